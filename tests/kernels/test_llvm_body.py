"""llvm_body.py: which body runs, for which arguments; the CPU that code is compiled for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from llvmlite import ir
from numba import prange, types
from numba.core.errors import TypingError

from pace_nb.kernels import jit
from pace_nb.kernels.lanes import load, store
from pace_nb.kernels.llvm_body import f32x16, has, is_bf16_memory, is_memory, llvm_body
from tests.kernels.bodies import FEATURES, compiled_only


def named_body(v: np.ndarray) -> np.ndarray:
    """100 from the NumPy body, 200 from the LLVM one."""
    return np.full(16, 100, np.float32)


@llvm_body(named_body, lambda v: f32x16 if v == f32x16 else None)
def _(ctx: Any, bld: Any, sig: Any, args: Any) -> Any:
    return ir.Constant(f32x16.llvm, [200.0] * 16)


def is_written(n: int) -> int:
    """0; compiled, 1 where n is a number in the source."""
    return 0


@llvm_body(is_written, lambda n: types.int64)
def _(ctx: Any, bld: Any, sig: Any, args: Any) -> Any:
    return ctx.get_constant(types.int64, int(isinstance(sig.args[0], types.Literal)))


has_feature: list[bool] = []


def asks() -> int:
    return 0


@llvm_body(asks, lambda: types.int64)
def _(ctx: Any, bld: Any, sig: Any, args: Any) -> Any:
    one = next(iter(sorted(FEATURES)), None)
    has_feature[:] = [has(ctx), one is None or has(ctx, one), has(ctx, "no-such-feature")]
    return ctx.get_constant(types.int64, 0)


@jit.kernel
def _named_kernel(y, count, n):
    for i in prange(count):
        store(y, 16 * i, named_body(load(y, 16 * i)))
        y[16 * i] += is_written(7) + 10 * is_written(n) + asks()


def test_the_body_is_numpys_interpreted_and_llvms_compiled() -> None:
    y = np.zeros(32, np.float32)
    getattr(_named_kernel, "py_func", _named_kernel)(y, 2, 3)
    assert (y == 100).all()
    if not jit.INTERPRETED:
        _named_kernel(y, 2, 3)
        assert (y[1:16] == 200).all() and (y[17:] == 200).all()
        assert y[0] == y[16] == 201  # 7 arrives as a literal type, n does not
        assert has_feature == [True, True, False]


@compiled_only
def test_what_is_not_ours_is_not_compiled() -> None:
    @jit.kernel
    def _number_kernel(y, count):
        for i in prange(count):
            named_body(y[i])

    @jit.kernel
    def _keyword_kernel(y, count):
        for i in prange(count):
            store(y, 16 * i, named_body(v=load(y, 16 * i)))

    for kernel in (_number_kernel, _keyword_kernel):
        with pytest.raises(TypingError, match="named_body"):
            kernel(np.zeros(32, np.float32), 2)


@pytest.mark.parametrize(
    ("dtype", "shape", "memory", "bf16"),
    [
        (types.float32, 1, True, False),
        (types.uint16, 1, True, True),
        (types.float32, 2, False, False),
        (types.uint16, 2, False, False),
        (types.float64, 1, False, False),
        (types.int16, 1, False, False),
    ],
)
def test_memory_is_flat_and_of_a_storage_type(
    dtype: Any, shape: int, memory: bool, bf16: bool
) -> None:
    array = types.Array(dtype, shape, "C")
    assert is_memory(array) is memory
    assert is_bf16_memory(array) is bf16
    assert not is_memory(dtype)
