"""Which kernels can be checked: their inputs, how they are called, their bounds.

A bound is what the kernel's docstring declares, element by element: the same arithmetic as in
tests/kernels. Inputs are drawn from a normal distribution with a fixed seed; a case may hold one
NaN, which must reach the elements that the formula says and no others.
Knows kernels and their references. Does not know faults.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pace_nb.kernels import jit
from pace_nb.kernels.activation import activation, activation_ref
from pace_nb.kernels.attention_decode import attention_decode, attention_decode_ref
from pace_nb.kernels.attention_prefill import attention_prefill
from pace_nb.kernels.attention_rows import SPLIT, attention_ref
from pace_nb.kernels.bf16 import narrow, widen
from pace_nb.kernels.exp import exp, exp_ref
from pace_nb.kernels.gemm import MR, NR, gemm, gemm_ref, pack_weight
from pace_nb.kernels.kv_write import kv_gather_ref, kv_write_ref, new_pool
from pace_nb.kernels.lanes import load, store
from pace_nb.kernels.norm import layer_norm, layer_norm_ref, rms_norm, rms_norm_ref
from pace_nb.kernels.rope import rope, rope_ref

Array = NDArray[Any]
Sizes = tuple[int, ...]
Kernel = Callable[..., Array]

DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(np.uint16),
}
EPS = 1e-5
VECTOR = 16  # lanes: the tile of an axis that a kernel walks along with vectors


class Case(NamedTuple):
    """Arguments of one call, what it should give (float64), and how far off it may be."""

    arguments: tuple[Any, ...]
    options: dict[str, Any]
    exact: Array
    bound: Array


class Subject(NamedTuple):
    """A kernel that can be checked. `make(sizes, dtype, rng, nan)` gives a Case of it."""

    kernel: Kernel
    file: str
    formula: str
    bound: str  # as the docstring words it
    axes: tuple[str, ...]  # letters of `sizes`
    dtypes: tuple[str, ...]
    make: Callable[[Sizes, np.dtype[Any], np.random.Generator, bool], Case]
    quick: tuple[Sizes, ...]
    full: tuple[Sizes, ...]  # as well as those of quick
    tiles: dict[str, int]  # axes of the result, and how much of each is one tile


def is_fused() -> bool:
    """Does a multiply-add round once here? Some bounds are wider where it does not."""
    return jit.INTERPRETED or bool({"fma", "avx512f"} & jit.cpu_features())


def stored(x: Array, dtype: np.dtype[Any]) -> Array:
    """float64 as the kernel is given it."""
    return narrow(x, dtype)


def planted(x: Array, nan: bool) -> Array:
    """x, with a NaN about two thirds of the way through if `nan`."""
    if nan and x.size:
        x.flat[2 * x.size // 3] = np.nan
    return x


def rounding(exact: Array, dtype: np.dtype[Any]) -> Array:
    """What one rounding to storage adds to a bound that is in f32."""
    return np.abs(exact) * (2.0**-8 if dtype == np.uint16 else 0.0)


# ---- products ------------------------------------------------------------------------------------
def make_gemm(sizes: Sizes, dtype: np.dtype[Any], rng: np.random.Generator, nan: bool) -> Case:
    """x [M, K], a packed weight [N, K] and a bias."""
    m, n, k = sizes
    x = stored(planted(rng.standard_normal((m, k)), nan), dtype)
    w = stored(rng.standard_normal((n, k)), dtype)
    bias = rng.standard_normal(n).astype(np.float32)
    magnitudes = np.abs(widen(x)) @ np.abs(widen(w)).T + np.abs(bias)
    bound = (k + 1) * (2.0**-24 * magnitudes + 2.0**-126) * (1 if is_fused() else 2)
    return Case((x, pack_weight(w), bias), {}, gemm_ref(x, w, bias), bound)


# ---- rows ----------------------------------------------------------------------------------------
def make_norm(sizes: Sizes, dtype: np.dtype[Any], rng: np.random.Generator, nan: bool) -> Case:
    """RMSNorm of x [T, E] in `dtype`, result in `dtype`."""
    x = stored(planted(rng.standard_normal(sizes), nan), dtype)
    weight = rng.standard_normal(sizes[1]).astype(np.float32)
    exact = rms_norm_ref(x, weight, EPS)
    bound = (sizes[1] / 128 + 7) * 2.0**-24 * np.abs(exact) + rounding(exact, dtype) + 1e-37
    return Case((x, weight, EPS), {"dtype": dtype}, exact, bound)


def make_layer_norm(
    sizes: Sizes, dtype: np.dtype[Any], rng: np.random.Generator, nan: bool
) -> Case:
    """LayerNorm of x [T, E] whose mean is not 0."""
    x = stored(planted(rng.standard_normal(sizes) + 1.0, nan), dtype)
    weight, bias = (rng.standard_normal(sizes[1]).astype(np.float32) for _ in range(2))
    exact, wide = layer_norm_ref(x, weight, bias, EPS), widen(x)
    spread = np.abs(wide).max(-1, keepdims=True) / np.sqrt(wide.var(-1, keepdims=True) + EPS)
    bound = (sizes[1] / 64 + 9) * 2.0**-24 * (np.abs(exact) + np.abs(weight) * spread)
    bound = bound + rounding(exact, dtype) + 1e-37
    return Case((x, weight, bias, EPS), {"dtype": dtype}, exact, bound)


def make_rope(sizes: Sizes, dtype: np.dtype[Any], rng: np.random.Generator, nan: bool) -> Case:
    """x [T, H, D], all dims rotated, at positions 0 to 4095."""
    x = planted(rng.standard_normal(sizes), nan).astype(np.float32)
    half = sizes[2] // 2
    angles = np.arange(4096)[:, None] * 10000.0 ** (-np.arange(half) / max(half, 1))
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    positions = rng.integers(0, 4096, sizes[0]).astype(np.int32)
    exact = rope_ref(x, positions, cos, sin)
    crossed = np.abs(rope_ref(x, positions, np.zeros_like(cos), sin))  # |x_b sin| of each element
    along = np.abs(rope_ref(x, positions, cos, np.zeros_like(sin)))
    # Without fma both products are rounded, and then their sum: the docstring's 2 |x_b sin| +
    # |x_a cos| leaves out the last when the two have one sign.
    factor = np.abs(exact) + crossed + (0 if is_fused() else along)
    bound = 2.0**-24 * factor + rounding(exact, dtype) + 1e-37
    return Case((x, positions, cos, sin), {"dtype": dtype}, exact, bound)


def make_activation(
    sizes: Sizes, dtype: np.dtype[Any], rng: np.random.Generator, nan: bool
) -> Case:
    """silu of x [T, F]."""
    x = planted(3.0 * rng.standard_normal(sizes), nan).astype(np.float32)
    exact = activation_ref(x, "silu")
    tiny = 1.2e-38 * np.maximum(1.0, np.abs(widen(x)))
    bound = 4.0 * np.spacing(np.abs(exact).astype(np.float32)) + tiny + rounding(exact, dtype)
    return Case((x, "silu"), {"dtype": dtype}, exact, bound)


# ---- one vector after another --------------------------------------------------------------------
@jit.device_fn
def _exp_of_vectors(x: Array, y: Array, n: int) -> None:
    for i in range(n):
        store(y, 16 * i, exp(load(x, 16 * i)))


def exp_of(x: Array) -> Array:
    """The device function `exp` of x [N] f32, 16 lanes at a time."""
    padded = np.zeros(-(-len(x) // VECTOR) * VECTOR, np.float32)
    padded[: len(x)] = x
    y = np.empty_like(padded)
    with np.errstate(all="ignore"):
        _exp_of_vectors(padded, y, len(padded) // VECTOR)
    return y[: len(x)]


def make_exp(sizes: Sizes, dtype: np.dtype[Any], rng: np.random.Generator, nan: bool) -> Case:
    """x evenly spaced over all that has a finite result that is not 0."""
    x = planted(np.linspace(-103.9, 88.72, sizes[0]), nan).astype(np.float32)
    exact = exp_ref(x)
    ulps = 1.0 if is_fused() else 1.5
    return Case((x,), {}, exact, ulps * np.spacing(exact.astype(np.float32)).astype(float))


# ---- attention -----------------------------------------------------------------------------------
def make_attention(sizes: Sizes, dtype: np.dtype[Any], rng: np.random.Generator, nan: bool) -> Case:
    """The last T tokens of one sequence of S; a NaN lies in a key."""
    tokens, s, heads, kv_heads, d = sizes
    if s < tokens or heads % kv_heads:
        raise ValueError(f"{tokens} tokens of {s} keys, {heads} heads of {kv_heads}")
    q = stored(rng.standard_normal((tokens, heads, d)), dtype)
    k = stored(planted(rng.standard_normal((s, kv_heads, d)), nan), dtype)
    v = stored(rng.standard_normal((s, kv_heads, d)), dtype)
    pool = new_pool(-(-s // 16) + 2, kv_heads, d, dtype)
    for x in pool:  # what lies beyond the keys must never be used
        x[...] = stored(np.full(1, np.nan), dtype)
    table = 1 + np.arange(-(-s // 16))[::-1].reshape(1, -1)  # blocks of one unit, backwards
    lens = np.array([s], np.int32)
    kv_write_ref(k, v, pool, table, 1, np.array([0, s], np.int32), lens)
    queries = np.array([0, tokens], np.int32)
    arguments = (q, pool, table, 1, queries, lens, d**-0.5)
    exact = attention_decode_ref(*arguments)
    return Case(arguments, {}, exact, attention_bound(arguments, exact))


def attention_bound(arguments: tuple[Any, ...], exact: Array) -> Array:
    """The error that attention_rows.py declares, [T, H, D], of one sequence."""
    q, pool, table, per_block, _, lens, scale = arguments
    s, dtype, tokens = int(lens[0]), q.dtype, len(q)
    k, v = kv_gather_ref(pool, table[0], per_block, s)
    q, k, v = (np.nan_to_num(widen(x)).astype(np.float32) for x in (q, k, v))
    weighted = attention_ref(q, k, np.abs(v), np.arange(s - tokens, s), scale)
    group = q.shape[1] // k.shape[1]
    products = np.stack(  # the largest sum of |q| |k| of each row and head
        [
            np.einsum("thd,shd->ths", np.abs(q[t : t + 1]), np.repeat(np.abs(k), group, axis=1))
            .max(axis=2)
            .ravel()
            for t in range(tokens)
        ]
    )
    e = (q.shape[2] + 2) * 2.0**-24 * scale * products[..., None]
    unit = 2.0**-8 if dtype == np.uint16 else 2.0**-24
    relative = 4 * e + (min(s, SPLIT) + s / 8 + 64) * 2.0**-24 + unit
    bound: Array = weighted * relative + np.abs(np.nan_to_num(exact)) * unit + 1e-30
    return bound


# ---- the table -----------------------------------------------------------------------------------
BOTH = ("float32", "bfloat16")
ATTENTION_BOUND = (
    "w.|v| (4 (D + 2) u max |q|.|k| / sqrt(D) + (min(S, 512) + S/8 + 64) u), u = 2^-24; BF16 adds "
    "2^-8 (w.|v| + |y|)"
)

SUBJECTS: dict[str, Subject] = {
    "gemm": Subject(
        gemm, "pace_nb/kernels/gemm.py", "C = A W^T + bias",
        "(K + 1) (2^-24 (|bias| + sum |A| |W|) + 2^-126)", ("M", "N", "K"), BOTH, make_gemm,
        ((1, 64, 64), (7, 200, 33), (13, 70, 40), (64, 129, 512)),
        ((1, 1, 1), (2, 63, 15), (1, 781, 1823), (25, 100, 4103), (3, 65, 2049), (256, 256, 1024)),
        {"m": MR, "n": NR},
    ),
    "norm": Subject(
        rms_norm, "pace_nb/kernels/norm.py", "y = x / sqrt(mean(x^2) + eps) weight",
        "(E/128 + 7) 2^-24 |y|; BF16 adds 2^-8 |y|", ("T", "E"), BOTH, make_norm,
        ((4, 64), (3, 65), (2, 781), (1, 2048)),
        ((1, 1), (3, 15), (5, 17), (1823, 781), (7, 8192)), {"t": 1, "e": VECTOR},
    ),
    "layer_norm": Subject(
        layer_norm, "pace_nb/kernels/norm.py", "y = (x - mean) / sqrt(var + eps) weight + bias",
        "(E/64 + 9) 2^-24 (|y| + |weight| max|x| / std); BF16 adds 2^-8 |y|", ("T", "E"), BOTH,
        make_layer_norm, ((4, 64), (3, 65), (2, 781), (1, 2048)),
        ((3, 15), (5, 17), (1823, 781), (7, 8192)), {"t": 1, "e": VECTOR},
    ),
    "rope": Subject(
        rope, "pace_nb/kernels/rope.py", "(a, b) -> (a cos - b sin, b cos + a sin)",
        "2^-24 (|b sin| + |y|); BF16 adds 2^-8 |y|", ("T", "H", "D"), BOTH, make_rope,
        ((3, 2, 16), (5, 1, 34), (2, 2, 80)), ((1, 32, 64), (2, 1, 256), (1823, 3, 96)),
        {"t": 1, "h": 1, "d": VECTOR},
    ),
    "exp": Subject(
        exp_of, "pace_nb/kernels/exp.py", "y = e^x", "1 ULP (1.5 without fma)",
        ("N",), ("float32",), make_exp, ((1000,), (4096,)), ((1,), (17,), (1_000_003,)),
        {"n": VECTOR},
    ),
    "activation": Subject(
        activation, "pace_nb/kernels/activation.py", "y = silu(x) = x / (1 + e^-x)",
        "4 ULP; BF16 adds 2^-8 |y|", ("T", "F"), BOTH, make_activation,
        ((3, 15), (4, 33), (2, 2049)), ((1, 1), (1823, 781)), {"t": 1, "f": VECTOR},
    ),
    "attention_decode": Subject(
        attention_decode, "pace_nb/kernels/attention_decode.py", "y = softmax(q k^T / sqrt(D)) v",
        ATTENTION_BOUND, ("T", "S", "H", "KVH", "D"), BOTH, make_attention,
        ((1, 100, 8, 2, 64), (2, 513, 4, 4, 32), (1, 33, 7, 1, 40)),
        ((1, 1, 2, 1, 16), (5, 1100, 8, 2, 80), (1, 4096, 8, 2, 128)),
        {"t": 1, "h": 1, "d": VECTOR},
    ),
    "attention_prefill": Subject(
        attention_prefill, "pace_nb/kernels/attention_prefill.py",
        "y = softmax(q k^T / sqrt(D)) v", ATTENTION_BOUND, ("T", "S", "H", "KVH", "D"), BOTH,
        make_attention, ((33, 33, 4, 2, 64), (40, 100, 7, 1, 32)),
        ((130, 430, 8, 2, 64), (513, 513, 2, 2, 32), (70, 70, 6, 2, 256)),
        {"t": 16, "h": 1, "d": VECTOR},
    ),
}  # fmt: skip


MOST = 2**28  # product of all sizes
MOST_ELEMENTS = 2**24  # of a result: float64, several times over


def make(subject: Subject, sizes: Sizes, dtype: str, seed: int, nan: bool) -> Case:
    """The case of these sizes. ValueError where they do not fit the kernel, or are too many."""
    if len(sizes) != len(subject.axes):
        raise ValueError(f"{len(sizes)} sizes, expected {len(subject.axes)}")
    if min(sizes) < 1:
        raise ValueError("a size below 1")
    most = MOST if len(sizes) > 2 and subject.axes != ("T", "H", "D") else MOST_ELEMENTS
    if math.prod(sizes) > most:
        raise ValueError(f"too large to be checked: the product of sizes may be {most}")
    if subject.axes == ("T", "H", "D") and sizes[2] % 2:
        raise ValueError("D must be even")
    rng = np.random.default_rng([seed, *sizes])
    with np.errstate(all="ignore"):
        return subject.make(sizes, DTYPES[dtype], rng, nan)
