"""lanes.py: the LLVM body of every operation against its NumPy body, bit for bit.

Each kernel here runs twice, compiled and as the plain Python function it was written as; what the
NumPy bodies mean is tested on values written out by hand. `fma` and dot products may differ in the
last place (NumPy rounds twice).
"""

from __future__ import annotations

import ctypes
import inspect
import mmap
import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numba import prange
from numpy.typing import NDArray

from pace_nb.kernels import jit, lanes
from pace_nb.kernels.lanes import (
    W,
    absolute,
    bits,
    copy_word,
    dot_pairs,
    first_of_words,
    fma,
    from_bits,
    interleave,
    iota,
    keep_lanes,
    load,
    load_pairs,
    load_tail,
    maximum,
    minimum,
    mxfp4_exponents,
    mxfp4_pairs,
    per_word,
    prefetch,
    prefetch_once,
    reduce_add,
    reduce_max,
    round_half_even,
    scale_pow2,
    second_of_words,
    select_above,
    splat,
    splat_pair,
    sqrt,
    store,
    store_operand,
    store_tail,
    store_words,
    swap_pairs,
    tile_dot,
    tile_dot_apart,
    tile_dot_pairs,
    tile_load,
    tile_load_tail,
    tile_scale_rows,
    tile_store,
    tile_store_tail,
    tile_zeros,
)

Array = NDArray[Any]
F32, BF16 = np.float32, np.uint16
FEATURES = jit.cpu_features()
compiled_only = pytest.mark.skipif(jit.INTERPRETED, reason="about machine code")

SPECIAL = np.array(
    [
        *(0x00000000, 0x80000000, 0x3F800000, 0xBF800000),  # 0, -0, 1, -1
        *(0x7F800000, 0xFF800000, 0x7F7FFFFF, 0xFF7FFFFF),  # infinities, largest
        *(0x7FC00000, 0xFFC00000, 0x7FC12345, 0xFFFFFFFF),  # quiet NaNs with payloads
        *(0x7F800001, 0xFFA00001, 0x7F812345, 0x7F80FFFF),  # signalling NaNs
        *(0x00000001, 0x807FFFFF, 0x00800000, 0x00400000),  # denormals, smallest normal
        *(0x3F000000, 0x3FC00000, 0xC0200000, 0x40600000),  # halves: 0.5, 1.5, -2.5, 3.5
        *(0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF),  # ties of BF16, and beside them
        *(0x7F7F8000, 0x7F7F7FFF, 0x00008000, 0x00018000),  # rounding to infinity; denormal ties
    ],
    np.uint32,
).view(F32)


def values(n: int, seed: int = 0) -> Array:
    """n float32: the special ones, any bits at all, and numbers about 1."""
    rng = np.random.default_rng(seed)
    any_bits = rng.integers(0, 2**32, n, np.uint32).view(F32)
    about_one = rng.standard_normal(n).astype(F32)
    mixed = np.where(rng.random(n) < 0.5, any_bits, about_one)
    where = rng.permutation(n)[: min(n, len(SPECIAL))]
    mixed[where] = SPECIAL[: len(where)]
    return mixed


def stored(n: int, dtype: Any, seed: int = 0) -> Array:
    x = values(n, seed)
    return x if dtype == F32 else (x.view(np.uint32) >> 16).astype(BF16)


def both(kernel: Any, out: Array, *arguments: Any) -> tuple[Array, Array]:
    """What `kernel(out, ...)` leaves in out: compiled, and from the NumPy bodies."""
    by_numpy = out.copy()
    kernel(out, *arguments)
    with np.errstate(all="ignore"):
        getattr(kernel, "py_func", kernel)(by_numpy, *arguments)
    return out, by_numpy


def assert_bits(compiled: Array, by_numpy: Array) -> None:
    same = compiled.view(np.uint8) == by_numpy.view(np.uint8)
    assert same.all(), f"{(~same).sum()} bytes differ"


def assert_values(compiled: Array, by_numpy: Array) -> None:
    """Bit for bit, but any NaN for a NaN: arithmetic may give either operand's payload."""
    nan = np.isnan(by_numpy)
    np.testing.assert_array_equal(np.isnan(compiled), nan)
    np.testing.assert_array_equal(compiled[~nan].view(np.uint32), by_numpy[~nan].view(np.uint32))


def assert_last_place(compiled: Array, by_numpy: Array, size: Array | float = 0.0) -> None:
    """Within one place of the result, or of `size` (of the terms that were added)."""
    finite = np.isfinite(by_numpy) & np.isfinite(compiled)
    with np.errstate(invalid="ignore"):
        place = np.spacing(np.minimum(np.fmax(np.abs(by_numpy), size), 1e38).astype(F32))
        assert np.all(np.abs(compiled - by_numpy)[finite] <= place[finite])
    np.testing.assert_array_equal(np.isnan(compiled), np.isnan(by_numpy))


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


TYPES = [(F32, F32), (F32, BF16), (BF16, F32), (BF16, BF16)]


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


def guarded(elements: int, dtype: Any) -> tuple[mmap.mmap, Array]:
    """An array that ends where a page begins that may not be touched."""
    page = mmap.PAGESIZE
    memory = mmap.mmap(-1, 2 * page)
    whole = np.frombuffer(memory, np.uint8)
    libc = ctypes.CDLL(None, use_errno=True)
    address = ctypes.c_void_p(whole.ctypes.data + page)
    if libc.mprotect(address, ctypes.c_size_t(page), 0) != 0:  # 0 = PROT_NONE
        raise OSError(ctypes.get_errno(), "mprotect")
    size = elements * np.dtype(dtype).itemsize
    return memory, whole[page - size : page].view(dtype)


@jit.kernel
def _tails_at_the_end_kernel(y, x, end):
    for n in prange(17):
        store_tail(y, end - n, load_tail(x, end - n, n), n)  # each n goes up to the guard


@jit.kernel
def _tile_tails_at_the_end_kernel(y, x, end):
    for n in prange(65):
        tile_store_tail(tile_load_tail(1, 4, x, end - n, 0, n), y, end - n, 0, n)


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
        if dtype == F32:
            _tile_tails_at_the_end_kernel(y, x, 64)
            assert_bits(y, x)
    finally:
        jit.set_num_threads(threads)


def _quiet(x: Array) -> Array:
    """BF16 goes through float32, where a signalling NaN becomes quiet."""
    return lanes._as_stored(lanes._as_f32(x), x.dtype)


# ---- words and pairs -----------------------------------------------------------------------------
@jit.kernel
def _copy_words_kernel(to, x, count, s):
    for i in prange(count):
        copy_word(to, 3 * s * i, x, s * i)


@jit.kernel
def _words_kernel(y, x, first, second, count):
    for i in prange(count):
        at = 16 * per_word(y) * i
        store_words(y, at, load(first, 16 * i), load(second, 16 * i))
        store(x, 16 * i, first_of_words(y, at))
        store(x, 16 * (count + i), second_of_words(y, at))


@pytest.mark.parametrize(("from_type", "to_type"), TYPES)
def test_copy_word_moves_one_word(from_type: Any, to_type: Any) -> None:
    s = 2 if to_type == BF16 else 1
    x = stored(s * 300, from_type)
    before = stored(3 * len(x), to_type, seed=1)
    y, expected = both(_copy_words_kernel, before.copy(), x, 300, s)
    assert_bits(y, expected)
    untouched = np.arange(len(y)) // s % 3 != 0
    np.testing.assert_array_equal(y[untouched].view(BF16), before[untouched].view(BF16))
    if from_type == to_type:  # a move: signalling NaNs stay what they are
        assert_bits(y[~untouched], x)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_words_hold_a_pair_of_bf16_or_one_float(dtype: Any) -> None:
    first, second = values(16 * 40), values(16 * 40, seed=1)
    s = 4 // np.dtype(dtype).itemsize
    assert per_word(np.zeros(1, dtype)) == s
    read = [np.ones(2 * len(first), F32) for _ in range(2)]
    y, expected = np.zeros(s * len(first), dtype), np.zeros(s * len(first), dtype)
    _words_kernel(y, read[0], first, second, 40)
    getattr(_words_kernel, "py_func", _words_kernel)(expected, read[1], first, second, 40)
    assert_bits(y, expected)
    assert_bits(*read)
    kept = lanes._as_stored(first, np.dtype(dtype))
    np.testing.assert_array_equal(y[::s], kept)
    firsts, seconds = np.split(read[0], 2)
    np.testing.assert_array_equal(firsts, lanes._as_f32(kept))
    kept = lanes._as_stored(second, np.dtype(dtype)) if s == 2 else np.zeros(len(second), F32)
    np.testing.assert_array_equal(seconds, lanes._as_f32(kept))
    if s == 2:
        np.testing.assert_array_equal(y[1::2], kept)


@jit.kernel
def _dot_kernel(y, acc, a, b, count):
    for i in prange(count):
        v = dot_pairs(load(acc, 16 * i), load_pairs(a, 32 * i), load_pairs(b, 32 * i))
        store(y, 16 * i, v)
        v = dot_pairs(load(acc, 16 * i), splat_pair(a, 32 * i + 2), load_pairs(b, 32 * i))
        store(y, 16 * (i + count), v)


def test_dot_pairs_is_within_the_last_place() -> None:
    rng = np.random.default_rng(0)
    count = 200
    a, b = (
        (rng.standard_normal(32 * count).astype(F32).view(np.uint32) >> 16).astype(BF16)
        for _ in range(2)
    )
    acc = rng.standard_normal(16 * count).astype(F32)
    y, expected = both(_dot_kernel, np.empty(2 * len(acc), F32), acc, a, b, count)
    x, w = (lanes._as_f32(t).reshape(-1, 2) for t in (a, b))
    size = np.abs(acc) + np.abs(x * w).sum(-1)
    assert_last_place(y[: len(acc)], expected[: len(acc)], 2 * size)
    assert_last_place(y[len(acc) :], expected[len(acc) :], 64.0)
    # The odd element goes first: 2**24 + 1 is lost, but 1 - 2**24 + 2**24 is not.
    pairs = np.zeros(32, BF16)
    pairs[0], pairs[1] = 0x4B80, 0x3F80  # 2**24, 1
    ones = np.full(32, 0x3F80, BF16)
    y, expected = both(_dot_kernel, np.empty(32, F32), np.full(16, -(2.0**24), F32), pairs, ones, 1)
    assert y[0] == expected[0] == 1.0
    y, expected = both(_dot_kernel, np.empty(32, F32), np.full(16, 2.0**24, F32), pairs, ones, 1)
    assert y[0] == expected[0] == 2.0**25


def test_dot_pairs_keeps_nan_and_infinity_in_their_lane() -> None:
    a, b = np.full(32, 0x3F80, BF16), np.full(32, 0x3F80, BF16)
    a[4], a[7], a[8], b[8] = 0x7FC0, 0x7F80, 0x7F80, 0  # NaN, infinity, infinity times 0
    y, expected = both(_dot_kernel, np.empty(32, F32), np.ones(16, F32), a, b, 1)
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_array_equal(y[:6], [3, 3, np.nan, np.inf, np.nan, 3])


# ---- MXFP4 ---------------------------------------------------------------------------------------
@jit.kernel
def _mxfp4_kernel(y, codes, scales, ones, count):
    for i in prange(count):
        pairs = mxfp4_pairs(codes, 16 * i, mxfp4_exponents(scales, 16 * i))
        for half in range(2):  # 1 times one half of each pair, 0 times the other
            at = 16 * (2 * i + half)
            store(y, at, dot_pairs(splat(0.0), pairs, load_pairs(ones, 32 * half)))


def test_mxfp4_expands_every_code_at_every_scale() -> None:
    scales = np.repeat(np.arange(2, 253, dtype=np.uint8), 16)
    codes = np.resize(np.arange(256, dtype=np.uint8) * 17, len(scales))
    codes[::2] = np.roll(codes, 5)[::2] ^ 0x5A
    ones = np.zeros(64, BF16)
    ones[0:32:2] = ones[33::2] = 0x3F80
    count = len(scales) // 16
    y, expected = both(_mxfp4_kernel, np.empty(32 * count, F32), codes, scales, ones, count)
    magnitudes = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    table = np.concatenate((magnitudes, -magnitudes))
    exact = np.stack((table[codes & 15], table[codes >> 4])).reshape(2, count, 16)
    exact = exact.swapaxes(0, 1) * 2.0 ** (scales.reshape(count, 1, 16) - 127.0)
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_array_equal(y.reshape(exact.shape), exact.astype(F32))


# ---- register tiles ------------------------------------------------------------------------------
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
        y, expected = (lanes._as_f32(t).reshape(4, mr, n + 3) for t in (y, expected))
        as_before = lanes._as_f32(before).reshape(y.shape)[1, :, tail:]
        np.testing.assert_array_equal(y[1, :, tail:], as_before)
        inside = (slice(None), slice(None), slice(0, n))
        size = 100.0 if out_type == F32 else 2.0**16 * 100  # of a sum of 13 terms; places of BF16
        for k, columns in ((0, n), (1, tail)):
            assert_last_place(y[k, :, :columns], expected[k, :, :columns], size)
        np.testing.assert_array_equal(y[inside][2:], expected[inside][2:])
        x, w = (lanes._as_f32(given[name]).astype(float) for name in ("a", "b"))
        exact = x.reshape(mr, steps * s) @ w.reshape(steps, n, s).swapaxes(1, 2).reshape(-1, n)
        exact += given["bias"][:n]
        np.testing.assert_allclose(
            y[0, :, :n], exact, atol=1e-5, rtol=1e-5 if out_type == F32 else 2.0**-8
        )


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


# ---- machine code --------------------------------------------------------------------------------
@compiled_only
@pytest.mark.skipif(not {"fma", "avx512f"} & FEATURES, reason="the CPU has no fma")
def test_fma_rounds_once() -> None:
    a = np.full(16, 1.0 + 2.0**-12, F32)
    y = np.empty(9 * 16, F32)
    _operands_kernel(y, a, a, -(a * a), 1)
    assert (y[8 * 16 :] == 2.0**-24).all()


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
    operations = {
        name
        for name, f in inspect.getmembers(lanes, inspect.isfunction)
        if f.__module__ == lanes.__name__ and not name.startswith("_")
    } - {"llvm_body"}
    source = Path(__file__).read_text().split('"""', 2)[2]
    body = source[source.index("\n# ---- vectors") :]
    assert {name for name in operations if f"{name}(" not in body} == set()
