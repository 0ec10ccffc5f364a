"""How long things take, beside how long they would take at the limit of the machine.

Timing is `pace_nb.benchmarks.timing`: all runs of a table take turns, round after round, and so do
the probes of its limit, so that all meet the same neighbours. A rate is that of the median; a share
is the median over rounds of limit time / run time.

`PACE_NB_FAST=1`: each run and each probe is called once, and nothing else changes.
Knows: clocks, rates, tables. Does not know: any kernel but the probes of the limits.
"""

from __future__ import annotations

import math
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from nblib.show import Table, seconds_text
from pace_nb import __version__
from pace_nb.benchmarks import timing
from pace_nb.kernels import jit
from pace_nb.kernels.limits import (
    STREAMED,
    Probe,
    copy_probe,
    copy_rate,
    dram_read_rate,
    flop_peak,
    flop_probe,
    read_probes,
)

Amount = float | Mapping[str, float] | None

SHORTEST = 200e-6  # seconds: a shorter run is repeated within a round, so that the clock is exact
FEWEST, MOST = 3, 31  # rounds
STILL = 1.5  # times one thread's peak: what two threads of a machine with nothing else to do reach


def fast() -> bool:
    """PACE_NB_FAST: does everything but measure, for CI."""
    return os.environ.get("PACE_NB_FAST", "") not in ("", "0")


@contextmanager
def _threads(n: int | None) -> Iterator[int]:
    before = jit.num_threads()
    if n is not None:
        jit.set_num_threads(n)
    try:
        yield jit.num_threads()
    finally:
        jit.set_num_threads(before)


# ---- limits --------------------------------------------------------------------------------------
class Limit(NamedTuple):
    """What a run is held against: `unit` is "FLOP" or "B"; of the probes the fastest counts."""

    name: str
    unit: str
    probes: list[Probe]


def flop_limit(dtype: Any = np.uint16) -> Limit:
    """Dot products on registers: of BF16 pairs (uint16), or float32 multiply-adds."""
    name = "BF16 dot-product peak" if dtype == np.uint16 else "f32 multiply-add peak"
    return Limit(name, "FLOP", [flop_probe(dtype)])


def read_limit(buffer: np.ndarray[Any, Any]) -> Limit:
    """Reading this very buffer (1-D, uint16 or float32) once: a weight, a cache."""
    return Limit("rate of reading the same bytes", "B", read_probes(buffer))


def copy_limit(moved: float) -> Limit:
    """A copy that reads and writes `moved` bytes in all."""
    return Limit("rate of a copy as large", "B", [copy_probe(int(moved / 2))])


@dataclass(frozen=True)
class Limits:
    """This machine: FLOP/s of dot products, bytes/s of reading DRAM and of copying."""

    bf16: float
    f32: float
    read: float
    copy: float

    def __repr__(self) -> str:
        return (
            f"BF16 dot products {self.bf16 / 1e9:.0f} GFLOP/s, f32 {self.f32 / 1e9:.0f} GFLOP/s; "
            f"DRAM read {self.read / 1e9:.1f} GB/s, copy {self.copy / 1e9:.1f} GB/s"
        )


def limits(threads: int | None = None) -> Limits:
    """Measure the machine with so many threads (None: all): about a second.

    Where several threads compute hardly more than one does, a line says that the machine is busy.
    """
    repeats, size = (1, STREAMED // 16) if fast() else (7, STREAMED)
    buffer = np.ones(size // 4, np.float32)
    with _threads(threads) as used:
        found = Limits(
            flop_peak(np.uint16, repeats),
            flop_peak(np.float32, repeats),
            dram_read_rate(buffer, repeats),
            copy_rate(size // 2, repeats),
        )
    if used > 1 and not fast():
        with _threads(1):
            gain = found.f32 / flop_peak(np.float32, repeats)
        if gain < STILL:
            print(
                f"The machine is busy, or threads share a core: {used} threads compute {gain:.2f} "
                "times what one does. Figures of several threads mean little."
            )
    return found


@dataclass(frozen=True)
class Best:
    """The roofline's answer: no run is shorter than `seconds`, for its "FLOPs" or "bytes"."""

    seconds: float
    bound: str
    compute: float
    traffic: float

    def __repr__(self) -> str:
        return (
            f"at best {seconds_text(self.seconds)}, bound by {self.bound} "
            f"(arithmetic {seconds_text(self.compute)}, bytes {seconds_text(self.traffic)})"
        )


def best_time(flops: float, moved: float, peak: float, rate: float) -> Best:
    """Shortest possible time of `flops` at `peak` FLOP/s and `moved` bytes at `rate` bytes/s."""
    compute, traffic = flops / peak, moved / rate
    bound = "FLOPs" if compute >= traffic else "bytes"
    return Best(max(compute, traffic), bound, compute, traffic)


# ---- timing --------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Timing:
    """One row. Times are of one call, in seconds; rates are of the median; share is 0 to about 1.

    What was not asked for (no `flops`, no `moved`, no `limit`) is NaN.
    """

    name: str
    best: float
    median: float
    speedup: float  # against the first row
    flops: float
    moved: float
    share: float

    @property
    def gflops(self) -> float:
        """GFLOP/s."""
        return self.flops / self.median / 1e9

    @property
    def gbps(self) -> float:
        """GB/s."""
        return self.moved / self.median / 1e9

    @property
    def intensity(self) -> float:
        """FLOPs per byte."""
        return self.flops / self.moved


@dataclass(frozen=True, repr=False)
class Timings:
    """The rows of one `timeit`, by name; renders as a table. `limit_rate` is in FLOP/s or B/s."""

    rows: list[Timing]
    caption: str
    limit: str = ""
    limit_rate: float = math.nan

    def __getitem__(self, name: str) -> Timing:
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"{name!r}: expected one of {[row.name for row in self.rows]}")

    def __iter__(self) -> Iterator[Timing]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def table(self) -> Table:
        columns: list[tuple[str, Callable[[Timing], str]]] = [
            ("", lambda r: r.name),
            ("best", lambda r: seconds_text(r.best)),
            ("median", lambda r: seconds_text(r.median)),
        ]
        if len(self.rows) > 1:
            columns.append(("speed-up", lambda r: f"{r.speedup:.3g} x"))
        if any(not math.isnan(r.moved) for r in self.rows):
            columns.append(("GB/s", lambda r: _figure(r.gbps)))
        if any(not math.isnan(r.flops) for r in self.rows):
            columns.append(("GFLOP/s", lambda r: _figure(r.gflops)))
        if self.limit:
            columns.append(
                ("of limit", lambda r: "" if math.isnan(r.share) else f"{100 * r.share:.3g} %")
            )
        rows = [[value(row) for _, value in columns] for row in self.rows]
        return Table([header for header, _ in columns], rows, self.caption)

    def __repr__(self) -> str:
        return repr(self.table)

    def _repr_html_(self) -> str:
        return self.table._repr_html_()


def _figure(rate: float) -> str:
    return "" if math.isnan(rate) else f"{rate:.3g}" if rate < 1000 else f"{rate:.0f}"


def _amount(given: Amount, name: str) -> float:
    if given is None:
        return math.nan
    return float(given.get(name, math.nan) if isinstance(given, Mapping) else given)


def _repeated(run: Callable[[], object], calls: int) -> Callable[[], object]:
    def many() -> None:
        for _ in range(calls):
            run()

    return run if calls == 1 else many


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def timeit(
    runs: Mapping[str, Callable[[], object]],
    *,
    flops: Amount = None,
    moved: Amount = None,
    limit: Limit | None = None,
    cold: bool = False,
    threads: int | None = None,
    seconds: float = 1.5,
) -> Timings:
    """Time functions of no arguments against one another, and against a limit.

    runs: name -> function, the first is what the others' speed-up refers to. flops, moved: FLOPs
    and bytes of one call, for all or by name. cold: other memory is read before each call.
    threads: of compiled kernels. seconds: about how long all of it may take, apart from compiling;
    between 3 and 31 rounds.
    """
    if not runs:
        raise ValueError("timeit: runs is empty, expected name -> function")
    probes = {f"limit {i}": p for i, p in enumerate(limit.probes)} if limit else {}
    everything = dict(runs) | {name: probe.run for name, probe in probes.items()}
    with _threads(threads) as used:
        before = timing.preemptions()
        calls = dict.fromkeys(everything, 1)
        if fast():
            once = {name: _seconds(run) for name, run in everything.items()}
            timed = {name: timing.Timed(s, s, [s]) for name, s in once.items()}
        else:
            for run in everything.values():
                run()  # compiles, and warms
            first = {name: _seconds(run) for name, run in everything.items()}
            if not cold:
                calls |= {n: min(1000, math.ceil(SHORTEST / s)) for n, s in first.items()}
            total = sum(calls[name] * s for name, s in first.items())
            rounds = max(FEWEST, min(MOST, int(seconds / total)))
            repeated = {name: _repeated(run, calls[name]) for name, run in everything.items()}
            timed = timing.interleave(repeated, rounds, cold)
        preempted = timing.preemptions() - before
    rates = {
        name: probe.amount * calls[name] / timed[name].median for name, probe in probes.items()
    }
    fastest = max(rates, key=lambda name: rates[name]) if rates else ""
    rows, reference = [], timed[next(iter(runs))].median / calls[next(iter(runs))]
    for name in runs:
        t, n = timed[name], calls[name]
        row_flops, row_moved, share = _amount(flops, name), _amount(moved, name), math.nan
        if limit:
            amount = row_flops if limit.unit == "FLOP" else row_moved
            scale = amount * n / (probes[fastest].amount * calls[fastest])
            share = timing.share(timed[fastest], t, scale)
        median = t.median / n
        rows.append(
            Timing(name, t.best / n, median, reference / median, row_flops, row_moved, share)
        )
    rounds = len(timed[next(iter(runs))].rounds)
    kind = "cold" if cold else "warm"
    caption = (
        f"{used} thread{'s' * (used > 1)}, {kind}, {rounds} interleaved round{'s' * (rounds > 1)}"
    )
    if limit:
        per_second = "GFLOP/s" if limit.unit == "FLOP" else "GB/s"
        caption += f"; the limit is the {limit.name}: {rates[fastest] / 1e9:.3g} {per_second}"
    if preempted > 20 * rounds:
        caption += f"; the machine was busy ({preempted} preemptions)"
    return Timings(rows, caption, limit.name if limit else "", rates.get(fastest, math.nan))


# ---- the machine ---------------------------------------------------------------------------------
def environment(extra: Sequence[str] = ()) -> None:
    """Print what a reader must know of the machine and the versions to place the figures."""
    import llvmlite
    import numba

    facts = timing.machine(jit.num_threads())
    print(f"CPU       {facts['cpu']}, {facts['threads']} threads, Linux {facts['kernel']}")
    print(f"kernels   {jit.isa_path()}")
    print(
        f"versions  pace_nb {__version__}, Python {platform.python_version()}, "
        f"NumPy {np.__version__}, Numba {numba.__version__}, llvmlite {llvmlite.__version__}"
    )
    for line in extra:
        print(line)
    if fast():
        print("PACE_NB_FAST: everything is timed once, so no figure means anything")
