"""exp.py: bounds over the whole range, and the values that must be exact."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from numba import prange
from numpy.typing import NDArray

from pace_nb.kernels import exp, jit
from pace_nb.kernels.exp import (
    exp2,
    exp2_ref,
    exp_ref,
    normal_cdf,
    normal_cdf_ref,
    sigmoid,
    sigmoid_ref,
)
from pace_nb.kernels.lanes import load, store

Array = NDArray[Any]
exp_lanes = exp.exp  # the module has the name that its function has
# Without fused multiply-add two roundings take the place of one.
FUSED = jit.INTERPRETED or bool({"fma", "avx512f"} & jit.cpu_features())
POINTS = 16 * (500 if jit.INTERPRETED else 60_000)


@jit.kernel
def _apply_kernel(x, y, n, which):
    for i in prange(n):
        v = load(x, 16 * i)
        if which == 0:
            store(y, 16 * i, exp_lanes(v))
        elif which == 1:
            store(y, 16 * i, sigmoid(v))
        elif which == 3:
            store(y, 16 * i, exp2(v))
        else:
            store(y, 16 * i, normal_cdf(v))


def apply(which: int, x: Any) -> Array:
    x = np.asarray(x, np.float32)
    padded = np.zeros(-(-len(x) // 16) * 16, np.float32)
    padded[: len(x)] = x
    y = np.empty_like(padded)
    _apply_kernel(padded, y, len(padded) // 16, which)
    return y[: len(x)]


def ulps(y: Array, ref: Array) -> Array:
    """Distance in units of the float32 grid at the exact value."""
    return np.abs(y - ref) / np.spacing(np.abs(ref).astype(np.float32)).astype(float)


def inputs(low: float, high: float) -> Array:
    """Evenly spaced, and dense around zero."""
    even = np.linspace(low, high, POINTS // 2)
    near = np.geomspace(1e-30, min(-low, high), POINTS // 4)
    return np.concatenate((even, near, -near)).astype(np.float32)


def test_exp_is_within_one_ulp() -> None:
    x = inputs(-103.9, 88.72)
    assert ulps(apply(0, x), exp_ref(x)).max() <= (1.0 if FUSED else 1.5)


def test_exp_of_special_values() -> None:
    nan, inf = math.nan, math.inf
    given = [0.0, -0.0, -inf, inf, nan, -nan, -104.0, -1e30, 88.73, 1e30, 1e-45]
    expected = [1.0, 1.0, 0.0, inf, nan, nan, 0.0, 0.0, inf, inf, 1.0]
    np.testing.assert_array_equal(apply(0, given), np.float32(expected))
    assert not np.signbit(apply(0, [-inf, -200.0])).any()


def test_exp_overflows_and_vanishes_where_it_should() -> None:
    """The last finite result, the first infinity; the last denormal, the first zero."""
    top = np.float32(math.log(float(np.finfo(np.float32).max)))
    around = [np.nextafter(top, np.float32(0)), np.nextafter(top, np.float32(100))]
    np.testing.assert_array_equal(np.isinf(apply(0, around)), [False, True])
    bottom = np.float32(-150 * math.log(2))  # half of the smallest denormal, a tie that goes to 0
    around = [np.nextafter(bottom, np.float32(0)), np.nextafter(bottom, np.float32(-200))]
    np.testing.assert_array_equal(apply(0, around) > 0, [True, False])


def test_exp2_is_within_three_ulp_and_exact_for_whole_powers() -> None:
    x = inputs(-149.9, 126.9)
    assert ulps(apply(3, x), exp2_ref(x)).max() <= 3.0
    whole = np.arange(-149, 128, dtype=np.float32)
    np.testing.assert_array_equal(apply(3, whole), np.float32(exp2_ref(whole)))


def test_exp2_of_special_values() -> None:
    nan, inf = math.nan, math.inf
    given = [0.0, -0.0, -inf, nan, -nan, -151.0, -1e30, -3.4e38, 1e-45]
    expected = [1.0, 1.0, 0.0, nan, nan, 0.0, 0.0, 0.0, 1.0]
    np.testing.assert_array_equal(apply(3, given), np.float32(expected))


@pytest.mark.skipif(jit.INTERPRETED, reason="a thousand times slower, and the same arithmetic")
def test_exp_never_falls() -> None:
    """Softmax relies on order: a larger score may not get a smaller probability."""
    start = int(np.float32(-88.0).view(np.uint32))
    for bits in (np.arange(start, start - 2**20, -1), np.arange(0x3F000000, 0x3F000000 + 2**20)):
        y = apply(0, bits.astype(np.uint32).view(np.float32))
        assert np.all(np.diff(y) >= 0.0)


def test_sigmoid_is_within_its_bound() -> None:
    x = inputs(-87.0, 100.0)
    assert ulps(apply(1, x), sigmoid_ref(x)).max() <= 2.5
    given = [0.0, math.inf, -math.inf, math.nan, -200.0, 200.0]
    np.testing.assert_array_equal(apply(1, given), np.float32([0.5, 1, 0, math.nan, 0, 1]))


def test_normal_cdf_is_within_its_bound_in_both_tails() -> None:
    x = inputs(-12.9, 12.9)
    bound = 8.0 if FUSED else 8.0 + x.astype(float) ** 2 / 2
    assert np.all(ulps(apply(2, x), normal_cdf_ref(x)) <= bound)
    given = [math.inf, -math.inf, math.nan, -40.0, 40.0, -1e30, 1e30]
    np.testing.assert_array_equal(apply(2, given), np.float32([1, 0, math.nan, 0, 1, 0, 1]))
    assert abs(apply(2, [0.0])[0] - 0.5) <= 2**-23
    # Denormal results are exact to their last place; at the last argument they are 0.
    far = np.linspace(-14.6, -12.9, POINTS // 4).astype(np.float32)
    bound = 2.0**-149 * (8 if FUSED else 8 + 14.6**2 / 2)
    assert np.abs(apply(2, far) - normal_cdf_ref(far)).max() <= bound
    last = np.float32(14.49)
    near = [np.nextafter(-last, np.float32(0)), -last, np.nextafter(-last, np.float32(-15)), -14.6]
    assert apply(2, near).max() <= 2.0**-149 and apply(2, near[1:]).max() == 0


def test_references_are_the_functions() -> None:
    x = np.float32([-3.0, 0.25, 2.0])
    np.testing.assert_allclose(exp_ref(x), [math.e**t for t in x.tolist()], rtol=1e-15)
    np.testing.assert_allclose(sigmoid_ref(x), [0.5 + 0.5 * math.tanh(t / 2) for t in x.tolist()])
    half = [0.5 + 0.5 * math.erf(t / 2**0.5) for t in x.tolist()]
    np.testing.assert_allclose(normal_cdf_ref(x), half)


def test_the_coefficients_are_as_good_as_the_docstring_says() -> None:
    """In float64, so that only the polynomials count."""
    r = np.linspace(-math.log(2) / 2, math.log(2) / 2, 4001)
    polynomial = np.polyval([exp.P6, exp.P5, exp.P4, exp.P3, exp.P2, 1.0, 1.0], r)
    assert np.abs(polynomial / np.exp(r) - 1).max() < 3.3e-9
    a = np.linspace(0.0, 14.0, 4001)
    t = 1.0 / (1.0 + exp.CDF_K * a)
    names = [f"R{i}" for i in range(8, -1, -1)]
    scaled = np.polyval([getattr(exp, n) for n in names], t) * t
    exact = normal_cdf_ref(-a)
    assert np.abs(scaled * np.exp(-a * a / 2) / exact - 1).max() < 2.6e-8
    assert exp.LN2_HIGH + exp.LN2_LOW == pytest.approx(math.log(2), rel=1e-16)
    assert np.float32(exp.LN2_HIGH) * 512 == 355


@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_lane_does_not_depend_on_its_neighbours(which: int) -> None:
    x = inputs(-20.0, 20.0)[: 16 * 20]
    together = apply(which, x)
    x[::3] = math.nan
    alone = apply(which, x)
    assert np.isnan(alone[::3]).all()
    keep = np.arange(len(x)) % 3 != 0
    np.testing.assert_array_equal(alone[keep], together[keep])
