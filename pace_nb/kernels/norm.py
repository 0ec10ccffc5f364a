"""RMSNorm and LayerNorm, each also fused with the residual add before it.

    rms_norm        y = x / sqrt(mean(x^2) + eps) * weight
    add_rms_norm    residual += x;  y = rms_norm(residual)
                    with `inner`: residual += rms_norm(x) by this weight;  y as before
    layer_norm      y = (x - mean(x)) / sqrt(mean((x - mean(x))^2) + eps) * weight + bias
    add_layer_norm  residual += x;  y = layer_norm(residual)

| Array    | Shape  | Type           | Layout                                         |
|----------|--------|----------------|------------------------------------------------|
| x        | [T, E] | f32, BF16      | rows contiguous, any row stride                |
| residual | [T, E] | f32            | contiguous, updated in place                   |
| weight   | [E]    | f32            | contiguous; models that scale by 1 + w add the 1 at load |
| inner    | [E]    | f32 or None    | the same                                       |
| bias     | [E]    | f32 or None    | contiguous                                     |
| y        | [T, E] | f32, BF16      | contiguous, allocated or given as `out`        |

Moves: T E (size(x) + size(y)) bytes, with the add T E (size(x) + 8 + size(y)); weights stay in L1.
Does: 4 T E FLOPs (LayerNorm 7 T E). Under one FLOP per byte, so bound by memory.
Error: sums run in f32 over 64 interleaved partial sums of E/64 terms each, then a tree of 6 adds:
    the relative error of the sum of squares is at most (E/64 + 7) 2^-24, half of that after the
    root. RMSNorm: |y - ref| <= (E/128 + 7) 2^-24 |ref| (a few 2^-24 in practice; the bound is met
    where few large elements come before many small ones). LayerNorm takes the variance of x - mean
    (two passes over a row in L1), so nothing cancels but in the mean: |y - ref| <=
    (E/64 + 9) 2^-24 (|ref| + |weight| max|x| / std). A BF16 y adds its rounding, 2^-8 |ref|.
Cautions: squares are summed in f32: beyond |x| about 1e19 they overflow and the row becomes zeros,
    below 1e-19 they vanish, which shows only where eps is 0 (a row of zeros is NaN there).
    A NaN makes its whole row NaN, an infinity itself NaN and the rest of its row 0 (RMSNorm) or NaN
    (LayerNorm), as the formulas do; no other row is touched. `out` may be `x` itself when both have
    one dtype; any other overlap is wrong.
Source: Zhang and Sennrich 2019 (RMSNorm), Ba et al. 2016 (LayerNorm); re-implements PACE `rmsnorm`,
    `layernorm`, `fused_add_rmsnorm`, `fused_add_layernorm` (csrc/ops/norm), with the variance free
    of E[x^2] - E[x]^2.
Notebook: 10 fused norm. Ledger: norm.
"""

from __future__ import annotations

import math

import numpy as np
from numba import prange
from numpy.typing import DTypeLike

from pace_nb.kernels import jit
from pace_nb.kernels.arrays import NOTHING, STORAGE, Array, flat_rows, require, writable
from pace_nb.kernels.bf16 import narrow, widen
from pace_nb.kernels.lanes import (
    fma,
    keep_lanes,
    load,
    load_tail,
    reduce_add,
    splat,
    store,
    store_tail,
)


# ---- definitions ---------------------------------------------------------------------------------
def rms_norm_ref(x: Array, weight: Array, eps: float) -> Array:
    """RMSNorm of the rows of x [T, E], float64."""
    x = widen(x)
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def layer_norm_ref(x: Array, weight: Array, bias: Array | None, eps: float) -> Array:
    """LayerNorm of the rows of x [T, E], float64."""
    x = widen(x)
    centred = x - np.mean(x, axis=-1, keepdims=True)
    scaled = centred / np.sqrt(np.mean(centred * centred, axis=-1, keepdims=True) + eps) * weight
    return scaled if bias is None else scaled + bias


def add_rms_norm_ref(
    x: Array, residual: Array, weight: Array, eps: float, inner: Array | None = None
) -> tuple[Array, Array]:
    """(residual + x, or + its RMSNorm by `inner`, rounded to f32; RMSNorm of that in float64)."""
    added = widen(x)
    if inner is not None:
        added = widen(narrow(rms_norm_ref(x, inner, eps), np.float32))
    total = narrow(added + residual, np.float32)
    return total, rms_norm_ref(total, weight, eps)


def add_layer_norm_ref(
    x: Array, residual: Array, weight: Array, bias: Array | None, eps: float
) -> tuple[Array, Array]:
    """(residual + x rounded to f32, LayerNorm of that in float64)."""
    total = narrow(widen(x) + residual, np.float32)
    return total, layer_norm_ref(total, weight, bias, eps)


# ---- one row -------------------------------------------------------------------------------------
# Elements per turn: four independent sums, as an fma takes 4 cycles and one starts each cycle.
STEP = 64


@jit.device_fn
def _row_sum(x, x0, e):
    """Sum of x[x0 : x0 + e], a float32."""
    s0, s1, s2, s3 = splat(0.0), splat(0.0), splat(0.0), splat(0.0)
    whole = e // STEP * STEP
    for i in range(x0, x0 + whole, STEP):
        s0 = s0 + load(x, i)
        s1 = s1 + load(x, i + 16)
        s2 = s2 + load(x, i + 32)
        s3 = s3 + load(x, i + 48)
    for i in range(whole, e, 16):
        s0 = s0 + load_tail(x, x0 + i, min(16, e - i))
    return reduce_add((s0 + s1) + (s2 + s3))


@jit.device_fn
def _row_squares(x, x0, e, mean):
    """Sum of (x - mean)^2 over x[x0 : x0 + e], a float32; mean is a vector, zero for RMSNorm."""
    s0, s1, s2, s3 = splat(0.0), splat(0.0), splat(0.0), splat(0.0)
    whole = e // STEP * STEP
    for i in range(x0, x0 + whole, STEP):
        v0, v1, v2, v3 = (
            load(x, i) - mean,
            load(x, i + 16) - mean,
            load(x, i + 32) - mean,
            load(x, i + 48) - mean,
        )
        s0, s1, s2, s3 = fma(v0, v0, s0), fma(v1, v1, s1), fma(v2, v2, s2), fma(v3, v3, s3)
    for i in range(whole, e, 16):
        n = min(16, e - i)
        v = keep_lanes(load_tail(x, x0 + i, n) - mean, 0, n, splat(0.0))
        s0 = fma(v, v, s0)
    return reduce_add((s0 + s1) + (s2 + s3))


@jit.device_fn
def _add_row(x, x0, residual, r0, e):
    """residual[r0 : r0 + e] += x[x0 : x0 + e]."""
    whole = e // 16 * 16
    for i in range(0, whole, 16):
        store(residual, r0 + i, load(residual, r0 + i) + load(x, x0 + i))
    n = e - whole
    if n:
        total = load_tail(residual, r0 + whole, n) + load_tail(x, x0 + whole, n)
        store_tail(residual, r0 + whole, total, n)


@jit.device_fn
def _rms_scale(x, x0, eps, e):
    """1 / sqrt(mean(x^2) + eps) of x[x0 : x0 + e], in every lane."""
    mean_square = np.float64(_row_squares(x, x0, e, splat(0.0))) / e
    # Not math.sqrt: interpreted, too, 1 / 0 is then infinity.
    return splat(1.0 / np.sqrt(mean_square + eps))


@jit.device_fn
def _add_normed_row(x, x0, inner, eps, residual, r0, e):
    """residual[r0 : r0 + e] += RMSNorm of x[x0 : x0 + e] by `inner`."""
    scale = _rms_scale(x, x0, eps, e)
    whole = e // 16 * 16
    for i in range(0, whole, 16):
        normed = load(x, x0 + i) * scale * load(inner, i)
        store(residual, r0 + i, load(residual, r0 + i) + normed)
    n = e - whole
    if n:
        normed = load_tail(x, x0 + whole, n) * scale * load_tail(inner, whole, n)
        store_tail(residual, r0 + whole, load_tail(residual, r0 + whole, n) + normed, n)


@jit.device_fn
def rms_norm_row(x, x0, weight, eps, out, y0, e):
    """out[y0 : y0 + e] = RMSNorm of x[x0 : x0 + e] by `weight`."""
    scale = _rms_scale(x, x0, eps, e)
    whole = e // 16 * 16
    for i in range(0, whole, 16):
        store(out, y0 + i, load(x, x0 + i) * scale * load(weight, i))
    n = e - whole
    if n:
        store_tail(
            out, y0 + whole, load_tail(x, x0 + whole, n) * scale * load_tail(weight, whole, n), n
        )


@jit.device_fn
def _layer_norm_row(x, x0, weight, bias, eps, out, y0, e):
    mean = splat(np.float64(_row_sum(x, x0, e)) / e)
    variance = np.float64(_row_squares(x, x0, e, mean)) / e
    scale = splat(1.0 / np.sqrt(variance + eps))
    whole = e // 16 * 16
    for i in range(0, whole, 16):
        store(out, y0 + i, fma((load(x, x0 + i) - mean) * scale, load(weight, i), load(bias, i)))
    n = e - whole
    if n:
        scaled = (load_tail(x, x0 + whole, n) - mean) * scale
        store_tail(
            out, y0 + whole, fma(scaled, load_tail(weight, whole, n), load_tail(bias, whole, n)), n
        )


# ---- kernels: one row per task, rows independent -------------------------------------------------
@jit.kernel
def _rms_norm_kernel(x, stride, weight, eps, out, rows, e):
    for t in prange(rows):
        rms_norm_row(x, t * stride, weight, eps, out, t * e, e)


@jit.kernel
def _add_rms_norm_kernel(x, stride, inner, residual, weight, eps, out, rows, e):
    for t in prange(rows):
        if inner.size:
            _add_normed_row(x, t * stride, inner, eps, residual, t * e, e)
        else:
            _add_row(x, t * stride, residual, t * e, e)
        rms_norm_row(residual, t * e, weight, eps, out, t * e, e)


@jit.kernel
def _layer_norm_kernel(x, stride, weight, bias, eps, out, rows, e):
    for t in prange(rows):
        _layer_norm_row(x, t * stride, weight, bias, eps, out, t * e, e)


@jit.kernel
def _add_layer_norm_kernel(x, stride, residual, weight, bias, eps, out, rows, e):
    for t in prange(rows):
        _add_row(x, t * stride, residual, t * e, e)
        _layer_norm_row(residual, t * e, weight, bias, eps, out, t * e, e)


# ---- public wrappers -----------------------------------------------------------------------------
def check_eps(kernel: str, name: str, eps: float) -> None:
    """`eps` must be a finite number >= 0."""
    if not (eps >= 0.0 and math.isfinite(eps)):
        raise ValueError(f"{kernel}: {name} is {eps}, expected a finite number >= 0")


def _checked(
    kernel: str,
    x: Array,
    weight: Array,
    bias: Array | None,
    eps: float,
    out: Array | None,
    dtype: DTypeLike,
) -> Array:
    """Check what the four wrappers share; return `out`, allocated where it was None."""
    require(kernel, "x", x, ("T", "E"), STORAGE)
    require(kernel, "weight", weight, (x.shape[1],))
    if bias is not None:
        require(kernel, "bias", bias, (x.shape[1],))
    if x.shape[1] == 0:
        raise ValueError(f"{kernel}: x has shape {x.shape}, expected at least one column")
    check_eps(kernel, "eps", eps)
    if out is None:
        out = np.empty(x.shape, dtype)
    require(kernel, "out", out, x.shape, STORAGE)
    writable(kernel, "out", out)
    return out


def rms_norm(
    x: Array, weight: Array, eps: float, out: Array | None = None, dtype: DTypeLike = np.float32
) -> Array:
    """RMSNorm of the rows of x.

    x [T, E] f32 or BF16 (uint16); weight [E] f32; out [T, E] f32 or BF16, allocated as `dtype` if
    None. Returns out. TypeError or ValueError names the argument that does not fit.
    """
    out = _checked("rms_norm", x, weight, None, eps, out, dtype)
    if jit.use_reference():
        out[...] = narrow(rms_norm_ref(x, weight, eps), out.dtype)
    else:
        flat, stride = flat_rows(x)
        with jit.threads_for(x.nbytes):
            _rms_norm_kernel(
                flat, stride, np.ascontiguousarray(weight), eps, out.reshape(-1), *x.shape
            )
    return out


def add_rms_norm(
    x: Array,
    residual: Array,
    weight: Array,
    eps: float,
    out: Array | None = None,
    dtype: DTypeLike = np.float32,
    inner: Array | None = None,
) -> Array:
    """residual += x in place, then RMSNorm of the rows of residual.

    x [T, E] f32 or BF16; residual [T, E] f32; inner [E] f32: RMSNorm of x by this weight is what is
    added, with the bits of `rms_norm`; otherwise as `rms_norm`. Returns out.
    """
    out = _checked("add_rms_norm", x, weight, None, eps, out, dtype)
    require("add_rms_norm", "residual", residual, x.shape)
    writable("add_rms_norm", "residual", residual)
    if inner is not None:
        require("add_rms_norm", "inner", inner, weight.shape)
    if jit.use_reference():
        residual[...], normed = add_rms_norm_ref(x, residual, weight, eps, inner)
        out[...] = narrow(normed, out.dtype)
    else:
        flat, stride = flat_rows(x)
        with jit.threads_for(3 * residual.nbytes):
            _add_rms_norm_kernel(
                flat,
                stride,
                NOTHING if inner is None else np.ascontiguousarray(inner),
                residual.reshape(-1),
                np.ascontiguousarray(weight),
                eps,
                out.reshape(-1),
                *x.shape,
            )
    return out


def layer_norm(
    x: Array,
    weight: Array,
    bias: Array | None,
    eps: float,
    out: Array | None = None,
    dtype: DTypeLike = np.float32,
) -> Array:
    """LayerNorm of the rows of x; bias [E] f32 or None; otherwise as `rms_norm`. Returns out."""
    out = _checked("layer_norm", x, weight, bias, eps, out, dtype)
    if jit.use_reference():
        out[...] = narrow(layer_norm_ref(x, weight, bias, eps), out.dtype)
    else:
        flat, stride = flat_rows(x)
        shift = np.zeros_like(weight) if bias is None else np.ascontiguousarray(bias)
        with jit.threads_for(x.nbytes):
            _layer_norm_kernel(
                flat, stride, np.ascontiguousarray(weight), shift, eps, out.reshape(-1), *x.shape
            )
    return out


def add_layer_norm(
    x: Array,
    residual: Array,
    weight: Array,
    bias: Array | None,
    eps: float,
    out: Array | None = None,
    dtype: DTypeLike = np.float32,
) -> Array:
    """residual += x in place, then LayerNorm of its rows; otherwise as `add_rms_norm`."""
    out = _checked("add_layer_norm", x, weight, bias, eps, out, dtype)
    require("add_layer_norm", "residual", residual, x.shape)
    writable("add_layer_norm", "residual", residual)
    if jit.use_reference():
        residual[...], normed = add_layer_norm_ref(x, residual, weight, bias, eps)
        out[...] = narrow(normed, out.dtype)
    else:
        flat, stride = flat_rows(x)
        shift = np.zeros_like(weight) if bias is None else np.ascontiguousarray(bias)
        with jit.threads_for(3 * residual.nbytes):
            _add_layer_norm_kernel(
                flat,
                stride,
                residual.reshape(-1),
                np.ascontiguousarray(weight),
                shift,
                eps,
                out.reshape(-1),
                *x.shape,
            )
    return out
