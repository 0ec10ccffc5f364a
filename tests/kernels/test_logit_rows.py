"""logit_rows.py: the largest, bounds, thresholds, sums and ranks of one row, by definition."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numba import prange
from numpy.typing import NDArray

from pace_nb.kernels import jit
from pace_nb.kernels.logit_rows import (
    BLOCK,
    DIGITS,
    collect,
    key_at,
    kth_peak,
    largest_of,
    num_peaks,
    order_ref,
    rank_of,
    row_weights_ref,
    scaled_ref,
    threshold,
    weigh,
    weigh_row,
)

Array = NDArray[Any]
SIZES = [1, 15, 16, 17, 64, 781, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 70]


@jit.kernel
def _largest_kernel(x, x0, v, peaks, out):
    for _ in prange(1):
        largest, position = largest_of(x, x0, v, peaks)
        out[0], out[1] = largest, position


def largest(x: Array, x0: int = 0, v: int | None = None) -> tuple[float, int, Array]:
    v = len(x) if v is None else v
    peaks, out = np.empty(num_peaks(v), np.float32), np.zeros(2)
    _largest_kernel(x, x0, v, peaks, out)
    return out[0], int(out[1]), peaks


def logits(v: int, step: float = 0.0) -> Array:
    x = np.random.default_rng(v).normal(0, 3, v).astype(np.float32)
    return (np.round(x / step) * step).astype(np.float32) if step else x


@pytest.mark.parametrize("v", SIZES)
def test_the_largest_and_its_first_position(v: int) -> None:
    for step in (0.0, 1.0):
        x = logits(v, step)
        found, position, peaks = largest(x)
        assert (found, position) == (x.max(), x.argmax())
        padded = np.full(len(peaks) // 16 * BLOCK, -np.inf, np.float32)
        padded[:v] = x
        np.testing.assert_array_equal(peaks, padded.reshape(-1, BLOCK // 16, 16).max(1).ravel())


def test_what_lies_around_the_row_does_not_count() -> None:
    x = np.full(300, np.nan, np.float32)
    x[37:200] = logits(163)
    found, position, _ = largest(x, 37, 163)
    assert (found, position) == (x[37:200].max(), x[37:200].argmax())


@pytest.mark.parametrize("v", [1, 17, 781, BLOCK + 1])
def test_a_nan_anywhere_is_found_and_infinities_are_not_taken_for_one(v: int) -> None:
    for position in {0, v // 2, v - 1}:
        x = logits(v)
        x[position] = np.nan
        assert np.isnan(largest(x)[0]) and largest(x)[1] == -1
        x[position] = -np.inf
        assert largest(x)[0] == x.max()
        x[position] = np.inf
        assert largest(x)[:2] == (np.inf, position)
    assert largest(np.full(v, -np.inf, np.float32))[0] == -np.inf


def test_zeros_of_either_sign_tie() -> None:
    x = np.float32([-1, -0.0, 0.0, -0.0])
    assert largest(x)[1] == 1
    assert largest(x[[0, 2, 1]].copy())[1] == 1


@jit.kernel
def _keys_kernel(x, out):
    for i in prange(len(x)):
        out[i] = key_at(x.view(np.int32), i)


def test_keys_are_in_the_order_of_their_floats() -> None:
    x = np.float32([-np.inf, -3e38, -1, -1e-45, -0.0, 0.0, 1e-45, 1e-38, 1, 3e38, np.inf])
    keys = np.empty(len(x), np.int64)
    _keys_kernel(x, keys)
    assert keys[4] == keys[5]
    assert (np.diff(np.delete(keys, 4)) > 0).all()
    assert keys.min() >= 0 and keys.max() < 2**32


@jit.kernel
def _threshold_kernel(x, shares, step, needed, bins, out):
    for _ in prange(1):
        key, above = threshold(x, len(x), shares, step, needed, bins)
        kept = 0
        for i in range(len(x)):
            if key_at(x.view(np.int32), i) >= key:
                kept += 1
        out[0], out[1] = kept, above


@pytest.mark.parametrize("v", [1, 16, 781])
@pytest.mark.parametrize("step", [0.0, 1.0])
def test_a_threshold_is_where_the_sum_is_reached(v: int, step: float) -> None:
    x = logits(v, step)
    weights = np.random.default_rng(1).integers(0, 2**40, v)
    for shares, stride in ((weights, 1), (np.ones(1, np.int64), 0)):
        each = shares if stride else np.ones(v, np.int64)
        order = order_ref(x)
        reached = np.cumsum(each[order])
        for needed in {1, int(reached[-1]) // 3 + 1, int(reached[-1])}:
            last = x[order[int(np.searchsorted(reached, needed))]]
            out = np.zeros(2, np.int64)
            _threshold_kernel(x, shares, stride, needed, np.zeros(DIGITS, np.int64), out)
            assert out[0] == (x >= last).sum()
            assert out[1] == each[x > last].sum()


@jit.kernel
def _row_kernel(x, v, k, bound, floor, temperature, peaks, sums, values, ids, shares, bins, out):
    for _ in prange(1):
        top, _first = largest_of(x, 0, v, peaks)
        n = collect(x, 0, v, peaks, top, temperature, bound, floor, values, ids)
        weigh(values, n, top, temperature, shares)
        out[0] = n
        out[1] = weigh_row(x, 0, v, top, temperature, sums)
        out[2] = rank_of(x, 0, v, k)
        out[3] = kth_peak(peaks, len(peaks), k + 1, bins[DIGITS:], bins)


@pytest.mark.parametrize("v", SIZES)
@pytest.mark.parametrize("step", [0.0, 1.0])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_rows_by_definition(v: int, step: float, temperature: float) -> None:
    x, t = logits(v, step), np.float32(temperature)
    values, ids = np.empty(v + 16, np.float32), np.empty(v + 16, np.int32)
    shares, sums = np.empty(v + 16, np.int64), np.empty(num_peaks(v) // 16, np.int64)
    peaks = np.empty(num_peaks(v), np.float32)
    weights, scaled = row_weights_ref(x, temperature), scaled_ref(x, temperature)
    order = order_ref(x).tolist()
    for k, bound, floor in ((0, -np.inf, -np.inf), (v // 2, 0.0, -5.0), (v - 1, -1.0, -np.inf)):
        out = np.zeros(4)
        bounds = np.float32(bound), np.float32(floor)
        bins = np.ones(DIGITS + 1, np.int64)
        _row_kernel(x, v, k, *bounds, t, peaks, sums, values, ids, shares, bins, out)
        kept = np.flatnonzero((x >= bounds[0]) & (scaled >= bounds[1]))
        n = int(out[0])
        assert ids[:n].tolist() == kept.tolist()
        assert values[:n].tolist() == x[kept].tolist()
        assert shares[:n].tolist() == weights[kept].tolist()
        assert int(out[1]) == sums[-1] == weights.sum()
        assert sums.tolist() == [weights[: end + BLOCK].sum() for end in range(0, v, BLOCK)]
        assert out[2] == 1 + order.index(k)
        assert (x >= out[3]).sum() >= k + 1  # at least k + 1 logits reach the (k + 1)-th peak


def test_a_peak_bounds_tightly_where_there_are_many() -> None:
    """The 50th largest peak of a large vocabulary leaves few logits more than 50."""
    v = BLOCK * 40
    x = np.random.default_rng(0).normal(0, 3, v).astype(np.float32)
    values, ids = np.empty(v + 16, np.float32), np.empty(v + 16, np.int32)
    shares, sums, out = np.empty(v + 16, np.int64), np.empty(40, np.int64), np.zeros(4)
    peaks, f = np.empty(num_peaks(v), np.float32), np.float32
    bins = np.ones(DIGITS + 1, np.int64)
    _row_kernel(x, v, 49, f(np.inf), f(0), f(1), peaks, sums, values, ids, shares, bins, out)
    assert 50 <= (x >= out[3]).sum() <= 75
