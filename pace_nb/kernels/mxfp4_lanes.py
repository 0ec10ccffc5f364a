"""MXFP4 in registers: a line of 128 codes becomes four vectors of 16 pairs of BF16.

    value = e2m1(code) * 2^(scale - 127),   e2m1: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives

Exact: a code has two significant bits and the scale is a power of two, added to the exponent.
A line is 64 bytes: 32 words of 16 bits, with four codes each. Quarter q of it, the codes of columns
16 q to 16 q + 15, are bits 4 q to 4 q + 3 of every word: word 2 c is column 16 q + c of the even k,
word 2 c + 1 of the odd k. So one load and one shift bring a quarter to where the table is looked
up, which sees the lowest bits alone.
Knows: the format's codes and scales. Does not know: how a weight is laid out (quant.py).
Cautions: nothing is bounds-checked; scales must be 2 .. 252.
Source: OCP Microscaling Formats 1.0. Notebook: 19 MoE and MXFP4. Ledger: quant.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types

from pace_nb.kernels.llvm_body import (
    I16,
    I32X16,
    W,
    bf16x32,
    emit_call,
    emit_vector_pointer,
    has,
    i32_constant,
    i32x16,
    llvm_body,
)

_E2M1 = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], np.float32)  # magnitudes of codes 0 .. 7
MXFP4_TABLE = (np.concatenate([_E2M1, -_E2M1]).view(np.uint32) >> 16).astype(np.uint16)  # as BF16


def mxfp4_exponents(scales: np.ndarray, i: int) -> np.ndarray:
    """What 16 scale bytes (2**(s - 127)) add to BF16 bits, as i32x16: twice (s - 127) << 7, one per
    half of a pair. Scales must be 2 .. 252, so that no result leaves BF16's normal range."""
    shift = (scales[i : i + W].astype(np.int32) - 127) << 7
    return ((shift << 16) | (shift & 0xFFFF)).astype(np.int32)


def _is_bytes(x: Any) -> bool:
    return isinstance(x, types.Array) and x.ndim == 1 and x.dtype == types.uint8


def _load_bytes(ctx: Any, bld: ir.IRBuilder, sig: Any, args: Any) -> Any:
    """16 bytes at args[0][args[1]] as 16 words."""
    index = ctx.cast(bld, args[1], sig.args[1], types.intp)
    llvm = ir.VectorType(ir.IntType(8), W)
    pointer = emit_vector_pointer(ctx, bld, sig.args[0], args[0], index, llvm)
    return bld.zext(bld.load(pointer, align=1), I32X16)


@llvm_body(mxfp4_exponents, lambda scales, i: i32x16 if _is_bytes(scales) else None)
def _(ctx: Any, bld: ir.IRBuilder, sig: Any, args: Any) -> Any:
    shift = bld.sub(_load_bytes(ctx, bld, sig, args), i32_constant(127))
    shift = bld.shl(shift, i32_constant(7))
    lower = bld.and_(shift, i32_constant(0xFFFF))
    return bld.or_(bld.shl(shift, i32_constant(16)), lower)


def mxfp4_pairs(codes: np.ndarray, i: int, quarter: int, exponents: np.ndarray) -> np.ndarray:
    """A quarter (0 to 3, a literal number) of the line of codes at i, times the scales, as bf16x32.

    Exact: a code has two significant bits and the scale is a power of two.
    """
    code = (codes[i : i + 4 * W].view(np.uint16) >> np.uint16(4 * quarter)) & 15
    raised = MXFP4_TABLE[code] + exponents.astype(np.int32).view(np.uint16)
    return np.where(code & 7, raised, MXFP4_TABLE[code]).astype(np.uint16)


def _pairs_type(codes: Any, i: Any, quarter: Any, exponents: Any) -> Any:
    literal = isinstance(quarter, types.IntegerLiteral) and 0 <= quarter.literal_value < 4
    return bf16x32 if literal and _is_bytes(codes) and exponents == i32x16 else None


@llvm_body(mxfp4_pairs, _pairs_type)
def _(ctx: Any, bld: ir.IRBuilder, sig: Any, args: Any) -> Any:
    i16x32 = ir.VectorType(I16, 2 * W)

    def every(value: int) -> Any:
        return ir.Constant(i16x32, [value] * (2 * W))

    index = ctx.cast(bld, args[1], sig.args[1], types.intp)
    line = bld.load(emit_vector_pointer(ctx, bld, sig.args[0], args[0], index, i16x32), align=1)
    code = bld.lshr(line, every(4 * sig.args[2].literal_value))
    magnitude = bld.and_(code, every(7))
    zero = bld.icmp_unsigned("==", magnitude, every(0))
    if has(ctx, "avx512bw"):
        table = ir.Constant(i16x32, [int(v) for v in MXFP4_TABLE] * 2)  # 5 bits count: any fifth
        value = emit_call(bld, "llvm.x86.avx512.permvar.hi.512", i16x32, table, code)
    else:
        # 1 + m / 2 times 2**(e - 1) for e > 0; the code 1 alone is 0.5
        value = bld.add(bld.shl(magnitude, every(6)), every(126 << 7))
        half = bld.icmp_unsigned("==", magnitude, every(1))
        value = bld.select(zero, every(0), bld.select(half, every(126 << 7), value))
        value = bld.or_(value, bld.shl(bld.and_(code, every(8)), every(12)))
    raised = bld.add(value, bld.bitcast(args[3], i16x32))
    return bld.bitcast(bld.select(zero, value, raised), I32X16)
