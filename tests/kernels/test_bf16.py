"""bf16.py: every bit pattern one way, every kind of float32 the other, against ml_dtypes."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pace_nb.kernels.bf16 import as_f32, as_stored, from_f32, narrow, to_f32, widen

Array = NDArray[Any]
ALL = np.arange(2**16, dtype=np.uint16)


def floats_around(u: Array) -> Array:
    """float32 at, just below and just above each BF16 number and each tie between two."""
    upper = u.astype(np.uint32) << 16
    offsets = np.array([0x0000, 0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    return (upper[:, None] + offsets).reshape(-1).view(np.float32)


def test_to_f32_is_exact_for_all_patterns() -> None:
    x = to_f32(ALL)
    np.testing.assert_array_equal(x.view(np.uint32), ALL.astype(np.uint32) << 16)
    np.testing.assert_array_equal(x, ALL.view(ml_dtypes.bfloat16).astype(np.float32))


def test_from_f32_rounds_to_nearest_even() -> None:
    x = floats_around(ALL)
    u, number = from_f32(x), ~np.isnan(x)
    with np.errstate(all="ignore"):
        expected = x.astype(ml_dtypes.bfloat16).view(np.uint16)
    np.testing.assert_array_equal(u[number], expected[number])
    back = to_f32(u[~number])
    assert np.isnan(back).all()
    np.testing.assert_array_equal(np.signbit(back), np.signbit(x[~number]))
    assert (u[~number] & 0x40).all()  # quiet


def test_from_f32_undoes_to_f32() -> None:
    number = ~np.isnan(to_f32(ALL))
    np.testing.assert_array_equal(from_f32(to_f32(ALL))[number], ALL[number])


@settings(max_examples=200, deadline=None)
@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_the_error_is_half_a_place(value: float) -> None:
    x = np.array([value], np.float32)
    y = to_f32(from_f32(x)).astype(float)[0]
    if np.isfinite(y):
        assert abs(y - value) <= max(2.0**-8 * abs(value), 2.0**-134)
    else:
        assert abs(value) >= float(np.float32(3.3895314e38))  # the largest BF16, 0x7F7F


def test_by_hand() -> None:
    given_ = np.float32([1.0, -2.0, 0.0, -0.0, 1.00390625, 1.01171875, np.inf, 3.4e38])
    bits = [0x3F80, 0xC000, 0, 0x8000, 0x3F80, 0x3F82, 0x7F80, 0x7F80]
    np.testing.assert_array_equal(from_f32(given_), bits)


@pytest.mark.parametrize("shape", [(), (0,), (3, 5), (2, 3, 4)])
def test_shapes_and_strides_are_kept(shape: tuple[int, ...]) -> None:
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    u = from_f32(x)
    assert u.shape == to_f32(u).shape == shape
    if len(shape) > 1:
        np.testing.assert_array_equal(from_f32(x.T), u.T)
        np.testing.assert_array_equal(from_f32(x[..., ::-2]), u[..., ::-2])
        np.testing.assert_array_equal(to_f32(u.T), to_f32(u).T)


def test_widen_and_narrow_are_what_references_use() -> None:
    x = np.float32([1.5, 1e-40, np.inf, np.nan])
    assert widen(x).dtype == widen(from_f32(x)).dtype == np.float64
    np.testing.assert_array_equal(widen(x), x.astype(float))
    np.testing.assert_array_equal(widen(from_f32(x)), to_f32(from_f32(x)).astype(float))
    y = np.array([1 / 3, 1e300, -1e300, np.nan, 1e-320])
    expected = np.float32([1 / 3, np.inf, -np.inf, np.nan, 0.0])
    np.testing.assert_array_equal(narrow(y, np.float32), expected)
    np.testing.assert_array_equal(narrow(y, np.uint16), from_f32(expected))


def test_signalling_nans_pass_without_a_warning() -> None:
    """They come from damaged files; pytest turns warnings into errors."""
    for x in (np.array([0x7F81], np.uint16), np.array([0x7F800001], np.uint32).view(np.float32)):
        assert np.isnan(widen(x)).all()
        assert np.isnan(to_f32(narrow(widen(x), np.uint16).astype(np.uint16))).all()


def test_other_types_are_refused() -> None:
    with pytest.raises(TypeError, match=r"to_f32: expected uint16 \(BF16 bits\), found int16"):
        to_f32(np.zeros(2, np.int16))
    with pytest.raises(TypeError, match="from_f32: expected float32, found float64"):
        from_f32(np.zeros(2))


def test_storage_to_float32_and_back() -> None:
    x = np.array([1.0, -2.5, np.inf, 1e-40], np.float32)
    u = from_f32(x)
    np.testing.assert_array_equal(as_f32(u), to_f32(u))
    assert as_f32(x) is x and as_stored(x, x.dtype) is x
    np.testing.assert_array_equal(as_stored(x, u.dtype), u)
