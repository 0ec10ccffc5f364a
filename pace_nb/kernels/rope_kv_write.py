"""Between the projection of q, k and v and attention: rotate q and k, write k and v to the cache.

    Q[t, h] = rotate(q[t, h], position of t)                     as `rope.py`, in storage dtype
    pool.k, pool.v <- rotate(k[t, h], position of t), v[t, h]    as `kv_write.py`
    with norms, rms_norm(q[t, h]) and rms_norm(k[t, h]) rotate   as `norm.py`: Qwen 3, Gemma 3

| Array | Shape              | Type      | Layout                                                 |
|-------|--------------------|-----------|--------------------------------------------------------|
| heads | [T, H + 2 KVH, D]  | f32       | contiguous: H heads of q, KVH of k, then KVH of v      |
| norms | 2 times [D]        | f32, None | weights of q's and k's heads, and eps                  |
| Q     | [T, H, D]          | BF16, f32 | contiguous; what attention multiplies K with           |
| pool  |                    |           | `kv_write.py`                                          |

Moves: T D (H + 2 KVH) (4 + size(pool)) bytes; a normalized head and a unit's rotated keys stay in
    L1 on their way.
Does: 3 T R (H + KVH) FLOPs, 4 T D (H + KVH) more with norms. Bound by memory, and for few tokens by
    being called: one launch where two norms, two rotations and writing were five, each with checks.
Error: that of `rms_norm` and `rope`, rounded to storage once; a row's bits are those of `rms_norm`,
    then `rope`, then `kv_write`.
Cautions: as `kv_write`: a pair's odd half is zeroed with its even one; no unit may belong to two
    sequences.
Source: vLLM's fused qk_rope + reshape_and_cache; PACE rotates and writes apart.
Notebook: 09 RoPE, 12 KV cache.
Ledger: rope_kv_write.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import prange

from pace_nb.kernels import jit
from pace_nb.kernels.arrays import NOTHING, Array, contiguous, require, writable
from pace_nb.kernels.bf16 import narrow
from pace_nb.kernels.kv_write import (
    KVPool,
    WritePlan,
    check_plan,
    check_pool,
    write_keys,
    write_ref,
    write_values,
)
from pace_nb.kernels.norm import check_eps, rms_norm_ref, rms_norm_row
from pace_nb.kernels.rope import Rotation, check_rotation, rope_ref, rotate_head

APART = 64  # elements between the scratch of two threads: no cache line is written by both


class HeadNorms(NamedTuple):
    """RMSNorm of each head before it rotates: weights f32 [D] of q's and of k's heads, and eps."""

    q: Array
    k: Array
    eps: float


# ---- definition ----------------------------------------------------------------------------------
def rope_kv_write_ref(
    heads: Array,
    rotation: Rotation,
    pool: KVPool,
    planned: WritePlan,
    norms: HeadNorms | None = None,
) -> Array:
    """Q float64 [T, H, D]; k rotated and v are in the pool."""
    k0, v0 = heads.shape[1] - 2 * pool.num_kv_heads, heads.shape[1] - pool.num_kv_heads
    q, k, v = np.split(heads, [k0, v0], axis=1)
    if norms is not None:
        q, k = (
            narrow(rms_norm_ref(x, weight, norms.eps), np.float32)
            for x, weight in ((q, norms.q), (k, norms.k))
        )
    tables = rotation.rows, rotation.cos, rotation.sin, rotation.interleaved
    write_ref(narrow(rope_ref(k, *tables), pool.dtype), v, pool, planned)
    return rope_ref(q, *tables)


# ---- kernel --------------------------------------------------------------------------------------
@jit.kernel
def _rope_kv_write_kernel(
    x, q_weight, k_weight, eps, normed, positions, cos, sin, half, interleaved, queries, keys,
    pool_k, pool_v, tokens, heads, kv_heads, d, dp, s, in_pool, units, longest, rows, workers
):  # fmt: skip
    # A thread has a share of the units' heads, as in kv_write.py, and one of the tokens' queries:
    # dealt out as one row of tasks, which differ tenfold, they would all wait for the first thread.
    # On their way, in scratch of a thread that stays in L1: `normed`, one head, empty without
    # norms, and `keys` [longest, D], rotated, of one unit. They lie side by side there, as rows of
    # a token lie a power of two apart and would push each other out of L1.
    writes, group, own = units * kv_heads, heads // kv_heads, longest * d + APART
    k0, v0, row = heads * d, (heads + kv_heads) * d, (heads + 2 * kv_heads) * d
    for w in prange(workers):
        n0 = w * (d + APART)
        for task in range(w * writes // workers, (w + 1) * writes // workers):
            i, h = task // kv_heads, task % kv_heads
            unit, slot, end, t = rows[4 * i], rows[4 * i + 1], rows[4 * i + 2], rows[4 * i + 3]
            for r in range(t, t + end - slot):
                c0, y0 = positions[r] * half, w * own + (r - t) * d
                head, x0 = x, r * row + k0 + h * d
                if normed.size:
                    rms_norm_row(x, x0, k_weight, eps, normed, n0, d)
                    head, x0 = normed, n0
                rotate_head(head, x0, cos, sin, c0, half, interleaved, keys, y0, d)
            p = (h * in_pool + unit) * 16
            write_keys(keys, w * own, d, pool_k, p * d, slot, end, d, s)
            write_values(x, t * row + v0 + h * d, row, pool_v, p * dp, slot, end, d, dp, s)
        for task in range(w * tokens * kv_heads // workers, (w + 1) * tokens * kv_heads // workers):
            t, first = task // kv_heads, task % kv_heads * group
            for h in range(first, first + group):
                c0, y0 = positions[t] * half, (t * heads + h) * d
                head, x0 = x, t * row + h * d
                if normed.size:
                    rms_norm_row(x, x0, q_weight, eps, normed, n0, d)
                    head, x0 = normed, n0
                rotate_head(head, x0, cos, sin, c0, half, interleaved, queries, y0, d)


# ---- public wrapper ------------------------------------------------------------------------------
def rope_kv_write(
    heads: Array,
    rotation: Rotation,
    pool: KVPool,
    planned: WritePlan,
    norms: HeadNorms | None = None,
    out: Array | None = None,
) -> Array:
    """Rotate q and k, write k and v of a planned step into one layer's pool; returns Q.

    heads [T, H + 2 KVH, D] f32, contiguous: of q, of k, of v, as a fused projection has them;
    rotation of `rope.rotation`, planned of `kv_write.plan`; norms: what the heads of q and k go
    through before. Q [T, H, D] in the pool's dtype, contiguous, is `out`, or allocated if that is
    None. ValueError or TypeError names the argument that does not fit, before anything is written.
    """
    name = "rope_kv_write"
    kv_heads, d, s = check_pool(name, pool)
    require(name, "heads", heads, ("T", "H + 2 KVH", d))
    contiguous(name, "heads", heads)
    tokens, num_heads = len(heads), heads.shape[1] - 2 * kv_heads
    if num_heads < kv_heads or num_heads % kv_heads:
        raise ValueError(
            f"{name}: {heads.shape[1]} heads, expected {kv_heads} of k, {kv_heads} of v, a multiple"
            f" of {kv_heads} of q"
        )
    check_plan(name, planned, tokens, pool)
    check_rotation(name, rotation, tokens, d)
    shape, dtype = (tokens, num_heads, d), pool.k.dtype
    if out is None:
        out = np.empty(shape, dtype)
    else:
        require(name, "out", out, shape, (dtype,))
        writable(name, "out", out)
        if np.may_share_memory(heads, out):
            raise ValueError(f"{name}: out shares memory with heads, which are read until the end")
    weights, eps, normed = (NOTHING, NOTHING), 0.0, 0
    if norms is not None:
        require(name, "norms.q", norms.q, (d,))
        require(name, "norms.k", norms.k, (d,))
        check_eps(name, "norms.eps", norms.eps)
        weights = np.ascontiguousarray(norms.q), np.ascontiguousarray(norms.k)
        eps, normed = norms.eps, d
    if jit.use_reference():
        out[...] = narrow(rope_kv_write_ref(heads, rotation, pool, planned, norms), dtype)
        return out
    keys = planned.longest * d
    with jit.threads_for(4 * heads.nbytes):  # some arithmetic goes with the bytes
        workers = jit.num_threads()
        _rope_kv_write_kernel(
            heads.reshape(-1),
            *weights,
            eps,
            np.empty(workers * (normed + APART) if normed else 0, np.float32),
            rotation.rows,
            rotation.cos.reshape(-1),
            rotation.sin.reshape(-1),
            rotation.cos.shape[1],
            rotation.interleaved,
            out.reshape(-1),
            np.empty(workers * (keys + APART), dtype),
            pool.k.reshape(-1),
            pool.v.reshape(-1),
            tokens,
            num_heads,
            kv_heads,
            d,
            pool.v.shape[3],
            s,
            pool.num_units,
            len(planned.rows),
            planned.longest,
            planned.rows.reshape(-1),
            workers,
        )
    return out
