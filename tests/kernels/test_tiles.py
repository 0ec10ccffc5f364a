"""tiles.py: the LLVM body of every operation against its NumPy body, and tiles in registers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numba import prange

from pace_nb.kernels import jit, tiles
from pace_nb.kernels.bf16 import as_f32
from pace_nb.kernels.lanes import store
from pace_nb.kernels.llvm_body import W
from pace_nb.kernels.tiles import (
    tile_dot,
    tile_dot_apart,
    tile_dot_pairs,
    tile_load,
    tile_load_tail,
    tile_row_maxima,
    tile_scale_rows,
    tile_store,
    tile_store_tail,
    tile_zeros,
)
from pace_nb.kernels.words import load_pairs, per_word
from tests.kernels.bodies import (
    BF16,
    F32,
    FEATURES,
    assert_bits,
    assert_last_place,
    both,
    compiled_only,
    guarded,
    stored,
    untested,
)


# ---- operations ----------------------------------------------------------------------------------
def tile_kernel(mr: int, nv: int) -> Any:
    """A kernel that puts a tile of this size through every operation."""
    n = nv * W

    @jit.kernel
    def _tile_kernel(y, bias, a, b, scales, steps, tail):
        for _ in prange(1):
            s = per_word(a)
            acc = tile_load(mr, nv, bias, 0, 0)  # one row in every row
            starts = (0, W * s, 2 * W * s, 3 * W * s)
            for p in range(0, steps, 2):
                acc = tile_dot(acc, a, p * s, steps * s, b, p * nv * W * s, W * s)
                acc = tile_dot_apart(
                    acc, a, (p + 1) * s, steps * s, b, starts, (p + 1) * nv * W * s
                )
            tile_store(acc, y, 0, n + 3)
            acc = tile_scale_rows(acc, scales, 1)
            tile_store_tail(acc, y, mr * (n + 3), n + 3, tail)
            tile_store(tile_zeros(mr, nv), y, 2 * mr * (n + 3), n + 3)
            acc = tile_load_tail(mr, nv, bias, 1, 5, tail)
            tile_store(acc, y, 3 * mr * (n + 3), n + 3)

    return _tile_kernel


# Sizes and types: float32, BF16, and BF16 stored too. 6 x 4 is what gemm uses.
TILES = [
    (6, 4, F32, F32),
    (6, 4, BF16, F32),
    (6, 4, BF16, BF16),
    (1, 4, F32, F32),
    (5, 3, BF16, F32),
]
tile_kernels = {size: tile_kernel(*size) for size in {t[:2] for t in TILES}}


@pytest.mark.parametrize(("mr", "nv", "dtype", "out_type"), TILES)
def test_tiles(mr: int, nv: int, dtype: Any, out_type: Any) -> None:
    rng = np.random.default_rng(mr)
    steps, n = 6, nv * W
    s = 4 // np.dtype(dtype).itemsize
    plain = {"bias": n + 5 * mr + 1, "a": mr * steps * s, "b": steps * s * n, "scales": mr + 1}
    given = {name: rng.standard_normal(size).astype(F32) for name, size in plain.items()}
    given["bias"][3] = np.inf
    if dtype == BF16:
        for name in ("a", "b"):
            given[name] = (given[name].view(np.uint32) >> 16).astype(BF16)
    for tail in (0, 1, 16, 17, n - 1, n):
        before = stored(4 * mr * (n + 3), out_type)
        y, expected = both(tile_kernels[mr, nv], before.copy(), *given.values(), steps, tail)
        padding = np.arange(len(y)) % (n + 3) >= n
        assert_bits(y[padding], before[padding])
        y, expected = (as_f32(t).reshape(4, mr, n + 3) for t in (y, expected))
        as_before = as_f32(before).reshape(y.shape)[1, :, tail:]
        np.testing.assert_array_equal(y[1, :, tail:], as_before)
        inside = (slice(None), slice(None), slice(0, n))
        size = 100.0 if out_type == F32 else 2.0**16 * 100  # of a sum of 13 terms; places of BF16
        for k, columns in ((0, n), (1, tail)):
            assert_last_place(y[k, :, :columns], expected[k, :, :columns], size)
        np.testing.assert_array_equal(y[inside][2:], expected[inside][2:])
        x, w = (as_f32(given[name]).astype(float) for name in ("a", "b"))
        exact = x.reshape(mr, steps * s) @ w.reshape(steps, n, s).swapaxes(1, 2).reshape(-1, n)
        exact += given["bias"][:n]
        np.testing.assert_allclose(
            y[0, :, :n], exact, atol=1e-5, rtol=1e-5 if out_type == F32 else 2.0**-8
        )


def maxima_kernel(mr: int, nv: int) -> Any:
    @jit.kernel
    def _maxima_kernel(y, x):
        for _ in prange(1):
            store(y, 0, tile_row_maxima(tile_load(mr, nv, x, 0, nv * W)))

    return _maxima_kernel


@pytest.mark.parametrize(("mr", "nv"), [(6, 4), (4, 4), (2, 1), (1, 4), (5, 3), (8, 2)])
def test_row_maxima_are_those_of_each_row_wherever_they_lie(mr: int, nv: int) -> None:
    kernel = maxima_kernel(mr, nv)
    x = -np.random.default_rng(0).random((mr, nv * W)).astype(F32)  # below the zeros of `y`
    x[0] = -np.inf
    for lane in range(nv * W):
        rows = np.arange(mr)
        x[rows, (lane + 5 * rows) % (nv * W)] = 1.0 + rows + lane
        y, expected = both(kernel, np.zeros(W, F32), x.reshape(-1))
        np.testing.assert_array_equal(y[:mr], x.max(axis=1))
        assert_bits(y, expected)


def widened_kernel(mr: int, nv: int, packed: bool) -> Any:
    @jit.kernel
    def _widened_kernel(y, a, b, steps):
        for _ in prange(1):
            s = per_word(b)
            acc = tile_zeros(mr, nv)
            for p in range(steps):
                at = p * nv * W * s
                if packed:
                    acc = tile_dot(acc, a, p * s * mr, 1, b, at, W * s, mr)
                else:
                    acc = tile_dot(acc, a, p * s, steps * s, b, at, W * s)
            tile_store(acc, y, 0, nv * W)

    return _widened_kernel


@pytest.mark.skipif(jit.WIDE and not jit.INTERPRETED, reason="there is vdpbf16ps, or may be")
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("mr", "nv"), [(6, 1), (4, 1), (2, 2), (1, 4), (3, 2)])
def test_a_tile_of_float32_and_pairs_is_that_of_pairs(mr: int, nv: int, packed: bool) -> None:
    rng, steps = np.random.default_rng(mr), 5
    a, b = (
        (rng.standard_normal(size).astype(F32).view(np.uint32) >> 16).astype(BF16)
        for size in ((mr, 2 * steps), steps * 2 * nv * W)
    )
    wide = as_f32(a.T if packed else a).copy().reshape(-1)
    kernel, y = widened_kernel(mr, nv, packed), np.empty(mr * nv * W, F32)
    y, expected = both(kernel, y, wide, b, steps)
    assert_last_place(y, expected, 32.0)
    if not packed:
        pairs, _ = both(kernel, y.copy(), a.reshape(-1), b, steps)
        assert_bits(y, pairs)
    exact = as_f32(a).astype(float) @ as_f32(b).astype(float).reshape(steps, nv * W, 2).swapaxes(
        1, 2
    ).reshape(2 * steps, nv * W)
    np.testing.assert_allclose(y.reshape(mr, -1), exact, rtol=1e-5, atol=1e-5)


@jit.kernel
def _tile_of_pairs_kernel(y, a, b, count):
    for i in prange(count):
        acc, at = tile_zeros(3, 4), 128 * i
        for p in range(2):
            b0, b1 = load_pairs(b, at), load_pairs(b, at + 32)
            b2, b3 = load_pairs(b, at + 64), load_pairs(b, at + 96)
            acc = tile_dot_pairs(acc, a, 2 * p, 4, b0, b1, b2, b3)
        tile_store(acc, y, 192 * i, 64)


@jit.kernel
def _tile_of_memory_kernel(y, a, b, count):
    for i in prange(count):
        acc, at = tile_zeros(3, 4), 128 * i
        for p in range(2):
            acc = tile_dot(acc, a, 2 * p, 4, b, at, 32)
        tile_store(acc, y, 192 * i, 64)


def test_a_tile_of_pairs_in_registers_is_the_tile_of_memory() -> None:
    rng = np.random.default_rng(0)
    a, b = (
        (rng.standard_normal(size).astype(F32).view(np.uint32) >> 16).astype(BF16)
        for size in (12, 128 * 5)
    )
    y, z = np.empty(192 * 5, F32), np.empty(192 * 5, F32)
    _tile_of_pairs_kernel(y, a, b, 5)
    _tile_of_memory_kernel(z, a, b, 5)
    assert_bits(y, z)
    y, expected = both(_tile_of_pairs_kernel, y, a, b, 5)
    assert_last_place(y, expected, 32.0)


@jit.kernel
def _tile_tails_at_the_end_kernel(y, x, end):
    for n in prange(65):
        tile_store_tail(tile_load_tail(1, 4, x, end - n, 0, n), y, end - n, 0, n)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs mprotect")
def test_tails_do_not_touch_what_lies_behind() -> None:
    """A read or write of one lane too many ends this process."""
    kept = [guarded(64, F32) for _ in range(2)]
    x, y = kept[0][1], kept[1][1]
    x[:] = stored(64, F32)
    threads = jit.num_threads()
    try:
        jit.set_num_threads(1)  # the lengths overlap in y, in any order with the same values
        _tile_tails_at_the_end_kernel(y, x, 64)
        assert_bits(y, x)
    finally:
        jit.set_num_threads(threads)


# ---- machine code --------------------------------------------------------------------------------
def spills(assembly: str) -> int:
    """512-bit registers saved on the stack."""
    return len(re.findall(r"vmov\w+\s+%zmm\d+, -?\d*\(%r[sb]p", assembly))


def dot_loop(mr: int, nv: int) -> Any:
    @jit.kernel
    def _dot_loop_kernel(c, a, b, steps, count):
        for t in prange(count):
            acc = tile_zeros(mr, nv)
            for p in range(steps):
                acc = tile_dot(acc, a, p * 2 * mr, 2, b, p * 2 * W * nv, 2 * W)
            tile_store(acc, c, t * mr * nv * W, nv * W)

    c, a, b = np.zeros(mr * nv * W, F32), np.zeros(6 * mr, BF16), np.zeros(6 * W * nv, BF16)
    _dot_loop_kernel(c, a, b, 3, 1)
    return _dot_loop_kernel


@compiled_only
@pytest.mark.skipif("avx512bf16" not in FEATURES, reason="the CPU has no vdpbf16ps")
def test_a_tile_stays_in_registers() -> None:
    assembly = jit.assembly(dot_loop(6, 4))
    assert assembly.count("vdpbf16ps") >= 24
    assert "%zmm" in assembly
    assert spills(assembly) == 0
    assert spills(jit.assembly(dot_loop(8, 4))) > 0  # 32 accumulators leave none for B: it is seen


@compiled_only
@pytest.mark.skipif("avx512bf16" in FEATURES, reason="about CPUs without it")
def test_without_avx512bf16_there_is_no_instruction_of_it() -> None:
    assert "vdpbf16ps" not in jit.assembly(dot_loop(2, 2))
    assert "avx512bf16" in jit.isa_path()


def test_every_operation_is_tested_here() -> None:
    assert untested(tiles, __file__) == set()
