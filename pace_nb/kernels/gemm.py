"""Matrix product with prepacked weights: prefill GEMM, small batches, decode GEMV from one layout.

    C[m, n] = bias[n] + sum over k of A[m, k] * W[n, k]

| Array | Shape              | Type      | Layout                                                  |
|-------|--------------------|-----------|---------------------------------------------------------|
| A     | [M, K]             | BF16, f32 | contiguous                                              |
| W     | [N, K]             | BF16, f32 | as checkpoints hold it; packed once by `pack_weight`    |
| data  | [N/NR, K/S, NR, S] | BF16, f32 | panels of NR columns; S = 2 for BF16 (pairs), 1 for f32 |
| bias  | [N]                | f32, None | contiguous                                              |
| C     | [M, N]             | f32       | contiguous, allocated or given as `out`                 |

NR is 64 with AVX-512 and 16 without. In `data` N is padded to NR and K to S with zeros.
Moves: N K size(W) + M K size(A) + 4 M N bytes; M K (4 + size(A)) more where rows are packed.
Does: 2 M N K FLOPs. M = 1 is bound by reading W from DRAM, large M by the dot-product units
    (`vdpbf16ps`: 64 FLOPs an instruction; elsewhere a pair is two fused multiply-adds).
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
    KC, MC); re-implements PACE's TPP linear (csrc/ops/libxsmm), which packs [N/32, K/64, 32, 32, 2]
    and rounds C to BF16.
Notebook: 03 GEMM ladder, 04 GEMV.
Ledger: gemm.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
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
from pace_nb.kernels.bf16 import as_f32, narrow, widen
from pace_nb.kernels.lanes import prefetch, prefetch_once
from pace_nb.kernels.memory import zeros
from pace_nb.kernels.tiles import NV, tile_dot, tile_load_tail, tile_store_tail, tile_zeros
from pace_nb.kernels.words import per_word

# ---- constants -----------------------------------------------------------------------------------
# 32 registers of 512 bits: panels of 64 columns, one cache line of pairs per vector, four vectors
# per step of k. A tile of 6 x 4 accumulators, 4 vectors of W and 1 of A fills 29 registers. So many
# rows as TALL are one tile, too. It does not fit, but DRAM, for which it waits, is slower than
# spilling; a second pass over the panel, from L2, would leave DRAM idle (ledger: gemm). A panel's
# block of KC is 256 KiB in BF16, a quarter of L2; read M / MR times. There is no other blocking.
# 16 registers (AVX2): panels of 16 columns, of two registers each. A tile of 6 x 2 accumulators, 2
# halves of W and 1 of A fills 15. A panel's block of KC is 32 KiB in BF16; MC rows of A, 384 KiB,
# stay in L2 while GROUP panels, 128 columns, meet them. One row, or two, take 4 or 2 panels SIDE by
# side: 8 accumulators keep the units busy, and so many streams read DRAM a third faster than one.
NR = 16 * NV  # columns of a panel: the vectors of which six rows fit into the registers
MR = 6  # rows of a tile
TALL = 8 if jit.WIDE else MR
HEIGHTS = (TALL, MR, 4, 2, 1) if jit.WIDE else (MR, 4, 2, 1)  # of the tiles that there are
KC = 2048 if jit.WIDE else 1024  # k per block
MC = 1 << 30 if jit.WIDE else 96  # rows per block, in whole tiles
# Fewer rows than these are no block of their own: `_height` may cut only the end of M otherwise. MC
# is a multiple of MR.
TAIL = 8
GROUP = 1 if jit.WIDE else 8  # panels per task
SIDE = 0 if jit.WIDE else 4  # rows times panels side by side; 0: never
# Rows that are one tile if there is one more, and two or three if not. With 16 registers, where a
# tile of a row or two takes as long as one of four, that is every odd number but 1.
UNEVEN = (3, 5, 7)
# A panel that is read once is one stream. Two to MR rows leave it to the hardware's prefetcher,
# which asking would disturb: four rows read at 99 % of the DRAM rate without, at 80 % with, and six
# take 9 to 15 % less time. One row, which meets a line every cycle, asks AHEAD steps of k before it
# needs it: 4 KiB, where the hardware's prefetcher, which stops at the end of a page, is not yet.
# TALL rows, which take their time, ask FURTHER ahead and into L2: what is asked for into L1 has
# been pushed out again, by their own rows and spills, when they come to it. (16 to 128 steps were
# tried: more than 28 cost 7 % where DRAM is slow, fewer than 26 up to 19 % where it is fast.)
AHEAD = 1024 // NR
FURTHER = 1664 // NR
# While a block meets its last rows, the next one is asked for, so that its first rows find it in
# L2: DRAM would feed them four times slower than they compute. Earlier, A would push it out again.
# (With 9 to 11 rows, in tiles of 6, 4, 2 and 1, some lines are left to the hardware's prefetcher.)
ASKING = 48
LINES = NR // 16  # of a panel, in a step of k
AT_ONCE = min(LINES, 2)  # lines that are asked for in a step
FRACTION = 16  # bits below the point in how much of the next block has been asked for
# Rates of asking where nobody reads the block again, and it is asked for step by step.
ONCE, ONCE_SLOWLY = -1, -2


class PackedWeight(NamedTuple):
    """A weight as the kernels read it: `data` flat, [N/NR, K/S, NR, S]; n, k as before padding."""

    data: Array
    n: int
    k: int


# ---- definitions ---------------------------------------------------------------------------------
def gemm_ref(x: Array, w: Array, bias: Array | None = None) -> Array:
    """x [M, K] times w [N, K] transposed, plus bias [N], float64."""
    product = widen(x) @ widen(w).T
    return product if bias is None else product + bias


def pack_weights_ref(parts: Sequence[Array], nr: int = NR) -> Array:
    """[N0, K], [N1, K], .. stacked to [N, K] -> flat [N/nr, K/S, nr, S], zero where padded."""
    w = np.concatenate(parts)
    n, k = w.shape
    step = _step(w)
    padded = np.zeros((-n % nr + n, -k % step + k), w.dtype)
    padded[:n, :k] = w
    panels = padded.reshape(len(padded) // nr, nr, -1, step)
    return np.ascontiguousarray(panels.transpose(0, 2, 1, 3)).reshape(-1)


def unpack_weight(weight: PackedWeight) -> Array:
    """The [N, K] array that `pack_weight` was given."""
    step = _step(weight.data)
    panels = weight.data.reshape(-(-weight.n // NR), -(-weight.k // step), NR, step)
    rows = panels.transpose(0, 2, 1, 3).reshape(len(panels) * NR, -1)
    return np.ascontiguousarray(rows[: weight.n, : weight.k])


def operand_ref(x: Array, offsets: Array) -> Array:
    """Rows offsets[e] .. offsets[e + 1] of x [M, K] in tiles, each [K, rows]: float32, flat.

    A tile has the most rows of 6, 4, 2 and 1 that are left, but two of 4 take the last 8.
    """
    tiles = []
    for i, end in pairwise(offsets):
        while i < end:
            rows = 4 if end - i == 8 else next(mr for mr in (6, 4, 2, 1) if mr <= end - i)
            tiles.append(as_f32(x[i : i + rows]).T.reshape(-1))
            i += rows
    return np.concatenate([np.empty(0, np.float32), *tiles])


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
def _dot(mr):
    """The device function for one step along k of a tile of `mr` rows of `operand`."""

    @jit.device_fn
    def dot(acc, a, a0, word, k, b, at):
        s = per_word(b)
        return tile_dot(acc, a, a0 + word * s, k, b, at, 16 * s)

    @jit.device_fn
    def packed_dot(acc, a, a0, word, k, b, at):
        s = per_word(b)
        return tile_dot(acc, a, a0 + word * s * mr, 1, b, at, 16 * s, mr)

    return dot if jit.WIDE else packed_dot


def _row_tile(mr):
    """The device function for `mr` rows; every size is its own type of tile, held in registers."""
    dot = _dot(mr)

    @jit.device_fn
    def rows(
        a, a0, first, k, b, b0, steps, after, ask0, rate, begun, begin, g0, ldg, c, c0, ldc, n
    ):
        # c [mr, n] at c0, of a [mr, k] at a0 (see `operand`), from word `first` on, and b
        # [steps, NR, S] at b0. It begins with begin [mr, n] at g0 if begun: c itself, or the bias,
        # for which ldg is 0. The block of b that comes next begins at `after`.
        s = per_word(b)
        acc = tile_zeros(mr, NV)
        if begun:
            acc = tile_load_tail(mr, NV, begin, g0, ldg, n)
        asked = ask0
        for p in range(steps):
            at = b0 + p * NR * s
            if rate == ONCE:
                for line in range(LINES):
                    prefetch_once(b, at + (AHEAD * NR + line * 16) * s)
            elif rate == ONCE_SLOWLY:
                for line in range(LINES):
                    prefetch(b, at + (FURTHER * NR + line * 16) * s)
            elif rate:
                line = after + (asked >> FRACTION) * AT_ONCE * 16 * s
                prefetch(b, line)
                if AT_ONCE == 2:
                    prefetch(b, line + 16 * s)
                asked += mr * rate
            acc = dot(acc, a, a0, first + p, k, b, at)
        tile_store_tail(acc, c, c0, ldc, n)

    return rows


def _by_height(tile_of, heights):
    """The device function for the first of `heights` that `left` rows fill; returns it."""
    mr, tile = heights[0], tile_of(heights[0])
    lower = _by_height(tile_of, heights[1:]) if heights[1:] else None

    @jit.device_fn
    def rows(left, *operands):
        if lower is not None and left < mr:
            return lower(left, *operands)
        tile(*operands)
        return mr

    return rows


_rows = _by_height(_row_tile, HEIGHTS)


def _side_tile(mr):
    """The device function for `mr` rows and all of k, of SIDE / mr panels."""
    side = SIDE // mr

    @jit.device_fn
    def rows(a, a0, b, b0, steps, bias, column, c, c0, ldc, n):
        s = per_word(b)
        acc = tile_zeros(mr, side)
        if bias.size:
            acc = tile_load_tail(mr, side, bias, column, 0, n)
        for p in range(steps):
            at, apart = b0 + p * NR * s, steps * NR * s
            acc = tile_dot(acc, a, a0 + p * s * mr, 1, b, at, apart, mr)
        tile_store_tail(acc, c, c0, ldc, n)

    return rows


if SIDE:
    _side_1, _side_2 = _side_tile(1), _side_tile(2)

    @jit.device_fn
    def _side_by_side(a, a0, b, j, count, bias, column, c, c0, ldc, m, steps, columns):
        """As `panels`, for as many of them as are whole sides; returns how many are done."""
        s, g = per_word(b), 0
        while m <= 2 and m * (count - g) >= SIDE:
            b0, at, n = (j + g) * steps * NR * s, c0 + g * NR, columns - g * NR
            if m == 1:
                _side_1(a, a0, b, b0, steps, bias, column + g * NR, c, at, ldc, min(n, SIDE * NR))
            else:
                _side_2(a, a0, b, b0, steps, bias, column + g * NR, c, at, ldc, min(n, 2 * NR))
            g += SIDE // m
        return g

else:

    @jit.device_fn
    def _side_by_side(a, a0, b, j, count, bias, column, c, c0, ldc, m, steps, columns):
        return 0


@jit.device_fn
def _height(left, m):
    """Rows that the next tile may have, where `left` of m rows are left.

    Packing and products ask here, so they cut alike.
    """
    if m == TALL:
        return m
    return 4 if left == 8 else min(left, MR)  # a tile of two rows is no faster than one of four


@jit.device_fn
def _block(
    a, a0, first, k, b, b0, steps, after, begun, begin, g0, ldg, c, c0, ldc, m, row0, end, n
):
    """Rows row0 .. end of m against one block of a panel; names as in `_row_tile`."""
    # Rows, in whole tiles from the first to the last, in step with which the next block is asked
    # for: a tile of mr rows asks for mr / asking of it, AT_ONCE lines at a time.
    asking = min(end - row0, ASKING + (end - row0 - ASKING) % MR)
    rate = (LINES << FRACTION) // (AT_ONCE * asking)
    if m <= TALL:
        rate = ONCE if m == 1 else ONCE_SLOWLY if m == TALL > MR else 0
    i = row0
    while i < end:
        late = i - (end - asking)
        ask0, ask = (late * steps * rate, rate) if late >= 0 else (0, 0)
        ai, gi, ci = a0 + i * k, g0 + i * ldg, c0 + i * ldc
        left = _height(end - i, m)
        i += _rows(
            left, a, ai, first, k, b, b0, steps, after, ask0, ask, begun, begin, gi, ldg, c, ci,
            ldc, n,
        )  # fmt: skip


@jit.device_fn
def panels(a, a0, b, j, count, bias, column, c, c0, ldc, m, k, columns):
    """c [m, columns] at c0 = bias[column:] + a [m, k] at a0 times panels j .. j + count of b.

    a is of `operand`. k is a multiple of S, and bias, unless empty, holds whole panels: the caller
    pads both.
    """
    s = per_word(b)
    steps = (k + s - 1) // s
    done = _side_by_side(a, a0, b, j, count, bias, column, c, c0, ldc, m, steps, columns)
    block = steps if m <= TALL else KC // s  # what is read once is one stream
    for p in range(0, steps, block):
        size, begun, row0 = min(block, steps - p), p > 0 or bias.size > 0, 0
        while row0 < m:
            end = row0 + MC if m - row0 >= MC + TAIL else m
            for g in range(done, count):
                here = (j + g) * steps + p
                if g + 1 < count:  # what comes next: the same block of the next panel,
                    after = here + steps
                elif end < m:  # or of the first, for the next rows,
                    after = (j + done) * steps + p
                else:  # or the next block, or the next panels
                    after = j * steps + p + size if p + size < steps else (j + count) * steps
                cg, n = c0 + g * NR, min(NR, columns - g * NR)
                begin, g0, ldg = (c, cg, ldc) if p else (bias, column + g * NR, 0)
                b0, b1 = here * NR * s, after * NR * s
                _block(
                    a, a0, p, k, b, b0, size, b1, begun, begin, g0, ldg, c, cg, ldc, m, row0, end, n
                )  # fmt: skip
            row0 = end


# ---- kernels -------------------------------------------------------------------------------------
def _pack_tile(mr):
    """The device function that packs a tile of `mr` rows: y [k, mr] at y0 = x [mr, k] at x0."""

    @jit.device_fn
    def pack(ours, x, x0, k, shift, y, y0):
        if ours:
            for i in range(k):
                for r in range(mr):
                    y[y0 + i * mr + r] = np.uint32(x[x0 + r * k + i]) << shift

    return pack


_pack_rows = _by_height(_pack_tile, HEIGHTS)


@jit.kernel
def _pack_operand_kernel(x, shift, y, offsets, k, shares):
    """Rows of each segment as tiles, one after the other, each [K, rows of it]: float32's bits."""
    for task in prange((len(offsets) - 1) * shares):  # a share of the tiles of a segment per task
        e, share = task // shares, task % shares
        m, i, turn = offsets[e + 1] - offsets[e], 0, 0
        while i < m:
            at = (offsets[e] + i) * k
            i += _pack_rows(_height(m - i, m), turn % shares == share, x, at, k, shift, y, at)
            turn += 1


@jit.kernel
def _gemm_kernel(a, b, bias, c, m, n, k):
    # One group of panels of columns per task; columns are independent.
    for g in prange((n + GROUP * NR - 1) // (GROUP * NR)):
        j = g * GROUP
        count = min(GROUP, (n + NR - 1) // NR - j)
        panels(a, 0, b, j, count, bias, j * NR, c, j * NR, n, m, k, n - j * NR)


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
    a, m_pad, k = operand(x)
    c = np.empty((m + m_pad, n), np.float32) if out is None or m_pad else out
    bias = np.ascontiguousarray(bias)
    with jit.threads_for(weight.data.nbytes * -(-m // MR)):
        _gemm_kernel(a, weight.data, bias, c.reshape(-1), m + m_pad, n, k)
    if out is None:
        return c[:m]
    return _put(c[:m], out) if m_pad else out


def operand(x: Array, offsets: Array | None = None) -> tuple[Array, int, int]:
    """x [M, K] as `panels` reads it: (flat, rows of zeros added, K).

    With a row more where M is uneven (never with offsets), and a column where K is an odd number of
    BF16: the last pair needs its zero. Where there are 16 registers, float32 and packed in tiles of
    rows; offsets int64 [segments + 1] are then where the rows of each call of `panels` begin, None
    for one of all rows.
    """
    uneven = len(x) in UNEVEN if jit.WIDE else len(x) > 1 and len(x) % 2
    m_pad, k_pad = int(uneven and offsets is None), -x.shape[1] % _step(x)
    if m_pad or k_pad:
        x = np.pad(x, ((0, m_pad), (0, k_pad)))
    (m, k), x = x.shape, np.ascontiguousarray(x).reshape(-1)
    if jit.WIDE:
        return x, m_pad, k
    if offsets is None:
        offsets = np.array([0, m])
    packed = np.empty(m * k, np.float32)
    shift = 16 * (_step(x) - 1)
    bits = x if shift else x.view(np.uint32)
    with jit.threads_for(packed.nbytes):
        shares = jit.num_threads()
        _pack_operand_kernel(bits, shift, packed.view(np.uint32), offsets, k, shares)
    return packed, m_pad, k


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
