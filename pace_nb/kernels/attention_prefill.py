"""Attention of many query tokens per sequence: tiles of tokens, causal blocks above them skipped.

    out[t, h] = softmax(scale q[t, h] . k[j, h // G], j seen by t) . v[j, h // G]
    row t of sequence b is at position context_lens[b] - (cu_seqlens_q[b + 1] - t) and sees that key
    and the keys before it: `window` in all if window > 0, those of its own chunk of positions,
    key // chunk == position // chunk, if chunk > 0

| Array        | Shape           | Type      | Layout                                              |
|--------------|-----------------|-----------|-----------------------------------------------------|
| q            | [T, H, D]       | BF16, f32 | as the pool; last axis contiguous                   |
| pool         | see kv_write.py | BF16, f32 | contiguous; the keys of this step are in it         |
| block_table  | [B, X]          | int64     | number of a block's first unit                      |
| cu_seqlens_q | [B + 1]         | int32, 64 | first row of each sequence, then T                  |
| context_lens | [B]             | int32, 64 | keys of each sequence, those of this step too       |
| sinks        | [H]             | f32, None | raw logits, not scaled; 0.0 is a sink               |
| out          | [T, H, D]       | as q      | contiguous, allocated or given as `out`             |

A sequence may be new or go on from keys that are cached; nothing is padded.
Moves: per tile of 96 rows, the keys it sees, 2 S D size(k) bytes, mostly from L2 and L3.
Does: 4 D FLOPs per query head and visible key: 2 T^2 H D for a new prompt. 96 FLOPs per byte, so
    bound by the dot-product units.
Error: see attention_rows.py; bit-equal whatever the batch, chunking, threads and cache, and equal
    to what attention_decode gives for the same row.
Cautions: what lies in the pool beyond a sequence's keys is never used, be it NaN; blocks that lie
    before every window or chunk need not exist.
Source: Dao et al. 2022 (FlashAttention), with K and V kept in the layout that the register tile
    reads (kv_write.py), so nothing is packed here; re-implements PACE csrc/ops/attention/slab
    PREFILL and csrc/ops/prefill_attention.cpp (which repack K and V for every query tile).
Notebook: 08 tiled prefill. Ledger: attention_prefill.
"""

from __future__ import annotations

import numpy as np
from numba import prange

from pace_nb.kernels import bf16, jit
from pace_nb.kernels.arrays import Array, flat_heads, require
from pace_nb.kernels.attention_plan import (
    CHUNK,
    DP,
    GROUP,
    IN_POOL,
    KV_HEADS,
    ROWS_OF_TASK,
    TABLE_STRIDE,
    TOKENS,
    UNITS_PER_BLOCK,
    WINDOW,
    WORKERS,
    D,
    Plan,
    operands,
    plan,
    planned_ref,
)
from pace_nb.kernels.attention_rows import (
    SPLIT,
    WORDS,
    WORK,
    attend_split,
    batch_attention_ref,
    finish_row,
    first_key,
    fold_row,
    gather_rows,
    has_turn,
)
from pace_nb.kernels.kv_write import KVPool


# ---- definition ----------------------------------------------------------------------------------
def attention_prefill_ref(
    q: Array,
    pool: KVPool,
    block_table: Array,
    units_per_block: int,
    cu_seqlens_q: Array,
    context_lens: Array,
    scale: float,
    window: int = 0,
    sinks: Array | None = None,
    sequences: Array | None = None,
    chunk: int = 0,
) -> Array:
    """attention_rows.attention_ref of each sequence over its gathered keys, float64 [T, H, D]."""
    chosen = np.arange(len(context_lens)) if sequences is None else sequences
    return batch_attention_ref(
        q,
        pool,
        block_table,
        units_per_block,
        cu_seqlens_q,
        context_lens,
        scale,
        window,
        sinks,
        chosen,
        chunk,
    )


def attend_ref(
    planned: Plan, q: Array, pool: KVPool, scale: float, sinks: Array | None = None
) -> Array:
    """`attention_prefill_ref` of a planned step; the rows of other sequences are 0."""
    return planned_ref(planned, q, pool, scale, sinks)


# ---- kernel --------------------------------------------------------------------------------------
@jit.kernel
def _attend_kernel(
    q,
    token_stride,
    head_stride,
    k,
    v,
    table,
    cu_seqlens_q,
    contexts,
    sequences,
    sizes,
    sign,
    scale,
    sinks,
    out,
    top,
    total,
    values,
    storage,
    work,
    words,
):
    # One piece per (sequence, key/value head, tile of query tokens): it walks over its splits and
    # folds each as it is done. Workers take turns, neighbouring tiles of one head side by side.
    in_pool, units_per_block = sizes[IN_POOL], sizes[UNITS_PER_BLOCK]
    kv_heads, group, d, dp = sizes[KV_HEADS], sizes[GROUP], sizes[D], sizes[DP]
    tokens, rows, workers = sizes[TOKENS], sizes[ROWS_OF_TASK], sizes[WORKERS]
    window, chunk = sizes[WINDOW], sizes[CHUNK]
    size = len(storage) // workers
    for w in prange(workers):
        own = storage[w * size : w * size + size]
        p = own[rows * d :]
        # This worker's rows of m, l, o: first those of all splits so far, then those of a split.
        whole, apart = 2 * w * rows, (2 * w + 1) * rows
        piece = 0
        for b in sequences:
            q0, queries = cu_seqlens_q[b], cu_seqlens_q[b + 1] - cu_seqlens_q[b]
            for h in range(kv_heads):
                for t in range(0, queries, tokens):
                    if has_turn(piece, w, workers):
                        n, position = min(tokens, queries - t), contexts[b] - queries + t
                        start = (q0 + t) * token_stride + h * group * head_stride
                        gather_rows(q, start, token_stride, head_stride, n, group, d, sign, own)
                        first = first_key(position, window, chunk) // SPLIT
                        for split in range(first, (position + n - 1) // SPLIT + 1):
                            attend_split(
                                own,
                                k,
                                v,
                                h * in_pool,
                                table,
                                b * sizes[TABLE_STRIDE],
                                units_per_block,
                                d,
                                dp,
                                n,
                                group,
                                position,
                                window,
                                chunk,
                                scale,
                                split,
                                words[w * WORDS : (w + 1) * WORDS],
                                work[w * WORK : w * WORK + WORK],
                                p,
                                top,
                                total,
                                values,
                                whole if split == first else apart,
                            )
                            if split > first:
                                for r in range(n * group):
                                    fold_row(
                                        top,
                                        total,
                                        values,
                                        whole + r,
                                        top,
                                        total,
                                        values,
                                        apart + r,
                                        dp,
                                    )
                        for r in range(n * group):
                            head = h * group + r % group
                            y0 = ((q0 + t + r // group) * kv_heads * group + head) * d
                            finish_row(top, total, values, whole + r, sinks, head, out, y0, d, dp)
                    piece += 1


# ---- public wrappers -----------------------------------------------------------------------------
def attend(
    planned: Plan,
    q: Array,
    pool: KVPool,
    scale: float,
    sinks: Array | None = None,
    out: Array | None = None,
) -> Array:
    """As `attention_prefill`, for a step that `attention_plan.plan` has checked."""
    given = operands(planned, q, pool, scale, sinks, out)
    if not len(planned.sequences):
        return given.out
    if jit.use_reference():
        exact = attend_ref(planned, q, pool, scale, sinks)
        for b in planned.sequences:
            mine = slice(planned.cu_seqlens_q[b], planned.cu_seqlens_q[b + 1])
            given.out[mine] = bf16.narrow(exact[mine], given.out.dtype)
        return given.out
    flat, token_stride, head_stride = flat_heads(given.q)
    with jit.threads_for(planned.key_bytes * (planned.q_shape[0] // len(planned.sequences))):
        _attend_kernel(
            flat,
            token_stride,
            head_stride,
            given.k,
            given.v,
            planned.block_table.reshape(-1),
            planned.cu_seqlens_q,
            planned.contexts,
            planned.sequences,
            planned.sizes,
            given.sign,
            given.scale,
            given.sinks,
            given.out.reshape(-1),
            planned.top,
            planned.total,
            planned.values,
            planned.storage,
            planned.work,
            planned.words,
        )
    return given.out


def attention_prefill(
    q: Array,
    pool: KVPool,
    block_table: Array,
    units_per_block: int,
    cu_seqlens_q: Array,
    context_lens: Array,
    scale: float,
    window: int = 0,
    sinks: Array | None = None,
    out: Array | None = None,
    sequences: Array | None = None,
    chunk: int = 0,
) -> Array:
    """Causal attention of whole prompts or chunks of them.

    q [T, H, D] in the pool's dtype, all sequences' rows one after the other; block_table int64
    [B, X]; units_per_block >= 1; cu_seqlens_q [B + 1]; context_lens [B] >= the query tokens; sinks
    f32 [H]; out [T, H, D] as q, allocated if None. sequences: indices of the sequences to compute
    (None: all); the rows of others are left as they are. window, chunk: at most one is not 0.
    Returns out. TypeError or ValueError names the argument that does not fit.
    """
    require("attention_prefill", "q", q, ("T", "H", "D"), (pool.k.dtype,))
    planned = plan(
        "attention_prefill",
        q.shape,
        pool,
        block_table,
        units_per_block,
        cu_seqlens_q,
        context_lens,
        window,
        chunk,
        sequences,
    )
    return attend(planned, q, pool, scale, sinks, out)
