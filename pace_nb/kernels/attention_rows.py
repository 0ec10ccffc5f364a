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
all rows see whole takes whole tiles. Of a block that some row sees in part, a tile multiplies the
pairs that all its rows see, and each row by itself the pairs that it sees beyond them; a lone key,
whose partner in its pair is hidden, is added after them. No hidden value is ever multiplied, be it
a NaN, and the order of a row's additions depends on its own keys alone.
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

import numpy as np

from pace_nb.kernels import jit
from pace_nb.kernels.arrays import Array
from pace_nb.kernels.bf16 import widen
from pace_nb.kernels.exp import exp
from pace_nb.kernels.kv_write import UNIT, KVPool, kv_gather_ref
from pace_nb.kernels.lanes import (
    fma,
    keep_lanes,
    load,
    load_tail,
    maximum,
    prefetch,
    reduce_add,
    reduce_max,
    splat,
    store,
    store_operand,
    store_tail,
)
from pace_nb.kernels.tiles import (
    tile_dot,
    tile_dot_apart,
    tile_load,
    tile_scale_rows,
    tile_store,
    tile_zeros,
)
from pace_nb.kernels.words import first_of_words, per_word, second_of_words

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
# And int64: where the words of this block and of the next begin, then the spans of 6 rows.
WORDS = 2 * KEY_BLOCK + 2 * MR


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
    def scores(q, q0, d, k, k0, later, work):
        # work [mr, 64] = q [mr, D] at q0 . keys of a block; unit j [D/S, 16, S] begins at k0[j],
        # that of the next block at later[j].
        s = per_word(q)
        steps = d // s
        acc = tile_zeros(mr, 4)
        for j in range(4):
            ahead = later[j]
            for x in range(j * steps // 4, (j + 1) * steps // 4):
                for i in range(4):
                    prefetch(k, ahead + i * 16 * s)
                ahead += 64 * s
                acc = tile_dot_apart(acc, q, q0 + x * s, d, k, k0, x * 16 * s)
        tile_store(acc, work, 0, KEY_BLOCK)

    return scores


def _value_tile(nv, mr):
    """The device function for `mr` rows and 16 `nv` columns of the values."""

    @jit.device_fn
    def add_values(p, p0, v, dp, column, words, first, end, work, values, o0):
        # values [mr, Dp] at o0 = alpha values + p [mr, 64] at p0 V, over words first .. end of the
        # block (a word is S keys of one column); the words of all columns [Dp, S] begin at
        # words[x], those of the next block at words[64 + x].
        s = per_word(v)
        acc = tile_scale_rows(tile_load(mr, nv, values, o0 + column, dp), work, ALPHA)
        for x in range(first, end):
            ahead = words[KEY_BLOCK + x] + column * s
            for i in range(nv):
                prefetch(v, ahead + 16 * i * s)
            acc = tile_dot(acc, p, p0 + x * s, KEY_BLOCK, v, words[x] + column * s, 16 * s)
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
def _hide(mr, spans, scale, work):
    """Scores [mr, 64], scaled; outside a row's keys first .. end -inf: their weights become 0."""
    hidden, factor = splat(-np.inf), splat(scale)
    for i in range(mr):
        first, end = spans[2 * i], spans[2 * i + 1]
        for key in range(0, KEY_BLOCK, 16):
            at = i * KEY_BLOCK + key
            store(work, at, keep_lanes(load(work, at) * factor, first - key, end - key, hidden))


@jit.device_fn
def _softmax_rows(mr, scale, work, p, top, total, r):
    """p [mr, 64] = exp(scale scores - m), rounded to storage.

    Rows r .. r + mr of top and total (m and l) take these keys in; alpha = exp(old m - new m) goes
    to `work`, for the values.
    """
    factor = splat(scale)
    for i in range(mr):
        at = i * KEY_BLOCK
        s0, s1 = load(work, at) * factor, load(work, at + 16) * factor
        s2, s3 = load(work, at + 32) * factor, load(work, at + 48) * factor
        block_top = reduce_max(maximum(maximum(s0, s1), maximum(s2, s3)))
        # The comparison loses a NaN, but exp keeps it: the sum and the values become NaN.
        new = block_top if block_top > top[r + i] else top[r + i]
        shift = splat(new)
        s0, s1, s2, s3 = exp(s0 - shift), exp(s1 - shift), exp(s2 - shift), exp(s3 - shift)
        work[NEW + i] = new
        work[SUM + i] = reduce_add((s0 + s1) + (s2 + s3))
        store_operand(p, at, s0)
        store_operand(p, at + 16, s1)
        store_operand(p, at + 32, s2)
        store_operand(p, at + 48, s3)
    new_top = load_tail(work, NEW, mr)
    alpha = exp(load_tail(top, r, mr) - new_top)
    store(work, ALPHA, alpha)
    store_tail(top, r, new_top, mr)
    new_total = fma(load_tail(total, r, mr), alpha, load_tail(work, SUM, mr))
    store_tail(total, r, new_total, mr)


@jit.device_fn
def _add_values(mr, p, p0, v, dp, words, first, end, work, values, o0):
    """All columns of the values: groups of 64, then of 16, as 6 rows of 16 keep the units busy."""
    whole = dp // 64 * 64
    for c in range(0, whole, 64):
        _add_64_columns(mr, p, p0, v, dp, c, words, first, end, work, values, o0)
    for c in range(whole, dp, 16):
        _add_16_columns(mr, p, p0, v, dp, c, words, first, end, work, values, o0)


@jit.device_fn
def _scale_values(mr, work, values, o0, dp):
    """values [mr, Dp] at o0 times alpha, which is 1 from then on."""
    for i in range(mr):
        alpha = splat(work[ALPHA + i])
        for at in range(o0 + i * dp, o0 + (i + 1) * dp, 16):
            store(values, at, load(values, at) * alpha)
        work[ALPHA + i] = 1.0


@jit.device_fn
def _add_lone_value(p, p0, key, v, dp, words, values, o0):
    """values [Dp] at o0 += p[p0 + key] times the value of `key`; its pair's other key is hidden.

    A product of two BF16 is exact in f32, so fma rounds as the dot product does.
    """
    s = per_word(v)
    v0 = words[key // s]
    weight = splat(reduce_add(load_tail(p, p0 + key, 1)))
    for c in range(0, dp, 16):
        first, second = first_of_words(v, v0 + c * s), second_of_words(v, v0 + c * s)
        value = second if key % 2 else first
        store(values, o0 + c, fma(weight, value, load(values, o0 + c)))


@jit.device_fn
def _add_before(mr, p, v, dp, words, spans, work, values, o0):
    """The values that only some rows see, before words begin .. stop that all see; returns these.

    Row i sees keys spans[2 i] .. spans[2 i + 1].
    """
    s = per_word(v)
    begin, stop = 0, KEY_BLOCK // s
    for i in range(mr):
        begin = max(begin, (spans[2 * i] + s - 1) // s)
        stop = min(stop, spans[2 * i + 1] // s)
    _scale_values(mr, work, values, o0, dp)
    for i in range(mr):
        first, end = (spans[2 * i] + s - 1) // s, min(begin, spans[2 * i + 1] // s)
        if first < end:
            at = o0 + i * dp
            _add_values(1, p, i * KEY_BLOCK, v, dp, words, first, end, work, values, at)
    return begin, max(begin, stop)


@jit.device_fn
def _add_after(mr, stop, p, v, dp, words, spans, work, values, o0):
    """The values that only some rows see, from word `stop`, then each row's lone keys."""
    s = per_word(v)
    for i in range(mr):
        key, end, at = spans[2 * i], spans[2 * i + 1], o0 + i * dp
        first = max(stop, (key + s - 1) // s)
        if first < end // s:
            _add_values(1, p, i * KEY_BLOCK, v, dp, words, first, end // s, work, values, at)
        if key % s and key < end:
            _add_lone_value(p, i * KEY_BLOCK, key, v, dp, words, values, at)
        if end % s and key < end:
            _add_lone_value(p, i * KEY_BLOCK, end - 1, v, dp, words, values, at)


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
def _locate(head, table, t0, units_per_block, block, near, far, d, dp, s, words, w0):
    """Where the keys of a block's four units begin; where its words of values do, in words[w0:].

    Units outside near .. far may not exist: one that does takes their place.
    """
    b = block // 16
    u0 = head + unit_number(table, t0, units_per_block, max(near, min(far, b)))
    u1 = head + unit_number(table, t0, units_per_block, max(near, min(far, b + 1)))
    u2 = head + unit_number(table, t0, units_per_block, max(near, min(far, b + 2)))
    u3 = head + unit_number(table, t0, units_per_block, max(near, min(far, b + 3)))
    for x in range(16 // s):
        words[w0 + x] = (u0 * 16 // s + x) * dp * s
        words[w0 + x + 16 // s] = (u1 * 16 // s + x) * dp * s
        words[w0 + x + 32 // s] = (u2 * 16 // s + x) * dp * s
        words[w0 + x + 48 // s] = (u3 * 16 // s + x) * dp * s
    return u0 * 16 * d, u1 * 16 * d, u2 * 16 * d, u3 * 16 * d


@jit.device_fn
def _find_spans(mr, r, group, position, block, window, chunk, spans):
    """Keys first .. end of the block that rows r .. r + mr see, into spans; does any see one?"""
    some = False
    for i in range(mr):
        at = position + (r + i) // group
        first = max(first_key(at, window, chunk) - block, 0)
        end = min(at + 1 - block, KEY_BLOCK)
        some = some or first < end
        spans[2 * i], spans[2 * i + 1] = (first, end) if first < end else (0, 0)
    return some


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
    [WORDS] int64, p [6 * 64] in storage dtype and work [WORK] f32 are scratch.
    """
    s = per_word(v)
    clear_rows(top, total, values, r0, tokens * group, dp)
    low = max(first_key(position, window, chunk), split * SPLIT)
    high = min(position + tokens, split * SPLIT + SPLIT)
    if low >= high:
        return
    spans = words[2 * KEY_BLOCK :]
    near, far, start = low // 16, (high - 1) // 16, low // KEY_BLOCK * KEY_BLOCK
    last_first = first_key(position + tokens - 1, window, chunk)
    later = _locate(head, table, t0, units_per_block, start, near, far, d, dp, s, words, KEY_BLOCK)
    for block in range(start, high, KEY_BLOCK):
        # The next block is asked for while this one is computed: units lie apart, and what the
        # hardware fetches on its own ends with each.
        k0 = later
        for x in range(KEY_BLOCK // s):
            words[x] = words[KEY_BLOCK + x]
        later = _locate(
            head,
            table,
            t0,
            units_per_block,
            block + KEY_BLOCK,
            near,
            far,
            d,
            dp,
            s,
            words,
            KEY_BLOCK,
        )
        whole = position + 1 >= block + KEY_BLOCK and last_first <= block
        r, rows = 0, tokens * group
        while r < rows:
            left = rows - r
            mr = MR if left >= MR else 4 if left >= 4 else 2 if left >= 2 else 1
            o0 = (r0 + r) * dp
            if whole or _find_spans(mr, r, group, position, block, window, chunk, spans):
                _scores(mr, q, r * d, d, k, k0, later, work)
                factor, begin, stop = scale, 0, KEY_BLOCK // s
                if not whole:
                    _hide(mr, spans, scale, work)
                    factor = 1.0
                _softmax_rows(mr, factor, work, p, top, total, r0 + r)
                if not whole:
                    begin, stop = _add_before(mr, p, v, dp, words, spans, work, values, o0)
                if begin < stop:
                    _add_values(mr, p, 0, v, dp, words, begin, stop, work, values, o0)
                if not whole:
                    _add_after(mr, stop, p, v, dp, words, spans, work, values, o0)
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
