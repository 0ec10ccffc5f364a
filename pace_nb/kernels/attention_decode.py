"""Attention of one or a few query tokens per sequence, parallel over the keys too.

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

Moves: 2 S KVH D size(k) bytes per sequence, once for all query heads and tokens that share them
    (up to 96 rows); the results of a split, 4 (D + 2) bytes per row and 512 keys, stay in cache.
Does: 4 S H D FLOPs per query token; H / KVH FLOPs per byte of BF16, so bound by reading the keys
    and values up to about 30 rows per key/value head.
Error: see attention_rows.py; bit-equal whatever the batch, chunking, threads and cache, and equal
    to what attention_prefill gives for the same row.
Cautions: what lies in the pool beyond a sequence's keys is never used, be it NaN; blocks that lie
    before every window or chunk need not exist.
Source: split over keys as in Flash-Decoding (Dao et al. 2023), at fixed places; re-implements PACE
    csrc/ops/attention/slab (DECODE_GQA, DECODE_SPLITK, which there is never reached, and MTD).
Notebook: 07 GQA decode. Ledger: attention_decode.
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
    FEW,
    WORDS,
    WORK,
    attend_few,
    attend_split,
    batch_attention_ref,
    clear_rows,
    finish_row,
    fold_row,
    gather_rows,
    has_turn,
    keys_of_split,
)
from pace_nb.kernels.kv_write import KVPool

# ---- constants -----------------------------------------------------------------------------------
# What reading a key costs, in rows: 4096 keys of 8 heads, D 64, took 0.27 ms and 0.0135 per row.
READ = 20


# ---- definition ----------------------------------------------------------------------------------
def attention_decode_ref(
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
    """`attention_decode_ref` of a planned step; the rows of other sequences are 0."""
    return planned_ref(planned, q, pool, scale, sinks)


# ---- kernels -------------------------------------------------------------------------------------
@jit.device_fn
def _work(position, tokens, group, sizes, split):
    """What a piece costs, in rows times keys: to read a key costs as much as READ rows with it."""
    low, high = keys_of_split(position, tokens, sizes[WINDOW], sizes[CHUNK], split)
    return max(high - low, 0) * (READ + tokens * group)


@jit.device_fn
def _attend_any(
    q, k, v, head, table, t0, units_per_block, d, dp, tokens, group, position, window, chunk, scale,
    split, words, work, p, top, total, values, r0,
):  # fmt: skip
    """`attend_few` or `attend_split`, by the number of rows."""
    if tokens * group <= FEW:
        attend_few(
            q, k, v, head, table, t0, units_per_block, d, dp, tokens, group, position, window,
            chunk, scale, split, words, work, p, top, total, values, r0,
        )  # fmt: skip
    else:
        attend_split(
            q, k, v, head, table, t0, units_per_block, d, dp, tokens, group, position, window,
            chunk, scale, split, words, work, p, top, total, values, r0,
        )  # fmt: skip


def _share_with(attend):
    """The device function for a worker's share of the pieces, each computed by `attend`.

    One piece per (sequence, group of query tokens, key/value head, split): it reads its keys once
    for all its rows and leaves m, l, o in `rows` rows of top, total, values. A worker takes one run
    of pieces after the other, so that the keys after a split are what it reads next: those that
    begin in its share of all the work.
    """

    @jit.device_fn
    def share(
        w, q, token_stride, head_stride, k, v, table, cu_seqlens_q, contexts, first_split,
        num_splits, sequences, sizes, sign, scale, top, total, values, storage, work, words,
        all_work,
    ):  # fmt: skip
        in_pool, units_per_block = sizes[IN_POOL], sizes[UNITS_PER_BLOCK]
        kv_heads, group, d, dp = sizes[KV_HEADS], sizes[GROUP], sizes[D], sizes[DP]
        tokens, rows, workers = sizes[TOKENS], sizes[ROWS_OF_TASK], sizes[WORKERS]
        size = len(storage) // workers
        own = storage[w * size : w * size + size]
        p = own[rows * d :]
        my_words, my_work = words[w * WORDS : (w + 1) * WORDS], work[w * WORK : w * WORK + WORK]
        piece, before = 0, 0
        for b in sequences:
            q0, queries = cu_seqlens_q[b], cu_seqlens_q[b + 1] - cu_seqlens_q[b]
            t0 = b * sizes[TABLE_STRIDE]
            for t in range(0, queries, tokens):
                n, position = min(tokens, queries - t), contexts[b] - queries + t
                for h in range(kv_heads):
                    gathered = False
                    for split in range(first_split[b], first_split[b] + num_splits[b]):
                        if before * workers // all_work == w:
                            if not gathered:
                                start = (q0 + t) * token_stride + h * group * head_stride
                                gather_rows(
                                    q, start, token_stride, head_stride, n, group, d, sign, own
                                )
                                gathered = True
                            attend(
                                own, k, v, h * in_pool, table, t0, units_per_block, d, dp, n, group,
                                position, sizes[WINDOW], sizes[CHUNK], scale, split, my_words,
                                my_work, p, top, total, values, piece * rows,
                            )  # fmt: skip
                        before += _work(position, n, group, sizes, split)
                        piece += 1

    return share


_few_share, _any_share = _share_with(attend_few), _share_with(_attend_any)


@jit.device_fn
def _all_work(cu_seqlens_q, contexts, first_split, num_splits, sequences, sizes):
    """What all pieces cost together."""
    tokens, work = sizes[TOKENS], 0
    for b in sequences:
        queries = cu_seqlens_q[b + 1] - cu_seqlens_q[b]
        for t in range(0, queries, tokens):
            n, position = min(tokens, queries - t), contexts[b] - queries + t
            for split in range(first_split[b], first_split[b] + num_splits[b]):
                work += sizes[KV_HEADS] * _work(position, n, sizes[GROUP], sizes, split)
    return work


# Two kernels, of which most users need the first alone; the second compiles three times as long.
@jit.kernel
def _attend_few_kernel(
    q, token_stride, head_stride, k, v, table, cu_seqlens_q, contexts, first_split, num_splits,
    sequences, sizes, sign, scale, top, total, values, storage, work, words,
):  # fmt: skip
    everything = _all_work(cu_seqlens_q, contexts, first_split, num_splits, sequences, sizes)
    for w in prange(sizes[WORKERS]):
        _few_share(
            w, q, token_stride, head_stride, k, v, table, cu_seqlens_q, contexts, first_split,
            num_splits, sequences, sizes, sign, scale, top, total, values, storage, work, words,
            everything,
        )  # fmt: skip


@jit.kernel
def _attend_kernel(
    q, token_stride, head_stride, k, v, table, cu_seqlens_q, contexts, first_split, num_splits,
    sequences, sizes, sign, scale, top, total, values, storage, work, words,
):  # fmt: skip
    everything = _all_work(cu_seqlens_q, contexts, first_split, num_splits, sequences, sizes)
    for w in prange(sizes[WORKERS]):
        _any_share(
            w, q, token_stride, head_stride, k, v, table, cu_seqlens_q, contexts, first_split,
            num_splits, sequences, sizes, sign, scale, top, total, values, storage, work, words,
            everything,
        )  # fmt: skip


@jit.kernel
def _fold_kernel(
    cu_seqlens_q,
    num_splits,
    sequences,
    sizes,
    top,
    total,
    values,
    sinks,
    out,
    work,
):
    # One (sequence, group of query tokens, key/value head) per turn: its splits in index order.
    kv_heads, group, d, dp = sizes[KV_HEADS], sizes[GROUP], sizes[D], sizes[DP]
    tokens, rows, workers = sizes[TOKENS], sizes[ROWS_OF_TASK], sizes[WORKERS]
    size = len(work) // workers
    for w in prange(workers):
        own = work[w * size : w * size + size]
        row_top, row_total, row_values = own[:1], own[16:32], own[32:]
        piece, turn = 0, 0
        for b in sequences:
            q0, queries = cu_seqlens_q[b], cu_seqlens_q[b + 1] - cu_seqlens_q[b]
            for t in range(0, queries, tokens):
                n = min(tokens, queries - t)
                for h in range(kv_heads):
                    if has_turn(turn, w, workers):
                        for r in range(n * group):
                            clear_rows(row_top, row_total, row_values, 0, 1, dp)
                            for split in range(num_splits[b]):
                                i = (piece + split) * rows + r
                                fold_row(
                                    row_top, row_total, row_values, 0, top, total, values, i, dp
                                )
                            head = h * group + r % group
                            y0 = ((q0 + t + r // group) * kv_heads * group + head) * d
                            finish_row(
                                row_top, row_total, row_values, 0, sinks, head, out, y0, d, dp
                            )
                    turn += 1
                    piece += num_splits[b]


# ---- public wrappers -----------------------------------------------------------------------------
def attend(
    planned: Plan,
    q: Array,
    pool: KVPool,
    scale: float,
    sinks: Array | None = None,
    out: Array | None = None,
) -> Array:
    """As `attention_decode`, for a step that `attention_plan.plan` has checked with split_keys."""
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
    kernel = _attend_few_kernel if planned.sizes[ROWS_OF_TASK] <= FEW else _attend_kernel
    with jit.threads_for(planned.key_bytes):
        kernel(
            flat,
            token_stride,
            head_stride,
            given.k,
            given.v,
            planned.block_table.reshape(-1),
            planned.cu_seqlens_q,
            planned.contexts,
            planned.first_split,
            planned.num_splits,
            planned.sequences,
            planned.sizes,
            given.sign,
            given.scale,
            planned.top,
            planned.total,
            planned.values,
            planned.storage,
            planned.work,
            planned.words,
        )
    with jit.threads_for(planned.values.nbytes):
        _fold_kernel(
            planned.cu_seqlens_q,
            planned.num_splits,
            planned.sequences,
            planned.sizes,
            planned.top,
            planned.total,
            planned.values,
            given.sinks,
            given.out.reshape(-1),
            planned.work,
        )
    return given.out


def attention_decode(
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
    """Attention of few query tokens per sequence (1 to about 64) over many keys.

    q [T, H, D] in the pool's dtype, all sequences' rows one after the other; block_table int64
    [B, X]; units_per_block >= 1; cu_seqlens_q [B + 1]; context_lens [B] >= the query tokens; sinks
    f32 [H]; out [T, H, D] as q, allocated if None. sequences: indices of the sequences to compute
    (None: all); the rows of others are left as they are. window, chunk: at most one is not 0.
    Returns out. TypeError or ValueError names the argument that does not fit.
    """
    require("attention_decode", "q", q, ("T", "H", "D"), (pool.k.dtype,))
    planned = plan(
        "attention_decode",
        q.shape,
        pool,
        block_table,
        units_per_block,
        cu_seqlens_q,
        context_lens,
        window,
        chunk,
        sequences,
        split_keys=True,
    )
    return attend(planned, q, pool, scale, sinks, out)
