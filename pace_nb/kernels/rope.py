"""Rotary position embedding: turn pairs of dims of each head by an angle that its position sets.

    (y_a, y_b) = (x_a cos - x_b sin,  x_b cos + x_a sin)    for R / 2 pairs (a, b) of the D dims
    rotate-half (GPT-NeoX, Llama): (a, b) = (i, i + R / 2)
    interleaved (GPT-J, Llama 4):  (a, b) = (2 i, 2 i + 1)
    dims R .. D - 1 are copied (partial rotary)

| Array     | Shape      | Type      | Layout                                               |
|-----------|------------|-----------|------------------------------------------------------|
| x         | [T, H, D]  | f32       | last axis contiguous (a slice of a fused q k v)      |
| positions | [T]        | int32     | row of the tables for each token, 0 .. P - 1         |
| cos, sin  | [P, R / 2] | f32       | contiguous; both made from one angle, in any scaling |
| y         | [T, H, D]  | f32, BF16 | contiguous, allocated or given as `out`              |

Moves: T H D (4 + size(y)) bytes; a token's R / 2 angles stay in L1 for its H heads.
Does: 3 T H R FLOPs. Under one FLOP per byte, so bound by memory.
Error: a product, then an fma, in f32: |y - ref| <= 2^-24 (|x_b sin| + |y|) and the rounding to BF16
    (2^-24 (|x_a cos| + |x_b sin| + |y|) where the CPU has no fma). Angles are as the tables are.
Cautions: a NaN or infinity spreads to its partner (0 times infinity is NaN), no further.
    `out` may be `x` itself when x is contiguous and f32.
Source: Su et al. 2021 (RoFormer) 3.4.2; re-implements PACE `csrc/ops/rope` with partial rotary and
    both pairings.
Notebook: 09 RoPE. Ledger: rope.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import prange
from numpy.typing import DTypeLike

from pace_nb.kernels import jit
from pace_nb.kernels.arrays import STORAGE, Array, flat_heads, in_range, require, writable
from pace_nb.kernels.bf16 import narrow, widen
from pace_nb.kernels.lanes import (
    fma,
    interleave,
    load,
    load_tail,
    store,
    store_tail,
    swap_pairs,
)


# ---- definitions ---------------------------------------------------------------------------------
def rope_ref(
    x: Array, positions: Array, cos: Array, sin: Array, interleaved: bool = False
) -> Array:
    """x [T, H, D] rotated, float64."""
    y, half = widen(x), cos.shape[1]
    pairs = y[..., : 2 * half]
    a, b = (pairs[..., ::2], pairs[..., 1::2]) if interleaved else np.split(pairs, 2, axis=-1)
    c, s = (widen(table)[positions][:, None, :] for table in (cos, sin))
    a[...], b[...] = a * c - b * s, b * c + a * s
    return y


# ---- one head ------------------------------------------------------------------------------------
@jit.device_fn
def _rotate_halves(x, x0, cos, sin, c0, out, y0, half):
    """out[y0 : y0 + 2 half] = x[x0 : x0 + 2 half] rotated by cos, sin[c0 : c0 + half]."""
    whole = half // 16 * 16
    for i in range(0, whole, 16):
        a, b = load(x, x0 + i), load(x, x0 + half + i)
        c, s = load(cos, c0 + i), load(sin, c0 + i)
        store(out, y0 + i, fma(a, c, -(b * s)))
        store(out, y0 + half + i, fma(b, c, a * s))
    n = half - whole
    if n:
        a, b = load_tail(x, x0 + whole, n), load_tail(x, x0 + half + whole, n)
        c, s = load_tail(cos, c0 + whole, n), load_tail(sin, c0 + whole, n)
        store_tail(out, y0 + whole, fma(a, c, -(b * s)), n)
        store_tail(out, y0 + half + whole, fma(b, c, a * s), n)


@jit.device_fn
def _rotate_neighbours(x, x0, cos, sin, c0, out, y0, half):
    """The same for neighbouring pairs: a vector holds 8 of them, each angle in two lanes."""
    for i in range(0, half, 8):
        n = min(8, half - i)
        v = load(x, x0 + 2 * i) if n == 8 else load_tail(x, x0 + 2 * i, 2 * n)
        c, s = load_tail(cos, c0 + i, n), load_tail(sin, c0 + i, n)
        turned = fma(v, interleave(c, c), swap_pairs(v) * interleave(-s, s))
        if n == 8:
            store(out, y0 + 2 * i, turned)
        else:
            store_tail(out, y0 + 2 * i, turned, 2 * n)


@jit.device_fn
def _copy(x, x0, out, y0, n):
    """out[y0 : y0 + n] = x[x0 : x0 + n]."""
    whole = n // 16 * 16
    for i in range(0, whole, 16):
        store(out, y0 + i, load(x, x0 + i))
    store_tail(out, y0 + whole, load_tail(x, x0 + whole, n - whole), n - whole)


@jit.device_fn
def rotate_head(x, x0, cos, sin, c0, half, interleaved, out, y0, d):
    """out[y0 : y0 + d] = the head x[x0 : x0 + d] rotated by cos, sin[c0 : c0 + half]."""
    if interleaved:
        _rotate_neighbours(x, x0, cos, sin, c0, out, y0, half)
    else:
        _rotate_halves(x, x0, cos, sin, c0, out, y0, half)
    if d > 2 * half:
        _copy(x, x0 + 2 * half, out, y0 + 2 * half, d - 2 * half)


# ---- kernel: one token per task, tokens independent ----------------------------------------------
@jit.kernel
def _rope_kernel(x, row, head, positions, cos, sin, half, interleaved, out, tokens, heads, d):
    for t in prange(tokens):
        c0 = positions[t] * half
        for h in range(heads):
            x0, y0 = t * row + h * head, (t * heads + h) * d
            rotate_head(x, x0, cos, sin, c0, half, interleaved, out, y0, d)


# ---- public wrappers -----------------------------------------------------------------------------
class Rotation(NamedTuple):
    """How T tokens rotate, checked once for all layers alike: tables f32 [P, R/2], each token's row
    in them int64 [T], how dims are paired. Made by `rotation`."""

    cos: Array
    sin: Array
    rows: Array
    interleaved: bool


def rotation(cos: Array, sin: Array, rows: Array, interleaved: bool = False) -> Rotation:
    """Check the tables f32 [P, R/2] and the tokens' rows in them, int32 or int64 [T].

    TypeError or ValueError names the argument that does not fit.
    """
    require("rope", "positions", rows, ("T",), (np.int32, np.int64))
    require("rope", "cos", cos, ("P", "R/2"))
    require("rope", "sin", sin, cos.shape)
    in_range("rope", "positions", rows, len(cos))
    cos, sin = (t if t.flags.c_contiguous and t.flags.writeable else t.copy() for t in (cos, sin))
    return Rotation(cos, sin, rows.astype(np.int64), bool(interleaved))


def check_rotation(kernel: str, given: Rotation, tokens: int, d: int) -> None:
    """`given` must be for so many tokens, and its angles for heads of so many dims."""
    if len(given.rows) != tokens:
        raise ValueError(f"{kernel}: rotation of {len(given.rows)} tokens, expected {tokens}")
    if 2 * given.cos.shape[1] > d:
        raise ValueError(
            f"{kernel}: cos has shape {given.cos.shape}, expected R/2 from 0 to D/2 = {d / 2:g}"
        )


def rope(
    x: Array,
    positions: Array,
    cos: Array,
    sin: Array,
    out: Array | None = None,
    interleaved: bool = False,
    dtype: DTypeLike = np.float32,
) -> Array:
    """Rotate the first R dims of each head of x, copy the rest (all of them where R is 0).

    x [T, H, D] f32, any strides with a contiguous last axis; positions int32 or int64 [T]; cos, sin
    [P, R/2] f32; out [T, H, D] f32 or BF16, allocated as `dtype` if None. `interleaved`: pairs are
    neighbours. Returns out. TypeError or ValueError names the argument that does not fit.
    """
    require("rope", "x", x, ("T", "H", "D"))
    require("rope", "positions", positions, (len(x),), (np.int32, np.int64))
    given = rotation(cos, sin, positions, interleaved)
    check_rotation("rope", given, len(x), x.shape[2])
    if out is None:
        out = np.empty(x.shape, dtype)
    require("rope", "out", out, x.shape, STORAGE)
    writable("rope", "out", out)
    if jit.use_reference():
        out[...] = narrow(rope_ref(x, positions, cos, sin, interleaved), out.dtype)
    else:
        with jit.threads_for(x.nbytes):
            _rope_kernel(
                *flat_heads(x),
                given.rows,
                given.cos.reshape(-1),
                given.sin.reshape(-1),
                cos.shape[1],
                given.interleaved,
                out.reshape(-1),
                *x.shape,
            )
    return out
