"""Words: the 4 bytes of memory that hold one float32 or a pair of BF16, and dot products of pairs.

What keys, values and operands of products are stored as. A kernel that says where its words lie
serves both storage types: `per_word` elements of the array are one of them.

Values
    word     4 bytes of memory: one float32, or a pair of BF16
    bf16x32  16 pairs in a register; only ever an operand of `dot_pairs`
Cautions
    nothing is bounds-checked. The NumPy body of `dot_pairs` rounds twice in rare cases, as that of
    `lanes.fma`. On CPUs with avx512bf16 `vdpbf16ps` flushes denormals to zero, the fallback keeps
    them.
Source: Intel's description of VDPBF16PS, for the order within a pair.
Notebook: 04 GEMV. Ledger: lanes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types

from pace_nb.kernels.bf16 import as_f32, as_stored
from pace_nb.kernels.lanes import splat
from pace_nb.kernels.llvm_body import (
    F32,
    F32X16,
    I16,
    I32,
    I32X16,
    W,
    bf16x32,
    emit_dot_pairs,
    emit_narrow,
    emit_pointer,
    emit_splat,
    emit_vector_pointer,
    f32x16,
    i32_constant,
    is_bf16_memory,
    is_memory,
    llvm_body,
)


# ---- pairs of BF16 -------------------------------------------------------------------------------
def load_pairs(x: np.ndarray, i: int) -> np.ndarray:
    """x[i : i + 32] (uint16) as bf16x32: 16 pairs."""
    return x[i : i + 2 * W].copy()


@llvm_body(load_pairs, lambda x, i: bf16x32 if is_bf16_memory(x) else None)
def _(ctx: Any, bld: ir.IRBuilder, sig: Any, args: Any) -> Any:
    index = ctx.cast(bld, args[1], sig.args[1], types.intp)
    return bld.load(emit_vector_pointer(ctx, bld, sig.args[0], args[0], index, I32X16), align=2)


def splat_pair(x: np.ndarray, i: int) -> np.ndarray:
    """The pair x[i], x[i + 1] (uint16) in every one of the 16 lanes."""
    return np.tile(x[i : i + 2], W)


@llvm_body(splat_pair, lambda x, i: bf16x32 if is_bf16_memory(x) else None)
def _(ctx: Any, bld: ir.IRBuilder, sig: Any, args: Any) -> Any:
    index = ctx.cast(bld, args[1], sig.args[1], types.intp)
    return emit_splat(
        bld, bld.load(emit_vector_pointer(ctx, bld, sig.args[0], args[0], index, I32), align=2)
    )


def dot_pairs(acc: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """acc[lane] + a[2 lane + 1] * b[2 lane + 1], rounded, + a[2 lane] * b[2 lane], rounded.

    The odd element comes first: the order of vdpbf16ps.
    """
    x, y = as_f32(a).astype(np.float64), as_f32(b).astype(np.float64)
    odd = (acc + x[1::2] * y[1::2]).astype(np.float32)
    return (odd + x[0::2] * y[0::2]).astype(np.float32)


@llvm_body(
    dot_pairs, lambda acc, a, b: f32x16 if (acc, a, b) == (f32x16, bf16x32, bf16x32) else None
)
def _(ctx: Any, bld: ir.IRBuilder, sig: Any, args: Any) -> Any:
    return emit_dot_pairs(ctx, bld, *args)


# ---- words: one float32, or a pair of BF16 -------------------------------------------------------
def copy_word(to: np.ndarray, i: int, x: np.ndarray, j: int) -> None:
    """The word to[i] (uint16: to[i : i + 2]) = the elements of x from j on, rounded as `to` is."""
    s = 2 if to.dtype == np.uint16 else 1
    given = x[j : j + s]
    to[i : i + s] = given if x.dtype == to.dtype else as_stored(as_f32(given), to.dtype)


@llvm_body(copy_word, lambda to, i, x, j: types.void if is_memory(to) and is_memory(x) else None)
def _(ctx: Any, bld: ir.IRBuilder, sig: Any, args: Any) -> Any:
    to, x = sig.args[0], sig.args[2]
    i, j = (ctx.cast(bld, args[k], sig.args[k], types.intp) for k in (1, 3))
    element = {types.uint16: I16, types.float32: F32}
    n, size = (2, 2) if to.dtype == types.uint16 else (1, 4)
    pointer = bld.bitcast(
        emit_pointer(ctx, bld, x, args[2], j), ir.VectorType(element[x.dtype], n).as_pointer()
    )
    word = bld.load(pointer, align=2 if x.dtype == types.uint16 else 4)
    if x.dtype != to.dtype and n == 2:
        word = emit_narrow(ctx, bld, word)
    elif x.dtype != to.dtype:
        wide = bld.shl(bld.zext(word, ir.VectorType(I32, n)), i32_constant(16, n))
        word = bld.bitcast(wide, ir.VectorType(F32, n))
    pointer = bld.bitcast(emit_pointer(ctx, bld, to, args[0], i), word.type.as_pointer())
    bld.store(word, pointer, align=size)
    return ctx.get_dummy_value()


def store_words(x: np.ndarray, i: int, first: np.ndarray, second: np.ndarray) -> None:
    """16 words from x[i] on, one per lane: (first, second) as a pair of BF16, or `first` alone."""
    if x.dtype == np.uint16:
        x[i : i + 2 * W : 2], x[i + 1 : i + 2 * W : 2] = (
            as_stored(v, x.dtype) for v in (first, second)
        )
    else:
        x[i : i + W] = first


@llvm_body(
    store_words,
    lambda x, i, a, b: types.void if is_memory(x) and (a, b) == (f32x16, f32x16) else None,
)
def _(ctx: Any, bld: ir.IRBuilder, sig: Any, args: Any) -> Any:
    index = ctx.cast(bld, args[1], sig.args[1], types.intp)
    if sig.args[0].dtype == types.uint16:
        first, second = (bld.zext(emit_narrow(ctx, bld, v), I32X16) for v in args[2:])
        pairs = bld.or_(first, bld.shl(second, i32_constant(16)))
        pointer = emit_vector_pointer(ctx, bld, sig.args[0], args[0], index, I32X16)
        bld.store(pairs, pointer, align=2)
    else:
        bld.store(
            args[2], emit_vector_pointer(ctx, bld, sig.args[0], args[0], index, F32X16), align=4
        )
    return ctx.get_dummy_value()


def first_of_words(x: np.ndarray, i: int) -> np.ndarray:
    """The first element of each of the 16 words from x[i] on, as f32x16."""
    return as_f32(x[i : i + 2 * W : 2] if x.dtype == np.uint16 else x[i : i + W]).copy()


@llvm_body(first_of_words, lambda x, i: f32x16 if is_memory(x) else None)
def _(ctx: Any, bld: ir.IRBuilder, sig: Any, args: Any) -> Any:
    index = ctx.cast(bld, args[1], sig.args[1], types.intp)
    paired = sig.args[0].dtype == types.uint16
    pointer = emit_vector_pointer(
        ctx, bld, sig.args[0], args[0], index, I32X16 if paired else F32X16
    )
    words = bld.load(pointer, align=2 if paired else 4)
    return bld.bitcast(bld.shl(words, i32_constant(16)), F32X16) if paired else words


def second_of_words(x: np.ndarray, i: int) -> np.ndarray:
    """The second element of each of the 16 words (pairs of BF16) from x[i] on; 0 where x is f32."""
    return as_f32(x[i + 1 : i + 2 * W : 2]).copy() if x.dtype == np.uint16 else splat(0.0)


@llvm_body(second_of_words, lambda x, i: f32x16 if is_memory(x) else None)
def _(ctx: Any, bld: ir.IRBuilder, sig: Any, args: Any) -> Any:
    if sig.args[0].dtype != types.uint16:
        return ir.Constant(F32X16, [0.0] * W)
    index = ctx.cast(bld, args[1], sig.args[1], types.intp)
    words = bld.load(emit_vector_pointer(ctx, bld, sig.args[0], args[0], index, I32X16), align=2)
    return bld.bitcast(bld.and_(words, i32_constant(-65536)), F32X16)


def per_word(x: np.ndarray) -> int:
    """S: elements of x in a word of 4 bytes, 2 of BF16 or 1 of f32; a constant when compiled."""
    return 4 // x.itemsize


@llvm_body(per_word, lambda x: types.intp if is_memory(x) else None)
def _(ctx: Any, bld: ir.IRBuilder, sig: Any, args: Any) -> Any:
    return ir.Constant(ir.IntType(64), 2 if sig.args[0].dtype == types.uint16 else 1)
