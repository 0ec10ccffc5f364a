"""Both bodies of lane operations: values to try them on, and ways in which results must agree.

Each kernel of these tests runs twice, compiled and as the plain Python function it was written as;
what the NumPy bodies mean is tested on values written out by hand. `fma` and dot products may
differ in the last place (NumPy rounds twice).
"""

from __future__ import annotations

import ctypes
import inspect
import mmap
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pace_nb.kernels import jit

Array = NDArray[Any]
F32, BF16 = np.float32, np.uint16
TYPES = [(F32, F32), (F32, BF16), (BF16, F32), (BF16, BF16)]
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


def guarded(elements: int, dtype: Any) -> tuple[mmap.mmap, Array]:
    """An array that ends where a page begins that may not be touched."""
    size = elements * np.dtype(dtype).itemsize
    page = -(-max(size, 1) // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, page + mmap.PAGESIZE)
    whole = np.frombuffer(memory, np.uint8)
    libc = ctypes.CDLL(None, use_errno=True)
    address = ctypes.c_void_p(whole.ctypes.data + page)
    if libc.mprotect(address, ctypes.c_size_t(mmap.PAGESIZE), 0) != 0:  # 0 = PROT_NONE
        raise OSError(ctypes.get_errno(), "mprotect")
    return memory, whole[page - size : page].view(dtype)


def operations(module: ModuleType) -> set[str]:
    """Names of the operations that a module of lanes has."""
    return {
        name
        for name, f in inspect.getmembers(module, inspect.isfunction)
        if f.__module__ == module.__name__ and not name.startswith("_")
    }


def untested(module: ModuleType, test_file: str) -> set[str]:
    """Operations of a module that the kernels of its test file do not call."""
    source = Path(test_file).read_text()
    body = source[source.index("@jit.kernel") :]
    return {name for name in operations(module) if f"{name}(" not in body}
