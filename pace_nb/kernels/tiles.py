"""Register tiles: MR rows by NV vectors of float32 that stay in registers through a product.

A tile is a Numba value, each size a type of its own, so the accumulators of a matrix product are
named by one variable and still never leave their registers.

Values
    Tile     MR rows by NV vectors of float32 accumulators: MR NV + NV + 1 <= 32 registers; where a
             vector takes two of them, 2 (MR NV + NV) + 1 <= 16
Memory
    flat, addressed by element offset, with a leading dimension where there are rows.
Cautions
    nothing is bounds-checked. Sizes are literal numbers. The NumPy bodies of dot products round
    twice in rare cases, as that of `lanes.fma`.
Source: the tile as a value type was proven in a spike (230 of 232 GFLOP/s on one Zen 4 core).
Notebook: 03 GEMM ladder. Ledger: lanes.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import models, register_model

from pace_nb.kernels import jit
from pace_nb.kernels.bf16 import as_f32, as_stored
from pace_nb.kernels.lanes import maximum, reduce_max
from pace_nb.kernels.llvm_body import (
    F32,
    F32X16,
    I16X16,
    I32,
    I32X16,
    W,
    bf16x32,
    emit_dot_pairs,
    emit_even,
    emit_fma,
    emit_load_first,
    emit_load_here,
    emit_narrow,
    emit_odd,
    emit_pointer,
    emit_splat,
    emit_store_first,
    emit_vector_pointer,
    f32x16,
    is_bf16_memory,
    is_memory,
    llvm_body,
)
from pace_nb.kernels.words import dot_pairs, splat_pair

# Vectors of a tile of six rows. 32 registers hold 6 x 4 accumulators, 4 vectors of B and 1 of A; 16
# narrower ones, of which a vector takes two, hold 6 x 2, 2 and 1.
NV = 4 if jit.WIDE else 1


# ---- the type ------------------------------------------------------------------------------------
class TileType(types.Type):
    """MR rows by NV vectors of float32; each size is its own type, so a tile lives in registers."""

    def __init__(self, mr: int, nv: int) -> None:
        self.mr, self.nv = mr, nv
        super().__init__(name=f"Tile({mr},{nv})")


@register_model(TileType)
class _TileModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Any) -> None:
        super().__init__(dmm, fe_type, ir.ArrayType(F32X16, fe_type.mr * fe_type.nv))


# ---- operations ----------------------------------------------------------------------------------
def _tile_of(mr: Any, nv: Any, *rest: Any) -> Any:
    literal = all(isinstance(s, types.IntegerLiteral) for s in (mr, nv))
    return TileType(mr.literal_value, nv.literal_value) if literal else None


def _same_tile(acc: Any, *rest: Any) -> Any:
    return acc if isinstance(acc, TileType) else None


def _tile_to_void(acc: Any, *rest: Any) -> Any:
    return types.void if isinstance(acc, TileType) else None


def tile_zeros(mr: int, nv: int) -> np.ndarray:
    """Tile of mr rows and nv vectors, all zero; mr and nv are literal numbers."""
    return np.zeros((mr, nv * W), np.float32)


@llvm_body(tile_zeros, _tile_of)
def _(ctx: Any, bld: ir.IRBuilder, sig: Any, args: Any) -> Any:
    tile = sig.return_type
    return ir.Constant(ir.ArrayType(F32X16, tile.mr * tile.nv), None)


def tile_load(mr: int, nv: int, c: np.ndarray, c0: int, ldc: int) -> np.ndarray:
    """Tile with row i = c[c0 + i * ldc : ...], float32; ldc = 0 puts one row (a bias) in each."""
    return np.stack([c[c0 + i * ldc : c0 + i * ldc + nv * W] for i in range(mr)])


def tile_load_tail(mr: int, nv: int, c: np.ndarray, c0: int, ldc: int, n: int) -> np.ndarray:
    """As tile_load, but only the first n columns of a row (0 <= n <= 16 * nv), zero elsewhere."""
    acc = np.zeros((mr, nv * W), np.float32)
    for i in range(mr):
        acc[i, :n] = c[c0 + i * ldc : c0 + i * ldc + n]
    return acc


def _is_f32_memory(x: Any) -> bool:
    return is_memory(x) and x.dtype == types.float32


def _load_tile(ctx: Any, bld: ir.IRBuilder, sig: Any, args: Any) -> Any:
    tile, memory = sig.return_type, sig.args[2]
    row, ld = (ctx.cast(bld, args[k], sig.args[k], types.intp) for k in (3, 4))
    n = ctx.cast(bld, args[5], sig.args[5], types.intp) if len(args) == 6 else None
    value = ir.Constant(ir.ArrayType(F32X16, tile.mr * tile.nv), ir.Undefined)
    for i in range(tile.mr):
        for j in range(tile.nv):
            at = bld.add(row, ir.Constant(row.type, W * j))
            pointer = emit_vector_pointer(ctx, bld, memory, args[2], at, F32X16)
            if n is None:
                v = bld.load(pointer, align=4)
            else:
                lanes = bld.sub(n, ir.Constant(n.type, W * j))
                v = emit_load_first(ctx, bld, pointer, F32X16, lanes)
            value = bld.insert_value(value, v, i * tile.nv + j)
        row = bld.add(row, ld)
    return value


llvm_body(tile_load, lambda mr, nv, c, *rest: _tile_of(mr, nv) if _is_f32_memory(c) else None)(
    _load_tile
)
llvm_body(tile_load_tail, lambda mr, nv, c, *rest: _tile_of(mr, nv) if _is_f32_memory(c) else None)(
    _load_tile
)


def tile_store(acc: np.ndarray, c: np.ndarray, c0: int, ldc: int) -> None:
    """c[c0 + i * ldc : ...] = row i, rounded to BF16 where c is uint16."""
    for i in range(acc.shape[0]):
        c[c0 + i * ldc : c0 + i * ldc + acc.shape[1]] = as_stored(acc[i], c.dtype)


def tile_store_tail(acc: np.ndarray, c: np.ndarray, c0: int, ldc: int, n: int) -> None:
    """As tile_store, but only the first n columns of each row (0 <= n <= 16 * nv)."""
    for i in range(acc.shape[0]):
        c[c0 + i * ldc : c0 + i * ldc + n] = as_stored(acc[i, :n], c.dtype)


def _store_tile(ctx: Any, bld: ir.IRBuilder, sig: Any, args: Any) -> Any:
    tile, memory = sig.args[0], sig.args[1]
    row, ld = (ctx.cast(bld, args[k], sig.args[k], types.intp) for k in (2, 3))
    n = ctx.cast(bld, args[4], sig.args[4], types.intp) if len(args) == 5 else None
    llvm, align = (I16X16, 2) if memory.dtype == types.uint16 else (F32X16, 4)
    for i in range(tile.mr):
        for j in range(tile.nv):
            at = bld.add(row, ir.Constant(row.type, W * j))
            pointer = emit_vector_pointer(ctx, bld, memory, args[1], at, llvm)
            v = bld.extract_value(args[0], i * tile.nv + j)
            v = emit_narrow(ctx, bld, v) if memory.dtype == types.uint16 else v
            if n is None:
                bld.store(v, pointer, align=align)
            else:
                emit_store_first(ctx, bld, pointer, v, bld.sub(n, ir.Constant(n.type, W * j)))
        row = bld.add(row, ld)
    return ctx.get_dummy_value()


llvm_body(tile_store, _tile_to_void)(_store_tile)
llvm_body(tile_store_tail, _tile_to_void)(_store_tile)


def tile_scale_rows(acc: np.ndarray, s: np.ndarray, s0: int) -> np.ndarray:
    """Row i times s[s0 + i] (float32)."""
    return acc * s[s0 : s0 + acc.shape[0], None]


@llvm_body(tile_scale_rows, _same_tile)
def _(ctx: Any, bld: ir.IRBuilder, sig: Any, args: Any) -> Any:
    tile, value = sig.args[0], args[0]
    start = ctx.cast(bld, args[2], sig.args[2], types.intp)
    for i in range(tile.mr):
        at = bld.add(start, ir.Constant(start.type, i))
        factor = emit_splat(bld, bld.load(emit_pointer(ctx, bld, sig.args[1], args[1], at)))
        for j in range(tile.nv):
            k = i * tile.nv + j
            value = bld.insert_value(value, bld.fmul(bld.extract_value(value, k), factor), k)
    return value


def tile_row_maxima(acc: np.ndarray) -> np.ndarray:
    """f32x16: lane i is the largest element of row i, for up to 8 rows; a NaN may be lost.

    The lanes beyond the rows begin with row 0 again.
    """
    largest = [reduce_max(functools.reduce(maximum, row.reshape(-1, W))) for row in acc]
    return np.array([largest[i % 8 % len(acc)] for i in range(W)], np.float32)


@llvm_body(
    tile_row_maxima, lambda acc: f32x16 if isinstance(acc, TileType) and acc.mr <= 8 else None
)
def _(ctx: Any, bld: ir.IRBuilder, sig: Any, args: Any) -> Any:
    """Each step halves what is left of the rows and puts two of them into one vector: first within
    quarters of a vector, where lanes move fastest."""
    tile = sig.args[0]

    def larger(a: Any, b: Any) -> Any:
        return bld.select(bld.fcmp_ordered(">", a, b), a, b)

    def halved(a: Any, b: Any, low: list[int], apart: int) -> Any:
        indices = (low, [x + apart for x in low])
        return larger(*(bld.shuffle_vector(a, b, ir.Constant(I32X16, x)) for x in indices))

    rows: list[Any] = []
    for i in range(8):
        row = i % tile.mr * tile.nv
        vectors = [bld.extract_value(args[0], row + j) for j in range(tile.nv)]
        rows.append(rows[row // tile.nv] if i >= tile.mr else functools.reduce(larger, vectors))
    quarters = range(0, W, 4)
    low = [q + x for q in quarters for x in (0, W, 1, W + 1)]  # a0 b0 a1 b1, then a2 b2 a3 b3
    rows = [halved(a, b, low, 2) for a, b in zip(rows[::2], rows[1::2], strict=True)]
    low = [q + x for q in quarters for x in (0, 1, W, W + 1)]  # a b c d of each quarter
    rows = [halved(a, b, low, 2) for a, b in zip(rows[::2], rows[1::2], strict=True)]
    both = halved(rows[0], rows[1], [*range(8), *range(W, W + 8)], 8)
    return halved(both, both, [*range(4), *range(8, 12)] * 2, 4)


def tile_dot(
    acc: np.ndarray,
    a: np.ndarray,
    a0: int,
    lda: int,
    b: np.ndarray,
    b0: int,
    ldb: int,
    step: int = 1,
) -> np.ndarray:
    """One step along K: acc[i, 16 j + lane] += A[i, k] * B[k, 16 j + lane].

    B of float32: one k; A[i, 0] = a[a0 + i * lda], B vector j = b[b0 + j * ldb : + 16].
    B of BF16:    a pair of k; A[i] = a[a0 + i * lda], a[a0 + i * lda + step], B vector j =
                  b[b0 + j * ldb : + 32] as pairs (`dot_pairs`). A is BF16 and step 1, or A has the
                  same values as float32: without vdpbf16ps that saves taking pairs apart.
    """
    columns = tuple(b0 + j * ldb for j in range(acc.shape[1] // W))
    return _dot(acc, a, a0, lda, b, columns, step)


def tile_dot_apart(
    acc: np.ndarray,
    a: np.ndarray,
    a0: int,
    lda: int,
    b: np.ndarray,
    b0: tuple[int, ...],
    offset: int,
) -> np.ndarray:
    """As tile_dot, with B vector j at b[b0[j] + offset : ...]: one start per vector."""
    return _dot(acc, a, a0, lda, b, tuple(i + offset for i in b0[: acc.shape[1] // W]), 1)


def _dot(
    acc: np.ndarray,
    a: np.ndarray,
    a0: int,
    lda: int,
    b: np.ndarray,
    starts: tuple[int, ...],
    step: int,
) -> np.ndarray:
    s = 2 if b.dtype == np.uint16 else 1
    mr, nv = acc.shape[0], acc.shape[1] // W
    words = np.stack([b[i : i + s * W] for i in starts])
    x = as_f32(np.array([a[a0 + i * lda : a0 + i * lda + s * step : step] for i in range(mr)]))
    y = as_f32(words).reshape(1, nv * W, s)
    x, y = x.reshape(mr, 1, s).astype(np.float64), y.astype(np.float64)
    for e in reversed(range(s)):  # of a pair the odd element first, as in dot_pairs
        acc = (acc + x[..., e] * y[..., e]).astype(np.float32)
    return acc


def _dot_step(
    ctx: Any, bld: ir.IRBuilder, sig: Any, args: Any, starts: list[Any], step: Any
) -> Any:
    """The tile args[0] after one step along K; `starts` are the offsets of the B vectors, `step`
    is how far the elements of a pair of A lie apart."""
    row, ld = (ctx.cast(bld, args[k], sig.args[k], types.intp) for k in (2, 3))
    paired = sig.args[4].dtype == types.uint16
    llvm, align = (I32X16, 2) if paired else (F32X16, 4)
    pointers = [emit_vector_pointer(ctx, bld, sig.args[4], args[4], at, llvm) for at in starts]
    rows = [bld.add(row, bld.mul(ld, ir.Constant(ld.type, i))) for i in range(sig.args[0].mr)]

    def load_columns() -> list[Any]:
        return [bld.load(pointer, align=align) for pointer in pointers]

    def splat(at: Any, llvm: ir.Type) -> Any:
        pointer = emit_vector_pointer(ctx, bld, sig.args[1], args[1], at, llvm)
        return emit_splat(bld, bld.load(pointer, align=sig.args[1].dtype.bitwidth // 8))

    def fma(value: Any, k: int, x: Any, y: Any) -> Any:
        return bld.insert_value(value, emit_fma(ctx, bld, x, y, bld.extract_value(value, k)), k)

    value, nv = args[0], sig.args[0].nv
    if paired and jit.WIDE:
        columns = load_columns()
        for i, at in enumerate(rows):
            v = splat(at, I32)
            for j in range(nv):
                k = i * nv + j
                acc = emit_dot_pairs(ctx, bld, bld.extract_value(value, k), v, columns[j])
                value = bld.insert_value(value, acc, k)
    elif paired:
        # All rows' odd elements, then all even ones. B is read for each, and not before: otherwise
        # the pairs would stay in registers beside their halves, and push accumulators out. The
        # shorter side of the tile waits in registers for the longer one.
        mr = len(rows)
        for half in (emit_odd, emit_even):

            def x(i: int, half: Any = half) -> Any:
                if sig.args[1].dtype == types.uint16:
                    return half(bld, splat(rows[i], I32))
                return splat(bld.add(rows[i], step) if half is emit_odd else rows[i], F32)

            def y(j: int, half: Any = half) -> Any:
                return half(bld, emit_load_here(bld, pointers[j], align))

            if nv > mr:
                xs = [x(i) for i in range(mr)]
                for j in range(nv):
                    column = y(j)
                    for i in range(mr):
                        value = fma(value, i * nv + j, xs[i], column)
            else:
                ys = [y(j) for j in range(nv)]
                for i in range(mr):
                    row_element = x(i)
                    for j in range(nv):
                        value = fma(value, i * nv + j, row_element, ys[j])
    else:
        columns = load_columns()
        for i, at in enumerate(rows):
            x = splat(at, F32)
            for j in range(nv):
                value = fma(value, i * nv + j, x, columns[j])
    return value


def _tile_dot_type(acc: Any, a: Any, a0: Any, lda: Any, b: Any, *rest: Any) -> Any:
    ours = isinstance(acc, TileType) and is_memory(a) and is_memory(b)
    if not ours or (a.dtype == types.uint16 and len(rest) == 3):  # pairs of A lie together
        return None
    return acc if a.dtype == b.dtype or _is_widened(a, b) else None


def _is_widened(a: Any, b: Any) -> bool:
    """Is A float32 where B is BF16? That is for CPUs with few registers and no vdpbf16ps."""
    return not jit.WIDE and (a.dtype, b.dtype) == (types.float32, types.uint16)


@llvm_body(tile_dot, _tile_dot_type)
def _(ctx: Any, bld: ir.IRBuilder, sig: Any, args: Any) -> Any:
    col, ldb = (ctx.cast(bld, args[k], sig.args[k], types.intp) for k in (5, 6))
    starts = [bld.add(col, bld.mul(ldb, ir.Constant(ldb.type, j))) for j in range(sig.args[0].nv)]
    step = ir.Constant(col.type, 1)
    if len(args) == 8:
        step = ctx.cast(bld, args[7], sig.args[7], types.intp)
    return _dot_step(ctx, bld, sig, args, starts, step)


def _tile_dot_apart_type(acc: Any, a: Any, a0: Any, lda: Any, b: Any, b0: Any, offset: Any) -> Any:
    starts = isinstance(b0, types.UniTuple) and b0.dtype == types.intp
    known = starts and _tile_dot_type(acc, a, a0, lda, b, b0, offset) is not None
    return acc if known and b0.count >= acc.nv else None


@llvm_body(tile_dot_apart, _tile_dot_apart_type)
def _(ctx: Any, bld: ir.IRBuilder, sig: Any, args: Any) -> Any:
    offset = ctx.cast(bld, args[6], sig.args[6], types.intp)
    starts = [bld.add(bld.extract_value(args[5], j), offset) for j in range(sig.args[0].nv)]
    return _dot_step(ctx, bld, sig, args, starts, ir.Constant(offset.type, 1))


def tile_dot_pairs(
    acc: np.ndarray,
    a: np.ndarray,
    a0: int,
    lda: int,
    b0: np.ndarray,
    b1: np.ndarray,
    b2: np.ndarray,
    b3: np.ndarray,
) -> np.ndarray:
    """As `tile_dot` for a tile of four vectors, with the pairs of B in registers: b0 to b3."""
    acc = acc.copy()
    for j, b in enumerate((b0, b1, b2, b3)):
        for i in range(acc.shape[0]):
            columns = slice(j * W, (j + 1) * W)
            acc[i, columns] = dot_pairs(acc[i, columns], splat_pair(a, a0 + i * lda), b)
    return acc


def _tile_dot_pairs_type(acc: Any, a: Any, a0: Any, lda: Any, *b: Any) -> Any:
    ours = isinstance(acc, TileType) and acc.nv == 4 and is_bf16_memory(a)
    return acc if ours and len(b) == 4 and all(v == bf16x32 for v in b) else None


@llvm_body(tile_dot_pairs, _tile_dot_pairs_type)
def _(ctx: Any, bld: ir.IRBuilder, sig: Any, args: Any) -> Any:
    tile, value = sig.args[0], args[0]
    row, ld = (ctx.cast(bld, args[k], sig.args[k], types.intp) for k in (2, 3))
    for i in range(tile.mr):
        pair = bld.load(emit_vector_pointer(ctx, bld, sig.args[1], args[1], row, I32), align=2)
        v = emit_splat(bld, pair)
        for j in range(4):
            k = i * 4 + j
            acc = emit_dot_pairs(ctx, bld, bld.extract_value(value, k), v, args[4 + j])
            value = bld.insert_value(value, acc, k)
        row = bld.add(row, ld)
    return value
