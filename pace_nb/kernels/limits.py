"""What this machine can do at most: the limits that kernels are measured against, in one process.

    flop_peak       dot products on registers only: no memory, no dependency that waits
    dram_read_rate  every byte of a buffer far larger than the caches, read once
    copy_rate       read one buffer, write another

| Array  | Shape | Type      | Layout                                |
|--------|-------|-----------|---------------------------------------|
| buffer | [n]   | BF16, f32 | contiguous; pages touched beforehand  |

Moves: flop_peak nothing, dram_read_rate n size bytes, copy_rate 2 n size bytes.
Does: flop_peak a dot product per vector of a tile a turn (BF16 64 FLOPs each, f32 32); the others
    none that count.
Error: `stream_sum` adds in f32, n 2^-24 relative; the rest are measurements, best of several,
    because noise only slows.
Cautions: DRAM's rate depends on the pages a buffer got and on how many streams a thread keeps, so
    the read rate is the best of one and of four streams. Quote ratios taken in one run.
Source: register peak as in BLIS's and likwid's peak kernels; McCalpin 1995 (STREAM).
Notebook: 00 where the time goes.
Ledger: limits.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numba import prange
from numpy.typing import DTypeLike

from pace_nb.kernels import jit
from pace_nb.kernels.arrays import STORAGE, Array, require
from pace_nb.kernels.bf16 import widen
from pace_nb.kernels.lanes import load, reduce_add, splat, store
from pace_nb.kernels.tiles import NV, tile_dot, tile_store, tile_zeros

TURNS = 1 << 18  # turns of one measurement, a tile of dot products each: about 1 ms
STREAMED = 1 << 28  # bytes that `dram_read_rate` reads by default: eight times a 32 MiB L3


def stream_sum_ref(buffer: Array) -> float:
    """What the read kernel computes, float64: the sum of the buffer (uint16 as BF16)."""
    return float(widen(buffer).sum())


@jit.device_fn
def _dot_turns(a, b, c, t, turns):
    acc = tile_zeros(6, NV)
    for _ in range(turns):
        acc = tile_dot(acc, a, 0, 0, b, 0, 64 // b.itemsize)  # they stay in registers
    tile_store(acc, c, t * 6 * 16 * NV, 16 * NV)


@jit.kernel
def _dot_turns_kernel(a, b, c, threads, turns):
    for t in prange(threads):  # one chain of turns per thread
        _dot_turns(a, b, c, t, turns)


@jit.device_fn
def _sum_streams(x, x0, n, streams):
    """Sum of x[x0 : x0 + n] read as 1 or 4 streams side by side; n a multiple of 256."""
    s0, s1, s2, s3 = splat(0.0), splat(0.0), splat(0.0), splat(0.0)
    if streams == 1:
        for i in range(x0, x0 + n, 64):
            s0, s1 = s0 + load(x, i), s1 + load(x, i + 16)
            s2, s3 = s2 + load(x, i + 32), s3 + load(x, i + 48)
    else:
        q = n // 4
        for i in range(x0, x0 + q, 64):
            for j in range(i, i + 64, 16):
                s0, s1 = s0 + load(x, j), s1 + load(x, j + q)
                s2, s3 = s2 + load(x, j + 2 * q), s3 + load(x, j + 3 * q)
    return reduce_add((s0 + s1) + (s2 + s3))


@jit.kernel
def _stream_sum_kernel(x, sums, threads, n, streams):
    for t in prange(threads):  # one contiguous share per thread
        sums[t] = _sum_streams(x, t * n, n, streams)


@jit.device_fn
def _copy_share(x, y, x0, n):
    for i in range(x0, x0 + n, 16):
        store(y, i, load(x, i))


@jit.kernel
def _copy_kernel(x, y, threads, n):
    for t in prange(threads):  # one contiguous share per thread
        _copy_share(x, y, t * n, n)


class Probe(NamedTuple):
    """Something to time: `run()` does `amount` FLOPs or bytes at the machine's limit."""

    run: Callable[[], object]
    amount: float


def flop_probe(dtype: DTypeLike = np.uint16) -> Probe:
    """Dot products on registers, all threads: BF16 (uint16) by vdpbf16ps, or float32 by fma.

    Where there is no vdpbf16ps a product of BF16 is two of float32, whose peak is then the answer.
    """
    if "avx512bf16" not in jit.cpu_features():
        dtype = np.float32
    threads = jit.num_threads()
    a, b = np.zeros(2, dtype), np.zeros(128, dtype)
    c = np.empty(threads * 6 * 16 * NV, np.float32)
    flops = threads * TURNS * 6 * NV * (64 if a.dtype == np.uint16 else 32)
    return Probe(lambda: _dot_turns_kernel(a, b, c, threads, TURNS), flops)


def read_probes(buffer: Array) -> list[Probe]:
    """Reading a 1-D buffer (uint16 or float32) once, with one and with four streams per thread."""
    threads = jit.num_threads()
    read = len(buffer) // threads // 256 * 256 * threads * buffer.itemsize
    return [Probe(lambda s=s: stream_sum(buffer, s), read) for s in (1, 4)]  # type: ignore[misc]


def copy_probe(num_bytes: int) -> Probe:
    """A copy of about `num_bytes` between two buffers, all threads; counts read plus written."""
    threads = jit.num_threads()
    share = max(num_bytes // 4 // threads // 16 * 16, 16)
    x, y = np.ones(share * threads, np.float32), np.zeros(share * threads, np.float32)
    return Probe(lambda: _copy_kernel(x, y, threads, share), 2 * x.nbytes)


def _rate(probe: Probe, repeats: int) -> float:
    probe.run()  # compiles, and wakes the threads
    best = np.inf
    for _ in range(repeats):
        start = time.perf_counter()
        probe.run()
        best = min(best, time.perf_counter() - start)
    return float(probe.amount / best)


def flop_peak(dtype: DTypeLike = np.uint16, repeats: int = 10) -> float:
    """FLOP/s of `flop_probe`, best of `repeats`."""
    return _rate(flop_probe(dtype), repeats)


def stream_sum(buffer: Array, streams: int = 1) -> float:
    """Sum of a 1-D buffer, every byte read once (to a multiple of 256 elements per thread).

    buffer [n] BF16 (uint16) or f32; streams 1 or 4 per thread; f32 partial sums.
    """
    require("stream_sum", "buffer", buffer, ("n",), STORAGE)
    if streams not in (1, 4):
        raise ValueError(f"stream_sum: streams is {streams}, expected 1 or 4")
    if jit.use_reference():
        return stream_sum_ref(buffer)
    threads = jit.num_threads()
    share = len(buffer) // threads // 256 * 256
    sums = np.empty(threads, np.float32)
    _stream_sum_kernel(np.ascontiguousarray(buffer), sums, threads, share, streams)
    return float(sums.sum())


def dram_read_rate(buffer: Array | None = None, repeats: int = 5) -> float:
    """Bytes per second that all threads together read from memory, best of `repeats` and patterns.

    `buffer` (1-D, uint16 or float32, far larger than L3) is the memory to read: the weights
    themselves if they are to be compared with. None makes one of 256 MiB.
    """
    if buffer is None:
        buffer = np.ones(STREAMED // 4, np.float32)
    return max(_rate(probe, repeats) for probe in read_probes(buffer))


def copy_rate(num_bytes: int, repeats: int = 10) -> float:
    """Bytes per second, read plus written, of `copy_probe`, best of `repeats`."""
    return _rate(copy_probe(num_bytes), repeats)
