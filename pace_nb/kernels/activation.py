"""Activations of the feed-forward half, alone or as the gate of a product.

    activation        y = act(x)
    gated_activation  y = act(gate) * up, where gate and up are the halves of each row
    clamped_swiglu    y = g sigmoid(alpha g) (u + 1),
                      g = min(gate, limit), u = min(max(up, -limit), limit)

    silu(x) = x / (1 + exp(-x))                     gelu(x) = x P(Z <= x), Z standard normal (erf)
    relu(x) = max(x, 0)                             gelu_tanh(x) = x / (1 + exp(-2 u)),
                                                        u = sqrt(2 / pi) (x + 0.044715 x^3)

| Array   | Shape   | Type      | Layout                                         |
|---------|---------|-----------|------------------------------------------------|
| x       | [T, F]  | f32       | rows contiguous, any row stride                |
| gate_up | [T, 2F] | f32       | the same; gate is columns 0 .. F - 1           |
| y       | [T, F]  | f32, BF16 | contiguous, allocated or given as `out`        |

Moves: T F (4 + size(y)) bytes, gated T F (8 + size(y)).
Does: about 25 operations per element for silu and gelu_tanh, 50 for gelu, 1 for relu: bound by
    memory where the rows come from DRAM, by arithmetic where the GEMM left them in cache.
Error: f32. silu and gelu 4 and 9 ULP; gelu_tanh, written as a sigmoid because 1 + tanh(u) cancels,
    4 + 2 |2 u| ULP (its exponent has an error that large); the product with up adds half an ULP,
    BF16 output another half of its own. Without fma gelu has x^2 / 2 ULP more, gelu_tanh |2 u|.
    clamped_swiglu 6 + 2 |alpha g| ULP (alpha and its product with g are rounded).
Cautions: as the formulas do, -infinity gives NaN (but relu 0), NaN stays NaN (relu too). Results
    below 1e-38 may be 0. `out` may be `x` itself when both are f32 and contiguous.
Source: Elfwing et al. 2017 (SiLU), Hendrycks and Gimpel 2016 (GELU and its tanh form), Shazeer 2020
    (gated). Re-implements the activations of PACE's TPP fused MLP (csrc/ops/mlp), without rounding
    gate and up to BF16 first.
Notebook: 11 fused MLP. Ledger: activation.
"""

from __future__ import annotations

import numpy as np
from numba import prange
from numpy.typing import DTypeLike

from pace_nb.kernels import jit
from pace_nb.kernels.arrays import STORAGE, Array, flat_rows, require, writable
from pace_nb.kernels.bf16 import narrow, widen
from pace_nb.kernels.exp import exp, exp_ref, normal_cdf, normal_cdf_ref
from pace_nb.kernels.lanes import fma, load, load_tail, maximum, minimum, splat, store, store_tail


# ---- definitions ---------------------------------------------------------------------------------
def activation_ref(x: Array, kind: str) -> Array:
    """act(x), float64."""
    x = widen(x)
    with np.errstate(invalid="ignore", over="ignore"):
        if kind == "silu":
            return x / (1.0 + exp_ref(-x))
        if kind == "gelu":
            return x * normal_cdf_ref(x)
        if kind == "gelu_tanh":
            u = np.sqrt(2.0 / np.pi) * (x + 0.044715 * x**3)
            return x / (1.0 + exp_ref(-2.0 * u))  # 1 / (1 + exp(-2 u)) = (1 + tanh u) / 2
        return np.maximum(x, 0.0)


def gated_activation_ref(gate_up: Array, kind: str) -> Array:
    """act(gate) * up of the rows [gate, up], float64."""
    gate, up = np.split(widen(gate_up), 2, axis=-1)
    with np.errstate(invalid="ignore", over="ignore"):
        return activation_ref(gate, kind) * up


def clamped_swiglu_ref(gate_up: Array, alpha: float, limit: float) -> Array:
    """g sigmoid(alpha g) (u + 1) of the rows [gate, up], clamped to g and u, float64."""
    gate, up = np.split(widen(gate_up), 2, axis=-1)
    g, u = np.minimum(gate, limit), np.clip(up, -limit, limit)
    with np.errstate(invalid="ignore", over="ignore"):
        return g / (1.0 + exp_ref(-alpha * g)) * (u + 1.0)


# ---- constants -----------------------------------------------------------------------------------
SILU, GELU, GELU_TANH, RELU = 0, 1, 2, 3
KINDS = {"silu": SILU, "gelu": GELU, "gelu_tanh": GELU_TANH, "relu": RELU}
TANH_1, TANH_3 = 1.5957691216057308, 0.07135481627159563  # 2 sqrt(2 / pi), that times 0.044715
# Columns per task: a decode step has one row, and a thread's share must outweigh starting it.
COLUMNS = 2048


# ---- one vector, one row -------------------------------------------------------------------------
@jit.device_fn
def _act(x, kind):
    """act(x), f32x16. `kind` is the same for all vectors of a call, so the branch is foreseen."""
    if kind == SILU:
        return x / (splat(1.0) + exp(-x))
    if kind == GELU:
        return x * normal_cdf(x)
    if kind == GELU_TANH:
        twice_u = x * fma(x * x, splat(TANH_3), splat(TANH_1))
        return x / (splat(1.0) + exp(-twice_u))
    return maximum(splat(0.0), x)  # a NaN in the second operand stays


@jit.device_fn
def _load_up_to(x, i, n):
    """x[i : i + 16] or, where n < 16, as many of them."""
    return load(x, i) if n >= 16 else load_tail(x, i, n)


@jit.device_fn
def act_row(x, x0, kind, out, y0, n):
    """out[y0 : y0 + n] = act(x[x0 : x0 + n]); one loop, as a second one would compile act again."""
    for i in range(0, n, 16):
        y = _act(_load_up_to(x, x0 + i, n - i), kind)
        if n - i >= 16:
            store(out, y0 + i, y)
        else:
            store_tail(out, y0 + i, y, n - i)


@jit.device_fn
def gated_row(x, gate0, up0, kind, out, y0, n):
    """out[y0 : y0 + n] = act(x[gate0 : gate0 + n]) * x[up0 : up0 + n]."""
    for i in range(0, n, 16):
        y = _act(_load_up_to(x, gate0 + i, n - i), kind) * _load_up_to(x, up0 + i, n - i)
        if n - i >= 16:
            store(out, y0 + i, y)
        else:
            store_tail(out, y0 + i, y, n - i)


@jit.device_fn
def _swiglu_row(x, gate0, up0, alpha, limit, out, y0, n):
    """out[y0 : y0 + n] = clamped_swiglu of x[gate0 : gate0 + n] and x[up0 : up0 + n]."""
    top, one = splat(limit), splat(1.0)
    for i in range(0, n, 16):  # a NaN in the second operand of a minimum or maximum stays
        g = minimum(top, _load_up_to(x, gate0 + i, n - i))
        u = minimum(top, maximum(-top, _load_up_to(x, up0 + i, n - i)))
        y = g / (one + exp(-(splat(alpha) * g))) * (u + one)
        if n - i >= 16:
            store(out, y0 + i, y)
        else:
            store_tail(out, y0 + i, y, n - i)


# ---- kernels: a stretch of at most COLUMNS columns of one row per task ---------------------------
@jit.kernel
def _activation_kernel(x, stride, kind, out, rows, f):
    per_row = (f + COLUMNS - 1) // COLUMNS
    for task in prange(rows * per_row):
        t, c = task // per_row, task % per_row * COLUMNS
        act_row(x, t * stride + c, kind, out, t * f + c, min(COLUMNS, f - c))


@jit.kernel
def _gated_activation_kernel(x, stride, kind, out, rows, f):
    per_row = (f + COLUMNS - 1) // COLUMNS
    for task in prange(rows * per_row):
        t, c = task // per_row, task % per_row * COLUMNS
        gate0 = t * stride + c
        gated_row(x, gate0, gate0 + f, kind, out, t * f + c, min(COLUMNS, f - c))


@jit.kernel
def _clamped_swiglu_kernel(x, stride, alpha, limit, out, rows, f):
    per_row = (f + COLUMNS - 1) // COLUMNS
    for task in prange(rows * per_row):
        t, c = task // per_row, task % per_row * COLUMNS
        gate0, n = t * stride + c, min(COLUMNS, f - c)
        _swiglu_row(x, gate0, gate0 + f, alpha, limit, out, t * f + c, n)


# ---- public wrappers -----------------------------------------------------------------------------
def _checked(kernel: str, shape: tuple[int, ...], out: Array | None, dtype: DTypeLike) -> Array:
    """`out`, allocated where it is None and checked where it is given."""
    if out is None:
        out = np.empty(shape, dtype)
    require(kernel, "out", out, shape, STORAGE)
    writable(kernel, "out", out)
    return out


def check_kind(kernel: str, kind: str) -> None:
    """`kind` must be the name of an activation."""
    if kind not in KINDS:
        raise ValueError(f"{kernel}: kind is {kind!r}, expected one of {', '.join(KINDS)}")


def _halves(kernel: str, gate_up: Array) -> tuple[int, int]:
    """(T, F) of gate_up [T, 2F]."""
    require(kernel, "gate_up", gate_up, ("T", "2F"))
    if gate_up.shape[1] % 2:
        raise ValueError(f"{kernel}: gate_up has shape {gate_up.shape}, expected an even last axis")
    return len(gate_up), gate_up.shape[1] // 2


def activation(
    x: Array, kind: str, out: Array | None = None, dtype: DTypeLike = np.float32
) -> Array:
    """act(x) element by element.

    x [T, F] f32; kind "silu", "gelu", "gelu_tanh" or "relu"; out [T, F] f32 or BF16, allocated as
    `dtype` if None. Returns out. TypeError or ValueError names the argument that does not fit.
    """
    require("activation", "x", x, ("T", "F"))
    check_kind("activation", kind)
    out = _checked("activation", x.shape, out, dtype)
    if jit.use_reference():
        out[...] = narrow(activation_ref(x, kind), out.dtype)
    else:
        with jit.threads_for(x.nbytes):
            _activation_kernel(*flat_rows(x), KINDS[kind], out.reshape(-1), *x.shape)
    return out


def gated_activation(
    gate_up: Array, kind: str, out: Array | None = None, dtype: DTypeLike = np.float32
) -> Array:
    """act(gate) * up; gate_up [T, 2F] f32, gate first; otherwise as `activation`. Returns out."""
    shape = _halves("gated_activation", gate_up)
    check_kind("gated_activation", kind)
    out = _checked("gated_activation", shape, out, dtype)
    if jit.use_reference():
        out[...] = narrow(gated_activation_ref(gate_up, kind), out.dtype)
    else:
        with jit.threads_for(gate_up.nbytes):
            _gated_activation_kernel(*flat_rows(gate_up), KINDS[kind], out.reshape(-1), *shape)
    return out


def clamped_swiglu(
    gate_up: Array,
    alpha: float,
    limit: float,
    out: Array | None = None,
    dtype: DTypeLike = np.float32,
) -> Array:
    """The gated unit of GPT-OSS; gate_up [T, 2F] f32, gate first; limit > 0. Returns out.

    out [T, F] f32 or BF16, allocated as `dtype` if None. TypeError or ValueError names the argument
    that does not fit.
    """
    shape = _halves("clamped_swiglu", gate_up)
    if not (np.isfinite(alpha) and 0 < limit < np.inf):
        raise ValueError(
            f"clamped_swiglu: alpha is {alpha} and limit is {limit}, expected finite numbers, "
            "limit above 0"
        )
    out = _checked("clamped_swiglu", shape, out, dtype)
    if jit.use_reference():
        out[...] = narrow(clamped_swiglu_ref(gate_up, alpha, limit), out.dtype)
    else:
        with jit.threads_for(gate_up.nbytes):
            _clamped_swiglu_kernel(
                *flat_rows(gate_up), float(alpha), float(limit), out.reshape(-1), *shape
            )
    return out
