"""integer_lanes.py: weights against e^x and, bit for bit, their NumPy twin; sums; masks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numba import prange
from numpy.typing import NDArray

from pace_nb.kernels import jit
from pace_nb.kernels.integer_lanes import (
    ONE,
    add_weights,
    count_lanes,
    equal_lanes,
    fixed,
    lanes_above,
    lanes_from,
    lowest_lane,
    no_weights,
    store_weights,
    sum_weights,
    weight,
    weight_ref,
)
from pace_nb.kernels.lanes import load

Array = NDArray[Any]
POINTS = 16 * (300 if jit.INTERPRETED else 40_000)


@jit.kernel
def _weight_kernel(x, out, n):
    for i in prange(n):
        store_weights(out, 16 * i, weight(load(x, 16 * i)))


def weights(x: Array) -> Array:
    out = np.empty(len(x), np.int64)
    _weight_kernel(x, out, len(x) // 16)
    return out


def points() -> Array:
    rng = np.random.default_rng(0)
    even, near = np.linspace(-32, 0, POINTS // 2), -np.geomspace(1e-30, 1, POINTS // 4)
    far = -np.exp(rng.uniform(0, 88, POINTS // 4))
    x = np.concatenate((even, near, far)).astype(np.float32)
    x[:5] = [0, -0.0, -np.inf, -3e38, -27.8]
    return x


def test_weights_have_the_bits_of_their_numpy_twin() -> None:
    """On every CPU, with or without fma: this test runs for the generic one too."""
    x = points()
    np.testing.assert_array_equal(weights(x), weight_ref(x))


def test_weights_are_close_to_the_exponential() -> None:
    x = points()
    exact = np.exp(x.astype(np.float64))
    assert np.all(np.abs(weights(x) / ONE - exact) <= 2.0**-22 * exact + 2.0**-40)
    assert weights(x)[:5].tolist() == [ONE, ONE, 0, 0, 0]


@jit.kernel
def _sum_kernel(x, out, n):
    for _ in prange(1):
        total = no_weights()
        for i in range(0, n, 16):
            total = add_weights(total, fixed(load(x, i)))
        out[0] = sum_weights(total)


def test_sums_are_exact_beyond_what_floats_hold() -> None:
    x = np.full(160, 2.0**40, np.float32)
    x[::7] = 3
    out = np.zeros(1, np.int64)
    _sum_kernel(x, out, len(x))
    assert out[0] == sum(int(v) for v in x)


@jit.kernel
def _mask_kernel(a, b, out):
    for _ in prange(1):
        out[0] = equal_lanes(load(a, 0), load(b, 0))
        out[1] = lanes_from(load(a, 0), load(b, 0))
        out[2] = lanes_above(load(a, 0), load(b, 0))
        out[3] = count_lanes(out[1])
        out[4] = lowest_lane(out[2])


@pytest.mark.parametrize("seed", range(5))
def test_masks_say_where_a_comparison_holds(seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.integers(-2, 3, (2, 16)).astype(np.float32)
    a[3], b[5], a[7], b[7], a[8], b[8], a[9] = np.nan, np.nan, -0.0, 0.0, 3, 2, np.inf
    out = np.zeros(5, np.int64)
    _mask_kernel(a, b, out)
    for mask, holds in zip(out[:3].tolist(), (a == b, a >= b, a > b), strict=True):
        assert [bool(mask >> lane & 1) for lane in range(16)] == holds.tolist()
        assert mask < 1 << 16
    assert out[3] == (a >= b).sum()
    assert out[4] == (a > b).argmax()
