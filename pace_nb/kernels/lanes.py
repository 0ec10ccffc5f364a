"""The vocabulary of the kernels: vectors of 16 lanes, operations with two bodies.

A vector is loaded, combined lane by lane, and stored or reduced to one number. Both bodies of an
operation (see llvm_body.py) give the same bits, but for `fma`, whose NumPy body rounds twice in
rare cases (NumPy has no fused multiply-add).

Values
    f32x16   16 float32 lanes; + - * / and - work on it
    i32x16   16 int32 lanes
Memory
    flat arrays of `float32`, or of `uint16`, which is BF16. `load`/`store` convert, so one kernel
    source serves both storage types.
Cautions
    nothing is bounds-checked; `*_tail(..., n)` touches only the first n lanes (0 <= n <= 16).
Source: two bodies follow Triton's interpreter mode. Notebook: 01 lanes. Ledger: lanes.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import lower_builtin

from pace_nb.kernels.bf16 import as_f32, as_stored
from pace_nb.kernels.llvm_body import (
    BF16X16,
    F32X16,
    I16,
    I16X16,
    I32,
    I32X16,
    IOTA,
    Emit,
    W,
    emit_call,
    emit_fma,
    emit_load_first,
    emit_narrow,
    emit_splat,
    emit_store_first,
    emit_vector_pointer,
    emit_widen,
    f32x16,
    has,
    i32_constant,
    i32x16,
    is_memory,
    llvm_body,
)


# ---- memory --------------------------------------------------------------------------------------
def splat(x: float | np.floating[Any]) -> np.ndarray:
    """f32x16 with `x` in every lane."""
    return np.full(W, x, np.float32)


@llvm_body(splat, lambda x: f32x16 if isinstance(x, (types.Number, types.Literal)) else None)
def _(ctx: Any, bld: ir.IRBuilder, sig: Any, args: Any) -> Any:
    return emit_splat(bld, ctx.cast(bld, args[0], sig.args[0], types.float32))


def load(x: np.ndarray, i: int) -> np.ndarray:
    """x[i : i + 16] as f32x16; uint16 is read as BF16."""
    return as_f32(x[i : i + W]).copy()


@llvm_body(load, lambda x, i: f32x16 if is_memory(x) else None)
def _(ctx: Any, bld: ir.IRBuilder, sig: Any, args: Any) -> Any:
    index = ctx.cast(bld, args[1], sig.args[1], types.intp)
    if sig.args[0].dtype == types.uint16:
        return emit_widen(
            bld,
            bld.load(emit_vector_pointer(ctx, bld, sig.args[0], args[0], index, I16X16), align=2),
        )
    return bld.load(emit_vector_pointer(ctx, bld, sig.args[0], args[0], index, F32X16), align=4)


def load_tail(x: np.ndarray, i: int, n: int) -> np.ndarray:
    """The first n lanes of x[i:], zero in the others, whose memory is not touched."""
    v = np.zeros(W, np.float32)
    v[:n] = as_f32(x[i : i + n])
    return v


@llvm_body(load_tail, lambda x, i, n: f32x16 if is_memory(x) else None)
def _(ctx: Any, bld: ir.IRBuilder, sig: Any, args: Any) -> Any:
    index = ctx.cast(bld, args[1], sig.args[1], types.intp)
    n = ctx.cast(bld, args[2], sig.args[2], types.intp)
    if sig.args[0].dtype == types.uint16:
        pointer = emit_vector_pointer(ctx, bld, sig.args[0], args[0], index, I16X16)
        return emit_widen(bld, emit_load_first(ctx, bld, pointer, I16X16, n))
    pointer = emit_vector_pointer(ctx, bld, sig.args[0], args[0], index, F32X16)
    return emit_load_first(ctx, bld, pointer, F32X16, n)


def store(x: np.ndarray, i: int, v: np.ndarray) -> None:
    """x[i : i + 16] = v, rounded to BF16 where x is uint16."""
    x[i : i + W] = as_stored(v, x.dtype)


def _store_type(x: Any, i: Any, v: Any, n: Any = None) -> Any:
    return types.void if is_memory(x) and v == f32x16 else None


@llvm_body(store, _store_type)
def _(ctx: Any, bld: ir.IRBuilder, sig: Any, args: Any) -> Any:
    index = ctx.cast(bld, args[1], sig.args[1], types.intp)
    if sig.args[0].dtype == types.uint16:
        pointer = emit_vector_pointer(ctx, bld, sig.args[0], args[0], index, I16X16)
        bld.store(emit_narrow(ctx, bld, args[2]), pointer, align=2)
    else:
        bld.store(
            args[2], emit_vector_pointer(ctx, bld, sig.args[0], args[0], index, F32X16), align=4
        )
    return ctx.get_dummy_value()


def store_tail(x: np.ndarray, i: int, v: np.ndarray, n: int) -> None:
    """Store the first n lanes of v to x[i:]; the memory of the others is not touched."""
    x[i : i + n] = as_stored(v, x.dtype)[:n]


@llvm_body(store_tail, _store_type)
def _(ctx: Any, bld: ir.IRBuilder, sig: Any, args: Any) -> Any:
    index = ctx.cast(bld, args[1], sig.args[1], types.intp)
    n = ctx.cast(bld, args[3], sig.args[3], types.intp)
    if sig.args[0].dtype == types.uint16:
        pointer = emit_vector_pointer(ctx, bld, sig.args[0], args[0], index, I16X16)
        emit_store_first(ctx, bld, pointer, emit_narrow(ctx, bld, args[2]), n)
    else:
        pointer = emit_vector_pointer(ctx, bld, sig.args[0], args[0], index, F32X16)
        emit_store_first(ctx, bld, pointer, args[2], n)
    return ctx.get_dummy_value()


def store_operand(x: np.ndarray, i: int, v: np.ndarray) -> None:
    """As `store`, for values that only a dot product will read: denormals may become zeros."""
    store(x, i, v)


@llvm_body(store_operand, _store_type)
def _(ctx: Any, bld: ir.IRBuilder, sig: Any, args: Any) -> Any:
    index = ctx.cast(bld, args[1], sig.args[1], types.intp)
    if sig.args[0].dtype == types.uint16:
        pointer = emit_vector_pointer(ctx, bld, sig.args[0], args[0], index, I16X16)
        if has(ctx, "avx512f", "avx512bf16"):
            name = "llvm.x86.avx512bf16.cvtneps2bf16.512"
            narrowed = bld.bitcast(emit_call(bld, name, BF16X16, args[2]), I16X16)
        else:
            narrowed = emit_narrow(ctx, bld, args[2])
        bld.store(narrowed, pointer, align=2)
    else:
        bld.store(
            args[2], emit_vector_pointer(ctx, bld, sig.args[0], args[0], index, F32X16), align=4
        )
    return ctx.get_dummy_value()


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c, rounded once (a CPU without the instruction rounds twice)."""
    return (a.astype(np.float64) * b + c).astype(np.float32)


def _all_f32x16(*args: Any) -> Any:
    return f32x16 if all(a == f32x16 for a in args) else None


@llvm_body(fma, _all_f32x16)
def _(ctx: Any, bld: ir.IRBuilder, sig: Any, args: Any) -> Any:
    return emit_fma(ctx, bld, *args)


def _register_arithmetic() -> None:
    """a + b, a - b, a * b, a / b, -a on f32x16 need no NumPy body; here are the LLVM ones."""

    def binary(emit_name: str) -> Emit:
        return lambda ctx, bld, sig, args: getattr(bld, emit_name)(*args)

    for op, emit_name in (
        (operator.add, "fadd"),
        (operator.sub, "fsub"),
        (operator.mul, "fmul"),
        (operator.truediv, "fdiv"),
    ):
        llvm_body(op, lambda a, b: f32x16 if a == f32x16 and b == f32x16 else None)
        lower_builtin(op, type(f32x16), type(f32x16))(binary(emit_name))
    llvm_body(operator.neg, lambda a: f32x16 if a == f32x16 else None)
    lower_builtin(operator.neg, type(f32x16))(lambda ctx, bld, sig, args: bld.fneg(args[0]))


_register_arithmetic()


def maximum(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a where a > b, else b: a NaN in `a` gives b, a NaN in `b` stays (as `vmaxps`)."""
    return np.where(a > b, a, b)


@llvm_body(maximum, _all_f32x16)
def _(ctx: Any, bld: ir.IRBuilder, sig: Any, args: Any) -> Any:
    return bld.select(bld.fcmp_ordered(">", *args), *args)


def minimum(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a where a < b, else b (as `vminps`)."""
    return np.where(a < b, a, b)


@llvm_body(minimum, _all_f32x16)
def _(ctx: Any, bld: ir.IRBuilder, sig: Any, args: Any) -> Any:
    return bld.select(bld.fcmp_ordered("<", *args), *args)


def select_above(
    v: np.ndarray, bound: np.ndarray, then: np.ndarray, other: np.ndarray
) -> np.ndarray:
    """`then` in the lanes where v > bound, `other` elsewhere (a NaN is not above)."""
    return np.where(v > bound, then, other)


@llvm_body(select_above, _all_f32x16)
def _(ctx: Any, bld: ir.IRBuilder, sig: Any, args: Any) -> Any:
    return bld.select(bld.fcmp_ordered(">", args[0], args[1]), args[2], args[3])


def keep_lanes(v: np.ndarray, first: int, end: int, other: np.ndarray) -> np.ndarray:
    """v in lanes first <= lane < end, `other` elsewhere; any integers, also outside 0..16."""
    lane = np.arange(W)
    return np.where((lane >= first) & (lane < end), v, other)


@llvm_body(keep_lanes, lambda v, first, end, other: _all_f32x16(v, other))
def _(ctx: Any, bld: ir.IRBuilder, sig: Any, args: Any) -> Any:
    intp = ir.IntType(64)
    bounds = []
    for k in (1, 2):
        i = ctx.cast(bld, args[k], sig.args[k], types.intp)
        low, high = ir.Constant(intp, 0), ir.Constant(intp, W)
        i = bld.select(bld.icmp_signed("<", i, low), low, i)
        i = bld.select(bld.icmp_signed(">", i, high), high, i)
        bounds.append(emit_splat(bld, bld.trunc(i, I32)))
    inside = bld.and_(bld.icmp_signed(">=", IOTA, bounds[0]), bld.icmp_signed("<", IOTA, bounds[1]))
    return bld.select(inside, args[0], args[3])


def round_half_even(v: np.ndarray) -> np.ndarray:
    """The nearest integer, halves to even, as float32; |v| < 2**22."""
    return np.rint(v)


@llvm_body(round_half_even, _all_f32x16)
def _(ctx: Any, bld: ir.IRBuilder, sig: Any, args: Any) -> Any:
    if has(ctx, "avx") or has(ctx, "sse4.1"):
        return emit_call(bld, "llvm.rint.v16f32", F32X16, args[0])
    # Adding and taking away 1.5 * 2**23 rounds to an integer; llvm.rint would call libm once per
    # lane here.
    magic = ir.Constant(F32X16, [12582912.0] * W)
    return bld.fsub(bld.fadd(args[0], magic), magic)


_CURRENT_ROUNDING = 4  # of LLVM's AVX-512 intrinsics: as the thread's control register says


def scale_pow2(v: np.ndarray, n: np.ndarray) -> np.ndarray:
    """v * 2**n for integral n in [-252, 254] and v of about 1 (0.5 <= |v| < 4), rounded once.

    Overflows to infinity, underflows gradually; a NaN n gives NaN.
    """
    with np.errstate(all="ignore"):
        whole = np.where(np.isnan(n), 0, n).astype(np.int32)
        return np.where(np.isnan(n), n, np.ldexp(v, whole)).astype(np.float32)


@llvm_body(scale_pow2, _all_f32x16)
def _(ctx: Any, bld: ir.IRBuilder, sig: Any, args: Any) -> Any:
    v, n = args
    if has(ctx, "avx512f"):
        name = "llvm.x86.avx512.mask.scalef.ps.512"
        none, every = ir.Constant(F32X16, ir.Undefined), ir.Constant(I16, -1)
        return emit_call(bld, name, F32X16, v, n, none, every, ir.Constant(I32, _CURRENT_ROUNDING))
    # 2**n as two factors, each built from exponent bits, so that 2**-140 and 2**128 need no special
    # case: the first product is exact, the second rounds once.
    is_nan = bld.fcmp_unordered("uno", n, n)
    whole = bld.fptosi(bld.select(is_nan, ir.Constant(F32X16, [0.0] * W), n), I32X16)
    half = bld.ashr(whole, i32_constant(1))
    for part in (half, bld.sub(whole, half)):
        factor = bld.bitcast(bld.shl(bld.add(part, i32_constant(127)), i32_constant(23)), F32X16)
        v = bld.fmul(v, factor)
    return bld.select(is_nan, n, v)


def sqrt(v: np.ndarray) -> np.ndarray:
    """Square root, correctly rounded."""
    with np.errstate(invalid="ignore"):
        return np.sqrt(v)


@llvm_body(sqrt, _all_f32x16)
def _(ctx: Any, bld: ir.IRBuilder, sig: Any, args: Any) -> Any:
    return emit_call(bld, "llvm.sqrt.v16f32", F32X16, args[0])


def absolute(v: np.ndarray) -> np.ndarray:
    """|v|."""
    return np.abs(v)


@llvm_body(absolute, _all_f32x16)
def _(ctx: Any, bld: ir.IRBuilder, sig: Any, args: Any) -> Any:
    return emit_call(bld, "llvm.fabs.v16f32", F32X16, args[0])


def reduce_add(v: np.ndarray) -> np.float32:
    """Sum of the lanes by halving (8 + 8, 4 + 4, 2 + 2, 1 + 1): one fixed order everywhere."""
    for half in (8, 4, 2, 1):
        v = v[:half] + v[half : 2 * half]
    return v[0]


def reduce_max(v: np.ndarray) -> np.float32:
    """Largest lane, by halving with `maximum`."""
    for half in (8, 4, 2, 1):
        v = maximum(v[:half], v[half : 2 * half])
    return v[0]


def _halving(bld: ir.IRBuilder, v: Any, combine: Callable[[Any, Any], Any]) -> Any:
    for half in (8, 4, 2, 1):
        undef = ir.Constant(v.type, ir.Undefined)
        index = ir.VectorType(I32, half)
        low = bld.shuffle_vector(v, undef, ir.Constant(index, list(range(half))))
        high = bld.shuffle_vector(v, undef, ir.Constant(index, list(range(half, 2 * half))))
        v = combine(low, high)
    return bld.extract_element(v, ir.Constant(I32, 0))


@llvm_body(reduce_add, lambda v: types.float32 if v == f32x16 else None)
def _(ctx: Any, bld: ir.IRBuilder, sig: Any, args: Any) -> Any:
    return _halving(bld, args[0], bld.fadd)


@llvm_body(reduce_max, lambda v: types.float32 if v == f32x16 else None)
def _(ctx: Any, bld: ir.IRBuilder, sig: Any, args: Any) -> Any:
    return _halving(bld, args[0], lambda a, b: bld.select(bld.fcmp_ordered(">", a, b), a, b))


def interleave(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a0, b0, a1, b1, .. a7, b7: the lower halves of a and b in turn."""
    return np.stack((a[:8], b[:8]), axis=1).reshape(W)


def swap_pairs(v: np.ndarray) -> np.ndarray:
    """v1, v0, v3, v2, .. v15, v14."""
    return v.reshape(8, 2)[:, ::-1].reshape(W)


@llvm_body(interleave, _all_f32x16)
def _(ctx: Any, bld: ir.IRBuilder, sig: Any, args: Any) -> Any:
    lanes = [i // 2 + i % 2 * W for i in range(W)]
    return bld.shuffle_vector(args[0], args[1], ir.Constant(I32X16, lanes))


@llvm_body(swap_pairs, _all_f32x16)
def _(ctx: Any, bld: ir.IRBuilder, sig: Any, args: Any) -> Any:
    lanes = [i ^ 1 for i in range(W)]
    return bld.shuffle_vector(args[0], args[0], ir.Constant(I32X16, lanes))


def prefetch(x: np.ndarray, i: int) -> None:
    """Ask for the cache line of x[i], into L2; any i, also outside the array. Nothing when
    interpreted. (L1 has few buffers for lines on their way, which loads and the hardware's own
    prefetching need: ledger, attention_decode.)"""


def prefetch_once(x: np.ndarray, i: int) -> None:
    """The same for a line that is read once: it should not displace what the caches hold."""


def _prefetch(keep: int) -> Emit:
    """LLVM's prefetch for reading data; `keep` 0: used once; 2: into L2, not L1."""

    def emit(ctx: Any, bld: ir.IRBuilder, sig: Any, args: Any) -> Any:
        index = ctx.cast(bld, args[1], sig.args[1], types.intp)
        pointer = emit_vector_pointer(ctx, bld, sig.args[0], args[0], index, ir.IntType(8))
        read, locality, data = (ir.Constant(I32, x) for x in (0, keep, 1))
        emit_call(bld, "llvm.prefetch.p0", ir.VoidType(), pointer, read, locality, data)
        return ctx.get_dummy_value()

    return emit


llvm_body(prefetch, lambda x, i: types.void if is_memory(x) else None)(_prefetch(2))
llvm_body(prefetch_once, lambda x, i: types.void if is_memory(x) else None)(_prefetch(0))


# ---- bits ----------------------------------------------------------------------------------------
def bits(v: np.ndarray) -> np.ndarray:
    """The lanes of f32x16 as i32x16, bit for bit."""
    return v.view(np.int32)


@llvm_body(bits, lambda v: i32x16 if v == f32x16 else None)
def _(ctx: Any, bld: ir.IRBuilder, sig: Any, args: Any) -> Any:
    return bld.bitcast(args[0], I32X16)


def from_bits(v: np.ndarray) -> np.ndarray:
    """The lanes of i32x16 as f32x16, bit for bit."""
    return v.view(np.float32)


@llvm_body(from_bits, lambda v: f32x16 if v == i32x16 else None)
def _(ctx: Any, bld: ir.IRBuilder, sig: Any, args: Any) -> Any:
    return bld.bitcast(args[0], F32X16)


def iota() -> np.ndarray:
    """i32x16 0, 1, .. 15."""
    return np.arange(W, dtype=np.int32)


@llvm_body(iota, lambda: i32x16)
def _(ctx: Any, bld: ir.IRBuilder, sig: Any, args: Any) -> Any:
    return IOTA
