"""The vocabulary of the kernels: 16-lane vectors and register tiles, operations with two bodies.

The NumPy body is the function you read here: it runs when kernels are interpreted
(`NUMBA_DISABLE_JIT=1`), can be stepped through and counted, and defines what the operation means.
The LLVM body beneath it is what a compiled kernel gets; both give the same bits, but for `fma` and
`tile_dot`, whose NumPy bodies round twice in rare cases (NumPy has no fused multiply-add).

Values
    f32x16   16 float32 lanes, one AVX-512 register (LLVM splits it where registers are narrower)
    i32x16   16 int32 lanes
    bf16x32  16 pairs of BF16, as they lie in memory (uint16); only ever an operand of a dot product
    word     4 bytes of memory: one float32, or a pair of BF16; what keys and values are stored as
    Tile     MR rows by NV vectors of float32 accumulators: MR * NV + NV + 1 <= 32 registers
Memory
    every array is flat (1-D, contiguous) and addressed by element offset; `float32` is itself,
    `uint16` is BF16. `load`/`store` convert, so one kernel source serves both storage types.
Cautions
    nothing is bounds-checked; `*_tail(..., n)` touches only the first n lanes (0 <= n <= 16).
    BF16 dot products: on CPUs with avx512bf16 `vdpbf16ps` flushes denormals to zero, the fallback
    keeps them.
Source: the tile as a value type was proven in a spike (230 of 232 GFLOP/s on one Zen 4 core); two
    bodies follow Triton's interpreter mode. Notebook: 01 lanes. Ledger: lanes.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.typing.templates import AbstractTemplate, infer, infer_global
from numba.extending import lower_builtin, models, register_model

W = 16  # float32 lanes in a vector: one 512-bit register

# ---- value types ---------------------------------------------------------------------------------


class _BF16(ir.types.Type):  # type: ignore[misc]
    """llvmlite has no bfloat; the name is all that the printed IR needs."""

    null = "0.0"

    def __str__(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BF16)

    def __hash__(self) -> int:
        return hash(_BF16)


_F32, _I32, _I16, _I1 = ir.FloatType(), ir.IntType(32), ir.IntType(16), ir.IntType(1)
_F32X16, _I32X16, _I16X16, _I1X16 = (ir.VectorType(t, W) for t in (_F32, _I32, _I16, _I1))
_BF16X32, _BF16X16 = ir.VectorType(_BF16(), 2 * W), ir.VectorType(_BF16(), W)
_IOTA = ir.Constant(_I32X16, list(range(W)))


class _VectorType(types.Type):
    def __init__(self, name: str, llvm: ir.Type) -> None:
        self.llvm = llvm
        super().__init__(name=name)


class _F32x16(_VectorType):
    pass


class _I32x16(_VectorType):
    pass


class _BF16x32(_VectorType):
    pass


f32x16 = _F32x16("f32x16", _F32X16)
i32x16 = _I32x16("i32x16", _I32X16)
bf16x32 = _BF16x32(
    "bf16x32", _I32X16
)  # 16 pairs, one per 32-bit lane; bitcast to bfloat at the dot product


class TileType(types.Type):
    """MR rows by NV vectors of float32; each size is its own type, so a tile lives in registers."""

    def __init__(self, mr: int, nv: int) -> None:
        self.mr, self.nv = mr, nv
        super().__init__(name=f"Tile({mr},{nv})")


@register_model(_F32x16)
@register_model(_I32x16)
@register_model(_BF16x32)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Any) -> None:
        super().__init__(dmm, fe_type, fe_type.llvm)


@register_model(TileType)
class _TileModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Any) -> None:
        super().__init__(dmm, fe_type, ir.ArrayType(_F32X16, fe_type.mr * fe_type.nv))


# ---- registering an LLVM body --------------------------------------------------------------------
Emit = Callable[[Any, ir.IRBuilder, Any, Any], Any]


def llvm_body(function: Any, returns: Callable[..., Any]) -> Callable[[Emit], Emit]:
    """Give `function` (a NumPy body, or an operator) an LLVM body.

    `returns(*argument_types)` is the result's type, or None where the types are not ours. Sizes
    written as numbers arrive as literal types, so `tile_zeros(6, 4)` knows its tile.
    """

    class Template(AbstractTemplate):
        key = function
        prefer_literal = True

        def generic(self, args: Any, kws: Any) -> Any:
            result = returns(*args) if not kws else None
            return None if result is None else result(*args)

    infer(Template)
    infer_global(function, types.Function(Template))

    def register(emit: Emit) -> Emit:
        lower_builtin(function, types.VarArg(types.Any))(emit)
        return emit

    return register


def _is_memory(t: Any) -> bool:
    return isinstance(t, types.Array) and t.ndim == 1 and t.dtype in (types.float32, types.uint16)


def _has(ctx: Any, *features: str) -> bool:
    """Does the machine that this code is compiled for have these features?"""
    listed = set(ctx.codegen()._tm_features.split(","))
    return all("+" + f in listed for f in features)


def _pointer(ctx: Any, bld: ir.IRBuilder, array_type: Any, array: Any, index: Any) -> Any:
    return bld.gep(ctx.make_array(array_type)(ctx, bld, array).data, [index])


def _vector_pointer(
    ctx: Any, bld: ir.IRBuilder, array_type: Any, array: Any, index: Any, llvm: ir.Type
) -> Any:
    return bld.bitcast(_pointer(ctx, bld, array_type, array, index), llvm.as_pointer())


def _call(bld: ir.IRBuilder, name: str, result: ir.Type, *args: Any) -> Any:
    function_type = ir.FunctionType(result, [a.type for a in args])
    return bld.call(cgutils.get_or_insert_function(bld.module, function_type, name), args)


def _splat(bld: ir.IRBuilder, scalar: Any) -> Any:
    undef = ir.Constant(ir.VectorType(scalar.type, W), ir.Undefined)
    one = bld.insert_element(undef, scalar, ir.Constant(_I32, 0))
    return bld.shuffle_vector(one, undef, ir.Constant(_I32X16, [0] * W))


def _i32_splat(value: int, n: int = W) -> Any:
    return ir.Constant(ir.VectorType(_I32, n), [value] * n)


def _first_lanes(bld: ir.IRBuilder, n: Any) -> Any:
    """Mask of the lanes below n (an intp)."""
    return bld.icmp_signed("<", _IOTA, _splat(bld, bld.trunc(n, _I32) if n.type.width > 32 else n))


def _fma(ctx: Any, bld: ir.IRBuilder, a: Any, b: Any, c: Any) -> Any:
    if _has(ctx, "fma") or _has(ctx, "avx512f"):
        return _call(bld, "llvm.fma.v16f32", _F32X16, a, b, c)
    return bld.fadd(
        bld.fmul(a, b), c
    )  # without the instruction llvm.fma would call libm once per lane


def _widen(bld: ir.IRBuilder, u16: Any) -> Any:
    """BF16 bits to float32: the upper half of the word."""
    return bld.bitcast(bld.shl(bld.zext(u16, _I32X16), _i32_splat(16)), _F32X16)


def _narrow(ctx: Any, bld: ir.IRBuilder, v: Any) -> Any:
    """float32 to BF16 bits, to nearest even, NaN to the quiet NaN of its sign (`bf16.from_f32`)."""
    n = v.type.count
    sixteen, one, almost_half, quiet_bit = (_i32_splat(c, n) for c in (16, 1, 0x7FFF, 0x40))
    bits = bld.bitcast(v, ir.VectorType(_I32, n))
    upper = bld.lshr(bits, sixteen)
    rounded = bld.lshr(bld.add(bits, bld.add(bld.and_(upper, one), almost_half)), sixteen)
    chosen = bld.select(bld.fcmp_unordered("uno", v, v), bld.or_(upper, quiet_bit), rounded)
    return bld.trunc(chosen, ir.VectorType(_I16, n))


# ---- vectors -------------------------------------------------------------------------------------
def _as_f32(stored: np.ndarray) -> np.ndarray:
    return (
        (stored.astype(np.uint32) << 16).view(np.float32) if stored.dtype == np.uint16 else stored
    )


def _as_stored(v: np.ndarray, dtype: np.dtype) -> np.ndarray:
    if dtype != np.uint16:
        return v
    u = v.view(np.uint32)
    rounded = (u + (0x7FFF + ((u >> 16) & 1))) >> 16
    return np.where(np.isnan(v), (u >> 16) | 0x40, rounded).astype(np.uint16)


def splat(x: float | np.floating[Any]) -> np.ndarray:
    """f32x16 with `x` in every lane."""
    return np.full(W, x, np.float32)


@llvm_body(splat, lambda x: f32x16 if isinstance(x, (types.Number, types.Literal)) else None)
def _(ctx: Any, bld: ir.IRBuilder, sig: Any, args: Any) -> Any:
    return _splat(bld, ctx.cast(bld, args[0], sig.args[0], types.float32))


def load(x: np.ndarray, i: int) -> np.ndarray:
    """x[i : i + 16] as f32x16; uint16 is read as BF16."""
    return _as_f32(x[i : i + W]).copy()


@llvm_body(load, lambda x, i: f32x16 if _is_memory(x) else None)
def _(ctx: Any, bld: ir.IRBuilder, sig: Any, args: Any) -> Any:
    index = ctx.cast(bld, args[1], sig.args[1], types.intp)
    if sig.args[0].dtype == types.uint16:
        return _widen(
            bld, bld.load(_vector_pointer(ctx, bld, sig.args[0], args[0], index, _I16X16), align=2)
        )
    return bld.load(_vector_pointer(ctx, bld, sig.args[0], args[0], index, _F32X16), align=4)


def load_tail(x: np.ndarray, i: int, n: int) -> np.ndarray:
    """The first n lanes of x[i:], zero in the others, whose memory is not touched."""
    v = np.zeros(W, np.float32)
    v[:n] = _as_f32(x[i : i + n])
    return v


def _lanes_in_use(bld: ir.IRBuilder, n: Any) -> Any:
    """n (an intp) cut to 0 .. 16."""
    low, high = ir.Constant(n.type, 0), ir.Constant(n.type, W)
    n = bld.select(bld.icmp_signed("<", n, low), low, n)
    return bld.select(bld.icmp_signed(">", n, high), high, n)


def _copy_lanes(bld: ir.IRBuilder, source: Any, target: Any, n: Any) -> None:
    """Copy n elements in a loop: without AVX-512 LLVM makes a masked access 16 branches."""
    with cgutils.for_range(bld, _lanes_in_use(bld, n)) as loop:
        bld.store(bld.load(bld.gep(source, [loop.index])), bld.gep(target, [loop.index]))


def _load_first(ctx: Any, bld: ir.IRBuilder, pointer: Any, llvm: ir.VectorType, n: Any) -> Any:
    """The first n lanes (n an intp) at `pointer`, zero in the others; only those n are read."""
    if _has(ctx, "avx512f", "avx512bw"):
        name = f"llvm.masked.load.v{W}{'f32' if llvm == _F32X16 else 'i16'}.p0"
        align = ir.Constant(_I32, 4 if llvm == _F32X16 else 2)
        return _call(bld, name, llvm, pointer, align, _first_lanes(bld, n), ir.Constant(llvm, None))
    buffer = cgutils.alloca_once(bld, llvm)
    bld.store(ir.Constant(llvm, None), buffer)
    scalar = llvm.element.as_pointer()
    _copy_lanes(bld, bld.bitcast(pointer, scalar), bld.bitcast(buffer, scalar), n)
    return bld.load(buffer)


def _store_first(ctx: Any, bld: ir.IRBuilder, pointer: Any, v: Any, n: Any) -> None:
    """Store the first n lanes (n an intp) of v at `pointer`; only those n are written."""
    if _has(ctx, "avx512f", "avx512bw"):
        name = f"llvm.masked.store.v{W}{'f32' if v.type == _F32X16 else 'i16'}.p0"
        align = ir.Constant(_I32, 4 if v.type == _F32X16 else 2)
        _call(bld, name, ir.VoidType(), v, pointer, align, _first_lanes(bld, n))
        return
    buffer = cgutils.alloca_once(bld, v.type)
    bld.store(v, buffer)
    scalar = v.type.element.as_pointer()
    _copy_lanes(bld, bld.bitcast(buffer, scalar), bld.bitcast(pointer, scalar), n)


@llvm_body(load_tail, lambda x, i, n: f32x16 if _is_memory(x) else None)
def _(ctx: Any, bld: ir.IRBuilder, sig: Any, args: Any) -> Any:
    index = ctx.cast(bld, args[1], sig.args[1], types.intp)
    n = ctx.cast(bld, args[2], sig.args[2], types.intp)
    if sig.args[0].dtype == types.uint16:
        pointer = _vector_pointer(ctx, bld, sig.args[0], args[0], index, _I16X16)
        return _widen(bld, _load_first(ctx, bld, pointer, _I16X16, n))
    pointer = _vector_pointer(ctx, bld, sig.args[0], args[0], index, _F32X16)
    return _load_first(ctx, bld, pointer, _F32X16, n)


def store(x: np.ndarray, i: int, v: np.ndarray) -> None:
    """x[i : i + 16] = v, rounded to BF16 where x is uint16."""
    x[i : i + W] = _as_stored(v, x.dtype)


def _store_type(x: Any, i: Any, v: Any, n: Any = None) -> Any:
    return types.void if _is_memory(x) and v == f32x16 else None


@llvm_body(store, _store_type)
def _(ctx: Any, bld: ir.IRBuilder, sig: Any, args: Any) -> Any:
    index = ctx.cast(bld, args[1], sig.args[1], types.intp)
    if sig.args[0].dtype == types.uint16:
        pointer = _vector_pointer(ctx, bld, sig.args[0], args[0], index, _I16X16)
        bld.store(_narrow(ctx, bld, args[2]), pointer, align=2)
    else:
        bld.store(args[2], _vector_pointer(ctx, bld, sig.args[0], args[0], index, _F32X16), align=4)
    return ctx.get_dummy_value()


def store_tail(x: np.ndarray, i: int, v: np.ndarray, n: int) -> None:
    """Store the first n lanes of v to x[i:]; the memory of the others is not touched."""
    x[i : i + n] = _as_stored(v, x.dtype)[:n]


@llvm_body(store_tail, _store_type)
def _(ctx: Any, bld: ir.IRBuilder, sig: Any, args: Any) -> Any:
    index = ctx.cast(bld, args[1], sig.args[1], types.intp)
    n = ctx.cast(bld, args[3], sig.args[3], types.intp)
    if sig.args[0].dtype == types.uint16:
        pointer = _vector_pointer(ctx, bld, sig.args[0], args[0], index, _I16X16)
        _store_first(ctx, bld, pointer, _narrow(ctx, bld, args[2]), n)
    else:
        pointer = _vector_pointer(ctx, bld, sig.args[0], args[0], index, _F32X16)
        _store_first(ctx, bld, pointer, args[2], n)
    return ctx.get_dummy_value()


def store_operand(x: np.ndarray, i: int, v: np.ndarray) -> None:
    """As `store`, for values that only a dot product will read: denormals may become zeros."""
    store(x, i, v)


@llvm_body(store_operand, _store_type)
def _(ctx: Any, bld: ir.IRBuilder, sig: Any, args: Any) -> Any:
    index = ctx.cast(bld, args[1], sig.args[1], types.intp)
    if sig.args[0].dtype == types.uint16:
        pointer = _vector_pointer(ctx, bld, sig.args[0], args[0], index, _I16X16)
        if _has(ctx, "avx512f", "avx512bf16"):
            name = "llvm.x86.avx512bf16.cvtneps2bf16.512"
            narrowed = bld.bitcast(_call(bld, name, _BF16X16, args[2]), _I16X16)
        else:
            narrowed = _narrow(ctx, bld, args[2])
        bld.store(narrowed, pointer, align=2)
    else:
        bld.store(args[2], _vector_pointer(ctx, bld, sig.args[0], args[0], index, _F32X16), align=4)
    return ctx.get_dummy_value()


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c, rounded once (a CPU without the instruction rounds twice)."""
    return (a.astype(np.float64) * b + c).astype(np.float32)


def _all_f32x16(*args: Any) -> Any:
    return f32x16 if all(a == f32x16 for a in args) else None


@llvm_body(fma, _all_f32x16)
def _(ctx: Any, bld: ir.IRBuilder, sig: Any, args: Any) -> Any:
    return _fma(ctx, bld, *args)


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
        lower_builtin(op, _F32x16, _F32x16)(binary(emit_name))
    llvm_body(operator.neg, lambda a: f32x16 if a == f32x16 else None)
    lower_builtin(operator.neg, _F32x16)(lambda ctx, bld, sig, args: bld.fneg(args[0]))


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
        bounds.append(_splat(bld, bld.trunc(i, _I32)))
    inside = bld.and_(
        bld.icmp_signed(">=", _IOTA, bounds[0]), bld.icmp_signed("<", _IOTA, bounds[1])
    )
    return bld.select(inside, args[0], args[3])


def round_half_even(v: np.ndarray) -> np.ndarray:
    """The nearest integer, halves to even, as float32; |v| < 2**22."""
    return np.rint(v)


@llvm_body(round_half_even, _all_f32x16)
def _(ctx: Any, bld: ir.IRBuilder, sig: Any, args: Any) -> Any:
    if _has(ctx, "avx") or _has(ctx, "sse4.1"):
        return _call(bld, "llvm.rint.v16f32", _F32X16, args[0])
    # Adding and taking away 1.5 * 2**23 rounds to an integer; llvm.rint would call libm once per
    # lane here.
    magic = ir.Constant(_F32X16, [12582912.0] * W)
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
    if _has(ctx, "avx512f"):
        name = "llvm.x86.avx512.mask.scalef.ps.512"
        none, every = ir.Constant(_F32X16, ir.Undefined), ir.Constant(_I16, -1)
        return _call(bld, name, _F32X16, v, n, none, every, ir.Constant(_I32, _CURRENT_ROUNDING))
    # 2**n as two factors, each built from exponent bits, so that 2**-140 and 2**128 need no special
    # case: the first product is exact, the second rounds once.
    is_nan = bld.fcmp_unordered("uno", n, n)
    whole = bld.fptosi(bld.select(is_nan, ir.Constant(_F32X16, [0.0] * W), n), _I32X16)
    half = bld.ashr(whole, _i32_splat(1))
    for part in (half, bld.sub(whole, half)):
        factor = bld.bitcast(bld.shl(bld.add(part, _i32_splat(127)), _i32_splat(23)), _F32X16)
        v = bld.fmul(v, factor)
    return bld.select(is_nan, n, v)


def sqrt(v: np.ndarray) -> np.ndarray:
    """Square root, correctly rounded."""
    with np.errstate(invalid="ignore"):
        return np.sqrt(v)


@llvm_body(sqrt, _all_f32x16)
def _(ctx: Any, bld: ir.IRBuilder, sig: Any, args: Any) -> Any:
    return _call(bld, "llvm.sqrt.v16f32", _F32X16, args[0])


def absolute(v: np.ndarray) -> np.ndarray:
    """|v|."""
    return np.abs(v)


@llvm_body(absolute, _all_f32x16)
def _(ctx: Any, bld: ir.IRBuilder, sig: Any, args: Any) -> Any:
    return _call(bld, "llvm.fabs.v16f32", _F32X16, args[0])


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
        index = ir.VectorType(_I32, half)
        low = bld.shuffle_vector(v, undef, ir.Constant(index, list(range(half))))
        high = bld.shuffle_vector(v, undef, ir.Constant(index, list(range(half, 2 * half))))
        v = combine(low, high)
    return bld.extract_element(v, ir.Constant(_I32, 0))


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
    return bld.shuffle_vector(args[0], args[1], ir.Constant(_I32X16, lanes))


@llvm_body(swap_pairs, _all_f32x16)
def _(ctx: Any, bld: ir.IRBuilder, sig: Any, args: Any) -> Any:
    lanes = [i ^ 1 for i in range(W)]
    return bld.shuffle_vector(args[0], args[0], ir.Constant(_I32X16, lanes))


def prefetch(x: np.ndarray, i: int) -> None:
    """Ask for the cache line of x[i]; any i, also outside the array. Nothing when interpreted."""


def prefetch_once(x: np.ndarray, i: int) -> None:
    """The same for a line that is read once: it should not displace what the caches hold."""


def _prefetch(keep: int) -> Emit:
    """LLVM's prefetch for reading data; `keep` from 0 (used once) to 3 (keep in all caches)."""

    def emit(ctx: Any, bld: ir.IRBuilder, sig: Any, args: Any) -> Any:
        index = ctx.cast(bld, args[1], sig.args[1], types.intp)
        pointer = _vector_pointer(ctx, bld, sig.args[0], args[0], index, ir.IntType(8))
        read, locality, data = (ir.Constant(_I32, x) for x in (0, keep, 1))
        _call(bld, "llvm.prefetch.p0", ir.VoidType(), pointer, read, locality, data)
        return ctx.get_dummy_value()

    return emit


llvm_body(prefetch, lambda x, i: types.void if _is_memory(x) else None)(_prefetch(3))
llvm_body(prefetch_once, lambda x, i: types.void if _is_memory(x) else None)(_prefetch(0))


# ---- bits ----------------------------------------------------------------------------------------
def bits(v: np.ndarray) -> np.ndarray:
    """The lanes of f32x16 as i32x16, bit for bit."""
    return v.view(np.int32)


@llvm_body(bits, lambda v: i32x16 if v == f32x16 else None)
def _(ctx: Any, bld: ir.IRBuilder, sig: Any, args: Any) -> Any:
    return bld.bitcast(args[0], _I32X16)


def from_bits(v: np.ndarray) -> np.ndarray:
    """The lanes of i32x16 as f32x16, bit for bit."""
    return v.view(np.float32)


@llvm_body(from_bits, lambda v: f32x16 if v == i32x16 else None)
def _(ctx: Any, bld: ir.IRBuilder, sig: Any, args: Any) -> Any:
    return bld.bitcast(args[0], _F32X16)


def iota() -> np.ndarray:
    """i32x16 0, 1, .. 15."""
    return np.arange(W, dtype=np.int32)


@llvm_body(iota, lambda: i32x16)
def _(ctx: Any, bld: ir.IRBuilder, sig: Any, args: Any) -> Any:
    return _IOTA


# ---- pairs of BF16 -------------------------------------------------------------------------------
def load_pairs(x: np.ndarray, i: int) -> np.ndarray:
    """x[i : i + 32] (uint16) as bf16x32: 16 pairs."""
    return x[i : i + 2 * W].copy()


def _is_bf16_memory(x: Any) -> bool:
    return _is_memory(x) and x.dtype == types.uint16


@llvm_body(load_pairs, lambda x, i: bf16x32 if _is_bf16_memory(x) else None)
def _(ctx: Any, bld: ir.IRBuilder, sig: Any, args: Any) -> Any:
    index = ctx.cast(bld, args[1], sig.args[1], types.intp)
    return bld.load(_vector_pointer(ctx, bld, sig.args[0], args[0], index, _I32X16), align=2)


def splat_pair(x: np.ndarray, i: int) -> np.ndarray:
    """The pair x[i], x[i + 1] (uint16) in every one of the 16 lanes."""
    return np.tile(x[i : i + 2], W)


@llvm_body(splat_pair, lambda x, i: bf16x32 if _is_bf16_memory(x) else None)
def _(ctx: Any, bld: ir.IRBuilder, sig: Any, args: Any) -> Any:
    index = ctx.cast(bld, args[1], sig.args[1], types.intp)
    return _splat(
        bld, bld.load(_vector_pointer(ctx, bld, sig.args[0], args[0], index, _I32), align=2)
    )


def dot_pairs(acc: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """acc[lane] + a[2 lane + 1] * b[2 lane + 1], rounded, + a[2 lane] * b[2 lane], rounded.

    The odd element comes first: the order of vdpbf16ps.
    """
    x, y = _as_f32(a).astype(np.float64), _as_f32(b).astype(np.float64)
    odd = (acc + x[1::2] * y[1::2]).astype(np.float32)
    return (odd + x[0::2] * y[0::2]).astype(np.float32)


def _dot_pairs(ctx: Any, bld: ir.IRBuilder, acc: Any, a: Any, b: Any) -> Any:
    """vdpbf16ps where the machine has it. LLVM aborts the process on it elsewhere, so ask first."""
    if _has(ctx, "avx512f", "avx512bf16"):
        name = "llvm.x86.avx512bf16.dpbf16ps.512"
        return _call(bld, name, _F32X16, acc, bld.bitcast(a, _BF16X32), bld.bitcast(b, _BF16X32))
    upper = _i32_splat(-65536)
    for half in ("upper", "lower"):
        x, y = (
            bld.and_(v, upper) if half == "upper" else bld.shl(v, _i32_splat(16)) for v in (a, b)
        )
        acc = _fma(ctx, bld, bld.bitcast(x, _F32X16), bld.bitcast(y, _F32X16), acc)
    return acc


@llvm_body(
    dot_pairs, lambda acc, a, b: f32x16 if (acc, a, b) == (f32x16, bf16x32, bf16x32) else None
)
def _(ctx: Any, bld: ir.IRBuilder, sig: Any, args: Any) -> Any:
    return _dot_pairs(ctx, bld, *args)


# ---- words: one float32, or a pair of BF16 -------------------------------------------------------
def copy_word(to: np.ndarray, i: int, x: np.ndarray, j: int) -> None:
    """The word to[i] (uint16: to[i : i + 2]) = the elements of x from j on, rounded as `to` is."""
    s = 2 if to.dtype == np.uint16 else 1
    given = x[j : j + s]
    to[i : i + s] = given if x.dtype == to.dtype else _as_stored(_as_f32(given), to.dtype)


@llvm_body(copy_word, lambda to, i, x, j: types.void if _is_memory(to) and _is_memory(x) else None)
def _(ctx: Any, bld: ir.IRBuilder, sig: Any, args: Any) -> Any:
    to, x = sig.args[0], sig.args[2]
    i, j = (ctx.cast(bld, args[k], sig.args[k], types.intp) for k in (1, 3))
    element = {types.uint16: _I16, types.float32: _F32}
    n, size = (2, 2) if to.dtype == types.uint16 else (1, 4)
    pointer = bld.bitcast(
        _pointer(ctx, bld, x, args[2], j), ir.VectorType(element[x.dtype], n).as_pointer()
    )
    word = bld.load(pointer, align=2 if x.dtype == types.uint16 else 4)
    if x.dtype != to.dtype and n == 2:
        word = _narrow(ctx, bld, word)
    elif x.dtype != to.dtype:
        wide = bld.shl(bld.zext(word, ir.VectorType(_I32, n)), _i32_splat(16, n))
        word = bld.bitcast(wide, ir.VectorType(_F32, n))
    pointer = bld.bitcast(_pointer(ctx, bld, to, args[0], i), word.type.as_pointer())
    bld.store(word, pointer, align=size)
    return ctx.get_dummy_value()


def store_words(x: np.ndarray, i: int, first: np.ndarray, second: np.ndarray) -> None:
    """16 words from x[i] on, one per lane: (first, second) as a pair of BF16, or `first` alone."""
    if x.dtype == np.uint16:
        x[i : i + 2 * W : 2], x[i + 1 : i + 2 * W : 2] = (
            _as_stored(v, x.dtype) for v in (first, second)
        )
    else:
        x[i : i + W] = first


@llvm_body(
    store_words,
    lambda x, i, a, b: types.void if _is_memory(x) and (a, b) == (f32x16, f32x16) else None,
)
def _(ctx: Any, bld: ir.IRBuilder, sig: Any, args: Any) -> Any:
    index = ctx.cast(bld, args[1], sig.args[1], types.intp)
    if sig.args[0].dtype == types.uint16:
        first, second = (bld.zext(_narrow(ctx, bld, v), _I32X16) for v in args[2:])
        pairs = bld.or_(first, bld.shl(second, _i32_splat(16)))
        pointer = _vector_pointer(ctx, bld, sig.args[0], args[0], index, _I32X16)
        bld.store(pairs, pointer, align=2)
    else:
        bld.store(args[2], _vector_pointer(ctx, bld, sig.args[0], args[0], index, _F32X16), align=4)
    return ctx.get_dummy_value()


def first_of_words(x: np.ndarray, i: int) -> np.ndarray:
    """The first element of each of the 16 words from x[i] on, as f32x16."""
    return _as_f32(x[i : i + 2 * W : 2] if x.dtype == np.uint16 else x[i : i + W]).copy()


@llvm_body(first_of_words, lambda x, i: f32x16 if _is_memory(x) else None)
def _(ctx: Any, bld: ir.IRBuilder, sig: Any, args: Any) -> Any:
    index = ctx.cast(bld, args[1], sig.args[1], types.intp)
    paired = sig.args[0].dtype == types.uint16
    pointer = _vector_pointer(ctx, bld, sig.args[0], args[0], index, _I32X16 if paired else _F32X16)
    words = bld.load(pointer, align=2 if paired else 4)
    return bld.bitcast(bld.shl(words, _i32_splat(16)), _F32X16) if paired else words


def second_of_words(x: np.ndarray, i: int) -> np.ndarray:
    """The second element of each of the 16 words (pairs of BF16) from x[i] on; 0 where x is f32."""
    return _as_f32(x[i + 1 : i + 2 * W : 2]).copy() if x.dtype == np.uint16 else splat(0.0)


@llvm_body(second_of_words, lambda x, i: f32x16 if _is_memory(x) else None)
def _(ctx: Any, bld: ir.IRBuilder, sig: Any, args: Any) -> Any:
    if sig.args[0].dtype != types.uint16:
        return ir.Constant(_F32X16, [0.0] * W)
    index = ctx.cast(bld, args[1], sig.args[1], types.intp)
    words = bld.load(_vector_pointer(ctx, bld, sig.args[0], args[0], index, _I32X16), align=2)
    return bld.bitcast(bld.and_(words, _i32_splat(-65536)), _F32X16)


def per_word(x: np.ndarray) -> int:
    """S: elements of x in a word of 4 bytes, 2 of BF16 or 1 of f32; a constant when compiled."""
    return 4 // x.itemsize


@llvm_body(per_word, lambda x: types.intp if _is_memory(x) else None)
def _(ctx: Any, bld: ir.IRBuilder, sig: Any, args: Any) -> Any:
    return ir.Constant(ir.IntType(64), 2 if sig.args[0].dtype == types.uint16 else 1)


# ---- register tiles ------------------------------------------------------------------------------
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
    return ir.Constant(ir.ArrayType(_F32X16, tile.mr * tile.nv), None)


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
    return _is_memory(x) and x.dtype == types.float32


def _load_tile(ctx: Any, bld: ir.IRBuilder, sig: Any, args: Any) -> Any:
    tile, memory = sig.return_type, sig.args[2]
    row, ld = (ctx.cast(bld, args[k], sig.args[k], types.intp) for k in (3, 4))
    n = ctx.cast(bld, args[5], sig.args[5], types.intp) if len(args) == 6 else None
    value = ir.Constant(ir.ArrayType(_F32X16, tile.mr * tile.nv), ir.Undefined)
    for i in range(tile.mr):
        for j in range(tile.nv):
            at = bld.add(row, ir.Constant(row.type, W * j))
            pointer = _vector_pointer(ctx, bld, memory, args[2], at, _F32X16)
            if n is None:
                v = bld.load(pointer, align=4)
            else:
                lanes = bld.sub(n, ir.Constant(n.type, W * j))
                v = _load_first(ctx, bld, pointer, _F32X16, lanes)
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
        c[c0 + i * ldc : c0 + i * ldc + acc.shape[1]] = _as_stored(acc[i], c.dtype)


def tile_store_tail(acc: np.ndarray, c: np.ndarray, c0: int, ldc: int, n: int) -> None:
    """As tile_store, but only the first n columns of each row (0 <= n <= 16 * nv)."""
    for i in range(acc.shape[0]):
        c[c0 + i * ldc : c0 + i * ldc + n] = _as_stored(acc[i, :n], c.dtype)


def _store_tile(ctx: Any, bld: ir.IRBuilder, sig: Any, args: Any) -> Any:
    tile, memory = sig.args[0], sig.args[1]
    row, ld = (ctx.cast(bld, args[k], sig.args[k], types.intp) for k in (2, 3))
    n = ctx.cast(bld, args[4], sig.args[4], types.intp) if len(args) == 5 else None
    llvm, align = (_I16X16, 2) if memory.dtype == types.uint16 else (_F32X16, 4)
    for i in range(tile.mr):
        for j in range(tile.nv):
            at = bld.add(row, ir.Constant(row.type, W * j))
            pointer = _vector_pointer(ctx, bld, memory, args[1], at, llvm)
            v = bld.extract_value(args[0], i * tile.nv + j)
            v = _narrow(ctx, bld, v) if memory.dtype == types.uint16 else v
            if n is None:
                bld.store(v, pointer, align=align)
            else:
                _store_first(ctx, bld, pointer, v, bld.sub(n, ir.Constant(n.type, W * j)))
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
        factor = _splat(bld, bld.load(_pointer(ctx, bld, sig.args[1], args[1], at)))
        for j in range(tile.nv):
            k = i * tile.nv + j
            value = bld.insert_value(value, bld.fmul(bld.extract_value(value, k), factor), k)
    return value


def tile_dot(
    acc: np.ndarray, a: np.ndarray, a0: int, lda: int, b: np.ndarray, b0: int, ldb: int
) -> np.ndarray:
    """One step along K: acc[i, 16 j + lane] += A[i, k] * B[k, 16 j + lane].

    float32: one k; A[i] = a[a0 + i * lda], B vector j = b[b0 + j * ldb : + 16].
    BF16:    a pair of k; A[i] = a[a0 + i * lda : + 2], B vector j = b[b0 + j * ldb : + 32] as pairs
             (`dot_pairs`).
    """
    columns = tuple(b0 + j * ldb for j in range(acc.shape[1] // W))
    return tile_dot_apart(acc, a, a0, lda, b, columns, 0)


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
    s = 2 if a.dtype == np.uint16 else 1
    mr, nv = acc.shape[0], acc.shape[1] // W
    words = np.stack([b[i + offset : i + offset + s * W] for i in b0[:nv]])
    x = _as_f32(np.stack([a[a0 + i * lda : a0 + i * lda + s] for i in range(mr)]))
    y = _as_f32(words).reshape(1, nv * W, s)
    x, y = x.reshape(mr, 1, s).astype(np.float64), y.astype(np.float64)
    for e in reversed(range(s)):  # of a pair the odd element first, as in dot_pairs
        acc = (acc + x[..., e] * y[..., e]).astype(np.float32)
    return acc


def _dot_step(ctx: Any, bld: ir.IRBuilder, sig: Any, args: Any, starts: list[Any]) -> Any:
    """The tile args[0] after one step along K; `starts` are the offsets of the B vectors."""
    tile, value = sig.args[0], args[0]
    row, ld = (ctx.cast(bld, args[k], sig.args[k], types.intp) for k in (2, 3))
    paired = sig.args[1].dtype == types.uint16
    llvm, align = (_I32X16, 2) if paired else (_F32X16, 4)
    columns = [
        bld.load(_vector_pointer(ctx, bld, sig.args[4], args[4], at, llvm), align=align)
        for at in starts
    ]
    for i in range(tile.mr):
        llvm, align = (_I32, 2) if paired else (_F32, 4)
        scalar = bld.load(_vector_pointer(ctx, bld, sig.args[1], args[1], row, llvm), align=align)
        v = _splat(bld, scalar)
        for j in range(tile.nv):
            k = i * tile.nv + j
            acc = bld.extract_value(value, k)
            acc = (
                _dot_pairs(ctx, bld, acc, v, columns[j])
                if paired
                else _fma(ctx, bld, v, columns[j], acc)
            )
            value = bld.insert_value(value, acc, k)
        row = bld.add(row, ld)
    return value


def _tile_dot_type(acc: Any, a: Any, a0: Any, lda: Any, b: Any, b0: Any, ldb: Any) -> Any:
    ours = isinstance(acc, TileType) and _is_memory(a) and _is_memory(b) and a.dtype == b.dtype
    return acc if ours else None


@llvm_body(tile_dot, _tile_dot_type)
def _(ctx: Any, bld: ir.IRBuilder, sig: Any, args: Any) -> Any:
    col, ldb = (ctx.cast(bld, args[k], sig.args[k], types.intp) for k in (5, 6))
    starts = [bld.add(col, bld.mul(ldb, ir.Constant(ldb.type, j))) for j in range(sig.args[0].nv)]
    return _dot_step(ctx, bld, sig, args, starts)


def _tile_dot_apart_type(acc: Any, a: Any, a0: Any, lda: Any, b: Any, b0: Any, offset: Any) -> Any:
    starts = isinstance(b0, types.UniTuple) and b0.dtype == types.intp
    known = starts and _tile_dot_type(acc, a, a0, lda, b, b0, offset) is not None
    return acc if known and b0.count >= acc.nv else None


@llvm_body(tile_dot_apart, _tile_dot_apart_type)
def _(ctx: Any, bld: ir.IRBuilder, sig: Any, args: Any) -> Any:
    offset = ctx.cast(bld, args[6], sig.args[6], types.intp)
    starts = [bld.add(bld.extract_value(args[5], j), offset) for j in range(sig.args[0].nv)]
    return _dot_step(ctx, bld, sig, args, starts)


# ---- MXFP4 ---------------------------------------------------------------------------------------
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
    pointer = _vector_pointer(ctx, bld, sig.args[0], args[0], index, llvm)
    return bld.zext(bld.load(pointer, align=1), _I32X16)


@llvm_body(mxfp4_exponents, lambda scales, i: i32x16 if _is_bytes(scales) else None)
def _(ctx: Any, bld: ir.IRBuilder, sig: Any, args: Any) -> Any:
    shift = bld.sub(_load_bytes(ctx, bld, sig, args), _i32_splat(127))
    shift = bld.shl(shift, _i32_splat(7))
    lower = bld.and_(shift, _i32_splat(0xFFFF))
    return bld.or_(bld.shl(shift, _i32_splat(16)), lower)


def mxfp4_pairs(codes: np.ndarray, i: int, exponents: np.ndarray) -> np.ndarray:
    """16 bytes of two codes each, the lower k in the lower nibble, as bf16x32 times their scales.

    Exact: a code has two significant bits and the scale is a power of two.
    """
    both = codes[i : i + W].repeat(2)
    both[1::2] >>= 4
    both &= 15
    raised = MXFP4_TABLE[both] + exponents.astype(np.int32).view(np.uint16)
    return np.where(both & 7, raised, MXFP4_TABLE[both]).astype(np.uint16)


@llvm_body(
    mxfp4_pairs,
    lambda codes, i, exponents: bf16x32 if _is_bytes(codes) and exponents == i32x16 else None,
)
def _(ctx: Any, bld: ir.IRBuilder, sig: Any, args: Any) -> Any:
    code = _load_bytes(ctx, bld, sig, args)
    code = bld.and_(bld.or_(code, bld.shl(code, _i32_splat(12))), _i32_splat(0x000F000F))
    i16x32 = ir.VectorType(_I16, 2 * W)

    def every(value: int) -> Any:
        return ir.Constant(i16x32, [value] * (2 * W))

    code = bld.bitcast(code, i16x32)
    magnitude = bld.and_(code, every(7))
    zero = bld.icmp_unsigned("==", magnitude, every(0))
    if _has(ctx, "avx512bw"):
        table = ir.Constant(i16x32, [int(v) for v in MXFP4_TABLE] * 2)
        value = _call(bld, "llvm.x86.avx512.permvar.hi.512", i16x32, table, code)
    else:
        # 1 + m / 2 times 2**(e - 1) for e > 0; the code 1 alone is 0.5
        value = bld.add(bld.shl(magnitude, every(6)), every(126 << 7))
        half = bld.icmp_unsigned("==", magnitude, every(1))
        value = bld.select(zero, every(0), bld.select(half, every(126 << 7), value))
        value = bld.or_(value, bld.shl(bld.and_(code, every(8)), every(12)))
    raised = bld.add(value, bld.bitcast(args[2], i16x32))
    return bld.bitcast(bld.select(zero, value, raised), _I32X16)


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
    ours = isinstance(acc, TileType) and acc.nv == 4 and _is_bf16_memory(a)
    return acc if ours and len(b) == 4 and all(v == bf16x32 for v in b) else None


@llvm_body(tile_dot_pairs, _tile_dot_pairs_type)
def _(ctx: Any, bld: ir.IRBuilder, sig: Any, args: Any) -> Any:
    tile, value = sig.args[0], args[0]
    row, ld = (ctx.cast(bld, args[k], sig.args[k], types.intp) for k in (2, 3))
    for i in range(tile.mr):
        pair = bld.load(_vector_pointer(ctx, bld, sig.args[1], args[1], row, _I32), align=2)
        v = _splat(bld, pair)
        for j in range(4):
            k = i * 4 + j
            acc = _dot_pairs(ctx, bld, bld.extract_value(value, k), v, args[4 + j])
            value = bld.insert_value(value, acc, k)
        row = bld.add(row, ld)
    return value
