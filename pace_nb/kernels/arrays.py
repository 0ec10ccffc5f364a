"""The checks that wrappers make before a kernel runs, and the flat views that kernels are given.

Kernels have no bounds checks: a shape that passes here is what keeps them inside their arrays.
Errors are one line, name the kernel and the argument, and say what was expected (TypeError for
dtypes, ValueError for the rest).
Knows: NumPy arrays. Does not know: any kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
STORAGE = (
    np.uint16,
    np.float32,
)  # BF16 bits, float32: what weights, activations and caches are stored as
NOTHING: Array = np.empty(0, np.float32)  # what a kernel is given for a weight or bias left out


def require(
    kernel: str,
    name: str,
    x: Array,
    shape: Sequence[int | str | None],
    dtypes: Sequence[Any] = (np.float32,),
) -> None:
    """`x` must be an ndarray of one of `dtypes` and of `shape`, where a letter or None fits all.

    Called for each argument of each kernel: what fits is found out in about a microsecond.
    """
    if isinstance(x, np.ndarray) and x.dtype in dtypes and x.ndim == len(shape):
        for want, have in zip(shape, x.shape, strict=True):
            if want != have and isinstance(want, (int, np.integer)):
                break
        else:
            return
    _refuse(kernel, name, x, shape, dtypes)


def _refuse(
    kernel: str, name: str, x: object, shape: Sequence[int | str | None], dtypes: Sequence[Any]
) -> None:
    """Say what does not fit."""
    if not isinstance(x, np.ndarray):
        raise TypeError(f"{kernel}: {name} is {type(x).__name__}, expected numpy.ndarray")
    if x.dtype not in dtypes:
        expected = " or ".join(np.dtype(d).name for d in dtypes)
        raise TypeError(f"{kernel}: {name} has dtype {x.dtype}, expected {expected}")
    wanted = ", ".join("any" if s is None else str(s) for s in shape)
    raise ValueError(f"{kernel}: {name} has shape {x.shape}, expected ({wanted})")


def contiguous(kernel: str, name: str, x: Array) -> None:
    """`x` is addressed by element offset: it must be contiguous."""
    if not x.flags.c_contiguous:
        raise ValueError(f"{kernel}: {name} is not a contiguous array")


def ascends(x: Array) -> bool:
    """Is no element below the one before? Compared, not subtracted: a difference can wrap."""
    return bool((x[1:] >= x[:-1]).all())


def writable(kernel: str, name: str, x: Array) -> None:
    """`x` is written by the kernel: it must be contiguous and writable."""
    if not x.flags.c_contiguous or not x.flags.writeable:
        raise ValueError(f"{kernel}: {name} is not a contiguous, writable array")


def flat_rows(x: Array) -> tuple[Array, int]:
    """(1-D array over the memory of 2-D `x`, elements from one row to the next).

    Without a copy where rows are contiguous and go forward; of a copy otherwise.
    """
    if x.flags.c_contiguous:
        return x.reshape(-1), x.shape[1]
    row, element = x.strides
    usable = x.shape[1] <= 1 or element == x.itemsize
    if (
        x.size == 0
        or not usable
        or row % x.itemsize
        or (x.shape[0] > 1 and row < x.itemsize * x.shape[1])
    ):
        x = np.ascontiguousarray(x)
        return x.reshape(-1), x.shape[1]
    if x.shape[0] == 1:
        row = x.itemsize * x.shape[1]
    stride = row // x.itemsize
    length = (x.shape[0] - 1) * stride + x.shape[1]
    return np.lib.stride_tricks.as_strided(x, (length,), (x.itemsize,)), stride


def flat_heads(x: Array) -> tuple[Array, int, int]:
    """(1-D array over the memory of x [T, H, D], elements to the next row, and to the next head).

    Without a copy where the last axis is contiguous and the others go forward (a slice of a fused
    q, k, v projection does); of a copy otherwise.
    """
    t, h, d = x.shape
    if not x.flags.c_contiguous and x.size:
        row, head, element = (s // x.itemsize for s in x.strides)
        forward = (row > 0 or t == 1) and (head > 0 or h == 1) and (element == 1 or d == 1)
        if forward and not any(s % x.itemsize for s in x.strides):
            length = (t - 1) * row + (h - 1) * head + d
            flat = np.lib.stride_tricks.as_strided(x, (length,), (x.itemsize,))
            return flat, row, head
        x = np.ascontiguousarray(x)
    return x.reshape(-1), h * d, d


def in_range(kernel: str, name: str, x: Array, end: int) -> None:
    """Every index in `x` must be in 0 .. end - 1 (one vectorised pass)."""
    if x.size and (int(x.min()) < 0 or int(x.max()) >= end):
        bad = x[(x < 0) | (x >= end)].flat[0]
        raise ValueError(f"{kernel}: {name} holds {bad}, expected 0 to {end - 1}")
