"""words.py: the LLVM body of every operation against its NumPy body, bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numba import prange

from pace_nb.kernels import jit, words
from pace_nb.kernels.bf16 import as_f32, as_stored
from pace_nb.kernels.lanes import load, store
from pace_nb.kernels.words import (
    copy_word,
    dot_pairs,
    first_of_words,
    load_pairs,
    per_word,
    second_of_words,
    splat_pair,
    store_words,
)
from tests.kernels.bodies import (
    BF16,
    F32,
    TYPES,
    assert_bits,
    assert_last_place,
    both,
    stored,
    untested,
    values,
)


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
    kept = as_stored(first, np.dtype(dtype))
    np.testing.assert_array_equal(y[::s], kept)
    firsts, seconds = np.split(read[0], 2)
    np.testing.assert_array_equal(firsts, as_f32(kept))
    kept = as_stored(second, np.dtype(dtype)) if s == 2 else np.zeros(len(second), F32)
    np.testing.assert_array_equal(seconds, as_f32(kept))
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
    x, w = (as_f32(t).reshape(-1, 2) for t in (a, b))
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


def test_every_operation_is_tested_here() -> None:
    assert untested(words, __file__) == set()
