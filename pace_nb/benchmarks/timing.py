"""Timing that survives a noisy machine: interleaved repeats, best and median, contention reported.

Knows the clock and the machine's name. Knows no kernel.

A kernel and its limit are run in turn, again and again, so that both meet the same neighbours; the
share is the median over rounds of limit time / kernel time. `preemptions` counts how often the
scheduler took a CPU away during the rounds: shares from a run with many of them mean little.
"""

from __future__ import annotations

import platform
import resource
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


class Timed(NamedTuple):
    """Seconds of one of the interleaved runs."""

    best: float
    median: float
    rounds: list[float]


def interleave(
    runs: Mapping[str, Callable[[], object]], rounds: int = 11, cold: bool = False
) -> dict[str, Timed]:
    """Seconds of each run, all run once per round in the order given, after one unmeasured round.

    `cold` reads 128 MiB of other memory before each run, so that nothing is left in the caches.
    """
    scrub = np.ones(1 << 24, np.float64) if cold else None
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            if scrub is not None:
                scrub.sum()
            start = time.perf_counter()
            run()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {name: Timed(min(s), statistics.median(s), s) for name, s in seconds.items()}


def share(limit: Timed, measured: Timed, scale: float = 1.0) -> float:
    """Median over rounds of (time the limit needs for the same work) / (time measured)."""
    pairs = zip(limit.rounds, measured.rounds, strict=True)
    return statistics.median(scale * a / b for a, b in pairs)


def preemptions() -> int:
    """How often this process lost a CPU so far (involuntary context switches)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def machine(threads: int) -> dict[str, Any]:
    """What a reader must know of the machine to place a figure."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        fields = [line.split(":", 1) for line in cpuinfo.read_text().splitlines() if ":" in line]
        facts = {key.strip(): value.strip() for key, value in reversed(fields)}
        model = f"{facts.get('model name', model)} family {facts.get('cpu family', '?')}"
    return {"cpu": model, "threads": threads, "kernel": platform.release().split("-")[0]}
