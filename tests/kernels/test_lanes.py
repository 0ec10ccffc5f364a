"""lanes.py: the LLVM body of every operation against its NumPy body, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numba import prange

from pace_nb.kernels import jit, lanes
from pace_nb.kernels.bf16 import as_f32, as_stored
from pace_nb.kernels.lanes import (
    absolute,
    bits,
    fma,
    from_bits,
    interleave,
    iota,
    keep_lanes,
    load,
    load_tail,
    maximum,
    minimum,
    prefetch,
    prefetch_once,
    reduce_add,
    reduce_max,
    round_half_even,
    scale_pow2,
    select_above,
    splat,
    sqrt,
    store,
    store_operand,
    store_tail,
    swap_pairs,
)
from tests.kernels.bodies import (
    BF16,
    F32,
    FEATURES,
    SPECIAL,
    TYPES,
    Array,
    assert_bits,
    assert_last_place,
    assert_values,
    both,
    compiled_only,
    guarded,
    stored,
    untested,
    values,
)


# ---- vectors -------------------------------------------------------------------------------------
@jit.kernel
def _one_operand_kernel(y, x, n):
    for i in prange(n):
        v, at = load(x, 16 * i), 16 * i
        store(y, at, -v)
        store(y, at + 16 * n, absolute(v))
        store(y, at + 32 * n, sqrt(v))
        store(y, at + 48 * n, swap_pairs(v))
        store(y, at + 64 * n, from_bits(bits(v)))
        store(y, at + 80 * n, splat(reduce_add(v)))
        store(y, at + 96 * n, splat(reduce_max(v)))


@jit.kernel
def _operands_kernel(y, a, b, c, n):
    for i in prange(n):
        u, v, w, at = load(a, 16 * i), load(b, 16 * i), load(c, 16 * i), 16 * i
        store(y, at, maximum(u, v))
        store(y, at + 16 * n, minimum(u, v))
        store(y, at + 32 * n, select_above(u, v, w, u))
        store(y, at + 48 * n, interleave(u, v))
        store(y, at + 64 * n, u + v)
        store(y, at + 80 * n, u - v)
        store(y, at + 96 * n, u * v)
        store(y, at + 112 * n, u / v)
        store(y, at + 128 * n, fma(u, v, w))


def test_operations_with_one_operand() -> None:
    x = values(16 * 64)
    y, expected = (
        r.reshape(7, -1)
        for r in both(_one_operand_kernel, np.empty(7 * len(x), F32), x, len(x) // 16)
    )
    for k in (0, 1, 3, 4):  # moves and signs: NaN payloads too
        assert_bits(y[k], expected[k])
    for k in (2, 5, 6):
        assert_values(y[k], expected[k])


def test_operations_with_two_and_three_operands() -> None:
    a, b, c = (values(16 * 64, seed) for seed in range(3))
    b[::7] = a[::7]  # equal operands: 0 with -0 among them
    b[:32], c[:32] = -a[:32], a[:32]
    n = len(a) // 16
    y, expected = (
        r.reshape(9, -1) for r in both(_operands_kernel, np.empty(9 * len(a), F32), a, b, c, n)
    )
    for k in range(4):
        assert_bits(y[k], expected[k])
    for k in range(4, 8):
        assert_values(y[k], expected[k])
    with np.errstate(all="ignore"):
        product = np.abs(a.astype(float) * b)
        size = np.fmax(product, np.abs(c))
    fits = ~(np.isfinite(product) & (product > 3e38))  # without fma the product overflows first
    assert_last_place(y[8][fits], expected[8][fits], size[fits])


def test_what_the_comparisons_do_with_nan() -> None:
    nan, one = splat(np.nan), splat(1.0)
    assert np.isnan(maximum(one, nan)).all() and (maximum(nan, one) == 1.0).all()
    assert np.isnan(minimum(one, nan)).all() and (minimum(nan, one) == 1.0).all()
    assert (select_above(nan, one, one, -one) == -1.0).all()
    assert (select_above(one, nan, one, -one) == -1.0).all()


def test_shuffles_by_hand() -> None:
    a, b = np.arange(16, dtype=F32), np.arange(100, 116, dtype=F32)
    np.testing.assert_array_equal(interleave(a, b)[:6], [0, 100, 1, 101, 2, 102])
    np.testing.assert_array_equal(interleave(a, b)[-2:], [7, 107])
    np.testing.assert_array_equal(swap_pairs(a)[:6], [1, 0, 3, 2, 5, 4])
    np.testing.assert_array_equal(iota(), np.arange(16))


def test_reduce_add_has_one_order() -> None:
    """Halving: 1 + 2**-24 is lost in the first step here, and would not be in a running sum."""
    v = np.zeros(16, F32)
    v[0], v[8], v[1] = 1.0, 2.0**-24, 2.0**-24
    assert reduce_add(v) == 1.0
    v[[8, 9]] = 0.0, 2.0**-24
    assert reduce_add(v) == F32(1.0 + 2.0**-23)


@jit.kernel
def _numbers_kernel(y, v, n, count):
    for i in prange(count):
        at = 16 * i
        store(y, at, scale_pow2(load(v, at), load(n, at)))
        store(y, at + 16 * count, round_half_even(load(n, at)))
        store(y, at + 32 * count, splat(i))
        store(y, at + 48 * count, splat(0.1))


def test_powers_of_two_and_rounding() -> None:
    count = 400
    rng = np.random.default_rng(0)
    v = (rng.uniform(0.5, 4.0, 16 * count) * rng.choice([-1.0, 1.0], 16 * count)).astype(F32)
    n = rng.integers(-252, 255, 16 * count).astype(F32)
    n[:4], v[:3] = np.nan, [1.0, np.inf, np.nan]
    n[16:26] = [-150, -149, -126, 127, 128, 254, -252, 0, 1, -1]
    arguments = (v, n, count)
    y, expected = both(_numbers_kernel, np.empty(16 * 4 * count, F32), *arguments)
    assert_values(y, expected)
    n = np.concatenate((rng.uniform(-300, 300, 8 * count), np.arange(8 * count) / 2 - 1600))
    n = n.astype(F32)
    y, expected = both(_numbers_kernel, np.empty(16 * 4 * count, F32), v, n, count)
    rounded = slice(16 * count, 32 * count)  # values only: without SSE4.1 -0.3 rounds to +0
    np.testing.assert_array_equal(y[rounded], expected[rounded])
    np.testing.assert_array_equal(y[rounded], [round(t) for t in n.tolist()])


@jit.kernel
def _keep_lanes_kernel(y, a, b, low, high):
    for i in prange((high - low) * (high - low)):
        first, end = low + i // (high - low), low + i % (high - low)
        store(y, 16 * i, keep_lanes(load(a, 0), first, end, load(b, 0)))


def test_keep_lanes_with_any_bounds() -> None:
    a, b = SPECIAL[:16].copy(), SPECIAL[16:32].copy()
    size = 25 * 25
    y, expected = both(_keep_lanes_kernel, np.empty(16 * size, F32), a, b, -4, 21)
    assert_bits(y, expected)
    for low in (-(2**40), 2**40):  # far outside: 32 bits are not enough
        y, expected = both(_keep_lanes_kernel, np.empty(64, F32), a, b, low, low + 2)
        assert_bits(y, expected)
    assert (y[:16].view(np.uint32) == b.view(np.uint32)).all()


# ---- memory --------------------------------------------------------------------------------------
@jit.kernel
def _copy_kernel(y, x, count, step):
    """y = x, then for n = 0 .. 16 a tail of n lanes, and all lanes of such a tail."""
    tails, whole = 16 * count, 16 * count + 17 * step
    for i in prange(count + 17):
        if i < count:
            prefetch(x, 16 * i + 512)
            prefetch_once(x, 16 * i - 512)
            store(y, 16 * i, load(x, 16 * i))
        else:
            n = i - count
            store_tail(y, tails + n * step, load_tail(x, n * step, n), n)
            store(y, whole + 16 * n, load_tail(x, 3, n))


@pytest.mark.parametrize(("from_type", "to_type"), TYPES)
def test_memory_is_converted_and_tails_move_n_lanes(from_type: Any, to_type: Any) -> None:
    count, step = 32, 21
    x = stored(16 * count, from_type)
    before = stored(16 * count + 17 * (step + 16), to_type, seed=1)
    y, expected = both(_copy_kernel, before.copy(), x, count, step)
    assert_bits(y, expected)
    tails, whole = 16 * count, 16 * count + 17 * step
    for n in range(17):  # what lies behind the first n lanes is as it was, or 0
        behind = slice(tails + n * step + n, tails + (n + 1) * step)
        assert_bits(y[behind], before[behind])
        assert not y[whole + 16 * n + n : whole + 16 * (n + 1)].any()
    y = y[: len(x)]
    if from_type == to_type == F32:
        assert_bits(y, x)
    if to_type == BF16 and from_type == F32:
        with np.errstate(all="ignore"):
            by_ml_dtypes = x.astype(ml_dtypes.bfloat16).view(BF16)
        nan = np.isnan(x)
        np.testing.assert_array_equal(y[~nan], by_ml_dtypes[~nan])
        as_f32 = (y.astype(np.uint32) << 16).view(F32)
        np.testing.assert_array_equal(np.isnan(as_f32), nan)
        np.testing.assert_array_equal(np.signbit(as_f32), np.signbit(x))


@jit.kernel
def _operands_of_dots_kernel(y, x, n):
    for i in prange(n):
        store_operand(y, 16 * i, load(x, 16 * i))


@pytest.mark.parametrize("to_type", [F32, BF16])
def test_operands_are_stored_as_all_is_but_for_denormals(to_type: Any) -> None:
    x = stored(16 * 64, F32)
    y, expected = both(_operands_of_dots_kernel, np.zeros(len(x), to_type), x, 64)
    if to_type == F32:
        assert_bits(y, expected)
        return
    as_f32, wanted = ((b.astype(np.uint32) << 16).view(F32) for b in (y, expected))
    denormal = (np.abs(x) > 0) & (np.abs(x) < np.finfo(F32).tiny)
    assert denormal.any() and (~denormal).any()
    assert_values(as_f32[~denormal], wanted[~denormal])
    flushed = np.where(as_f32[denormal] == 0, 0, wanted[denormal])
    np.testing.assert_array_equal(as_f32[denormal], flushed)


@jit.kernel
def _tails_at_the_end_kernel(y, x, end):
    for n in prange(17):
        store_tail(y, end - n, load_tail(x, end - n, n), n)  # each n goes up to the guard


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs mprotect")
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_tails_do_not_touch_what_lies_behind(dtype: Any) -> None:
    """A read or write of one lane too many ends this process."""
    kept = [guarded(64, dtype) for _ in range(2)]
    x, y = kept[0][1], kept[1][1]
    x[:] = stored(64, dtype)
    threads = jit.num_threads()
    try:
        jit.set_num_threads(1)  # the lengths overlap in y, in any order with the same values
        _tails_at_the_end_kernel(y, x, 64)
        np.testing.assert_array_equal(y[48:], _quiet(x[48:]))
    finally:
        jit.set_num_threads(threads)


def _quiet(x: Array) -> Array:
    """BF16 goes through float32, where a signalling NaN becomes quiet."""
    return as_stored(as_f32(x), x.dtype)


# ---- machine code --------------------------------------------------------------------------------
@compiled_only
@pytest.mark.skipif(not {"fma", "avx512f"} & FEATURES, reason="the CPU has no fma")
def test_fma_rounds_once() -> None:
    a = np.full(16, 1.0 + 2.0**-12, F32)
    y = np.empty(9 * 16, F32)
    _operands_kernel(y, a, a, -(a * a), 1)
    assert (y[8 * 16 :] == 2.0**-24).all()


def test_every_operation_is_tested_here() -> None:
    assert untested(lanes, __file__) == set()
