"""Next tokens from rows of logits: greedy or drawn, filtered, penalised, masked; and p itself.

    greedy           the largest logit, of equal ones the lowest id
    sample           a row of logits becomes a token in this order (vLLM's):
        1. mask, then bias and bans   (logit_edits.py)
        2. penalties on tokens seen   (logit_edits.py)
        3. temperature 0: the largest l, of equal ones the lowest id; done
        4. x = (l - largest) / temperature;  weight = floor(2^40 e^x), an integer
        5. min_p:  keep where x >= log(min_p)
        6. top_k:  keep the k largest l of the row, and what ties with the last of them
        7. top_p:  keep the shortest head of the likeliest (larger l first, of equal ones the lower
                   id) whose weights reach top_p times those of what 5 and 6 kept
        8. the first id, in order of id, where the sum of kept weights exceeds u times their total
    distribution     p after 1 to 7: kept weight / total (1 for the one token of temperature 0)
    sample_residual  the first id where the sum of max(p - q, 0) exceeds u times its total; of p
                     where q leaves nothing

u is a multiple of 2^-53 in [0, 1): the upper 53 bits of a word of Philox, keyed by the request's
seed, at its output position (philox.py). It needs no state.

| Array     | Shape      | Type    | Layout                                                        |
|-----------|------------|---------|---------------------------------------------------------------|
| logits    | [R, V]     | f32     | rows contiguous, any row stride                               |
| settings  | [S, 7]     | f64     | contiguous; columns TEMPERATURE to PRESENCE; a row a request  |
| seeds     | [S]        | uint64  | contiguous                                                    |
| slots     | [R]        | int64   | which row of settings and seeds a row of logits has           |
| positions | [R]        | int64   | output position of the token                                  |
| edits     | see `Edits`|         | ragged lists by offsets, as most rows have none               |
| tokens    | [R]        | int64   | the result; -1 where there is no token to give                |
| largest   | [R]        | f32     | largest logit of the row as given; NaN if it holds any        |
| left      | [R]        | f32     | the same after 2                                              |

Moves: greedy 4 R V bytes. sample the same again for temperature alone or top_p alone (weights of
    the whole row), nothing more for top_k and min_p, and a copy of the rows that have edits.
Does: greedy 2 operations per 16 logits. A row of weights 25 per 16, then what is kept only: no
    sort, the thresholds of top_k and top_p come from histograms of digits.
Error: none: the arithmetic above is exact or rounded where it says so, and the references give the
    same token. Against p in real numbers each weight is within 2^-22 relative and 2^-40 of the
    likeliest's.
Cautions: a row with a NaN, with +inf, or with nothing but -inf has no token: `largest` says which,
    and no other row notices. What weighs less than 2^-40 of the likeliest is never drawn. V is at
    most 2^22. Rows are independent: the same bits in any batch, for any number of threads.
Source: vLLM v1 `vllm/v1/sample/`; Leviathan et al. 2023 (residual).
    Re-implements PACE `pace/llm/sampler.py`, which sorts the vocabulary.
Notebook: 18 sampling. Ledger: sampling.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numba import prange

from pace_nb.kernels import jit
from pace_nb.kernels.arrays import Array, contiguous, flat_rows, in_range, require
from pace_nb.kernels.integer_lanes import (
    MOST_WEIGHTS,
    ONE,
    add_weights,
    fixed,
    no_weights,
    store_weights,
    sum_weights,
)
from pace_nb.kernels.lanes import load_tail, maximum, splat, store
from pace_nb.kernels.logit_edits import Edits, check_edits, edit, edited_ref
from pace_nb.kernels.logit_rows import (
    BLOCK,
    DIGITS,
    collect,
    key_at,
    kth_peak,
    largest_of,
    num_peaks,
    order_ref,
    row_weights_ref,
    scaled_ref,
    threshold,
    weigh,
    weigh_row,
    weight_at,
)
from pace_nb.kernels.philox import philox, philox_ref, share_of

# Columns of `settings`. top_k 0, top_p 1, log_min_p -inf, repetition 1, frequency and presence 0
# are off; temperature 0 is greedy. Temperature, log_min_p and penalties are used as f32.
TEMPERATURE, TOP_K, TOP_P, LOG_MIN_P, REPETITION, FREQUENCY, PRESENCE = range(7)
NUM_SETTINGS = 7
NEUTRAL = (1.0, 0.0, 1.0, -np.inf, 1.0, 0.0, 0.0)


class Drawn(NamedTuple):
    """What `sample` gives: see the module docstring."""

    tokens: Array
    largest: Array
    left: Array


# ---- definitions ---------------------------------------------------------------------------------
def greedy_ref(logits: Array) -> tuple[Array, Array]:
    """(tokens, largest) of the rows of logits."""
    largest = logits.max(axis=1)  # NaN where there is any
    tokens = np.where(np.isfinite(largest), logits.argmax(axis=1), -1)
    return tokens, largest


def uniform_bits_ref(seeds: Array, positions: Array, stream: int = 0) -> Array:
    """uint64[R]: `philox_ref` of each pair."""
    pairs = zip(seeds.tolist(), positions.tolist(), strict=True)
    return np.array([philox_ref(*pair, stream) for pair in pairs], np.uint64)


def kept_ref(row: Array, settings: Array) -> Array:
    """Weights int64[V] after steps 4 to 7: 0 where a token is not kept."""
    weights = row_weights_ref(row, settings[TEMPERATURE])
    kept = scaled_ref(row, settings[TEMPERATURE]) >= np.float32(settings[LOG_MIN_P])
    order, k = order_ref(row), int(settings[TOP_K])
    if 0 < k < len(row):
        kept &= row >= row[order[k - 1]]
    weights[~kept] = 0
    if settings[TOP_P] < 1:
        reached = np.cumsum(weights[order])
        size = int(reached.searchsorted(needed_of(int(reached[-1]), settings[TOP_P]))) + 1
        weights[order[size:]] = 0
    return weights


def needed_of(total: int, top_p: float) -> int:
    """The weight that top_p of `total` is, at least 1."""
    return min(max(math.ceil(top_p * float(total)), 1), total)


def sample_ref(
    logits: Array, settings: Array, seeds: Array, slots: Array, positions: Array, edits: Edits
) -> Drawn:
    """The tokens that `sample` gives, by sorting each row."""
    tokens, largest = greedy_ref(logits)
    left = largest.copy()
    for r in np.flatnonzero(tokens >= 0).tolist():
        own = settings[slots[r]]
        row = edited_ref(logits[r], edits, r, own[REPETITION:])
        left[r] = row.max()
        if not np.isfinite(left[r]):
            tokens[r] = -1
        elif own[TEMPERATURE] == 0:
            tokens[r] = row.argmax()
        else:
            reached = np.cumsum(kept_ref(row, own))
            u = philox_ref(int(seeds[slots[r]]), int(positions[r])) >> 11
            tokens[r] = reached.searchsorted(u * int(reached[-1]) >> 53, side="right")
    return Drawn(tokens, largest, left)


def distribution_ref(logits: Array, settings: Array, slots: Array, edits: Edits) -> Array:
    """f32[R, V]: what `sample` draws from."""
    out = np.zeros(logits.shape, np.float32)
    tokens, _ = greedy_ref(logits)
    out[tokens < 0] = np.nan
    for r in np.flatnonzero(tokens >= 0).tolist():
        own = settings[slots[r]]
        row = edited_ref(logits[r], edits, r, own[REPETITION:])
        if not np.isfinite(row.max()):
            out[r] = np.nan
        elif own[TEMPERATURE] == 0:
            out[r, row.argmax()] = 1
        else:
            weights = kept_ref(row, own)
            out[r] = weights / weights.sum()
    return out


def sample_residual_ref(p: Array, q: Array, uniform_bits: Array) -> Array:
    """int64[R] tokens drawn from max(p - q, 0), or from p where that is nothing."""
    tokens = np.empty(len(p), np.int64)
    for r, bits in enumerate(uniform_bits):
        for share in (np.maximum(p[r] - q[r], np.float32(0)), p[r]):
            reached = np.cumsum((share * np.float32(ONE)).astype(np.int64))
            if reached[-1]:
                break
        u = int(bits) >> 11
        tokens[r] = reached.searchsorted(u * int(reached[-1]) >> 53, side="right")
        if not reached[-1]:
            tokens[r] = -1
    return tokens


# ---- one row: its edited copy --------------------------------------------------------------------
@jit.device_fn
def _copy_row(x, x0, v, out):
    """out[:v] = x[x0 : x0 + v]; up to 15 more of out are touched."""
    for i in range(0, v, 16):
        store(out, i, load_tail(x, x0 + i, min(16, v - i)))


@jit.device_fn
def _edit(row, v, settings, s, edits, r):
    """Steps 1 and 2 in place."""
    repetition, frequency = settings[s, REPETITION], settings[s, FREQUENCY]
    presence = settings[s, PRESENCE]
    edit(row, v, edits, r, np.float32(repetition), np.float32(frequency), np.float32(presence))


# ---- one row: what is kept, and the draw ---------------------------------------------------------
MARGIN = 1e-3  # by which the bound on x below is too low: many times what rounding does to it


@jit.device_fn
def _needed(total, top_p):
    """`needed_of`."""
    return min(max(np.int64(math.ceil(top_p * np.float64(total))), np.int64(1)), total)


@jit.device_fn
def _likeliest(values, ids, n, k, ones, bins):
    """Keep, of n logits with their ids, the k largest and what ties with the last; how many."""
    if n <= k:
        return n
    bits = values.view(np.int32)
    key, _ = threshold(values, n, ones, 0, k, bins)
    kept = 0
    for i in range(n):
        if key_at(bits, i) >= key:
            values[kept], ids[kept] = values[i], ids[i]
            kept += 1
    return kept


@jit.device_fn
def _head(values, ids, shares, n, needed, bins):
    """Keep the shortest head of the likeliest whose shares reach `needed`; (how many, their sum).

    Ties with the last of them are kept in order of id, which is the order they lie in.
    """
    bits = values.view(np.int32)
    key, reached = threshold(values, n, shares, 1, needed, bins)
    kept, total = 0, np.int64(0)
    for i in range(n):
        here = key_at(bits, i)
        if here > key or (here == key and reached < needed):
            if here == key:
                reached += shares[i]
            total += shares[i]
            values[kept], ids[kept], shares[kept] = values[i], ids[i], shares[i]
            kept += 1
    return kept, total


@jit.device_fn
def _keep(x, x0, v, largest, settings, s, peaks, values, ids, shares, sums, bins):
    """(n, total): ids[:n] and shares[:n] are the tokens that steps 5 to 7 keep; total their sum.

    Where only top_p is set, weights of all V have to be summed up first. A token lighter than
    (total - needed) / V cannot be in the head: all of those together are not what it may leave out.
    """
    temperature, top_p = np.float32(settings[s, TEMPERATURE]), settings[s, TOP_P]
    k, floor = np.int64(settings[s, TOP_K]), np.float32(settings[s, LOG_MIN_P])
    bound, total = np.float32(-np.inf), np.int64(0)
    ones = bins[DIGITS:]
    ones[0] = 1
    few = 0 < k < v
    if few:
        bound = kth_peak(peaks, len(peaks), k, ones, bins)
    elif floor == np.float32(-np.inf):
        total = weigh_row(x, x0, v, largest, temperature, sums)
        spare = (total - _needed(total, top_p)) // v
        floor = np.float32(math.log(max(spare, np.int64(1)) / np.float64(ONE)) - MARGIN)
    n = collect(x, x0, v, peaks, largest, temperature, bound, floor, values, ids)
    if few:
        n = _likeliest(values, ids, n, k, ones, bins)
    weigh(values, n, largest, temperature, shares)
    if total == 0:
        for i in range(n):
            total += shares[i]
    if top_p < 1:
        n, total = _head(values, ids, shares, n, _needed(total, top_p), bins)
    return n, total


@jit.device_fn
def _is_filtered(settings, s, v):
    """Does any of min_p, top_k and top_p leave something out?"""
    few = 0 < settings[s, TOP_K] < v
    return few or settings[s, TOP_P] < 1 or settings[s, LOG_MIN_P] > -np.inf


@jit.device_fn
def _draw_whole(x, x0, v, largest, temperature, random, sums, shares):
    """The first position of the row where the sum of weights exceeds u times their total."""
    left = share_of(random, weigh_row(x, x0, v, largest, temperature, sums))
    block = 0
    while sums[block] <= left:
        block += 1
    if block > 0:
        left -= sums[block - 1]
    top, divisor = splat(largest), splat(temperature)
    i = block * BLOCK
    here = weight_at(x, x0, i, min(16, v - i), top, divisor)
    while sum_weights(here) <= left:
        left -= sum_weights(here)
        i += 16
        here = weight_at(x, x0, i, min(16, v - i), top, divisor)
    store_weights(shares, 0, here)
    lane = 0
    while shares[lane] <= left:
        left -= shares[lane]
        lane += 1
    return i + lane


@jit.device_fn
def _draw(x, x0, v, largest, settings, s, random, peaks, values, ids, shares, sums, bins):
    """Steps 4 to 8."""
    if not _is_filtered(settings, s, v):
        temperature = np.float32(settings[s, TEMPERATURE])
        return _draw_whole(x, x0, v, largest, temperature, random, sums, shares)
    _, total = _keep(x, x0, v, largest, settings, s, peaks, values, ids, shares, sums, bins)
    left = share_of(random, total)
    i = 0
    while shares[i] <= left:
        left -= shares[i]
        i += 1
    return np.int64(ids[i])


# ---- kernels: rows are dealt out to `tasks` threads in turn, each with its own scratch -----------
@jit.device_fn
def _is_finite(x):
    return -np.inf < x < np.inf


@jit.kernel
def _greedy_kernel(x, stride, rows, v, peaks, tokens, largest, tasks):
    num = len(peaks) // tasks
    for t in prange(tasks):
        own = peaks[t * num : (t + 1) * num]
        for r in range(t, rows, tasks):
            top, token = largest_of(x, r * stride, v, own)
            largest[r] = top
            tokens[r] = token if _is_finite(top) else -1


@jit.kernel
def _sample_kernel(
    x, stride, rows, v, settings, seeds, slots, positions, edits, floats, ids, longs, out, tasks
):
    padded, blocks = v + 16, (v + BLOCK - 1) // BLOCK
    tokens, largest, left = out
    for t in prange(tasks):
        mine = floats[t * (2 * padded + 16 * blocks) :]
        copy, values, peaks = (
            mine[:padded],
            mine[padded : 2 * padded],
            mine[2 * padded : 2 * padded + 16 * blocks],
        )
        my_ids = ids[t * padded :]
        my_longs = longs[t * (padded + blocks + DIGITS + 1) :]
        shares, sums = my_longs[:padded], my_longs[padded : padded + blocks]
        bins = my_longs[padded + blocks : padded + blocks + DIGITS + 1]
        for r in range(t, rows, tasks):
            s = slots[r]
            row, row0 = x, r * stride
            top, token = largest_of(row, row0, v, peaks)
            largest[r] = top
            left[r] = top
            tokens[r] = -1
            if not _is_finite(top):
                continue
            if (
                edits.mask_rows[r] >= 0
                or edits.add_starts[r] < edits.add_starts[r + 1]
                or edits.seen_starts[r] < edits.seen_starts[r + 1]
            ):
                _copy_row(row, row0, v, copy)
                _edit(copy, v, settings, s, edits, r)
                row, row0 = copy, 0
                top, token = largest_of(row, row0, v, peaks)
                left[r] = top
                if not _is_finite(top):
                    continue
            if settings[s, TEMPERATURE] > 0:
                random = philox(seeds[s], positions[r], 0)
                token = _draw(
                    row,
                    row0,
                    v,
                    top,
                    settings,
                    s,
                    random,
                    peaks,
                    values,
                    my_ids,
                    shares,
                    sums,
                    bins,
                )
            tokens[r] = token


@jit.kernel
def _distribution_kernel(
    x, stride, rows, v, settings, slots, edits, floats, ids, longs, out, tasks
):
    padded, blocks = v + 16, (v + BLOCK - 1) // BLOCK
    for t in prange(tasks):
        mine = floats[t * (2 * padded + 16 * blocks) :]
        copy, values = mine[:padded], mine[padded : 2 * padded]
        peaks = mine[2 * padded : 2 * padded + 16 * blocks]
        my_ids = ids[t * padded :]
        my_longs = longs[t * (padded + blocks + DIGITS + 1) :]
        shares, sums = my_longs[:padded], my_longs[padded : padded + blocks]
        bins = my_longs[padded + blocks : padded + blocks + DIGITS + 1]
        for r in range(t, rows, tasks):
            s = slots[r]
            top, token = largest_of(x, r * stride, v, peaks)
            if _is_finite(top):
                _copy_row(x, r * stride, v, copy)
                _edit(copy, v, settings, s, edits, r)
                top, token = largest_of(copy, 0, v, peaks)
            if not _is_finite(top):
                out[r, :] = np.float32(np.nan)
                continue
            out[r, :] = np.float32(0.0)
            if settings[s, TEMPERATURE] == 0:
                out[r, token] = np.float32(1.0)
            elif _is_filtered(settings, s, v):
                n, total = _keep(
                    copy, 0, v, top, settings, s, peaks, values, my_ids, shares, sums, bins
                )
                for i in range(n):
                    out[r, my_ids[i]] = np.float32(np.float64(shares[i]) / np.float64(total))
            else:
                temperature = np.float32(settings[s, TEMPERATURE])
                total = weigh_row(copy, 0, v, top, temperature, sums)
                weigh(copy, v, top, temperature, shares)
                for i in range(v):
                    out[r, i] = np.float32(np.float64(shares[i]) / np.float64(total))


@jit.device_fn
def _difference(p, p0, q, q0, q_factor, i, n):
    """2^40 max(p - q_factor q, 0) of n positions from i on, cut to integers, i64x16."""
    difference = load_tail(p, p0 + i, n) - load_tail(q, q0 + i, n) * q_factor
    return fixed(maximum(difference, splat(0.0)) * splat(ONE))


@jit.device_fn
def _draw_difference(p, p0, q, q0, q_factor, v, random, lanes):
    """First position where the sum of max(p - q_factor q, 0) exceeds u of its total; -1 if none."""
    total = no_weights()
    for i in range(0, v, 16):
        total = add_weights(total, _difference(p, p0, q, q0, q_factor, i, min(16, v - i)))
    whole = sum_weights(total)
    if whole == 0:
        return np.int64(-1)
    left = share_of(random, whole)
    i = 0
    here = _difference(p, p0, q, q0, q_factor, 0, min(16, v))
    while sum_weights(here) <= left:
        left -= sum_weights(here)
        i += 16
        here = _difference(p, p0, q, q0, q_factor, i, min(16, v - i))
    store_weights(lanes, 0, here)
    lane = 0
    while lanes[lane] <= left:
        left -= lanes[lane]
        lane += 1
    return np.int64(i + lane)


@jit.kernel
def _sample_residual_kernel(p, p_stride, q, q_stride, rows, v, random, lanes, tokens, tasks):
    for t in prange(tasks):
        mine = lanes[16 * t : 16 * t + 16]
        for r in range(t, rows, tasks):
            p0, q0 = r * p_stride, r * q_stride
            token = _draw_difference(p, p0, q, q0, splat(1.0), v, random[r], mine)
            if token < 0:  # q leaves nothing: 0 times q is taken away
                token = _draw_difference(p, p0, q, q0, splat(0.0), v, random[r], mine)
            tokens[r] = token


@jit.kernel
def _uniform_bits_kernel(seeds, positions, stream, out, rows):
    for r in prange(rows):
        out[r] = philox(seeds[r], positions[r], stream)


# ---- public wrappers -----------------------------------------------------------------------------
def _flat_logits(kernel: str, name: str, x: Array) -> tuple[Array, int]:
    """`flat_rows` of f32 [R, V] with 1 <= V <= 2^22, writable, so that all have one type."""
    require(kernel, name, x, ("R", "V"))
    if not 1 <= x.shape[1] <= MOST_WEIGHTS:
        raise ValueError(f"{kernel}: {name} has shape {x.shape}, expected V of 1 to {MOST_WEIGHTS}")
    return flat_rows(x if x.flags.writeable else x.copy())


def greedy(logits: Array) -> tuple[Array, Array]:
    """(tokens int64[R], largest f32[R]) of logits f32[R, V].

    A row with NaN, +inf or nothing but -inf has token -1 and NaN, inf or -inf as its largest.
    TypeError or ValueError names what does not fit.
    """
    flat, stride = _flat_logits("greedy", "logits", logits)
    if jit.use_reference():
        return greedy_ref(logits)
    rows, v = logits.shape
    tokens, largest = np.empty(rows, np.int64), np.empty(rows, np.float32)
    with jit.threads_for(logits.nbytes):
        tasks = jit.num_threads()
        peaks = np.empty(tasks * num_peaks(v), np.float32)
        _greedy_kernel(flat, stride, rows, v, peaks, tokens, largest, tasks)
    return tokens, largest


def _scratch(tasks: int, v: int) -> tuple[Array, Array, Array]:
    """(floats, ids, longs) for `tasks` threads; pages that are not touched cost nothing."""
    padded, blocks = v + 16, -(-v // BLOCK)
    return (
        np.empty(tasks * (2 * padded + 16 * blocks), np.float32),
        np.empty(tasks * padded, np.int32),
        np.empty(tasks * (padded + blocks + DIGITS + 1), np.int64),
    )


def _check_rows(kernel: str, logits: Array, settings: Array, slots: Array, edits: Edits) -> None:
    """What a row of logits refers to must be there, and be numbers that can be used."""
    rows, v = logits.shape
    require(kernel, "settings", settings, ("S", NUM_SETTINGS), (np.float64,))
    contiguous(kernel, "settings", settings)
    require(kernel, "slots", slots, (rows,), (np.int64,))
    in_range(kernel, "slots", slots, len(settings))
    used = settings[slots]
    fine = used[:, TEMPERATURE] >= 0
    fine &= (used[:, TOP_K] >= 0) & (used[:, TOP_K] < 2**31)
    fine &= (used[:, TOP_P] > 0) & (used[:, TOP_P] <= 1) & (used[:, LOG_MIN_P] <= 0)
    fine &= (used[:, REPETITION] > 0) & np.isfinite(used[:, REPETITION:]).all(axis=1)
    drawn = used[:, TEMPERATURE] > 0
    fine &= ~drawn | (used[:, TEMPERATURE] > 1e-37) & (used[:, TEMPERATURE] < 1e37)
    if not fine.all():
        row = int(np.flatnonzero(~fine)[0])
        raise ValueError(f"{kernel}: settings of row {row} are {used[row].tolist()}, see NEUTRAL")
    check_edits(kernel, edits, rows, v)


def sample(
    logits: Array,
    settings: Array,
    seeds: Array,
    slots: Array,
    positions: Array,
    edits: Edits | None = None,
) -> Drawn:
    """The next token of each row of logits f32[R, V]; arrays as in the module docstring.

    TypeError or ValueError names what does not fit.
    """
    flat, stride = _flat_logits("sample", "logits", logits)
    rows, v = logits.shape
    edits = Edits.none(rows) if edits is None else edits
    _check_rows("sample", logits, settings, slots, edits)
    require("sample", "seeds", seeds, (len(settings),), (np.uint64,))
    require("sample", "positions", positions, (rows,), (np.int64,))
    if jit.use_reference():
        return sample_ref(logits, settings, seeds, slots, positions, edits)
    out = Drawn(np.empty(rows, np.int64), np.empty(rows, np.float32), np.empty(rows, np.float32))
    with jit.threads_for(logits.nbytes):
        tasks = min(jit.num_threads(), max(rows, 1))
        _sample_kernel(
            flat,
            stride,
            rows,
            v,
            settings,
            seeds,
            slots,
            positions,
            edits,
            *_scratch(tasks, v),
            out,
            tasks,
        )
    return out


def distribution(logits: Array, settings: Array, slots: Array, edits: Edits | None = None) -> Array:
    """p f32[R, V] that `sample` draws from: 0 where a token is not kept, NaN for rows without any.

    TypeError or ValueError names what does not fit.
    """
    flat, stride = _flat_logits("distribution", "logits", logits)
    rows, v = logits.shape
    edits = Edits.none(rows) if edits is None else edits
    _check_rows("distribution", logits, settings, slots, edits)
    if jit.use_reference():
        return distribution_ref(logits, settings, slots, edits)
    out = np.empty((rows, v), np.float32)
    with jit.threads_for(logits.nbytes):
        tasks = min(jit.num_threads(), max(rows, 1))
        _distribution_kernel(
            flat, stride, rows, v, settings, slots, edits, *_scratch(tasks, v), out, tasks
        )
    return out


def uniform_bits(seeds: Array, positions: Array, stream: int = 0) -> Array:
    """uint64[R]: the random word of each (seed uint64, position int64) in a stream.

    Stream 0 is what `sample` draws tokens with; others are independent of it.
    TypeError or ValueError names what does not fit.
    """
    require("uniform_bits", "seeds", seeds, ("R",), (np.uint64,))
    require("uniform_bits", "positions", positions, seeds.shape, (np.int64,))
    if jit.use_reference():
        return uniform_bits_ref(seeds, positions, stream)
    out = np.empty(len(seeds), np.uint64)
    with jit.threads_for(out.nbytes):
        _uniform_bits_kernel(seeds, positions, stream, out, len(seeds))
    return out


def sample_residual(p: Array, q: Array, random: Array) -> Array:
    """int64[R]: a token of max(p - q, 0) for each row, of p where q leaves nothing.

    p, q f32[R, V], from 0 to 1; random uint64[R], from `uniform_bits`. -1 where p is nothing.
    What a rejected draft is replaced by, so that drafts leave the distribution p as it is.
    TypeError or ValueError names what does not fit.
    """
    flat_p, p_stride = _flat_logits("sample_residual", "p", p)
    require("sample_residual", "q", q, p.shape)
    flat_q, q_stride = _flat_logits("sample_residual", "q", q)
    rows, v = p.shape
    require("sample_residual", "random", random, (rows,), (np.uint64,))
    if jit.use_reference():
        return sample_residual_ref(p, q, random)
    tokens = np.empty(rows, np.int64)
    with jit.threads_for(p.nbytes + q.nbytes):
        tasks = min(jit.num_threads(), max(rows, 1))
        _sample_residual_kernel(
            flat_p,
            p_stride,
            flat_q,
            q_stride,
            rows,
            v,
            random,
            np.empty(16 * tasks, np.int64),
            tokens,
            tasks,
        )
    return tokens
