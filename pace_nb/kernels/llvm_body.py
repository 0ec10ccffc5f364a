"""Giving a NumPy function an LLVM body: the decorator, the values, and what bodies are made of.

An operation of the kernels has two bodies under one name (docs/adr/0006). The NumPy body is the
function that is read: it runs when kernels are interpreted (`NUMBA_DISABLE_JIT=1`), can be stepped
through and counted, and defines what the operation means. The LLVM body, a function that emits
instructions, is what a compiled kernel gets; `llvm_body` ties it to the first.

Values, each 512 bits: one AVX-512 register (LLVM splits it where registers are narrower)
    f32x16   16 float32 lanes
    i32x16   16 int32 lanes
    bf16x32  16 pairs of BF16, as they lie in memory (uint16); only ever an operand of a dot product
Memory
    every array is flat (1-D, contiguous) and addressed by element offset; `float32` is itself,
    `uint16` is BF16.
Knows: Numba's typing and lowering, LLVM's instructions, the features of the CPU that is compiled
for. Does not know: which operations there are; those are in lanes.py, words.py, tiles.py,
mxfp4_lanes.py and integer_lanes.py.
Cautions: nothing is bounds-checked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from llvmlite.ir import instructions
from numba import types
from numba.core import cgutils
from numba.core.typing.templates import AbstractTemplate, infer, infer_global
from numba.extending import lower_builtin, models, register_model

W = 16  # float32 lanes in a vector: one 512-bit register


# ---- values --------------------------------------------------------------------------------------
class _BF16(ir.types.Type):  # type: ignore[misc]
    """llvmlite has no bfloat; the name is all that the printed IR needs."""

    null = "0.0"

    def __str__(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BF16)

    def __hash__(self) -> int:
        return hash(_BF16)


F32, I32, I16 = ir.FloatType(), ir.IntType(32), ir.IntType(16)
F32X16, I32X16, I16X16 = (ir.VectorType(t, W) for t in (F32, I32, I16))
BF16X32, BF16X16 = ir.VectorType(_BF16(), 2 * W), ir.VectorType(_BF16(), W)
IOTA = ir.Constant(I32X16, list(range(W)))


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


f32x16 = _F32x16("f32x16", F32X16)
i32x16 = _I32x16("i32x16", I32X16)
# 16 pairs, one per 32-bit lane; bitcast to bfloat at the dot product
bf16x32 = _BF16x32("bf16x32", I32X16)


@register_model(_F32x16)
@register_model(_I32x16)
@register_model(_BF16x32)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Any) -> None:
        super().__init__(dmm, fe_type, fe_type.llvm)


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


# ---- types of arguments --------------------------------------------------------------------------
def is_memory(t: Any) -> bool:
    """Is this the type of a flat array of float32 or BF16?"""
    return isinstance(t, types.Array) and t.ndim == 1 and t.dtype in (types.float32, types.uint16)


def is_bf16_memory(t: Any) -> bool:
    """Is this the type of a flat array of BF16?"""
    return is_memory(t) and t.dtype == types.uint16


# ---- pieces of LLVM bodies -----------------------------------------------------------------------
def has(ctx: Any, *features: str) -> bool:
    """Does the machine that this code is compiled for have these features?"""
    listed = set(ctx.codegen()._tm_features.split(","))
    return all("+" + f in listed for f in features)


def emit_pointer(ctx: Any, bld: ir.IRBuilder, array_type: Any, array: Any, index: Any) -> Any:
    """The address of array[index]."""
    return bld.gep(ctx.make_array(array_type)(ctx, bld, array).data, [index])


def emit_vector_pointer(
    ctx: Any, bld: ir.IRBuilder, array_type: Any, array: Any, index: Any, llvm: ir.Type
) -> Any:
    """The same, as that of a value of type `llvm`."""
    return bld.bitcast(emit_pointer(ctx, bld, array_type, array, index), llvm.as_pointer())


def emit_call(bld: ir.IRBuilder, name: str, result: ir.Type, *args: Any) -> Any:
    """A call of one of LLVM's own functions."""
    function_type = ir.FunctionType(result, [a.type for a in args])
    return bld.call(cgutils.get_or_insert_function(bld.module, function_type, name), args)


def emit_splat(bld: ir.IRBuilder, scalar: Any) -> Any:
    """`scalar` in all 16 lanes."""
    undef = ir.Constant(ir.VectorType(scalar.type, W), ir.Undefined)
    one = bld.insert_element(undef, scalar, ir.Constant(I32, 0))
    return bld.shuffle_vector(one, undef, ir.Constant(I32X16, [0] * W))


def i32_constant(value: int, n: int = W) -> Any:
    """`value` in n lanes of int32."""
    return ir.Constant(ir.VectorType(I32, n), [value] * n)


def _first_lanes(bld: ir.IRBuilder, n: Any) -> Any:
    """Mask of the lanes below n (an intp)."""
    return bld.icmp_signed(
        "<", IOTA, emit_splat(bld, bld.trunc(n, I32) if n.type.width > 32 else n)
    )


def emit_fma(ctx: Any, bld: ir.IRBuilder, a: Any, b: Any, c: Any) -> Any:
    """a * b + c of 16 lanes."""
    if has(ctx, "fma") or has(ctx, "avx512f"):
        return emit_call(bld, "llvm.fma.v16f32", F32X16, a, b, c)
    # Without the instruction llvm.fma would call libm once per lane.
    return bld.fadd(bld.fmul(a, b), c)


def emit_widen(bld: ir.IRBuilder, u16: Any) -> Any:
    """BF16 bits to float32: the upper half of the word."""
    return bld.bitcast(bld.shl(bld.zext(u16, I32X16), i32_constant(16)), F32X16)


def emit_narrow(ctx: Any, bld: ir.IRBuilder, v: Any) -> Any:
    """float32 to BF16 bits, to nearest even, NaN to the quiet NaN of its sign (`bf16.from_f32`)."""
    n = v.type.count
    sixteen, one, almost_half, quiet_bit = (i32_constant(c, n) for c in (16, 1, 0x7FFF, 0x40))
    bits = bld.bitcast(v, ir.VectorType(I32, n))
    upper = bld.lshr(bits, sixteen)
    rounded = bld.lshr(bld.add(bits, bld.add(bld.and_(upper, one), almost_half)), sixteen)
    chosen = bld.select(bld.fcmp_unordered("uno", v, v), bld.or_(upper, quiet_bit), rounded)
    return bld.trunc(chosen, ir.VectorType(I16, n))


def _lanes_in_use(bld: ir.IRBuilder, n: Any) -> Any:
    """n (an intp) cut to 0 .. 16."""
    low, high = ir.Constant(n.type, 0), ir.Constant(n.type, W)
    n = bld.select(bld.icmp_signed("<", n, low), low, n)
    return bld.select(bld.icmp_signed(">", n, high), high, n)


def _copy_lanes(bld: ir.IRBuilder, source: Any, target: Any, n: Any) -> None:
    """Copy n elements in a loop: without AVX-512 LLVM makes a masked access 16 branches."""
    with cgutils.for_range(bld, _lanes_in_use(bld, n)) as loop:
        bld.store(bld.load(bld.gep(source, [loop.index])), bld.gep(target, [loop.index]))


def emit_load_first(ctx: Any, bld: ir.IRBuilder, pointer: Any, llvm: ir.VectorType, n: Any) -> Any:
    """The first n lanes (n an intp) at `pointer`, zero in the others; only those n are read."""
    if has(ctx, "avx512f", "avx512bw"):
        name = f"llvm.masked.load.v{W}{'f32' if llvm == F32X16 else 'i16'}.p0"
        align = ir.Constant(I32, 4 if llvm == F32X16 else 2)
        return emit_call(
            bld, name, llvm, pointer, align, _first_lanes(bld, n), ir.Constant(llvm, None)
        )
    buffer = cgutils.alloca_once(bld, llvm)
    bld.store(ir.Constant(llvm, None), buffer)
    scalar = llvm.element.as_pointer()
    _copy_lanes(bld, bld.bitcast(pointer, scalar), bld.bitcast(buffer, scalar), n)
    return bld.load(buffer)


def emit_store_first(ctx: Any, bld: ir.IRBuilder, pointer: Any, v: Any, n: Any) -> None:
    """Store the first n lanes (n an intp) of v at `pointer`; only those n are written."""
    if has(ctx, "avx512f", "avx512bw"):
        name = f"llvm.masked.store.v{W}{'f32' if v.type == F32X16 else 'i16'}.p0"
        align = ir.Constant(I32, 4 if v.type == F32X16 else 2)
        emit_call(bld, name, ir.VoidType(), v, pointer, align, _first_lanes(bld, n))
        return
    buffer = cgutils.alloca_once(bld, v.type)
    bld.store(v, buffer)
    scalar = v.type.element.as_pointer()
    _copy_lanes(bld, bld.bitcast(buffer, scalar), bld.bitcast(pointer, scalar), n)


class _VolatileLoad(instructions.LoadInstr):  # type: ignore[misc]
    """llvmlite cannot say volatile."""

    def descr(self, buf: list[str]) -> None:
        start = len(buf)
        super().descr(buf)
        buf[start] = "load volatile " + buf[start].removeprefix("load ")


def emit_load_here(bld: ir.IRBuilder, pointer: Any, align: int) -> Any:
    """A load that LLVM neither moves up nor replaces by a register that holds the same bytes."""
    bld.fence("seq_cst", "singlethread")  # no instruction
    load = _VolatileLoad(bld.block, pointer, typ=pointer.type.pointee)
    load.align = align
    bld._insert(load)
    return load


def emit_odd(bld: ir.IRBuilder, pairs: Any) -> Any:
    """The odd element of each pair, as f32x16."""
    return bld.bitcast(bld.and_(pairs, i32_constant(-65536)), F32X16)


def emit_even(bld: ir.IRBuilder, pairs: Any) -> Any:
    """The even element of each pair, as f32x16."""
    return bld.bitcast(bld.shl(pairs, i32_constant(16)), F32X16)


def emit_dot_pairs(ctx: Any, bld: ir.IRBuilder, acc: Any, a: Any, b: Any) -> Any:
    """`words.dot_pairs`, with vdpbf16ps where the machine has it.

    LLVM aborts the process on it elsewhere, so ask first.
    """
    if has(ctx, "avx512f", "avx512bf16"):
        name = "llvm.x86.avx512bf16.dpbf16ps.512"
        return emit_call(bld, name, F32X16, acc, bld.bitcast(a, BF16X32), bld.bitcast(b, BF16X32))
    for half in (emit_odd, emit_even):
        acc = emit_fma(ctx, bld, half(bld, a), half(bld, b), acc)
    return acc
