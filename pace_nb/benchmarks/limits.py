"""A run beside the limit it is held against, as one row of a result: FLOPs, reading, or copying.

Knows the probes of `pace_nb.kernels.limits` and how rows look. Each row interleaves the run and its
probe in this process, so both meet the same neighbours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from pace_nb.benchmarks import timing
from pace_nb.kernels.arrays import Array
from pace_nb.kernels.limits import Probe, copy_probe, flop_probe, read_probes

Run = Callable[[], object]


def row(
    case: str,
    run: Run,
    amount: float,
    probe: Probe,
    unit: str,
    rounds: int,
    intensity: float | None = None,
) -> dict[str, Any]:
    """`run` does `amount` FLOPs or bytes; what share of the probe's rate it reaches.

    intensity: FLOPs per byte of the run, which gives it its place in a roofline plot.
    """
    t = timing.interleave({"run": run, "limit": probe.run}, rounds)
    found = {
        "case": case,
        "value": amount / t["run"].median / 1e9,
        "unit": unit,
        "limit": probe.amount / t["limit"].median / 1e9,
        "limit_unit": unit,
        "share": timing.share(t["limit"], t["run"], amount / probe.amount),
        "best": amount / t["run"].best / 1e9,
        "limit_best": probe.amount / t["limit"].best / 1e9,
    }
    return found if intensity is None else found | {"flops_per_byte": intensity}


def against_peak(
    case: str,
    run: Run,
    flops: float,
    dtype: DTypeLike = np.uint16,
    rounds: int = 11,
    moved: float | None = None,
) -> dict[str, Any]:
    """Share of the register peak of `dtype`'s dot products. moved: bytes, for the intensity."""
    intensity = flops / moved if moved else None
    return row(case, run, flops, flop_probe(dtype), "GFLOP/s", rounds, intensity)


def against_read(
    case: str,
    run: Run,
    moved: float,
    buffer: Array,
    rounds: int = 11,
    flops: float | None = None,
) -> dict[str, Any]:
    """Share of the rate at which `buffer` (1-D, what the run reads) can be read at all.

    The better of one and of four streams per thread is the limit; which it is, is measured first.
    flops: of the run, for the intensity.
    """
    probes = read_probes(buffer)
    t = timing.interleave({str(i): probe.run for i, probe in enumerate(probes)}, 5)
    best = min(range(len(probes)), key=lambda i: t[str(i)].median)
    intensity = None if flops is None else flops / moved
    return row(case, run, moved, probes[best], "GB/s", rounds, intensity)


def against_copy(
    case: str, run: Run, moved: float, rounds: int = 31, flops: float | None = None
) -> dict[str, Any]:
    """Share of the rate of a copy that reads and writes as many bytes as the run has to."""
    intensity = None if flops is None else flops / moved
    return row(case, run, moved, copy_probe(int(moved / 2)), "GB/s", rounds, intensity)
