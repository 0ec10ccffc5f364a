"""arrays.py: the checks, and flat views that address the right elements without copies."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pace_nb.kernels.arrays import (
    STORAGE,
    ascends,
    contiguous,
    flat_heads,
    flat_rows,
    in_range,
    require,
    writable,
)

Array = NDArray[Any]
X = np.arange(6 * 4 * 10, dtype=np.float32).reshape(6, 4, 10)

VIEWS_2D = {
    "contiguous": X[:, 0].copy(),
    "columns": X.reshape(6, 40)[:, 3:17],
    "every other row": X.reshape(6, 40)[::2],
    "one row": X.reshape(6, 40)[2:3, 5:9],
    "one column": X.reshape(6, 40)[:, 7:8],
    "no rows": X.reshape(6, 40)[:0],
    "no columns": X.reshape(6, 40)[:, :0],
    "transposed": X.reshape(6, 40).T,
    "backward": X.reshape(6, 40)[::-1],
    "strided columns": X.reshape(6, 40)[:, ::2],
    "repeated row": np.broadcast_to(X[0, 0], (3, 10)),
    "overlapping rows": np.lib.stride_tricks.sliding_window_view(X.reshape(-1), 8)[:5],
}
COPIED = {"transposed", "backward", "strided columns", "repeated row", "overlapping rows"}

VIEWS_3D = {
    "contiguous": X,
    "some heads": X[:, 1:3],
    "one head": X[:, 2:3],
    "some dims": X[:, :, 2:7],
    "every other row": X[::2],
    "one row": X[3:4, 1:],
    "fused": np.arange(6 * 53.0).reshape(6, 53)[:, 3:43].reshape(6, 4, 10),
    "heads first": np.ascontiguousarray(X.swapaxes(0, 1)).swapaxes(0, 1),
    "no rows": X[:0],
    "no heads": X[:, :0],
    "one dim": X[:, :, 4:5],
    "transposed": X.T,
    "backward": X[:, ::-1],
    "repeated head": np.broadcast_to(X[:, :1], X.shape),
    "strided dims": X[:, :, ::2],
}
COPIED_3D = {"transposed", "backward", "repeated head", "strided dims"}


@pytest.mark.parametrize("name", VIEWS_2D)
def test_flat_rows_addresses_every_element(name: str) -> None:
    x = VIEWS_2D[name]
    flat, stride = flat_rows(x)
    assert flat.ndim == 1 and flat.dtype == x.dtype
    for t in range(x.shape[0]):
        np.testing.assert_array_equal(flat[t * stride : t * stride + x.shape[1]], x[t])
    if x.size:
        assert np.shares_memory(flat, x) == (name not in COPIED)
        last = flat.ctypes.data + flat.nbytes  # a kernel may read all of it
        assert name in COPIED or last <= x[-1, -1:].ctypes.data + x.itemsize


@pytest.mark.parametrize("name", VIEWS_3D)
def test_flat_heads_addresses_every_element(name: str) -> None:
    x = VIEWS_3D[name]
    flat, row, head = flat_heads(x)
    assert flat.ndim == 1 and flat.dtype == x.dtype
    for t in range(x.shape[0]):
        for h in range(x.shape[1]):
            at = t * row + h * head
            np.testing.assert_array_equal(flat[at : at + x.shape[2]], x[t, h])
    if x.size:
        assert np.shares_memory(flat, x) == (name not in COPIED_3D)
        last = flat.ctypes.data + flat.nbytes
        assert name in COPIED_3D or last <= x[-1, -1, -1:].ctypes.data + x.itemsize


def test_rows_that_are_not_whole_elements_apart_are_copied() -> None:
    """Fields of a record: 5 bytes from one row to the next."""
    record = np.zeros(4, np.dtype([("x", np.float32, (1,)), ("y", np.uint8)]))
    record["x"][:, 0] = [1, 2, 3, 4]
    flat, stride = flat_rows(record["x"])
    np.testing.assert_array_equal(flat[::stride], [1, 2, 3, 4])
    flat, row, _ = flat_heads(record["x"][:, None])
    np.testing.assert_array_equal(flat[::row], [1, 2, 3, 4])


def test_require_accepts_what_fits() -> None:
    require("k", "x", np.zeros((2, 3), np.float32), (2, 3))
    require("k", "x", np.zeros((2, 3), np.uint16), ("T", None), STORAGE)
    require("k", "x", np.zeros((), np.float32), ())


@pytest.mark.parametrize(
    ("x", "shape", "error", "message"),
    [
        ([1.0], (1,), TypeError, "k: x is list, expected numpy.ndarray"),
        (None, (1,), TypeError, "k: x is NoneType, expected numpy.ndarray"),
        (np.zeros(1), (1,), TypeError, "k: x has dtype float64, expected uint16 or float32"),
        (np.zeros(1, ">f4"), (1,), TypeError, "k: x has dtype >f4"),
        (np.zeros(2, np.float32), (1,), ValueError, r"k: x has shape \(2,\), expected \(1\)"),
        (np.zeros(2, np.float32), ("T", 2), ValueError, r"\(2,\), expected \(T, 2\)"),
        (np.zeros((2, 2), np.float32), (None,), ValueError, r"\(2, 2\), expected \(any\)"),
    ],
)
def test_require_names_what_does_not_fit(x: Any, shape: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message) as raised:
        require("k", "x", x, shape, STORAGE)
    assert "\n" not in str(raised.value)


def test_writable_wants_contiguous_memory_that_may_be_written() -> None:
    x = np.zeros((4, 4), np.float32)
    writable("k", "out", x)
    frozen = x.copy()
    frozen.flags.writeable = False
    for bad in (x[:, ::2], x.T[:2], frozen):
        with pytest.raises(ValueError, match="k: out is not a contiguous, writable array"):
            writable("k", "out", bad)


def test_in_range_names_the_first_index_outside() -> None:
    in_range("k", "ids", np.array([0, 3], np.int32), 4)
    in_range("k", "ids", np.zeros(0, np.int64), 0)
    for bad, found in (([0, 4, 9], 4), ([2, -1], -1), ([[1], [2**40]], 2**40)):
        with pytest.raises(ValueError, match=f"k: ids holds {found}, expected 0 to 3"):
            in_range("k", "ids", np.array(bad), 4)


def test_a_numpy_integer_in_a_shape_is_a_size() -> None:
    with pytest.raises(ValueError, match=r"x has shape \(3,\), expected \(4\)"):
        require("k", "x", np.zeros(3, np.float32), (np.int64(4),))


def test_ascends_compares_and_does_not_subtract() -> None:
    assert ascends(np.array([0, 0, 5]))
    assert not ascends(np.array([0, 2**31 - 1, -2, 1], np.int32))
    assert not ascends(np.array([0, 2**63 - 1, -2, 5]))


def test_contiguous() -> None:
    contiguous("k", "x", np.zeros(4))
    with pytest.raises(ValueError, match="k: x is not a contiguous array"):
        contiguous("k", "x", np.zeros(8)[::2])
