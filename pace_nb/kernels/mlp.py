"""First half of a feed-forward layer: product, bias and activation in one pass over the weights.

    H[m, f] = act(G[m, f]) * U[m, f]    gated,  G = X Wg^T + bg,  U = X Wu^T + bu
    H[m, f] = act(G[m, f])              plain

| Array | Shape            | Type      | Layout                                                    |
|-------|------------------|-----------|-----------------------------------------------------------|
| X     | [M, K]           | BF16, f32 | contiguous                                                |
| data  | [F/NR, P, panel] | BF16, f32 | `gemm.py`'s panels; P = 2: of Wg and Wu in turn; else 1   |
| bias  | [F/NR, P, NR]    | f32       | as data; or empty                                         |
| H     | [M, F]           | BF16, f32 | contiguous, allocated or given as `out`                   |

Moves: P F K size(W) + M K size(X) + M F size(H) bytes. G and U exist for OWN columns
    at a time, in L2: as arrays of their own they were new pages for every 256 tokens, cleared by
    the system while the product ran (docs/LOG.md).
Does: 2 P M F K FLOPs and an activation per element of H.
Error: that of `gemm` in G and U (f32), then that of `activation`; a row's bits are those of the two
    kernels one after the other, and depend on that row only.
Cautions: as `gemm`. Panels of gate and up alternate so that a thread reads one stream, and so that
    what a panel asks for in advance is what comes next.
Source: fused MLP of PACE (csrc/ops/libxsmm, fused_mlp), which keeps a block of tokens' hidden
    values in L2 as BF16.
Notebook: 11 fused MLP.
Ledger: mlp.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numba import prange
from numpy.typing import DTypeLike

from pace_nb.kernels import gemm, jit
from pace_nb.kernels.activation import (
    KINDS,
    act_row,
    activation_ref,
    check_kind,
    gated_activation_ref,
    gated_row,
)
from pace_nb.kernels.arrays import NOTHING, Array, require, writable
from pace_nb.kernels.bf16 import narrow
from pace_nb.kernels.gemm import GROUP, NR, PackedWeight, gemm_ref, panels

GATE_AND_UP = 2
OWN = 128  # columns of gate and up that exist at a time in each thread


class MLPWeight(NamedTuple):
    """Wg [F, K] (P = 1), or Wg and Wu (P = 2), and their biases, as the kernel reads them."""

    panels: PackedWeight  # n = P F, F padded to NR
    bias: Array  # f32, flat; empty for none
    parts: int
    n: int  # F


# ---- definition ----------------------------------------------------------------------------------
def mlp_ref(
    x: Array, weights: Sequence[Array], kind: str, biases: Sequence[Array] | None = None
) -> Array:
    """x [M, K], weights one or two [F, K], biases as many [F] -> H [M, F], float64.

    G and U are rounded to float32 in between, as what `activation_ref` takes.
    """
    given = biases if biases is not None else [None] * len(weights)
    rows = np.concatenate(
        [gemm_ref(x, w, b) for w, b in zip(weights, given, strict=True)], axis=1
    ).astype(np.float32)
    gated = len(weights) == GATE_AND_UP
    return gated_activation_ref(rows, kind) if gated else activation_ref(rows, kind)


# ---- kernel --------------------------------------------------------------------------------------
@jit.kernel
def _mlp_kernel(a, b, bias, kind, parts, h, work, workers, m, f, k):
    size, count, each = len(work) // workers, (f + NR - 1) // NR, OWN // (parts * NR)
    turns = (count + each - 1) // each
    for w in prange(workers):  # panels of F are independent: each thread has a stretch of them
        own = work[w * size : w * size + size]  # [m, OWN]
        for turn in range(w * turns // workers, (w + 1) * turns // workers):
            first = turn * each
            end = min(first + each, count)
            for i in range(first * parts, end * parts, GROUP):
                now, at = min(GROUP, end * parts - i), (i - first * parts) * NR
                panels(a, 0, b, i, now, bias, i * NR, own, at, OWN, m, k, now * NR)
            for j in range(first, end):
                n, at = min(NR, f - j * NR), (j - first) * parts * NR
                for i in range(m):
                    x0, h0 = i * OWN + at, i * f + j * NR
                    if parts == GATE_AND_UP:
                        gated_row(own, x0, x0 + NR, kind, h, h0, n)
                    else:
                        act_row(own, x0, kind, h, h0, n)


# ---- public wrappers -----------------------------------------------------------------------------
def new_mlp_weight(
    n: int, k: int, dtype: DTypeLike, *, gated: bool, biases: Array | None = None
) -> MLPWeight:
    """A weight of zeros for F = n, to be filled by `pack_mlp_rows`; biases f32 [P, F] or None."""
    parts = GATE_AND_UP if gated else 1
    panels = -(-n // NR)
    bias = NOTHING
    if biases is not None:
        require("new_mlp_weight", "biases", biases, (parts, n))
        padded = np.pad(biases, ((0, 0), (0, panels * NR - n)))
        bias = np.ascontiguousarray(padded.reshape(parts, panels, NR).swapaxes(0, 1)).reshape(-1)
    return MLPWeight(gemm.new_weight(parts * panels * NR, k, dtype), bias, parts, n)


def pack_mlp_rows(weight: MLPWeight, row0: int, w: Array) -> bool:
    """Put rows w [n, K] into their place: rows row0 .. of Wg and, below it, Wu, [P F, K] in all.

    Returns True if all are finite numbers. Errors as `gemm.pack_rows`.
    """
    if not 0 <= row0 <= weight.parts * weight.n - len(w):
        raise ValueError(
            f"pack_mlp_rows: row0 is {row0}, expected 0 to {weight.parts * weight.n - len(w)}: "
            f"{len(w)} rows of {weight.parts * weight.n}"
        )
    finite = True
    while len(w):
        part, row = divmod(row0, weight.n)
        here = w[: weight.n - row]
        finite &= gemm.pack_rows(weight.panels, row, here, lane=part, lanes=weight.parts)
        row0, w = row0 + len(here), w[len(here) :]
    return finite


def unpack_mlp_weight(weight: MLPWeight) -> tuple[list[Array], list[Array] | None]:
    """([F, K] of each part, their biases [F] or None)."""
    rows = gemm.unpack_weight(weight.panels)
    rows = rows.reshape(-1, weight.parts, NR, weight.panels.k).swapaxes(0, 1)
    weights = [part.reshape(-1, weight.panels.k)[: weight.n] for part in rows]
    if not weight.bias.size:
        return weights, None
    biases = weight.bias.reshape(-1, weight.parts, NR).swapaxes(0, 1)
    return weights, [part.reshape(-1)[: weight.n] for part in biases]


def mlp(x: Array, weight: MLPWeight, kind: str, out: Array | None = None) -> Array:
    """act(x Wg^T + bg) * (x Wu^T + bu), or act(x Wg^T + bg) of a plain weight: [M, F].

    x [M, K] of the weight's dtype (uint16 as BF16, or float32); kind as `activation`; out [M, F] of
    that dtype, allocated if None. Returns out. TypeError or ValueError names what does not fit.
    """
    panels, n, dtype = weight.panels, weight.n, weight.panels.data.dtype
    gemm.check_weight("mlp", panels)
    check_kind("mlp", kind)
    require("mlp", "x", x, ("M", panels.k), (dtype,))
    require("mlp", "weight.bias", weight.bias, (None,))
    fits = weight.parts in (1, GATE_AND_UP) and panels.n == weight.parts * -(-n // NR) * NR
    if not fits or weight.bias.size not in (0, panels.n):
        raise ValueError(
            f"mlp: weight of {panels.n} rows and {weight.bias.size} biases for F = {n}"
        )
    if out is None:
        out = np.empty((len(x), n), dtype)
    require("mlp", "out", out, (len(x), n), (dtype,))
    writable("mlp", "out", out)
    if np.may_share_memory(x, out):
        raise ValueError("mlp: out shares memory with x, which is read until the end")
    if jit.use_reference():
        weights, biases = unpack_mlp_weight(weight)
        out[...] = narrow(mlp_ref(x, weights, kind, biases), dtype)
        return out
    a, m_pad, k = gemm.operand(x)
    m = len(x) + m_pad
    h = np.empty((m, n), dtype) if m_pad else out
    with jit.threads_for(panels.data.nbytes * -(-m // gemm.MR)):
        workers = jit.num_threads()
        work = np.empty(workers * m * OWN, np.float32)
        _mlp_kernel(
            a,
            panels.data,
            np.ascontiguousarray(weight.bias),
            KINDS[kind],
            weight.parts,
            h.reshape(-1),
            work,
            workers,
            m,
            n,
            k,
        )
    if m_pad:
        out[...] = h[: len(x)]
    return out
