"""Attention of query rows to one split of the keys, and how splits become a row's result.

    s[j] = scale * (q . k[j])         for the keys j that the row sees: j <= position < j + window,
                                      or j <= position in the row's own chunk of positions
    m = max s,  l = sum exp(s - m),  o = sum exp(s - m) v[j]      online, KEY_BLOCK keys at a time
    out = o / l, after splits are folded in index order; a sink adds exp(sink - m) to l alone

This is the arithmetic that decode and prefill kernels share, so that the bits of a row depend on
the row, its position and the keys it sees, and on nothing else: not on the kernel, on the rows
beside it, on chunking, on where the cache put its units, on threads.

| Array      | Shape           | Type      | Layout                                               |
|------------|-----------------|-----------|------------------------------------------------------|
| q          | [rows, D]       | BF16, f32 | of one key/value head: token t, head g at t G + g    |
| k, v       | see kv_write.py | BF16, f32 | a pool; units of 16 keys are operands of tile_dot    |
| table      | [X]             | int64     | one sequence's row of the block table                |
| top, total | [rows]          | f32       | m and l                                              |
| values     | [rows, Dp]      | f32       | o; Dp = D rounded up to 16, nothing beyond D is used |

How: scores of 64 keys are a tile of up to 6 rows by 4 vectors, one vector per unit, in D / S steps;
values are a tile of up to 6 rows by 64 columns, in one step per pair of keys. A block of keys that
all rows see whole takes tiles of any rows. Of a block that some row sees in part, a tile takes rows
of one token, which see the same keys: it multiplies the pairs it sees, and a lone key, whose
partner in its pair is hidden, is added after them. No hidden value is ever multiplied, be it a NaN,
and the order of a row's additions depends on its own keys alone.
Error: with w = softmax weights and e = (D + 2) 2^-24 scale max |q|.|k|, a score's error, in f32:
    |out - exact| <= w.|v| (4 e + (min(S, SPLIT) + S/8 + 64) 2^-24). BF16 adds 2^-8 w.|v|, as the
    weights are rounded for the second product (their sum is not), and 2^-8 |out|.
Cautions: a NaN or infinity in a key or value reaches the rows that see it and no other. BF16 dot
    products take denormals for zero where the CPU has the instruction (lanes.py).
Source: Milakov and Gimelshein 2018 (online softmax), Dao et al. 2022 (FlashAttention), Xiao et al.
    2023 (sinks). Conventions of PACE csrc/ops/attention/slab (scale on f32 scores, sums of
    unrounded weights), but one arithmetic instead of its five, and a sink of 0.0 is a sink.
Notebook: 06 online softmax. Ledger: attention_decode.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import numpy as np

from pace_nb.kernels import jit
from pace_nb.kernels.arrays import STORAGE, Array, ascends, in_range, require, writable
from pace_nb.kernels.bf16 import widen
from pace_nb.kernels.exp import exp
from pace_nb.kernels.kv_write import UNIT, KVPool, kv_gather_ref
from pace_nb.kernels.lanes import (
    first_of_words,
    fma,
    keep_lanes,
    load,
    load_tail,
    maximum,
    per_word,
    reduce_add,
    reduce_max,
    second_of_words,
    splat,
    store,
    store_tail,
    tile_dot,
    tile_dot_apart,
    tile_load,
    tile_scale_rows,
    tile_store,
    tile_zeros,
)

# ---- constants -----------------------------------------------------------------------------------
# Units of a key block: 6 rows x 4 vectors of scores, 4 of keys and 1 of q fill 29 registers of 32.
UNITS = 4
KEY_BLOCK = UNITS * UNIT  # aligned at multiples of itself, so every row cuts its keys alike
MR = 6  # rows of the largest tile; what is left over takes tiles of 4, 2 and 1
# Keys of a split, a task of decode: 256 KiB of K and V for D = 128, some 10 us of DRAM time. To
# fold a split costs a row 2 exp and 3 D FLOPs, under 1 % of its keys. Never per thread count.
SPLIT = 512
ROWS = 96  # query rows of a task, about: they share each read of K and V; 16 tiles of 6 or 24 of 4
FLOOR = -3.4028234663852886e38  # m before any key: finite, as -inf - -inf is NaN

# Scratch of a thread, float32: scores [6, 64], then for 6 rows (padded to 16) m, sum of p, alpha.
NEW, SUM, ALPHA, WORK = 384, 400, 416, 432


# ---- definitions ---------------------------------------------------------------------------------
def attention_ref(
    q: Array,
    k: Array,
    v: Array,
    positions: Array,
    scale: float,
    window: int = 0,
    sinks: Array | None = None,
    chunk: int = 0,
) -> Array:
    """softmax(scale q k^T) v, float64 [T, H, D].

    q [T, H, D], row t at positions[t]; k, v [S, KVH, D], key j at position j; head h uses key/value
    head h // (H / KVH). A row sees its own position and what is before, `window` keys in all if
    window > 0, or those at position // chunk * chunk and after it if chunk > 0. sinks [H]: raw
    logits that take part in the softmax and have no value.
    """
    q, k, v = (widen(x) for x in (q, k, v))
    (_, heads, d), kv_heads = q.shape, k.shape[1]
    out = np.zeros(q.shape)
    for t, position in enumerate(positions):
        first = max(0, position + 1 - window) if window else 0
        seen = slice(position // chunk * chunk if chunk else first, position + 1)
        grouped = q[t].reshape(kv_heads, heads // kv_heads, d)
        scores = scale * np.einsum("kgd,skd->kgs", grouped, k[seen]).reshape(heads, -1)
        top = scores.max(axis=1) if sinks is None else np.maximum(scores.max(axis=1), sinks)
        weights = np.exp(scores - top[:, None])
        total = weights.sum(axis=1) + (0 if sinks is None else np.exp(sinks - top))
        weights = (weights / total[:, None]).reshape(kv_heads, heads // kv_heads, -1)
        out[t] = np.einsum("kgs,skd->kgd", weights, v[seen]).reshape(heads, d)
    return out


def batch_attention_ref(
    q: Array,
    pool: KVPool,
    block_table: Array,
    units_per_block: int,
    cu_seqlens_q: Array,
    context_lens: Array,
    scale: float,
    window: int,
    sinks: Array | None,
    sequences: Array,
    chunk: int,
) -> Array:
    """`attention_ref` of each of `sequences`, float64 [T, H, D]; zeros in the others' rows."""
    out = np.zeros(q.shape)
    for b in sequences:
        rows, context = slice(cu_seqlens_q[b], cu_seqlens_q[b + 1]), int(context_lens[b])
        if rows.start == rows.stop:
            continue
        k, v = kv_gather_ref(pool, block_table[b], units_per_block, context)
        positions = np.arange(context - (rows.stop - rows.start), context)
        out[rows] = attention_ref(q[rows], k, v, positions, scale, window, sinks, chunk)
    return out


# ---- a tile of rows against one block of keys ----------------------------------------------------
def _score_tile(mr):
    """The device function for `mr` rows; every size is its own type of tile, held in registers."""

    @jit.device_fn
    def scores(q, q0, d, k, k0, work):
        # work [mr, 64] = q [mr, D] at q0 . keys of a block; unit j [D/S, 16, S] begins at k0[j].
        s = per_word(q)
        acc = tile_zeros(mr, 4)
        for x in range(d // s):
            acc = tile_dot_apart(acc, q, q0 + x * s, d, k, k0, x * 16 * s)
        tile_store(acc, work, 0, KEY_BLOCK)

    return scores


def _value_tile(nv, mr):
    """The device function for `mr` rows and 16 `nv` columns of the values."""

    @jit.device_fn
    def add_values(p, v, dp, column, words, first, end, work, values, o0):
        # values [mr, Dp] at o0 = alpha values + p [mr, 64] V, over words first .. end of the block
        # (a word is S keys of one column); the words of all columns [Dp, S] begin at words[x].
        s = per_word(v)
        acc = tile_scale_rows(tile_load(mr, nv, values, o0 + column, dp), work, ALPHA)
        for x in range(first, end):
            acc = tile_dot(acc, p, x * s, KEY_BLOCK, v, words[x] + column * s, 16 * s)
        tile_store(acc, values, o0 + column, dp)

    return add_values


def _by_rows(tile):
    """The device function f(mr, ...) that calls tile(mr)(...), for the sizes that tiles come in."""
    rows_6, rows_4, rows_2, rows_1 = (tile(mr) for mr in (MR, 4, 2, 1))

    @jit.device_fn
    def of_rows(mr, *arguments):
        if mr == MR:
            rows_6(*arguments)
        elif mr == 4:
            rows_4(*arguments)
        elif mr == 2:
            rows_2(*arguments)
        else:
            rows_1(*arguments)

    return of_rows


_scores = _by_rows(_score_tile)
_add_64_columns, _add_16_columns = (_by_rows(partial(_value_tile, nv)) for nv in (4, 1))


@jit.device_fn
def _softmax_rows(mr, first, end, scale, work, p, top, total, r):
    """p [mr, 64] = exp(scale scores - m), rounded to storage, 0 outside keys first .. end.

    Rows r .. r + mr of top and total (m and l) take these keys in; alpha = exp(old m - new m) goes
    to `work`, for the values.
    """
    hidden, factor = splat(-np.inf), splat(scale)
    for i in range(mr):
        at = i * KEY_BLOCK
        s0 = keep_lanes(load(work, at) * factor, first, end, hidden)
        s1 = keep_lanes(load(work, at + 16) * factor, first - 16, end - 16, hidden)
        s2 = keep_lanes(load(work, at + 32) * factor, first - 32, end - 32, hidden)
        s3 = keep_lanes(load(work, at + 48) * factor, first - 48, end - 48, hidden)
        block_top = reduce_max(maximum(maximum(s0, s1), maximum(s2, s3)))
        # The comparison loses a NaN, but exp keeps it: the sum and the values become NaN.
        new = block_top if block_top > top[r + i] else top[r + i]
        shift = splat(new)
        s0, s1, s2, s3 = exp(s0 - shift), exp(s1 - shift), exp(s2 - shift), exp(s3 - shift)
        work[NEW + i] = new
        work[SUM + i] = reduce_add((s0 + s1) + (s2 + s3))
        store(p, at, s0)
        store(p, at + 16, s1)
        store(p, at + 32, s2)
        store(p, at + 48, s3)
    new_top = load_tail(work, NEW, mr)
    alpha = exp(load_tail(top, r, mr) - new_top)
    store(work, ALPHA, alpha)
    store_tail(top, r, new_top, mr)
    new_total = fma(load_tail(total, r, mr), alpha, load_tail(work, SUM, mr))
    store_tail(total, r, new_total, mr)


@jit.device_fn
def _add_values(mr, p, v, dp, words, first, end, work, values, o0):
    """All columns of the values: groups of 64, then of 16, as 6 rows of 16 keep the units busy."""
    whole = dp // 64 * 64
    for c in range(0, whole, 64):
        _add_64_columns(mr, p, v, dp, c, words, first, end, work, values, o0)
    for c in range(whole, dp, 16):
        _add_16_columns(mr, p, v, dp, c, words, first, end, work, values, o0)


@jit.device_fn
def _add_lone_value(mr, p, key, v, dp, words, values, o0):
    """values [mr, Dp] at o0 += p [mr] of `key` times its value; its pair's other key is hidden.

    A product of two BF16 is exact in f32, so fma rounds as the dot product does.
    """
    s = per_word(v)
    v0 = words[key // s]
    for c in range(0, dp, 16):
        first, second = first_of_words(v, v0 + c * s), second_of_words(v, v0 + c * s)
        value = second if key % 2 else first
        for i in range(mr):
            weight = splat(reduce_add(load_tail(p, i * KEY_BLOCK + key, 1)))
            at = o0 + i * dp + c
            store(values, at, fma(weight, value, load(values, at)))


# ---- the rows of a task against one split --------------------------------------------------------
@jit.device_fn
def unit_number(table, t0, units_per_block, unit):
    """Where in the pool a sequence's unit lies; its row of the flat `table` begins at t0."""
    return table[t0 + unit // units_per_block] + unit % units_per_block


@jit.device_fn
def gather_rows(q, q0, token_stride, head_stride, tokens, group, d, rows):
    """q of `tokens` tokens and `group` heads into rows [tokens * group, D]."""
    whole = d // 16 * 16
    for t in range(tokens):
        for g in range(group):
            source, target = q0 + t * token_stride + g * head_stride, (t * group + g) * d
            for i in range(0, whole, 16):
                store(rows, target + i, load(q, source + i))
            last = load_tail(q, source + whole, d - whole)
            store_tail(rows, target + whole, last, d - whole)


@jit.device_fn
def clear_rows(top, total, values, r0, rows, dp):
    """m, l, o of no keys at all, for `rows` rows from row r0."""
    for r in range(r0, r0 + rows):
        top[r] = FLOOR
        total[r] = 0.0
        for c in range(r * dp, r * dp + dp, 16):
            store(values, c, splat(0.0))


@jit.device_fn
def first_key(position, window, chunk):
    """The first key that the token at `position` sees; it never falls as the position rises."""
    if chunk > 0:
        return position // chunk * chunk
    return max(position + 1 - window, 0) if window > 0 else 0


@jit.device_fn
def attend_split(
    q,
    k,
    v,
    head,
    table,
    t0,
    units_per_block,
    d,
    dp,
    tokens,
    group,
    position,
    window,
    chunk,
    scale,
    split,
    words,
    work,
    p,
    top,
    total,
    values,
    r0,
):
    """m, l, o of q [tokens * group, D] over the keys of split number `split`, into rows r0 ...

    The first token is at `position`; `head` is the pool's first unit of the key/value head; words
    [64] int64, p [6 * 64] in storage dtype and work [WORK] f32 are scratch.
    """
    s = per_word(v)
    clear_rows(top, total, values, r0, tokens * group, dp)
    low = max(first_key(position, window, chunk), split * SPLIT)
    high = min(position + tokens, split * SPLIT + SPLIT)
    for block in range(low // KEY_BLOCK * KEY_BLOCK, high, KEY_BLOCK):
        # Units that no row sees may not exist: one that is seen is read in their place.
        near, far = low // 16, (high - 1) // 16
        b = block // 16
        u0 = head + unit_number(table, t0, units_per_block, max(near, min(far, b)))
        u1 = head + unit_number(table, t0, units_per_block, max(near, min(far, b + 1)))
        u2 = head + unit_number(table, t0, units_per_block, max(near, min(far, b + 2)))
        u3 = head + unit_number(table, t0, units_per_block, max(near, min(far, b + 3)))
        k0 = (u0 * 16 * d, u1 * 16 * d, u2 * 16 * d, u3 * 16 * d)
        for x in range(16 // s):
            words[x] = (u0 * 16 // s + x) * dp * s
            words[x + 16 // s] = (u1 * 16 // s + x) * dp * s
            words[x + 32 // s] = (u2 * 16 // s + x) * dp * s
            words[x + 48 // s] = (u3 * 16 // s + x) * dp * s
        last_first = first_key(position + tokens - 1, window, chunk)
        whole = position + 1 >= block + KEY_BLOCK and last_first <= block
        step = tokens if whole else 1
        for t in range(0, tokens, step):
            first = max(first_key(position + t, window, chunk) - block, 0)
            end = min(position + t + 1 - block, KEY_BLOCK)
            if first >= end:
                continue
            begin, stop = (first + s - 1) // s, end // s
            r, rows = t * group, (t + step) * group
            while r < rows:
                left = rows - r
                mr = MR if left >= MR else 4 if left >= 4 else 2 if left >= 2 else 1
                o0 = (r0 + r) * dp
                _scores(mr, q, r * d, d, k, k0, work)
                _softmax_rows(mr, first, end, scale, work, p, top, total, r0 + r)
                _add_values(mr, p, v, dp, words, begin, stop, work, values, o0)
                if first % s:
                    _add_lone_value(mr, p, first, v, dp, words, values, o0)
                if end % s:
                    _add_lone_value(mr, p, end - 1, v, dp, words, values, o0)
                r += mr


@jit.device_fn
def fold_row(top, total, values, r, split_top, split_total, split_values, i, dp):
    """Add row i of a split's m, l, o to row r of top, total, values. In index order of splits."""
    if split_total[i] == 0.0:  # the row sees no key of this split
        return
    old, other = splat(top[r]), splat(split_top[i])
    new = maximum(old, other)
    alpha, beta = exp(old - new), exp(other - new)
    store_tail(top, r, new, 1)
    store_tail(total, r, fma(splat(total[r]), alpha, splat(split_total[i]) * beta), 1)
    for c in range(0, dp, 16):
        added = load(split_values, i * dp + c) * beta
        store(values, r * dp + c, fma(load(values, r * dp + c), alpha, added))


@jit.device_fn
def finish_row(top, total, values, r, sinks, head, out, y0, d, dp):
    """out [D] at y0 = o / l of row r, after the sink of query head `head` has joined (m, l)."""
    alpha, denominator = splat(1.0), splat(total[r])
    if sinks.size:
        old, sink = splat(top[r]), splat(sinks[head])
        new = maximum(sink, old)
        alpha = exp(old - new)
        denominator = fma(denominator, alpha, exp(sink - new))
    if total[r] == 0.0:  # no key at all
        alpha, denominator = splat(0.0), splat(1.0)
    whole = d // 16 * 16
    for c in range(0, whole, 16):
        store(out, y0 + c, load(values, r * dp + c) * alpha / denominator)
    if d > whole:
        last = load(values, r * dp + whole) * alpha / denominator
        store_tail(out, y0 + whole, last, d - whole)


@jit.device_fn
def has_turn(turn, worker, workers):
    """Is piece `turn` this worker's? Back and forth, so that growing pieces are shared evenly."""
    place, odd = turn % workers, turn // workers % 2
    return place == (workers - 1 - worker if odd else worker)


# ---- what both wrappers check --------------------------------------------------------------------
class Given(NamedTuple):
    """The checked arguments of an attention call, and what follows from them."""

    out: Array  # [T, H, D]
    sequences: Array  # int64: indices of the sequences to compute
    query_lens: Array  # int64 [B]
    contexts: Array  # int64 [B]
    sinks: Array  # f32 [H], or of size 0
    group: int  # query heads of a key/value head
    padded: int  # Dp
    tokens: int  # query tokens of a task: token groups are cut at multiples of it


def checked(
    kernel: str,
    q: Array,
    pool: KVPool,
    block_table: Array,
    units_per_block: int,
    cu_seqlens_q: Array,
    context_lens: Array,
    scale: float,
    window: int,
    sinks: Array | None,
    out: Array | None,
    sequences: Array | None,
    chunk: int,
) -> Given:
    """Check every argument; TypeError or ValueError names the one that does not fit."""
    require(kernel, "pool.k", pool.k, ("KVH", "U", "D / S", UNIT, "S"), STORAGE)
    kv_heads, in_pool, words, _, s = pool.k.shape
    d, dtype = words * s, pool.k.dtype
    padded = -(-d // 16) * 16
    if s != 4 // dtype.itemsize or d == 0 or kv_heads == 0:
        raise ValueError(f"{kernel}: pool.k has shape {pool.k.shape}, expected a pool of new_pool")
    require(kernel, "pool.v", pool.v, (kv_heads, in_pool, UNIT // s, padded, s), (dtype,))
    if not (pool.k.flags.c_contiguous and pool.v.flags.c_contiguous):
        raise ValueError(f"{kernel}: pool.k or pool.v is not contiguous")
    require(kernel, "q", q, ("T", "H", d), (dtype,))
    heads = q.shape[1]
    if heads == 0 or heads % kv_heads:
        raise ValueError(f"{kernel}: q has {heads} heads, expected a multiple of {kv_heads}")
    require(kernel, "block_table", block_table, ("B", "X"), (np.int64,))
    require(kernel, "cu_seqlens_q", cu_seqlens_q, (len(block_table) + 1,), (np.int32, np.int64))
    require(kernel, "context_lens", context_lens, (len(block_table),), (np.int32, np.int64))
    if not abs(scale) <= float(np.finfo(np.float32).max):
        raise ValueError(f"{kernel}: scale is {scale}, expected a finite number")
    if window < 0:
        raise ValueError(f"{kernel}: window is {window}, expected 0 (none) or more")
    if chunk < 0 or (chunk and window):
        raise ValueError(
            f"{kernel}: chunk is {chunk} and window {window}, expected 0 (none) or more, "
            "and one of them 0"
        )
    if sinks is not None:
        require(kernel, "sinks", sinks, (heads,))
    if units_per_block < 1:
        raise ValueError(f"{kernel}: units_per_block is {units_per_block}, expected 1 or more")
    if out is None:
        out = np.empty(q.shape, dtype) if sequences is None else np.zeros(q.shape, dtype)
    else:
        require(kernel, "out", out, q.shape, (dtype,))
        writable(kernel, "out", out)
    if cu_seqlens_q[0] != 0 or cu_seqlens_q[-1] != len(q) or not ascends(cu_seqlens_q):
        raise ValueError(f"{kernel}: cu_seqlens_q is not a rising sequence from 0 to T = {len(q)}")
    query_lens = np.diff(cu_seqlens_q).astype(np.int64)
    contexts = context_lens.astype(np.int64)
    if (contexts < query_lens).any():
        b = int((contexts < query_lens).argmax())
        raise ValueError(
            f"{kernel}: context_lens[{b}] is {contexts[b]}, expected {query_lens[b]} or more, "
            "its query tokens"
        )
    if sequences is None:
        sequences = np.flatnonzero(query_lens)
    else:
        require(kernel, "sequences", sequences, ("N",), (np.int32, np.int64))
        in_range(kernel, "sequences", sequences, len(contexts))
        sequences = sequences[query_lens[sequences] > 0].astype(np.int64)
    _check_table(
        kernel,
        block_table,
        units_per_block,
        in_pool,
        first_keys(contexts, query_lens, window, chunk),
        contexts,
        sequences,
    )
    group = heads // kv_heads
    return Given(
        out,
        sequences,
        query_lens,
        contexts,
        np.empty(0, np.float32) if sinks is None else ours(sinks),
        group,
        padded,
        max(1, ROWS // group),
    )


def ours(x: Array) -> Array:
    """x contiguous and writable: read-only is another type, for which a kernel compiles again."""
    return np.array(x) if not x.flags.writeable else np.ascontiguousarray(x)


def first_keys(contexts: Array, query_lens: Array, window: int, chunk: int) -> Array:
    """[B] first key that any query token of a sequence sees."""
    positions = contexts - query_lens  # of the first query tokens
    if chunk:
        return positions // chunk * chunk
    return np.maximum(positions + 1 - window, 0) if window else np.zeros_like(contexts)


def _check_table(
    kernel: str,
    block_table: Array,
    units_per_block: int,
    in_pool: int,
    first: Array,
    contexts: Array,
    sequences: Array,
) -> None:
    """The blocks that hold the keys first .. contexts of `sequences` must lie in the pool."""
    if not len(sequences):
        return
    begin, end = first[sequences] // UNIT, -(-contexts[sequences] // UNIT)  # units
    if int(end.max()) > block_table.shape[1] * units_per_block:
        b = int(sequences[end.argmax()])
        raise ValueError(
            f"{kernel}: context_lens[{b}] is {contexts[b]}, expected at most what block_table's "
            f"{block_table.shape[1]} blocks of {units_per_block} units hold"
        )
    column = np.arange(-(-int(end.max()) // units_per_block)) * units_per_block
    table = block_table[sequences, : len(column)]
    used = np.minimum(units_per_block, end[:, None] - column)
    needed = (used > 0) & (column + units_per_block > begin[:, None])
    wrong = needed & ((table < 0) | (table > in_pool - used))
    if wrong.any():
        i, x = (int(n) for n in np.argwhere(wrong)[0])
        raise ValueError(
            f"{kernel}: block_table[{sequences[i]}, {x}] is {table[i, x]}, expected 0 to "
            f"{in_pool - used[i, x]} for a block of which {used[i, x]} units are used"
        )
