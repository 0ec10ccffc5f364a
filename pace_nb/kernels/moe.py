"""Mixture of experts: one grouped product over rows sorted by expert, and the weighted sum back.

    grouped_gemm    C[r, n] = bias[e, n] + sum over k of A[r, k] * W[e, n, k],  e: expert of row r
    combine         y[t, n] = sum over i of scale[t, i] * C[place[t, i], n],    i ascending
    sort_by_expert  which token each row of A is, and at which row each choice of a token landed

| Array   | Shape      | Type      | Layout                                              |
|---------|------------|-----------|-----------------------------------------------------|
| A       | [R, K]     | BF16, f32 | contiguous, rows of one expert beside each other    |
| W       | X x [N, K] | BF16, f32 | X experts, each as `gemm.pack_weight`, back to back |
| offsets | [X + 1]    | int64     | rows of expert e are offsets[e] to offsets[e + 1]   |
| bias    | [X, N]     | f32, None | contiguous                                          |
| C       | [R, N]     | f32       | contiguous                                          |
| scale   | [T, I]     | f32       | I experts per token                                 |
| place   | [T, I]     | int64     | rows of C                                           |

Moves: N K size(W) bytes for every expert that has a row, R K size(A) + 4 R N.
Does: 2 R N K FLOPs. Bound by reading the experts until each has tens of rows.
Order: each element of C as in `gemm`: one accumulator, k ascending; y adds its experts in the order
    of the token's own list. Neither depends on the other tokens of the batch.
Error: of C as `gemm`; |y - exact| <= I 2^-24 sum |scale C| more.
Cautions: an expert without rows is not read. Indices are checked by the wrappers.
Source: grouped GEMM as in MegaBlocks (Gale et al. 2022); replaces PACE's Python loop over experts
    (pace/llm/models/gpt_oss.py:86).
Notebook: 19 MoE and MXFP4.
Ledger: moe.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numba import prange

from pace_nb.kernels import jit
from pace_nb.kernels.arrays import (
    NOTHING,
    STORAGE,
    Array,
    ascends,
    contiguous,
    in_range,
    require,
)
from pace_nb.kernels.bf16 import narrow, widen
from pace_nb.kernels.gemm import (
    GROUP,
    NR,
    PackedWeight,
    gemm_ref,
    operand,
    pack_weight,
    packed_size,
    panels,
    unpack_weight,
)
from pace_nb.kernels.lanes import fma, load, load_tail, splat, store, store_tail


class PackedExperts(NamedTuple):
    """X expert weights [N, K], packed one after another in one flat array."""

    data: Array
    num_experts: int
    n: int
    k: int

    def expert(self, e: int) -> PackedWeight:
        """Expert e as a weight of its own; a view."""
        size = len(self.data) // self.num_experts
        return PackedWeight(self.data[e * size : (e + 1) * size], self.n, self.k)


# ---- definitions ---------------------------------------------------------------------------------
def grouped_gemm_ref(
    x: Array, experts: Sequence[Array], offsets: Array, bias: Array | None = None
) -> Array:
    """x [R, K], experts X x [N, K], offsets [X + 1], bias [X, N] -> [R, N], float64."""
    groups = [
        gemm_ref(x[offsets[e] : offsets[e + 1]], w, None if bias is None else bias[e])
        for e, w in enumerate(experts)
    ]
    return np.concatenate(groups)


def combine_ref(c: Array, place: Array, scale: Array) -> Array:
    """c [R, N], place and scale [T, I] -> [T, N], float64."""
    return np.einsum("ti,tin->tn", scale.astype(np.float64), widen(c)[place])


def sort_by_expert(chosen: Array, num_experts: int) -> tuple[Array, Array, Array]:
    """Rows (token, choice) in order of expert, ties in order of token.

    chosen [T, I], each 0 <= expert < num_experts. Returns (token of each row int64 [T I], place of
    each choice int64 [T, I], offsets int64 [num_experts + 1]).
    """
    require("sort_by_expert", "chosen", chosen, ("T", "I"), (np.int32, np.int64))
    in_range("sort_by_expert", "chosen", chosen, num_experts)
    order = np.argsort(chosen.reshape(-1), kind="stable")
    place = np.empty(chosen.size, np.int64)
    place[order] = np.arange(chosen.size)
    counts = np.bincount(chosen.reshape(-1), minlength=num_experts)
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    return order // max(chosen.shape[1], 1), place.reshape(chosen.shape), offsets


# ---- kernels -------------------------------------------------------------------------------------
@jit.kernel
def _grouped_gemm_kernel(a, b, busy, offsets, bias, c, n, k):
    count = (n + NR - 1) // NR
    groups = (count + GROUP - 1) // GROUP
    for task in prange(len(busy) * groups):  # a group of panels of an expert that has rows per task
        e, j = busy[task // groups], task % groups * GROUP
        row, m = offsets[e], offsets[e + 1] - offsets[e]
        first, now = e * count + j, min(GROUP, count - j)
        at = row * n + j * NR
        panels(a, row * k, b, first, now, bias, first * NR, c, at, n, m, k, n - j * NR)


@jit.device_fn
def _combine_row(c, place, scale, t, choices, y, n):
    """y[t] = sum over i of scale[t, i] * c[place[t, i]]."""
    whole = n // 16 * 16
    for column in range(0, whole, 16):
        total = splat(0.0)
        for i in range(t * choices, (t + 1) * choices):
            total = fma(splat(scale[i]), load(c, place[i] * n + column), total)
        store(y, t * n + column, total)
    rest = n - whole
    if rest:
        total = splat(0.0)
        for i in range(t * choices, (t + 1) * choices):
            total = fma(splat(scale[i]), load_tail(c, place[i] * n + whole, rest), total)
        store_tail(y, t * n + whole, total, rest)


@jit.kernel
def _combine_kernel(c, place, scale, tokens, choices, y, n):
    for t in prange(tokens):  # one token per task
        _combine_row(c, place, scale, t, choices, y, n)


# ---- public wrappers -----------------------------------------------------------------------------
def pack_experts(experts: Sequence[Array]) -> PackedExperts:
    """Pack X weights [N, K], all of one shape and dtype (uint16 as BF16, or float32)."""
    if not experts:
        raise ValueError("pack_experts: experts is empty, expected at least one [N, K] array")
    require("pack_experts", "experts[0]", experts[0], ("N", "K"), STORAGE)
    n, k = experts[0].shape
    size = packed_size(n, k, experts[0].dtype)
    data = np.empty(len(experts) * size, experts[0].dtype)
    for e, w in enumerate(experts):
        require("pack_experts", f"experts[{e}]", w, (n, k), (data.dtype,))
        data[e * size : (e + 1) * size] = pack_weight(w).data
    return PackedExperts(data, len(experts), n, k)


def check_offsets(kernel: str, offsets: Array, num_experts: int, rows: int) -> None:
    """offsets must be int64 [num_experts + 1] and ascend from 0 to `rows`."""
    require(kernel, "offsets", offsets, (num_experts + 1,), (np.int64,))
    if offsets[0] != 0 or offsets[-1] != rows or not ascends(offsets):
        raise ValueError(f"{kernel}: offsets must ascend from 0 to {rows}, found {offsets}")


def pad_bias(bias: Array | None, columns: int) -> Array:
    """bias [X, N], flat, each expert's padded to a multiple of `columns`; empty for None."""
    if bias is None:
        return NOTHING
    return np.pad(bias, ((0, 0), (0, -bias.shape[1] % columns))).reshape(-1)


def grouped_gemm(
    x: Array, weight: PackedExperts, offsets: Array, bias: Array | None = None
) -> Array:
    """Each row of x [R, K] times the weight of its expert: float32 [R, N].

    x has the weight's dtype; offsets int64 [X + 1] from 0 to R, ascending; bias f32 [X, N] or None.
    TypeError or ValueError names the argument that does not fit.
    """
    x_count, n, k, name = weight.num_experts, weight.n, weight.k, "grouped_gemm"
    size = x_count * packed_size(n, k, weight.data.dtype)
    require(name, "weight.data", weight.data, (size,), STORAGE)
    contiguous(name, "weight.data", weight.data)
    require(name, "x", x, ("R", k), (weight.data.dtype,))
    check_offsets(name, offsets, x_count, len(x))
    if bias is not None:
        require(name, "bias", bias, (x_count, n))
    out = np.empty((len(x), n), np.float32)
    if jit.use_reference():
        experts = [unpack_weight(weight.expert(e)) for e in range(x_count)]
        out[...] = narrow(grouped_gemm_ref(x, experts, offsets, bias), np.float32)
        return out
    busy = np.flatnonzero(np.diff(offsets))
    a, _, k = operand(x, offsets)
    _grouped_gemm_kernel(a, weight.data, busy, offsets, pad_bias(bias, NR), out.reshape(-1), n, k)
    return out


def combine(c: Array, place: Array, scale: Array) -> Array:
    """Weighted sum of each token's expert rows, float32 [T, N].

    c f32 [R, N]; place int64 [T, I], rows of c; scale f32 [T, I].
    """
    require("combine", "c", c, ("R", "N"))
    require("combine", "place", place, ("T", "I"), (np.int64,))
    require("combine", "scale", scale, place.shape)
    in_range("combine", "place", place, len(c))
    if jit.use_reference():
        return narrow(combine_ref(c, place, scale), np.float32)
    y = np.empty((len(place), c.shape[1]), np.float32)
    flat_place, flat_scale = (np.ascontiguousarray(a).reshape(-1) for a in (place, scale))
    flat = np.ascontiguousarray(c).reshape(-1)
    with jit.threads_for(c.nbytes):
        _combine_kernel(flat, flat_place, flat_scale, *place.shape, y.reshape(-1), c.shape[1])
    return y
