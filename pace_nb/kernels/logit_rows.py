"""One row of logits: its largest, what reaches a bound, and the threshold that a sum is reached at.

Device functions that sampling.py and logprobs.py share, and the definitions they have in common.

    x = (l - largest) / temperature              f32, each operation rounded
    weight = floor(2^40 e^x)                     an integer: sums are exact (integer_lanes.py)
    order: larger l first, of equal l the lower id

| Array  | Shape            | Type  | Layout                                                       |
|--------|------------------|-------|--------------------------------------------------------------|
| row    | [V]              | f32   | contiguous, at some offset of a flat array                   |
| peaks  | [16 ceil(V / N)] | f32   | largest of each lane in each block of N = 1024 logits        |
| values | [V + 16]         | f32   | logits that reached a bound, in order of id                  |
| ids    | [V + 16]         | int32 | their ids                                                    |
| shares | [V + 16]         | int64 | their weights                                                |
| bins   | [256]            | int64 | one digit's histogram                                        |

Moves: 4 V bytes for the largest, again for the weights of a whole row; what reaches a bound is
    looked for only in blocks whose peaks reach it.
Does: 2 operations per vector for the largest, 25 for weights.
Error: none but that of the weights: comparisons and integers are exact.
Cautions: where there may be a NaN, ask `largest_of`; the other functions must not be given any. -0
    and 0 are one logit.
Source: the threshold by radix digits is what GPU samplers do (FlashInfer, vLLM's top-k top-p) with
    sorting left out; the k-th largest peak is a lower bound of the k-th largest logit.
Notebook: 18 sampling. Ledger: sampling.
"""

from __future__ import annotations

import numpy as np

from pace_nb.kernels import jit
from pace_nb.kernels.arrays import Array
from pace_nb.kernels.integer_lanes import (
    add_weights,
    count_lanes,
    equal_lanes,
    lanes_above,
    lanes_from,
    lowest_lane,
    no_weights,
    store_weights,
    sum_weights,
    weight,
    weight_ref,
)
from pace_nb.kernels.lanes import (
    fma,
    keep_lanes,
    load,
    load_tail,
    maximum,
    reduce_max,
    splat,
    store,
)

# ---- constants -----------------------------------------------------------------------------------
# Logits in a block: few enough that the one with the largest is searched in no time, and that peaks
# (one of 64 logits each) are a small array; many enough that reducing a block costs nothing.
BLOCK = 1024
STEP = 64  # logits per turn: four independent maxima
DIGITS = 256  # values of a digit: 4 digits make a float


# ---- definitions ---------------------------------------------------------------------------------
def scaled_ref(logits: Array, temperature: float) -> Array:
    """(l - largest) / temperature of a row f32[V], in f32."""
    with np.errstate(over="ignore"):  # what is too far below the largest is -inf
        scaled: Array = (logits - logits.max()) / np.float32(temperature)
    return scaled


def row_weights_ref(logits: Array, temperature: float) -> Array:
    """Weights int64[V] of a row f32[V] without NaN: 2^40 for the largest."""
    return weight_ref(scaled_ref(logits, temperature))


def order_ref(logits: Array) -> Array:
    """Ids int64[V] of a row f32[V]: the largest logit first, of equal ones the lowest id."""
    return np.argsort(-logits, kind="stable")


def num_peaks(v: int) -> int:
    """Elements of `peaks` for rows of V logits."""
    return -(-v // BLOCK) * 16


# ---- the largest ---------------------------------------------------------------------------------
@jit.device_fn
def largest_of(x, x0, v, peaks):
    """(largest of x[x0 : x0 + v], its first position); fills peaks. NaN and -1 where any is NaN."""
    largest, block = np.float32(-np.inf), 0
    zero, lowest = splat(0.0), splat(-np.inf)
    odd0, odd1, odd2, odd3 = zero, zero, zero, zero  # NaN where a NaN or an infinity was
    for start in range(0, v, BLOCK):
        n = min(BLOCK, v - start)
        whole = n // STEP * STEP
        first = x0 + start
        m0, m1, m2, m3 = lowest, lowest, lowest, lowest
        for i in range(first, first + whole, STEP):
            v0, v1, v2, v3 = load(x, i), load(x, i + 16), load(x, i + 32), load(x, i + 48)
            m0, m1, m2, m3 = maximum(v0, m0), maximum(v1, m1), maximum(v2, m2), maximum(v3, m3)
            odd0, odd1 = fma(v0, zero, odd0), fma(v1, zero, odd1)
            odd2, odd3 = fma(v2, zero, odd2), fma(v3, zero, odd3)
        for i in range(whole, n, 16):
            k = min(16, n - i)
            value = load_tail(x, first + i, k)
            m0 = maximum(keep_lanes(value, 0, k, lowest), m0)
            odd0 = fma(value, zero, odd0)
        m0 = maximum(maximum(m0, m1), maximum(m2, m3))
        store(peaks, start // BLOCK * 16, m0)
        found = reduce_max(m0)
        if found > largest:
            largest, block = found, start
    odd0 = (odd0 + odd1) + (odd2 + odd3)
    if equal_lanes(odd0, odd0) != 0xFFFF and _has_nan(x, x0, v):
        return np.float32(np.nan), -1
    end = min(block + BLOCK, v)
    return largest, first_equal(x, x0, block, end, largest)


@jit.device_fn
def _has_nan(x, x0, v):
    """Is any of x[x0 : x0 + v] NaN?"""
    for i in range(0, v, 16):
        value = load_tail(x, x0 + i, min(16, v - i))
        if equal_lanes(value, value) != 0xFFFF:
            return True
    return False


@jit.device_fn
def first_equal(x, x0, start, end, value):
    """First position from `start` on, before `end`, where x[x0 + position] == value; else `end`."""
    wanted = splat(value)
    for i in range(start, end, 16):
        n = min(16, end - i)
        mask = equal_lanes(load_tail(x, x0 + i, n), wanted) & ((1 << n) - 1)
        if mask != 0:
            return i + lowest_lane(mask)
    return end


# ---- what reaches a bound ------------------------------------------------------------------------
@jit.device_fn
def _scaled(value, largest, temperature):
    """(l - largest) / temperature; all f32x16."""
    return (value - largest) / temperature


@jit.device_fn
def collect(x, x0, v, peaks, largest, temperature, bound, floor, values, ids):
    """How many of the row are >= bound, and scaled >= floor; they go to `values` and `ids`."""
    n = 0
    top, divisor = splat(largest), splat(temperature)
    low, light = splat(bound), splat(floor)
    for start in range(0, v, BLOCK):
        peak = load(peaks, start // BLOCK * 16)
        scaled_peak = _scaled(peak, top, divisor)
        if lanes_from(peak, low) != 0 and lanes_from(scaled_peak, light) != 0:
            end = min(start + BLOCK, v)
            for i in range(start, end, 16):
                k = min(16, end - i)
                value = load_tail(x, x0 + i, k)
                mask = lanes_from(value, low) & lanes_from(_scaled(value, top, divisor), light)
                mask &= (1 << k) - 1
                while mask != 0:
                    lane = lowest_lane(mask)
                    mask &= mask - 1
                    values[n] = x[x0 + i + lane]
                    ids[n] = i + lane
                    n += 1
    return n


@jit.device_fn
def key_at(bits, i):
    """An integer of 32 bits in the order of the floats whose bits (int32) these are; -0 is 0."""
    wide = np.int64(bits[i])
    if wide >= 0 or wide == -2147483648:  # the sign bit alone is -0
        return (wide & 2147483647) + 2147483648
    return -1 - wide


@jit.device_fn
def threshold(values, n, shares, step, needed, bins):
    """The largest key t such that elements of key >= t have shares of `needed` or more together,
    and what those above t have. shares[i * step] belongs to values[i]: step 0 counts elements.

    One digit after the other, the highest first: a histogram of the elements that have all digits
    so far. `needed` is at most what all have.
    """
    bits = values.view(np.int32)
    prefix, above = np.int64(0), np.int64(0)
    for shift in (24, 16, 8, 0):
        for i in range(DIGITS):
            bins[i] = 0
        for i in range(n):
            key = key_at(bits, i)
            if key >> (shift + 8) == prefix:
                bins[(key >> shift) & 255] += shares[i * step]
        digit = DIGITS - 1
        while digit > 0 and above + bins[digit] < needed:
            above += bins[digit]
            digit -= 1
        prefix = prefix * DIGITS + digit
    return prefix, above


@jit.device_fn
def kth_peak(peaks, num, k, ones, bins):
    """A value that at least k logits reach: the k-th largest peak, or -inf if there are fewer."""
    if k > num:
        return np.float32(-np.inf)
    key, _ = threshold(peaks, num, ones, 0, k, bins)
    bits, smallest = peaks.view(np.int32), np.float32(np.inf)
    for i in range(num):
        if key_at(bits, i) >= key and peaks[i] < smallest:
            smallest = peaks[i]
    return smallest


# ---- weights -------------------------------------------------------------------------------------
@jit.device_fn
def weight_at(x, x0, i, n, top, divisor):
    """Weights of the n logits from position i on, 0 in the other lanes, i64x16."""
    value = keep_lanes(load_tail(x, x0 + i, n), 0, n, splat(-np.inf))
    return weight(_scaled(value, top, divisor))


@jit.device_fn
def weigh(values, n, largest, temperature, shares):
    """shares[:n] = weights of values[:n]; up to 15 more of both are touched."""
    top, divisor = splat(largest), splat(temperature)
    for i in range(0, n, 16):
        store_weights(shares, i, weight_at(values, 0, i, min(16, n - i), top, divisor))


@jit.device_fn
def weigh_row(x, x0, v, largest, temperature, sums):
    """Sum of the row's weights; sums[b] = that of blocks 0 .. b."""
    top, divisor = splat(largest), splat(temperature)
    total = np.int64(0)
    for start in range(0, v, BLOCK):
        n = min(BLOCK, v - start)
        whole = n // 32 * 32
        first = x0 + start
        s0, s1 = no_weights(), no_weights()
        for i in range(first, first + whole, 32):
            s0 = add_weights(s0, weight(_scaled(load(x, i), top, divisor)))
            s1 = add_weights(s1, weight(_scaled(load(x, i + 16), top, divisor)))
        for i in range(whole, n, 16):
            s0 = add_weights(s0, weight_at(x, first, i, min(16, n - i), top, divisor))
        total += sum_weights(add_weights(s0, s1))
        sums[start // BLOCK] = total
    return total


@jit.device_fn
def rank_of(x, x0, v, position):
    """1 + how many of x[x0 : x0 + v] are larger than that at `position`, or equal and before it."""
    here = splat(x[x0 + position])
    rank = np.int64(1)
    for i in range(0, v, 16):
        k = min(16, v - i)
        value = load_tail(x, x0 + i, k)
        inside = (1 << k) - 1
        rank += count_lanes(lanes_above(value, here) & inside)
        if i < position:
            before = (1 << min(16, position - i)) - 1
            rank += count_lanes(equal_lanes(value, here) & inside & before)
    return rank
