"""Log-probabilities from rows of logits: of one token, its rank, and of the likeliest n.

    logprob(l) = (l - largest) - log(sum of weights / 2^40),  weight = floor(2^40 e^(l - largest))
    rank       = 1 + how many logits are larger, or equal and of lower id

| Array    | Shape  | Type  | Layout                                                             |
|----------|--------|-------|--------------------------------------------------------------------|
| logits   | [R, V] | f32   | rows contiguous, any row stride                                    |
| tokens   | [R]    | int64 | contiguous; -1 where only the likeliest are wanted                 |
| n        |        |       | how many of the likeliest, 0 to 1024                               |
| own      | [R]    | f32   | logprob of each row's token                                        |
| ranks    | [R]    | int64 | its rank                                                           |
| top_ids  | [R, n] | int64 | the likeliest, the largest first, ties in order of id; -1 beyond V |
| top      | [R, n] | f32   | their logprobs                                                     |
| largest  | [R]    | f32   | largest logit; NaN if the row holds any                            |

Moves: 12 R V bytes, the second and third time from the caches where a row fits them.
Does: about 29 operations per 16 logits, 25 of them for weights. The likeliest are found among the
    few logits that reach the n-th largest peak (logit_rows.py); only n of them are sorted.
Error: |y - ref| <= 2^-21 + 2^-23 |ref|: a sum of weights is within 2^-22 relative, what is cut
    off below 2^-40 of the largest comes to 2^-20 of V = 2^20 tokens at most (2^-23 at 128k).
Cautions: where `largest` is not finite the row's other results mean nothing. Sums are exact in
    integers, so results do not depend on the batch or on threads.
Source: vLLM v1 `gather_logprobs`, with ties in order of id.
Notebook: 18 sampling. Ledger: logprobs.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import prange

from pace_nb.kernels import jit
from pace_nb.kernels.arrays import Array, flat_rows, require
from pace_nb.kernels.integer_lanes import MOST_WEIGHTS, ONE
from pace_nb.kernels.logit_rows import (
    BLOCK,
    DIGITS,
    collect,
    key_at,
    kth_peak,
    largest_of,
    num_peaks,
    order_ref,
    rank_of,
    row_weights_ref,
    threshold,
    weigh_row,
)

MOST_LIKELIEST = 1024


class Logprobs(NamedTuple):
    """What `token_logprobs` gives: see the module docstring."""

    own: Array
    ranks: Array
    top_ids: Array
    top: Array
    largest: Array


# ---- definitions ---------------------------------------------------------------------------------
def token_logprobs_ref(logits: Array, tokens: Array, n: int) -> Logprobs:
    """What `token_logprobs` gives, by sorting each row."""
    rows, v = logits.shape
    largest = logits.max(axis=1)
    totals, ranks = np.full(rows, ONE, np.int64), np.ones(rows, np.int64)
    top_ids, own, top = np.full((rows, n), -1), np.copy(largest), np.full((rows, n), -np.inf)
    for r in np.flatnonzero(np.isfinite(largest)):
        totals[r] = row_weights_ref(logits[r], 1.0).sum()
        order = order_ref(logits[r])
        top_ids[r, :v] = order[:n]
        top[r, :v] = logits[r, order[:n]]
        if tokens[r] >= 0:
            own[r] = logits[r, tokens[r]]
            ranks[r] = 1 + int(np.flatnonzero(order == tokens[r])[0])
    return _finished(own, ranks, top_ids, top.astype(np.float32), largest, totals)


def _finished(
    own: Array, ranks: Array, top_ids: Array, top: Array, largest: Array, totals: Array
) -> Logprobs:
    """Logits own [R] and top [R, n] become log-probabilities."""
    log_sums = np.log(totals / ONE).astype(np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        own = (own - largest) - log_sums
        top = (top - largest[:, None]) - log_sums[:, None]
    return Logprobs(own, ranks, top_ids, top, largest)


# ---- one row -------------------------------------------------------------------------------------
@jit.device_fn
def _likeliest(x, x0, v, n, peaks, largest, values, ids, bins, top_ids, top, first):
    """top_ids[first : first + n] and top[..] = ids and logits of the n <= V largest, in order."""
    ones = bins[DIGITS:]
    ones[0] = 1
    bound = kth_peak(peaks, len(peaks), n, ones, bins)
    lowest = np.float32(-np.inf)
    num = collect(x, x0, v, peaks, largest, np.float32(1.0), bound, lowest, values, ids)
    bits = values.view(np.int32)
    key, above = threshold(values, num, ones, 0, n, bins)
    found = 0
    for i in range(num):
        here = key_at(bits, i)
        if here > key or (here == key and above < n):
            if here == key:
                above += 1
            j = first + found  # inserted in its place: what is equal came earlier and stays before
            while j > first and top[j - 1] < values[i]:
                top[j], top_ids[j] = top[j - 1], top_ids[j - 1]
                j -= 1
            top[j], top_ids[j] = values[i], ids[i]
            found += 1


# ---- kernel: rows are dealt out to `tasks` threads in turn, each with its own scratch ------------
@jit.kernel
def _token_logprobs_kernel(x, stride, rows, v, n, tokens, floats, ids, longs, out, totals, tasks):
    padded, blocks = v + 16, (v + BLOCK - 1) // BLOCK
    own, ranks, top_ids, top, largest = out
    wanted = min(n, v)
    for t in prange(tasks):
        mine = floats[t * (padded + 16 * blocks) :]
        values, peaks = mine[:padded], mine[padded : padded + 16 * blocks]
        my_ids = ids[t * padded :]
        my_longs = longs[t * (blocks + DIGITS + 1) :]
        sums, bins = my_longs[:blocks], my_longs[blocks : blocks + DIGITS + 1]
        for r in range(t, rows, tasks):
            x0, token = r * stride, tokens[r]
            highest, _ = largest_of(x, x0, v, peaks)
            largest[r] = highest
            own[r], ranks[r], totals[r] = highest, 1, 1
            if -np.inf < highest < np.inf:
                totals[r] = weigh_row(x, x0, v, highest, np.float32(1.0), sums)
                if token >= 0:
                    own[r] = x[x0 + token]
                    ranks[r] = rank_of(x, x0, v, token)
                if wanted > 0:
                    _likeliest(
                        x, x0, v, wanted, peaks, highest, values, my_ids, bins, top_ids, top, r * n
                    )


# ---- public wrapper ------------------------------------------------------------------------------
def token_logprobs(logits: Array, tokens: Array, n: int) -> Logprobs:
    """Logprob and rank of one token per row of logits f32[R, V], and the n likeliest tokens.

    TypeError or ValueError names what does not fit.
    """
    require("token_logprobs", "logits", logits, ("R", "V"))
    rows, v = logits.shape
    if not 1 <= v <= MOST_WEIGHTS:
        raise ValueError(
            f"token_logprobs: logits has shape {logits.shape}, expected V of 1 to {MOST_WEIGHTS}"
        )
    require("token_logprobs", "tokens", tokens, (rows,), (np.int64,))
    if rows and not -1 <= int(tokens.min()) <= int(tokens.max()) < v:
        raise ValueError(f"token_logprobs: tokens holds values outside -1 to {v - 1}")
    if not 0 <= n <= MOST_LIKELIEST:
        raise ValueError(f"token_logprobs: n is {n}, expected 0 to {MOST_LIKELIEST}")
    if jit.use_reference():
        return token_logprobs_ref(logits, tokens, n)
    flat, stride = flat_rows(logits if logits.flags.writeable else logits.copy())
    out = (
        np.empty(rows, np.float32),
        np.empty(rows, np.int64),
        np.full(rows * n, -1),
        np.full(rows * n, -np.inf, np.float32),
        np.empty(rows, np.float32),
    )
    totals = np.empty(rows, np.int64)
    with jit.threads_for(logits.nbytes):
        tasks = min(jit.num_threads(), max(rows, 1))
        padded, blocks = v + 16, num_peaks(v) // 16
        _token_logprobs_kernel(
            flat,
            stride,
            rows,
            v,
            n,
            np.ascontiguousarray(tokens),
            np.empty(tasks * (padded + 16 * blocks), np.float32),
            np.empty(tasks * padded, np.int32),
            np.empty(tasks * (blocks + DIGITS + 1), np.int64),
            out,
            totals,
            tasks,
        )
    own, ranks, top_ids, top, largest = out
    return _finished(own, ranks, top_ids.reshape(rows, n), top.reshape(rows, n), largest, totals)
