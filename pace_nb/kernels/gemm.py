"""Matrix product with prepacked weights: prefill GEMM, small batches, decode GEMV from one layout.

    C[m, n] = bias[n] + sum over k of A[m, k] * W[n, k]

| Array | Shape              | Type      | Layout                                                  |
|-------|--------------------|-----------|---------------------------------------------------------|
| A     | [M, K]             | BF16, f32 | contiguous                                              |
| W     | [N, K]             | BF16, f32 | as checkpoints hold it; packed once by `pack_weight`    |
| data  | [N/64, K/S, 64, S] | BF16, f32 | panels of 64 columns; S = 2 for BF16 (pairs), 1 for f32 |
| bias  | [N]                | f32, None | contiguous                                              |
| C     | [M, N]             | f32       | contiguous, allocated or given as `out`                 |

In `data` N is padded to 64 and K to S with zeros.
Moves: N K size(W) + M K size(A) + 4 M N bytes.
Does: 2 M N K FLOPs. M = 1 is bound by reading W from DRAM, large M by the dot-product units
    (`vdpbf16ps`: 64 FLOPs an instruction).
Order: one f32 accumulator per element of C, from the bias on, k ascending (within a BF16 pair
    k + 1 before k, as `vdpbf16ps` does). It depends neither on M nor on the row's place in the
    batch, on blocking (between K blocks the accumulator waits in C, exactly) or on threads: a row's
    bits are the same alone and in any batch.
Error: |C - exact| <= (K + 1) (2^-24 (|bias| + sum |A| |W|) + 2^-126) for inputs as stored: the
    bound of a sequential f32 sum, and what falls below f32's normal range. Where a CPU has no fma,
    twice that.
Cautions: `vdpbf16ps` flushes denormals to zero: of A, W and bias, and its own results. NaN or
    infinity in row m of A reaches row m of C only; in row n of W, column n only. `out` may not
    overlap `x` or `bias`.
Source: register tile and panel packing after Goto and van de Geijn 2008 and BLIS (names MR, NR,
    KC); re-implements PACE's TPP linear (csrc/ops/libxsmm), which packs [N/32, K/64, 32, 32, 2] and
    rounds C to BF16.
Notebook: 03 GEMM ladder, 04 GEMV.
Ledger: gemm.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numba import prange
from numpy.typing import DTypeLike

from pace_nb.kernels import jit
from pace_nb.kernels.arrays import (
    NOTHING,
    STORAGE,
    Array,
    contiguous,
    in_range,
    require,
    writable,
)
from pace_nb.kernels.bf16 import narrow, widen
from pace_nb.kernels.lanes import prefetch, prefetch_once
from pace_nb.kernels.memory import zeros
from pace_nb.kernels.tiles import tile_dot, tile_load_tail, tile_store_tail, tile_zeros
from pace_nb.kernels.words import per_word

# ---- constants -----------------------------------------------------------------------------------
NR = 64  # columns of a panel: one cache line of pairs per vector, four vectors per step of k
NV = 4  # vectors of a panel
MR = 6  # rows of a tile: 6 x 4 accumulators, 4 vectors of W and 1 of A fill 29 of the 32 registers
# So many rows are one tile, too. It does not fit the registers, but DRAM, for which it waits, is
# slower than spilling; a second pass over the panel, from L2, would leave DRAM idle (ledger: gemm).
TALL = 8
UNEVEN = (3, 5, 7)  # rows that are one tile if there is one more, and two or three if not
# Steps of k that a panel read once is asked for in advance: 4 KiB, where the hardware's prefetcher,
# which stops at the end of a page, has not gone yet.
AHEAD = 16
KC = 2048  # k per block: a panel's block is 256 KiB in BF16, a quarter of L2; read M / MR times
# While a block meets its last rows, the next one is asked for, so that its first rows find it in
# L2: DRAM would feed them four times slower than they compute. Earlier, A would push it out again.
# (With 9 to 11 rows, in tiles of 6, 2 and 1, some lines are left to the hardware's prefetcher.)
ASKING = 48
FRACTION = 16  # bits below the point in how much of the next block has been asked for
ONCE = -1  # a rate of asking: nobody reads this block again, and it is asked for step by step


class PackedWeight(NamedTuple):
    """A weight as the kernels read it: `data` flat, [N/64, K/S, 64, S]; n, k as before padding."""

    data: Array
    n: int
    k: int


# ---- definitions ---------------------------------------------------------------------------------
def gemm_ref(x: Array, w: Array, bias: Array | None = None) -> Array:
    """x [M, K] times w [N, K] transposed, plus bias [N], float64."""
    product = widen(x) @ widen(w).T
    return product if bias is None else product + bias


def pack_weights_ref(parts: Sequence[Array]) -> Array:
    """[N0, K], [N1, K], .. stacked to [N, K] -> flat [N/64, K/S, 64, S], zero where padded."""
    w = np.concatenate(parts)
    n, k = w.shape
    step = _step(w)
    padded = np.zeros((-n % NR + n, -k % step + k), w.dtype)
    padded[:n, :k] = w
    panels = padded.reshape(len(padded) // NR, NR, -1, step)
    return np.ascontiguousarray(panels.transpose(0, 2, 1, 3)).reshape(-1)


def unpack_weight(weight: PackedWeight) -> Array:
    """The [N, K] array that `pack_weight` was given."""
    step = _step(weight.data)
    panels = weight.data.reshape(-(-weight.n // NR), -(-weight.k // step), NR, step)
    rows = panels.transpose(0, 2, 1, 3).reshape(len(panels) * NR, -1)
    return np.ascontiguousarray(rows[: weight.n, : weight.k])


def pack_rows_ref(weight: PackedWeight, row0: int, w: Array) -> Array:
    """`data` of the weight whose rows row0 .. row0 + n - 1 are w [n, K]."""
    rows = unpack_weight(weight)
    rows[row0 : row0 + len(w)] = w
    return pack_weights_ref([rows])


def gather_rows_ref(weight: PackedWeight, ids: Array) -> Array:
    """Rows `ids` of the unpacked weight, float64."""
    return widen(unpack_weight(weight)[ids])


def _step(x: Array) -> int:
    return 2 if x.dtype == np.uint16 else 1


def packed_size(n: int, k: int, dtype: DTypeLike) -> int:
    """Elements of `data` for a weight [n, k]. ValueError unless it has a row and a column."""
    if min(n, k) < 1:
        raise ValueError(f"packed_size: ({n}, {k}), expected at least one row and column")
    step = 2 if dtype == np.uint16 else 1
    return -(-n // NR) * NR * -(-k // step) * step


# ---- one row tile against one panel --------------------------------------------------------------
def _row_tile(mr):
    """The device function for `mr` rows; every size is its own type of tile, held in registers."""

    @jit.device_fn
    def rows(a, a0, lda, b, b0, steps, ask0, rate, begun, begin, g0, ldg, c, c0, ldc, columns):
        # a [mr, steps * S] at a0; b [steps, 64, S] at b0; c [mr, columns] at c0. It begins with
        # begin [mr, columns] at g0 if begun: c itself, or the bias, for which ldg is 0.
        s = per_word(a)
        acc = tile_zeros(mr, NV)
        if begun:
            acc = tile_load_tail(mr, NV, begin, g0, ldg, columns)
        following, asked = b0 + steps * NR * s, ask0
        for p in range(steps):
            at = b0 + p * NR * s
            if rate == ONCE:
                for v in range(NV):
                    prefetch_once(b, at + (AHEAD * NR + v * 16) * s)
            else:
                pair = following + (asked >> FRACTION) * 32 * s
                prefetch(b, pair)
                prefetch(b, pair + 16 * s)
                asked += mr * rate
            acc = tile_dot(acc, a, a0 + p * s, lda, b, at, 16 * s)
        tile_store_tail(acc, c, c0, ldc, columns)

    return rows


def _row_tiles(heights):
    """The device function for the first of `heights` that `left` rows fill; returns it."""
    mr, tile = heights[0], _row_tile(heights[0])
    lower = _row_tiles(heights[1:]) if heights[1:] else None

    @jit.device_fn
    def rows(left, *operands):
        if lower is not None and left < mr:
            return lower(left, *operands)
        tile(*operands)
        return mr

    return rows


_rows = _row_tiles((TALL, MR, 4, 2, 1))


@jit.device_fn
def panel(a, a0, b, j, bias, column, c, c0, ldc, m, k, columns):
    """c [m, columns] at c0 = bias[column:] + a [m, k] at a0 times panel j of b.

    k is a multiple of S, and bias, unless empty, holds whole panels: the caller pads both.
    """
    s = per_word(a)
    steps = (k + s - 1) // s
    tall = TALL if m == TALL else MR
    # Rows, in whole tiles from the first to the last, in step with which the next block is asked
    # for: at each step of k the next pair of lines, and 2 pairs are a step of k.
    asking = min(m, ASKING + (m - ASKING) % MR)
    rate = ONCE if m <= TALL else (2 << FRACTION) // asking
    for p in range(0, steps, KC // s):
        n, begun = min(KC // s, steps - p), p > 0 or bias.size > 0
        begin, g0, ldg = (c, c0, ldc) if p else (bias, column, 0)
        at, bt, i = a0 + p * s, (j * steps + p) * NR * s, 0
        while i < m:
            late = i - (m - asking)
            ask0, ask = (late * n * rate, rate) if late >= 0 else (0, 0)
            left, ai, gi, ci = min(tall, m - i), at + i * k, g0 + i * ldg, c0 + i * ldc
            i += _rows(
                left, a, ai, k, b, bt, n, ask0, ask, begun, begin, gi, ldg, c, ci, ldc, columns
            )


# ---- kernels -------------------------------------------------------------------------------------
@jit.kernel
def _gemm_kernel(a, b, bias, c, m, n, k):
    for j in prange((n + NR - 1) // NR):  # one panel of columns per task; columns are independent
        panel(a, 0, b, j, bias, j * NR, c, j * NR, n, m, k, min(NR, n - j * NR))


@jit.kernel
def _pack_kernel(words, data, lane, lanes, row0, n, steps, high, low, broken):
    """Rows row0.. of the stacked weight, [n, steps] words (a pair of BF16, or a float32), into
    their places in `data`, of which every `lanes`-th panel is theirs. A word whose bits under
    `high` or `low`, the masks of its exponents, are all set holds a NaN or infinity: broken[panel]
    becomes 1."""
    first = row0 // NR
    for j in prange(first, (row0 + n + NR - 1) // NR):  # one panel per task
        begin, end = max(j * NR, row0), min(j * NR + NR, row0 + n)
        wrong = False
        for w in range(steps):
            source = (begin - row0) * steps + w
            target = ((j * lanes + lane) * steps + w) * NR + begin - j * NR
            for r in range(end - begin):
                word = words[source + r * steps]
                data[target + r] = word
                wrong |= (word & high == high) | (word & low == low)
        if wrong:
            broken[j - first] = 1


@jit.kernel
def _gather_rows_kernel(data, s, ids, out, k):
    # The bits of a BF16 (s = 2) are the upper half of its float32's; those of a float32 are all.
    steps, shift = (k + s - 1) // s, 16 * (s - 1)
    for t in prange(len(ids)):  # one row per task
        source = (ids[t] // NR * steps * NR + ids[t] % NR) * s
        for i in range(k):
            out[t * k + i] = np.uint32(data[source + i // s * (NR * s) + i % s]) << shift


# ---- public wrappers -----------------------------------------------------------------------------
def new_weight(n: int, k: int, dtype: DTypeLike) -> PackedWeight:
    """A weight [n, k] of zeros, uint16 (BF16) or float32, to be filled by `pack_rows`."""
    if np.dtype(dtype) not in [np.dtype(d) for d in STORAGE] or min(n, k) < 1:
        raise ValueError(
            f"new_weight: ({n}, {k}) of {np.dtype(dtype)}, expected at least one row and column of"
            " uint16 or float32"
        )
    return PackedWeight(zeros(packed_size(n, k, dtype), dtype), n, k)


def pack_rows(weight: PackedWeight, row0: int, w: Array, *, lane: int = 0, lanes: int = 1) -> bool:
    """Put rows w [n, K], of the weight's dtype, into their place: rows row0 .. row0 + n - 1.

    lanes: weights whose panels take turns in this one, of which this is number `lane`.
    Returns True if all of them are finite numbers: looked at here, the one time that all are read.
    TypeError or ValueError names what does not fit.
    """
    check_weight("pack_rows", weight)
    require("pack_rows", "w", w, ("n", weight.k), (weight.data.dtype,))
    if not 0 <= lane < lanes or (lanes > 1 and weight.n % (lanes * NR)):
        raise ValueError(f"pack_rows: lane {lane} of {lanes} in a weight of {weight.n} rows")
    rows = weight.n // lanes
    if not 0 <= row0 <= rows - len(w):
        raise ValueError(
            f"pack_rows: row0 is {row0}, expected 0 to {rows - len(w)}: {len(w)} rows of {rows}"
        )
    writable("pack_rows", "weight.data", weight.data)
    if not len(w):
        return True
    step = _step(w)
    if weight.k % step:
        w = np.pad(w, ((0, 0), (0, 1)))  # an odd K: the last pair needs its zero
    words = np.ascontiguousarray(w).reshape(-1)
    if words.ctypes.data % 4:  # half a pair off: read as whole words
        words = words.copy()
    words = words.view(np.uint32)
    words.flags.writeable = False  # one type, whatever the source: a kernel compiles once
    high = np.uint32(0x7F800000)
    low = np.uint32(0x7F80) if step == 2 else high
    broken = np.zeros(len(w) // NR + 2, np.uint8)
    with jit.threads_for(words.nbytes):
        _pack_kernel(
            words,
            weight.data.view(np.uint32),
            lane,
            lanes,
            row0,
            len(w),
            len(words) // len(w),
            high,
            low,
            broken,
        )
    return not broken.any()


def pack_weights(parts: Sequence[Array]) -> PackedWeight:
    """Stack weights [N0, K], [N1, K], .. along N and pack them: one product then serves them all.

    Parts are uint16 (BF16) or float32, all of one dtype. Returns a PackedWeight with the sum of
    their N. TypeError or ValueError names the part that does not fit.
    """
    if not parts:
        raise ValueError("pack_weights: parts is empty, expected at least one [N, K] array")
    k = parts[0].shape[-1] if isinstance(parts[0], np.ndarray) and parts[0].ndim else 0
    for i, w in enumerate(parts):
        require("pack_weights", f"parts[{i}]", w, ("N", k), (parts[0].dtype,) if i else STORAGE)
    weight = new_weight(sum(len(w) for w in parts), k, parts[0].dtype)
    row0 = 0
    for w in parts:
        pack_rows(weight, row0, w)
        row0 += len(w)
    return weight


def pack_weight(w: Array) -> PackedWeight:
    """Pack one weight [N, K], uint16 (BF16) or float32, out_features first as in checkpoints."""
    return pack_weights([w])


def check_weight(kernel: str, weight: PackedWeight) -> None:
    """`weight` must be what its n and k say."""
    size = packed_size(weight.n, weight.k, weight.data.dtype)
    require(kernel, "weight.data", weight.data, (size,), STORAGE)
    contiguous(kernel, "weight.data", weight.data)


def gemm(
    x: Array, weight: PackedWeight, bias: Array | None = None, out: Array | None = None
) -> Array:
    """x [M, K] times weight [N, K] transposed, plus bias: float32 [M, N].

    x has the weight's dtype (uint16 as BF16, or float32); bias [N] f32 or None; out [M, N] f32,
    allocated if None. Returns out. TypeError or ValueError names the argument that does not fit.
    """
    check_weight("gemm", weight)
    require("gemm", "x", x, ("M", weight.k), (weight.data.dtype,))
    if bias is not None:
        require("gemm", "bias", bias, (weight.n,))
    if out is not None:
        require("gemm", "out", out, (len(x), weight.n))
        writable("gemm", "out", out)
        if np.may_share_memory(x, out):
            raise ValueError("gemm: out shares memory with x, which is read until the end")
        if bias is not None and np.may_share_memory(bias, out):
            raise ValueError("gemm: out shares memory with bias, which is read until the end")
    if jit.use_reference():
        exact = narrow(gemm_ref(x, unpack_weight(weight), bias), np.float32)
        return exact if out is None else _put(exact, out)
    m, n, n_pad = len(x), weight.n, -weight.n % NR
    if bias is None:
        bias = NOTHING
    elif n_pad:
        bias = np.pad(bias, (0, n_pad))
    a, m_pad, k = padded(x)
    c = np.empty((m + m_pad, n), np.float32) if out is None or m_pad else out
    bias = np.ascontiguousarray(bias)
    with jit.threads_for(weight.data.nbytes * -(-m // MR)):
        _gemm_kernel(a, weight.data, bias, c.reshape(-1), m + m_pad, n, k)
    if out is None:
        return c[:m]
    return _put(c[:m], out) if m_pad else out


def padded(x: Array) -> tuple[Array, int, int]:
    """(x [M, K] flat, rows of zeros added, K), with a row more where M is uneven and a column where
    K is an odd number of BF16: the last pair needs its zero."""
    m_pad, k_pad = int(len(x) in UNEVEN), -x.shape[1] % _step(x)
    if m_pad or k_pad:
        x = np.pad(x, ((0, m_pad), (0, k_pad)))
    return np.ascontiguousarray(x).reshape(-1), m_pad, x.shape[1]


def _put(values: Array, out: Array) -> Array:
    out[...] = values
    return out


def gather_rows(weight: PackedWeight, ids: Array) -> Array:
    """Rows of the weight by number: an embedding, read from the copy that the LM head uses.

    ids [T] int32, each 0 <= id < N. Returns float32 [T, K].
    """
    check_weight("gather_rows", weight)
    require("gather_rows", "ids", ids, ("T",), (np.int32, np.int64))
    in_range("gather_rows", "ids", ids, weight.n)
    if jit.use_reference():
        return narrow(gather_rows_ref(weight, ids), np.float32)
    rows = np.empty((len(ids), weight.k), np.float32)
    step = _step(weight.data)
    data = weight.data if step == 2 else weight.data.view(np.uint32)
    bits = rows.reshape(-1).view(np.uint32)
    with jit.threads_for(rows.nbytes):
        _gather_rows_kernel(data, step, np.ascontiguousarray(ids), bits, weight.k)
    return rows
