"""Lanes of integers: weights in fixed point, whose sums are exact in any order, and lane masks.

A weight is a float32 of [0, 2**40] cut to an integer of 64 bits. Integers add up to the same total
whatever the order, so a sum over a vocabulary may run on 16 lanes, block by block, in a histogram
or one after the other, and a token drawn from it is the same.

    weight(x) = floor(2^40 e^x)  for x <= 0,   the e^x of f32 operations without any fma

Values, beside those of lanes.py
    i64x16   16 int64 lanes, two AVX-512 registers
    mask     an int64 whose bits 0 .. 15 say for which lanes a comparison holds
Moves: nothing, operands are registers.
Does: weight 22 operations per vector, the last of which, `fixed`, is two instructions.
Error: e^x is within 2 ULP of float32 (mul and add are rounded each, where lanes.fma would round
    once), then cut below 2^-40: |weight / 2^40 - e^x| <= 2^-22 e^x + 2^-40.
Cautions: one result on every CPU and in NumPy, to the bit: there is no fma in it, which some CPUs
    lack. x must not be NaN; weight(0) = 2^40 exactly, and below -27.73 it is 0. At most 2^22
    weights may be added up.
Source: Cody and Waite 1980, as in exp.py, whose constants these are. Notebook: 18 sampling.
    Ledger: sampling.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import models, register_model

from pace_nb.kernels import jit
from pace_nb.kernels.arrays import Array
from pace_nb.kernels.exp import LN2_HIGH, LN2_LOW, LOG2_E, P2, P3, P4, P5, P6
from pace_nb.kernels.lanes import maximum, round_half_even, scale_pow2, splat
from pace_nb.kernels.llvm_body import W, f32x16, llvm_body

# ---- constants -----------------------------------------------------------------------------------
FRACTION_BITS = 40  # of a weight: 2^22 of them add up to 2^62 at most
MOST_WEIGHTS = 1 << 22
ONE = 1 << FRACTION_BITS  # the weight of the likeliest token
LIGHTEST = -30.0  # from here on down e^x is below 2^-40, and its weight 0


# ---- definitions ---------------------------------------------------------------------------------
def weight_ref(x: Array) -> Array:
    """floor(2^40 e^x) of f32 x <= 0 as int64: the operations of `weight`, one after the other."""
    f = np.float32
    x = np.maximum(x, f(LIGHTEST))
    n = np.rint(x * f(LOG2_E))
    r = (x - n * f(LN2_HIGH)) - n * f(LN2_LOW)
    p = f(P6) * r + f(P5)
    for coefficient in (P4, P3, P2, 1.0, 1.0):
        p = p * r + f(coefficient)
    weights: Array = np.ldexp(p, n.astype(np.int32) + FRACTION_BITS).astype(np.int64)
    return weights


# ---- i64x16 --------------------------------------------------------------------------------------
_I64 = ir.IntType(64)
_I64X16 = ir.VectorType(_I64, W)


class _I64x16(types.Type):
    def __init__(self) -> None:
        super().__init__(name="i64x16")


i64x16 = _I64x16()


@register_model(_I64x16)
class _I64x16Model(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Any) -> None:
        super().__init__(dmm, fe_type, _I64X16)


def no_weights() -> np.ndarray:
    """i64x16 of zeros."""
    return np.zeros(W, np.int64)


@llvm_body(no_weights, lambda: i64x16)
def _(ctx: Any, bld: ir.IRBuilder, sig: Any, args: Any) -> Any:
    return ir.Constant(_I64X16, [0] * W)


def fixed(v: np.ndarray) -> np.ndarray:
    """The lanes of f32x16 cut to integers, i64x16; 0 <= v < 2**63."""
    return v.astype(np.int64)


@llvm_body(fixed, lambda v: i64x16 if v == f32x16 else None)
def _(ctx: Any, bld: ir.IRBuilder, sig: Any, args: Any) -> Any:
    return bld.fptosi(args[0], _I64X16)


def add_weights(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a + b, both i64x16."""
    return a + b


@llvm_body(add_weights, lambda a, b: i64x16 if (a, b) == (i64x16, i64x16) else None)
def _(ctx: Any, bld: ir.IRBuilder, sig: Any, args: Any) -> Any:
    return bld.add(*args)


def sum_weights(v: np.ndarray) -> int:
    """Sum of the lanes of i64x16, an int64."""
    return int(v.sum())


@llvm_body(sum_weights, lambda v: types.int64 if v == i64x16 else None)
def _(ctx: Any, bld: ir.IRBuilder, sig: Any, args: Any) -> Any:
    v = args[0]
    for half in (8, 4, 2, 1):
        undef = ir.Constant(v.type, ir.Undefined)
        index = ir.VectorType(ir.IntType(32), half)
        low = bld.shuffle_vector(v, undef, ir.Constant(index, list(range(half))))
        high = bld.shuffle_vector(v, undef, ir.Constant(index, list(range(half, 2 * half))))
        v = bld.add(low, high)
    return bld.extract_element(v, ir.Constant(ir.IntType(32), 0))


def store_weights(x: np.ndarray, i: int, v: np.ndarray) -> None:
    """x[i : i + 16] = v; x is int64."""
    x[i : i + W] = v


@llvm_body(
    store_weights,
    lambda x, i, v: (
        types.void
        if isinstance(x, types.Array) and (x.ndim, x.dtype, v) == (1, types.int64, i64x16)
        else None
    ),
)
def _(ctx: Any, bld: ir.IRBuilder, sig: Any, args: Any) -> Any:
    index = ctx.cast(bld, args[1], sig.args[1], types.intp)
    pointer = bld.gep(ctx.make_array(sig.args[0])(ctx, bld, args[0]).data, [index])
    bld.store(args[2], bld.bitcast(pointer, _I64X16.as_pointer()), align=8)
    return ctx.get_dummy_value()


# ---- masks ---------------------------------------------------------------------------------------
def equal_lanes(a: np.ndarray, b: np.ndarray) -> int:
    """Mask of the lanes where a == b, both f32x16 (a NaN equals nothing)."""
    return int((1 << np.arange(W))[a == b].sum())


def lanes_from(a: np.ndarray, b: np.ndarray) -> int:
    """Mask of the lanes where a >= b, both f32x16."""
    return int((1 << np.arange(W))[a >= b].sum())


def lanes_above(a: np.ndarray, b: np.ndarray) -> int:
    """Mask of the lanes where a > b, both f32x16."""
    return int((1 << np.arange(W))[a > b].sum())


for _function, _operator in ((equal_lanes, "=="), (lanes_from, ">="), (lanes_above, ">")):

    @llvm_body(_function, lambda a, b: types.int64 if (a, b) == (f32x16, f32x16) else None)
    def _(ctx: Any, bld: ir.IRBuilder, sig: Any, args: Any, operator: str = _operator) -> Any:
        lanes = bld.bitcast(bld.fcmp_ordered(operator, *args), ir.IntType(W))
        return bld.zext(lanes, _I64)


def lowest_lane(mask: int) -> int:
    """Number of the lowest bit that is set; the mask is not 0."""
    return (int(mask) & -int(mask)).bit_length() - 1


@llvm_body(lowest_lane, lambda mask: types.int64 if mask == types.int64 else None)
def _(ctx: Any, bld: ir.IRBuilder, sig: Any, args: Any) -> Any:
    return bld.cttz(args[0], ir.Constant(ir.IntType(1), 1))


def count_lanes(mask: int) -> int:
    """Number of bits that are set."""
    return int(mask).bit_count()


@llvm_body(count_lanes, lambda mask: types.int64 if mask == types.int64 else None)
def _(ctx: Any, bld: ir.IRBuilder, sig: Any, args: Any) -> Any:
    return bld.ctpop(args[0])


# ---- weights -------------------------------------------------------------------------------------
@jit.device_fn
def weight(x):
    """floor(2^40 e^x), i64x16, of f32x16 x <= 0."""
    x = maximum(x, splat(LIGHTEST))
    n = round_half_even(x * splat(LOG2_E))
    r = (x - n * splat(LN2_HIGH)) - n * splat(LN2_LOW)
    p = splat(P6) * r + splat(P5)
    p = p * r + splat(P4)
    p = p * r + splat(P3)
    p = p * r + splat(P2)
    p = p * r + splat(1.0)
    p = p * r + splat(1.0)
    return fixed(scale_pow2(p, n + splat(FRACTION_BITS)))
