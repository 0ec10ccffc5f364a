"""`Case`: the arguments of one call of a kernel, what it should give, how far off it may be.

A bound is what the kernel's docstring declares, element by element: the same arithmetic as in
tests/kernels. Inputs are drawn from a normal distribution with a fixed seed; a case may hold one
NaN, which must reach the elements that the formula says and no others.
Knows kernels and their references. Does not know faults, or which cases are run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pace_nb.kernels import jit
from pace_nb.kernels.activation import activation_ref
from pace_nb.kernels.attention_decode import attention_decode_ref
from pace_nb.kernels.attention_rows import SPLIT, attention_ref
from pace_nb.kernels.bf16 import narrow, widen
from pace_nb.kernels.exp import exp, exp_ref
from pace_nb.kernels.gemm import gemm_ref, pack_weight
from pace_nb.kernels.integer_lanes import MOST_WEIGHTS
from pace_nb.kernels.kv_write import UNIT, kv_gather_ref, kv_write, kv_write_ref, new_pool
from pace_nb.kernels.lanes import load, store
from pace_nb.kernels.mlp import new_mlp_weight, pack_mlp_rows
from pace_nb.kernels.moe import combine_ref, grouped_gemm_ref, pack_experts
from pace_nb.kernels.norm import layer_norm_ref, rms_norm_ref
from pace_nb.kernels.quant import BLOCK, dequantize_mxfp4_ref, pack_mxfp4
from pace_nb.kernels.rope import rope_ref
from pace_nb.kernels.sampling import NEUTRAL, TEMPERATURE, TOP_K

Array = NDArray[Any]
Sizes = tuple[int, ...]

EPS = 1e-5
VECTOR = 16  # lanes: the tile of an axis that a kernel walks along with vectors


class Case(NamedTuple):
    """Arguments of one call, what it should give (float64), and how far off it may be."""

    arguments: tuple[Any, ...]
    options: dict[str, Any]
    exact: Array
    bound: Array


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
def product_bound(x: Array, w: Array, bias: Array) -> Array:
    """The error that gemm.py declares for x [M, K] times w [N, K] transposed, plus bias [N]."""
    magnitudes = np.abs(widen(x)) @ np.abs(widen(w)).T + np.abs(bias)
    bound: Array = (x.shape[1] + 1) * (2.0**-24 * magnitudes + 2.0**-126)
    return bound * (1 if is_fused() else 2)


def make_gemm(sizes: Sizes, dtype: np.dtype[Any], rng: np.random.Generator, nan: bool) -> Case:
    """x [M, K], a packed weight [N, K] and a bias."""
    m, n, k = sizes
    x = stored(planted(rng.standard_normal((m, k)), nan), dtype)
    w = stored(rng.standard_normal((n, k)), dtype)
    bias = rng.standard_normal(n).astype(np.float32)
    return Case((x, pack_weight(w), bias), {}, gemm_ref(x, w, bias), product_bound(x, w, bias))


def make_mlp(sizes: Sizes, dtype: np.dtype[Any], rng: np.random.Generator, nan: bool) -> Case:
    """silu(x Wg^T + bg) (x Wu^T + bu): the product's error goes through silu, which is at most 1.1
    times as steep, and through the multiplication."""
    m, f, k = sizes
    x = stored(planted(rng.standard_normal((m, k)), nan), dtype)
    weights = [stored(rng.standard_normal((f, k)) / np.sqrt(k), dtype) for _ in range(2)]
    biases = rng.standard_normal((2, f)).astype(np.float32)
    packed = new_mlp_weight(f, k, dtype, gated=True, biases=biases)
    pack_mlp_rows(packed, 0, np.concatenate(weights))
    gate, up = (gemm_ref(x, w, b) for w, b in zip(weights, biases, strict=True))
    gate_off, up_off = (product_bound(x, w, b) for w, b in zip(weights, biases, strict=True))
    act = activation_ref(gate, "silu")
    act_off = 1.1 * gate_off
    act_off = act_off + silu_bound(gate, np.abs(act) + act_off)
    exact = act * up
    bound = np.abs(up) * act_off + np.abs(act) * up_off + act_off * up_off
    bound = bound + 2.0**-24 * np.abs(exact) + rounding(exact, dtype)
    return Case((x, packed, "silu"), {}, exact, bound)


# ---- products with experts -----------------------------------------------------------------------
def offsets_of(rows: int, num_experts: int, rng: np.random.Generator) -> Array:
    """Where each expert's rows begin, int64 [X + 1]; some have none."""
    chosen = np.sort(rng.integers(0, num_experts, rows))
    return np.searchsorted(chosen, np.arange(num_experts + 1)).astype(np.int64)


def experts_case(
    x: Array, weight: Any, experts: Sequence[Array], offsets: Array, bias: Array
) -> Case:
    """Each row times its expert, which is one of `experts` [N, K]."""
    bound = [
        product_bound(x[offsets[e] : offsets[e + 1]], w, bias[e]) for e, w in enumerate(experts)
    ]
    exact = grouped_gemm_ref(x, experts, offsets, bias)
    return Case((x, weight, offsets, bias), {}, exact, np.concatenate(bound))


def make_moe(sizes: Sizes, dtype: np.dtype[Any], rng: np.random.Generator, nan: bool) -> Case:
    """x [R, K], sorted by expert, and X packed weights [N, K]."""
    num_experts, rows, n, k = sizes
    x = stored(planted(rng.standard_normal((rows, k)), nan), dtype)
    experts = [stored(rng.standard_normal((n, k)), dtype) for _ in range(num_experts)]
    bias = rng.standard_normal((num_experts, n)).astype(np.float32)
    offsets = offsets_of(rows, num_experts, rng)
    return experts_case(x, pack_experts(experts), experts, offsets, bias)


def make_quant(sizes: Sizes, dtype: np.dtype[Any], rng: np.random.Generator, nan: bool) -> Case:
    """x [R, K] in BF16 and X weights [N, K] in MXFP4: any codes, scales of 2^-9 to 2^2."""
    num_experts, rows, n, k = sizes
    if k % BLOCK:
        raise ValueError(f"K must be a multiple of {BLOCK}")
    x = stored(planted(rng.standard_normal((rows, k)), nan), dtype)
    codes = [
        rng.integers(0, 256, (n, k // BLOCK, BLOCK // 2), np.uint8) for _ in range(num_experts)
    ]
    scales = [rng.integers(118, 130, (n, k // BLOCK)).astype(np.uint8) for _ in range(num_experts)]
    bias = rng.standard_normal((num_experts, n)).astype(np.float32)
    experts = [dequantize_mxfp4_ref(*each) for each in zip(codes, scales, strict=True)]
    offsets = offsets_of(rows, num_experts, rng)
    return experts_case(x, pack_mxfp4(codes, scales), experts, offsets, bias)


def make_combine(sizes: Sizes, dtype: np.dtype[Any], rng: np.random.Generator, nan: bool) -> Case:
    """T tokens, I rows of c for each, with their scales."""
    tokens, choices, n = sizes
    c = planted(rng.standard_normal((tokens * choices, n)), nan).astype(np.float32)
    place = rng.permutation(tokens * choices).reshape(tokens, choices).astype(np.int64)
    scale = rng.random((tokens, choices)).astype(np.float32)
    bound = choices * 2.0**-24 * combine_ref(np.abs(c), place, scale) * (1 if is_fused() else 2)
    return Case((c, place, scale), {}, combine_ref(c, place, scale), bound + 1e-37)


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
    bound = silu_bound(x, np.abs(exact)) + rounding(exact, dtype)
    return Case((x, "silu"), {"dtype": dtype}, exact, bound)


def silu_bound(x: Array, size: Array) -> Array:
    """4 ULP of results of this size; those below 1e-38 may be 0."""
    bound: Array = 4.0 * np.spacing(size.astype(np.float32)).astype(float)
    return bound + 1.2e-38 * np.maximum(1.0, np.abs(widen(x)))


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


# ---- the cache -----------------------------------------------------------------------------------
def written(k: Array, v: Array, dtype: np.dtype[Any]) -> Array:
    """k and v [T, KVH, D] f32 written into a cache of `dtype` in two steps, and read again: [2, T,
    KVH, D]. The sequence's units lie backwards in the pool, which held NaN before."""
    tokens, kv_heads, d = k.shape
    units = -(-tokens // UNIT)
    pool = new_pool(units + 2, kv_heads, d, dtype)
    for x in pool:
        x[...] = stored(np.full(1, np.nan), dtype)
    table = 1 + np.arange(units)[::-1].reshape(1, -1)
    middle = tokens // 2 + tokens % 2
    for first, end in ((0, middle), (middle, tokens)):
        rows = np.array([0, end - first], np.int32)
        kv_write(k[first:end], v[first:end], pool, table, 1, rows, np.array([end], np.int32))
    return np.stack(kv_gather_ref(pool, table[0], 1, tokens))


def make_kv_write(sizes: Sizes, dtype: np.dtype[Any], rng: np.random.Generator, nan: bool) -> Case:
    """k and v [T, KVH, D] in f32; a NaN lies in a key."""
    if dtype == np.uint16 and sizes[2] % 2:
        raise ValueError("D must be even")
    k = planted(rng.standard_normal(sizes), nan).astype(np.float32)
    v = rng.standard_normal(sizes).astype(np.float32)
    exact = np.stack([widen(k), widen(v)])
    return Case((k, v, dtype), {}, exact, rounding(exact, dtype))


# ---- probabilities -------------------------------------------------------------------------------
TEMPERATURE_OF_CASES, TOP_K_OF_CASES = 0.8, 50


def make_sampling(sizes: Sizes, dtype: np.dtype[Any], rng: np.random.Generator, nan: bool) -> Case:
    """What `sample` draws from at temperature 0.8 with top_k 50. A row with a NaN has no token."""
    rows, v = sizes
    if v > MOST_WEIGHTS:
        raise ValueError(f"V may be {MOST_WEIGHTS}")
    logits = planted(3.0 * rng.standard_normal(sizes), nan).astype(np.float32)
    settings = np.tile(np.array(NEUTRAL), (rows, 1))
    settings[:, TEMPERATURE], settings[:, TOP_K] = TEMPERATURE_OF_CASES, TOP_K_OF_CASES
    wide = widen(logits)
    x = (wide - wide.max(axis=1, keepdims=True)) / np.float32(TEMPERATURE_OF_CASES)
    weights = np.exp(x)
    if v > TOP_K_OF_CASES:
        weights[wide < np.sort(wide, axis=1)[:, [-TOP_K_OF_CASES]]] = 0
    total = weights.sum(axis=1, keepdims=True)
    # x is rounded twice, to 2^-24 of itself; then a weight is off by 2^-22 of itself and 2^-40.
    off = np.where(weights > 0, weights * (2.0**-22 + np.abs(x) * 2.0**-23) + 2.0**-40, 0.0)
    exact = weights / total
    bound = 1.01 * (off + exact * off.sum(axis=1, keepdims=True)) / total + 2.0**-24 * exact
    return Case((logits, settings, np.arange(rows)), {}, exact, bound)
