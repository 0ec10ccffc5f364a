"""Attention of query rows to one split of the keys, and how splits become a row's result.

    s[j] = scale * (q . k[j])         for the keys j that the row sees: j <= position < j + window,
                                      or j <= position in the row's own chunk of positions
    m = max s,  l = sum exp(s - m),  o = sum exp(s - m) v[j]      online, KEY_BLOCK keys at a time
                                      (as powers of 2: s and m carry a factor log2 e)
    out = o / l, after splits are folded in index order; a sink adds exp(sink - m) to l alone

This is the arithmetic that decode and prefill kernels share, so that the bits of a row depend on
the row, its position and the keys it sees, and on nothing else: not on the kernel, on the rows
beside it, on chunking, on where the cache put its units, on threads.

| Array      | Shape           | Type      | Layout                                               |
|------------|-----------------|-----------|------------------------------------------------------|
| q          | [rows, D]       | BF16, f32 | of one key/value head: token t, head g at t G + g    |
| k, v       | see kv_write.py | BF16, f32 | a pool; units of 16 keys are operands of tile_dot    |
| table      | [X]             | int64     | one sequence's row of the block table                |
| top        | [rows]          | f32       | m                                                    |
| total      | [rows, 16]      | f32       | l in parts: part i is of the keys j = i mod 16       |
| values     | [rows, Dp]      | f32       | o; Dp = D rounded up to 16, nothing beyond D is used |

How: scores of 64 keys are a tile of up to 6 rows by 4 vectors, one vector per unit, in D / S steps;
values are a tile of up to 6 rows by 64 columns, in one step per pair of keys; both are four tiles
of one vector without AVX-512. Between them the
weights of two tiles are made at once: their maxima come from the tiles in registers, and from then
on no row waits for another, nor a lane for its neighbour.
    A block of keys that all rows see whole takes whole tiles. Of a block that some row sees in
part, a tile multiplies the pairs that all its rows see, and each row by itself the pairs that it
sees beyond them; a lone key, whose partner in its pair is hidden, is added after them. No hidden
value is ever multiplied, be it a NaN, and the order of a row's additions depends on its own keys
alone.
Error: with w = softmax weights and e = (D + 2) 2^-24 scale max |q|.|k|, a score's error, in f32:
    |out - exact| <= w.|v| (4 e + (min(S, SPLIT) + S/8 + 64) 2^-24); 4 e has room for the rounding
    of scale log2 e, and 64 for exp2. BF16 adds 2^-8 w.|v|, as the weights are rounded for the
    second product (their sum is not; nor are they without AVX-512), and 2^-8 |out|.
    Few rows wait for memory: they read the keys of a whole split, then its values, in order, and
    ask for what comes next while they compute (`attend_few`). Many rows stay with one block in L1.
Cautions: a NaN or infinity in a key or value reaches the rows that see it and no other. BF16 dot
    products take denormals for zero where the CPU has the instruction (lanes.py).
Source: Milakov and Gimelshein 2018 (online softmax), Dao et al. 2022 (FlashAttention), Xiao et al.
    2023 (sinks). Conventions of PACE csrc/ops/attention/slab (scale on f32 scores, sums of
    unrounded weights), but one arithmetic instead of its five, and a sink of 0.0 is a sink.
Notebook: 06 online softmax. Ledger: attention_decode.
"""

from __future__ import annotations

import numpy as np

from pace_nb.kernels import jit
from pace_nb.kernels.arrays import Array
from pace_nb.kernels.bf16 import widen
from pace_nb.kernels.exp import LOG2_E, exp2
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
    NV,
    tile_dot,
    tile_dot_apart,
    tile_load,
    tile_row_maxima,
    tile_scale_rows,
    tile_store,
    tile_zeros,
)
from pace_nb.kernels.words import first_of_words, per_word, second_of_words

# ---- constants -----------------------------------------------------------------------------------
# Units of a key block: 6 rows x 4 vectors of scores, 4 of keys and 1 of q fill 29 registers of 32.
# Where there are 16, tiles are 6 rows x 1 vector, of scores and of values.
UNITS = 4
KEY_BLOCK = UNITS * UNIT  # aligned at multiples of itself, so every row cuts its keys alike
MR = 6  # rows of the largest tile; what is left over takes tiles of 4 and 1
# Keys of a split, a task of decode: 256 KiB of K and V for D = 128, some 10 us of DRAM time. To
# fold a split costs a row 2 exp and 3 D FLOPs, under 1 % of its keys. Never per thread count.
SPLIT = 512
ROWS = 96  # query rows of a task, about: they share each read of K and V; 16 tiles of 6 or 24 of 4
FLOOR = -3.4028234663852886e38  # m before any key: finite, as -inf - -inf is NaN

# Rows of a pass: the scores of two tiles, then the weights of all their rows, then two tiles of
# values. What one row waits for (its maximum, from 64 lanes) another's work hides.
PASS = 2 * MR
# Few rows wait for memory, and take another way through a split (`attend_few`): the scores of all
# its blocks, then their weights and values. K is one long stream from memory, then V, where turns
# of a block each would leave the hardware's prefetching to begin anew every few KiB.
FEW = PASS
BLOCKS = SPLIT // KEY_BLOCK
# Scratch of a thread, float32: for 12 rows -m and alpha, the largest score of each block of a split
# (a tile of 6 writes 16 lanes), then scores [12, 64] of each block.
SHIFT, ALPHA, TOPS = 0, 16, 32
SCORES = TOPS + BLOCKS * 32
WORK = SCORES + BLOCKS * PASS * KEY_BLOCK
# And int64: where the words of this block and of the next begin, the spans of 12 rows, the units of
# a split and of the block beyond it.
SPANS = 2 * KEY_BLOCK
UNIT_NUMBERS = SPANS + 2 * PASS
WORDS = UNIT_NUMBERS + (BLOCKS + 1) * UNITS


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
# Tiles of fewer rows than MR ask for the next block while they compute: they wait for memory. For a
# whole tile, which multiplies each line six times, asking costs more than it brings (LOG.md).
def _score_tile(mr):
    """The device function for `mr` rows; every size is its own type of tile, held in registers."""
    asks = mr < MR

    @jit.device_fn
    def scores(q, q0, d, k, k0, asked, later, work, w0, tops):
        # work [mr, 64] at w0 = q [mr, D] at q0 . keys of a block, and their maxima at tops; unit j
        # [D/S, 16, S] begins at k0[j]. What is needed next are the units of `asked` at later[j].
        s = per_word(k)
        steps = d // s
        acc = tile_zeros(mr, 4)
        for j in range(4):
            ahead = later[j]
            for x in range(j * steps // 4, (j + 1) * steps // 4):
                if asks:
                    for line in range(4):
                        prefetch(asked, ahead + line * 16 * s)
                    ahead += 64 * s
                acc = tile_dot_apart(acc, q, q0 + x * s, d, k, k0, x * 16 * s)
        tile_store(acc, work, w0, KEY_BLOCK)
        store(work, tops, tile_row_maxima(acc))

    @jit.device_fn
    def scores_by_unit(q, q0, d, k, k0, asked, later, work, w0, tops):
        # The same, with tiles of one unit: keys in the order of memory, where there are rows enough
        # to keep the units busy, or no registers for more.
        s = per_word(k)
        tops_so_far = splat(FLOOR)
        for j in range(4):
            acc, unit, ahead = tile_zeros(mr, 1), k0[j], later[j]
            for x in range(d // s):
                if asks:
                    prefetch(asked, ahead + x * 16 * s)
                acc = tile_dot(acc, q, q0 + x * s, d, k, unit + x * 16 * s, 0)
            tile_store(acc, work, w0 + j * UNIT, KEY_BLOCK)
            tops_so_far = maximum(tops_so_far, tile_row_maxima(acc))
        store(work, tops, tops_so_far)

    return scores if mr == (MR if jit.WIDE else 1) else scores_by_unit


def _value_tile(nv, mr):
    """The device function for `mr` rows and 16 `nv` columns of the values."""
    asks = mr < MR

    @jit.device_fn
    def add_values(p, i, v, asked, dp, column, words, first, end, work, values, o0):
        # values [mr, Dp] at o0 = alpha values + p V, for rows i .. i + mr of p [12, 64] and words
        # first .. end of the block (a word is S keys of one column); the words of all columns
        # [Dp, S] begin at words[x], what is needed next at words[64 + x] of `asked`.
        s = per_word(v)
        acc = tile_scale_rows(tile_load(mr, nv, values, o0 + column, dp), work, ALPHA + i)
        p0 = i * KEY_BLOCK
        for x in range(first, end):
            if asks:
                ahead = words[KEY_BLOCK + x] + column * s
                for line in range(nv):
                    prefetch(asked, ahead + 16 * line * s)
            acc = tile_dot(acc, p, p0 + x * s, KEY_BLOCK, v, words[x] + column * s, 16 * s)
        tile_store(acc, values, o0 + column, dp)

    return add_values


_scores_6, _scores_4, _scores_1 = (_score_tile(mr) for mr in (MR, 4, 1))
COLUMNS = 16 * NV  # of a tile of values
_add_6, _add_4 = (_value_tile(NV, mr) for mr in (MR, 4))
_add_6x16, _add_1x64, _add_1x16 = _value_tile(1, MR), _value_tile(4, 1), _value_tile(1, 1)
# For four rows that wait for memory: all lines of a word of 128 columns in order, where two such
# rows fit the registers.
FEW_ROWS, FEW_COLUMNS = (2, 128) if jit.WIDE else (4, 16)
_add_few = _value_tile(FEW_COLUMNS // 16, FEW_ROWS)


@jit.device_fn
def _few_scores(mr, *arguments):
    """The scores of a tile that asks: 4 rows or 1."""
    if mr == 4:
        _scores_4(*arguments)
    else:
        _scores_1(*arguments)


@jit.device_fn
def _scores(mr, *arguments):
    """The scores of a tile of 6, 4 or 1 rows."""
    if mr == MR:
        _scores_6(*arguments)
    else:
        _few_scores(mr, *arguments)


@jit.device_fn
def _hide(rows, spans, work, w0, tops):
    """Scores at w0 outside a row's keys first .. end become -inf, and leave its maximum."""
    hidden = splat(-np.inf)
    for i in range(rows):
        first, end = spans[2 * i], spans[2 * i + 1]
        largest = hidden
        for key in range(0, KEY_BLOCK, 16):
            at = w0 + i * KEY_BLOCK + key
            seen = keep_lanes(load(work, at), first - key, end - key, hidden)
            store(work, at, seen)
            largest = maximum(largest, seen)
        work[tops + i] = reduce_max(largest)


@jit.device_fn
def _softmax_rows(rows, scale, work, w0, tops, p, top, total, r):
    """p [rows, 64] = 2^(scale scores - m), rounded to p's type; scores are at w0 of `work`.

    Rows r .. r + rows of top and total (m and l) take these keys in; alpha = 2^(old m - new m) goes
    to `work`, for the values. scale is that of the logits times log2 e.
    """
    factor = splat(scale)
    old = load_tail(top, r, rows)
    # A NaN may be lost among the maxima, but exp2 keeps it: the sum and the values become NaN.
    new = maximum(old, load(work, tops) * factor)
    store_tail(top, r, new, rows)
    store(work, SHIFT, -new)
    store(work, ALPHA, exp2(old - new))
    for i in range(rows):
        at, lanes = i * KEY_BLOCK, (r + i) * 16
        w, shift = w0 + at, splat(work[SHIFT + i])
        s0, s1 = load(work, w) * factor, load(work, w + 16) * factor
        s2, s3 = load(work, w + 32) * factor, load(work, w + 48) * factor
        s0, s1, s2, s3 = exp2(s0 + shift), exp2(s1 + shift), exp2(s2 + shift), exp2(s3 + shift)
        sums = fma(load(total, lanes), splat(work[ALPHA + i]), (s0 + s1) + (s2 + s3))
        store(total, lanes, sums)
        store_operand(p, at, s0)
        store_operand(p, at + 16, s1)
        store_operand(p, at + 32, s2)
        store_operand(p, at + 48, s3)


@jit.device_fn
def _add_row_values(p, i, v, asked, dp, column, words, first, end, work, values, o0):
    """One row's values from `column` on: groups of 64 columns, then of 16."""
    whole = dp // 64 * 64
    for c in range(column, whole, 64):
        _add_1x64(p, i, v, asked, dp, c, words, first, end, work, values, o0)
    for c in range(whole, dp, 16):
        _add_1x16(p, i, v, asked, dp, c, words, first, end, work, values, o0)


@jit.device_fn
def _add_values(mr, p, i, v, dp, words, first, end, work, values, o0):
    """All columns of the values: whole tiles, then 16, as 6 rows of 16 keep the units busy."""
    column = 0
    if mr == MR:
        column = dp
        for c in range(0, dp // COLUMNS * COLUMNS, COLUMNS):
            _add_6(p, i, v, v, dp, c, words, first, end, work, values, o0)
        for c in range(dp // COLUMNS * COLUMNS, dp, 16):  # none where COLUMNS is 16
            _add_6x16(p, i, v, v, dp, c, words, first, end, work, values, o0)
    elif mr == 4:
        column = dp // COLUMNS * COLUMNS
        for c in range(0, column, COLUMNS):
            _add_4(p, i, v, v, dp, c, words, first, end, work, values, o0)
    for j in range(0 if column == dp else mr):
        at = o0 + j * dp
        _add_row_values(p, i + j, v, v, dp, column, words, first, end, work, values, at)


@jit.device_fn
def _add_few_values(mr, p, i, v, asked, dp, words, first, end, work, values, o0):
    """As `_add_values` for 4 rows or 1, in the order of memory as far as registers go."""
    column = 0
    if mr == 4:
        column = dp // FEW_COLUMNS * FEW_COLUMNS
        for c in range(0, column, FEW_COLUMNS):
            for j in range(0, 4, FEW_ROWS):
                at = o0 + j * dp
                _add_few(p, i + j, v, asked, dp, c, words, first, end, work, values, at)
        for c in range(column, dp // COLUMNS * COLUMNS, COLUMNS):
            _add_4(p, i, v, asked, dp, c, words, first, end, work, values, o0)
        column = dp // COLUMNS * COLUMNS
    for j in range(0 if column == dp else mr):
        at = o0 + j * dp
        _add_row_values(p, i + j, v, asked, dp, column, words, first, end, work, values, at)


@jit.device_fn
def _scale_values(t, mr, work, values, o0, dp):
    """values [mr, Dp] at o0, rows t .. t + mr of the pass, times alpha, which is 1 from then on."""
    for i in range(mr):
        alpha = splat(work[ALPHA + t + i])
        for at in range(o0 + i * dp, o0 + (i + 1) * dp, 16):
            store(values, at, load(values, at) * alpha)
        work[ALPHA + t + i] = 1.0


@jit.device_fn
def _add_lone_value(p, p0, key, v, dp, words, values, o0):
    """values [Dp] at o0 += p[p0 + key] times the value of `key`; its pair's other key is hidden.

    It rounds as the dot product does: that of two BF16 is exact in f32, another one is this fma.
    """
    s = per_word(v)
    v0 = words[key // s]
    weight = splat(reduce_add(load_tail(p, p0 + key, 1)))
    for c in range(0, dp, 16):
        first, second = first_of_words(v, v0 + c * s), second_of_words(v, v0 + c * s)
        value = second if key % 2 else first
        store(values, o0 + c, fma(weight, value, load(values, o0 + c)))


@jit.device_fn
def _add_lone_values(i, p, v, dp, words, spans, values, o0):
    """The first and the last key of row i of the pass, if it does not see their partners."""
    s, key, end = per_word(v), spans[2 * i], spans[2 * i + 1]
    if key % s and key < end:
        _add_lone_value(p, i * KEY_BLOCK, key, v, dp, words, values, o0)
    if end % s and key < end:
        _add_lone_value(p, i * KEY_BLOCK, end - 1, v, dp, words, values, o0)


@jit.device_fn
def _add_before(t, mr, p, v, dp, words, spans, work, values, o0):
    """The values that only some rows see, before words begin .. stop that all see; returns these.

    Rows t .. t + mr of the pass; row i sees keys spans[2 i] .. spans[2 i + 1].
    """
    s = per_word(v)
    begin, stop = 0, KEY_BLOCK // s
    for i in range(t, t + mr):
        begin = max(begin, (spans[2 * i] + s - 1) // s)
        stop = min(stop, spans[2 * i + 1] // s)
    _scale_values(t, mr, work, values, o0, dp)
    for i in range(t, t + mr):
        first, end = (spans[2 * i] + s - 1) // s, min(begin, spans[2 * i + 1] // s)
        if first < end:
            at = o0 + (i - t) * dp
            _add_row_values(p, i, v, v, dp, 0, words, first, end, work, values, at)
    return begin, max(begin, stop)


@jit.device_fn
def _add_after(t, mr, stop, p, v, dp, words, spans, work, values, o0):
    """The values that only some rows see, from word `stop`, then each row's lone keys."""
    s = per_word(v)
    for i in range(t, t + mr):
        first, end = max(stop, (spans[2 * i] + s - 1) // s), spans[2 * i + 1] // s
        at = o0 + (i - t) * dp
        if first < end:
            _add_row_values(p, i, v, v, dp, 0, words, first, end, work, values, at)
        _add_lone_values(i, p, v, dp, words, spans, values, at)


# ---- the rows of a task against one split --------------------------------------------------------
@jit.device_fn
def unit_number(table, t0, units_per_block, unit):
    """Where in the pool a sequence's unit lies; its row of the flat `table` begins at t0."""
    return table[t0 + unit // units_per_block] + unit % units_per_block


@jit.device_fn
def gather_rows(q, q0, token_stride, head_stride, tokens, group, d, sign, rows):
    """q of `tokens` tokens and `group` heads, times `sign`, into rows [tokens * group, D]."""
    whole, sign = d // 16 * 16, splat(sign)
    for t in range(tokens):
        for g in range(group):
            source, target = q0 + t * token_stride + g * head_stride, (t * group + g) * d
            for i in range(0, whole, 16):
                store(rows, target + i, load(q, source + i) * sign)
            last = load_tail(q, source + whole, d - whole) * sign
            store_tail(rows, target + whole, last, d - whole)


@jit.device_fn
def clear_rows(top, total, values, r0, rows, dp):
    """m, l, o of no keys at all, for `rows` rows from row r0."""
    for r in range(r0, r0 + rows):
        top[r] = FLOOR
        store(total, r * 16, splat(0.0))
        for c in range(r * dp, r * dp + dp, 16):
            store(values, c, splat(0.0))


@jit.device_fn
def first_key(position, window, chunk):
    """The first key that the token at `position` sees; it never falls as the position rises."""
    if chunk > 0:
        return position // chunk * chunk
    return max(position + 1 - window, 0) if window > 0 else 0


@jit.device_fn
def keys_of_split(position, tokens, window, chunk, split):
    """Keys low .. high of the split that some row sees, of so many tokens from `position` on."""
    low = max(first_key(position, window, chunk), split * SPLIT)
    return low, min(position + tokens, split * SPLIT + SPLIT)


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
def _few_height(rows):
    """Rows of the next tile that asks, of so many that are left."""
    return 4 if rows >= 4 else 1


@jit.device_fn
def _height(rows):
    """Rows of the next tile, of so many that are left."""
    return MR if rows >= MR else _few_height(rows)


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
    [WORDS] int64, p [12 * 64] in q's dtype and work [WORK] f32 are scratch.
    """
    s = per_word(v)
    clear_rows(top, total, values, r0, tokens * group, dp)
    low, high = keys_of_split(position, tokens, window, chunk, split)
    if low >= high:
        return
    spans = words[SPANS:]
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
            n = min(PASS, rows - r)
            if whole or _find_spans(n, r, group, position, block, window, chunk, spans):
                t = 0
                while t < n:
                    mr = _height(n - t)
                    at = SCORES + t * KEY_BLOCK
                    _scores(mr, q, (r + t) * d, d, k, k0, k, later, work, at, TOPS + t)
                    t += mr
                if not whole:
                    _hide(n, spans, work, SCORES, TOPS)
                _softmax_rows(n, scale, work, SCORES, TOPS, p, top, total, r0 + r)
                t = 0
                while t < n:
                    mr, o0 = _height(n - t), (r0 + r + t) * dp
                    begin, stop = 0, KEY_BLOCK // s
                    if not whole:
                        begin, stop = _add_before(t, mr, p, v, dp, words, spans, work, values, o0)
                    if begin < stop:
                        _add_values(mr, p, t, v, dp, words, begin, stop, work, values, o0)
                    if not whole:
                        _add_after(t, mr, stop, p, v, dp, words, spans, work, values, o0)
                    t += mr
            r += n


@jit.device_fn
def _units_at(words, b, width):
    """Where the four units of block b begin, with so many elements per key."""
    x, size = UNIT_NUMBERS + b * UNITS, UNIT * width
    return words[x] * size, words[x + 1] * size, words[x + 2] * size, words[x + 3] * size


@jit.device_fn
def _find_words(words, w0, b, width, s):
    """Where the words of block b do, into words[w0:]."""
    for j in range(UNITS):
        begin = words[UNIT_NUMBERS + b * UNITS + j] * UNIT * width
        for x in range(UNIT // s):
            words[w0 + j * UNIT // s + x] = begin + x * width * s


@jit.device_fn
def attend_few(
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
    """As `attend_split`, and to the bit, for at most FEW rows: in the order of memory.

    What is needed next is asked for all the time: at the end of the keys the first values, at the
    end of the values the keys after this split, which come next if the caller takes them so.
    """
    s, n = per_word(v), tokens * group
    clear_rows(top, total, values, r0, n, dp)
    low, high = keys_of_split(position, tokens, window, chunk, split)
    if low >= high:
        return
    spans, start = words[SPANS:], low // KEY_BLOCK * KEY_BLOCK
    blocks = -(-(high - start) // KEY_BLOCK)
    last_first = first_key(position + tokens - 1, window, chunk)
    for x in range((blocks + 1) * UNITS):
        # Units that no row sees may not exist: one that does takes their place.
        end = high if x < blocks * UNITS else position + tokens
        unit = max(low // UNIT, min((end - 1) // UNIT, start // UNIT + x))
        words[UNIT_NUMBERS + x] = head + unit_number(table, t0, units_per_block, unit)
    for b in range(blocks):
        asked, later = k, _units_at(words, b + 1, d)
        if b + 1 == blocks:
            asked, later = v, _units_at(words, 0, dp)
        k0, t = _units_at(words, b, d), 0
        while t < n:
            mr, at = _few_height(n - t), SCORES + (b * n + t) * KEY_BLOCK
            _few_scores(mr, q, t * d, d, k, k0, asked, later, work, at, TOPS + b * 32 + t)
            t += mr
    for b in range(blocks):
        block = start + b * KEY_BLOCK
        whole = position + 1 >= block + KEY_BLOCK and last_first <= block
        if whole or _find_spans(n, 0, group, position, block, window, chunk, spans):
            w0, tops, t = SCORES + b * n * KEY_BLOCK, TOPS + b * 32, 0
            _find_words(words, 0, b, dp, s)
            asked, width = (v, dp) if b + 1 < blocks else (k, d)
            _find_words(words, KEY_BLOCK, b + 1, width, s)
            if not whole:
                _hide(n, spans, work, w0, tops)
            _softmax_rows(n, scale, work, w0, tops, p, top, total, r0)
            while t < n:
                mr, o0 = _few_height(n - t) if whole else 1, (r0 + t) * dp
                first, end = 0, KEY_BLOCK // s
                if not whole:
                    first, end = (spans[2 * t] + s - 1) // s, spans[2 * t + 1] // s
                    _scale_values(t, 1, work, values, o0, dp)
                if first < end:
                    _add_few_values(mr, p, t, v, asked, dp, words, first, end, work, values, o0)
                if not whole:
                    _add_lone_values(t, p, v, dp, words, spans, values, o0)
                t += mr


@jit.device_fn
def fold_row(top, total, values, r, split_top, split_total, split_values, i, dp):
    """Add row i of a split's m, l, o to row r of top, total, values. In index order of splits.

    What is added to nothing is taken as it is, so a first split may also be computed in place.
    """
    sums, lanes = load(split_total, i * 16), r * 16
    if reduce_add(sums) == 0.0:  # the row sees no key of this split
        return
    first = reduce_add(load(total, lanes)) == 0.0
    old, other = splat(top[r]), splat(split_top[i])
    new = maximum(old, other)
    alpha, beta = exp2(old - new), exp2(other - new)
    store_tail(top, r, new, 1)
    store(total, lanes, sums if first else fma(load(total, lanes), alpha, sums * beta))
    for c in range(0, dp, 16):
        added, at = load(split_values, i * dp + c), r * dp + c
        store(values, at, added if first else fma(load(values, at), alpha, added * beta))


@jit.device_fn
def finish_row(top, total, values, r, sinks, head, out, y0, d, dp):
    """out [D] at y0 = o / l of row r, after the sink of query head `head` has joined (m, l)."""
    whole_total = reduce_add(load(total, r * 16))
    alpha, denominator = splat(1.0), splat(whole_total)
    if sinks.size:
        old, sink = splat(top[r]), splat(sinks[head]) * splat(LOG2_E)
        new = maximum(sink, old)
        alpha = exp2(old - new)
        denominator = fma(denominator, alpha, exp2(sink - new))
    if whole_total == 0.0:  # no key at all
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
