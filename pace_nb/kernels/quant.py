"""MXFP4 weights: four bits in memory, BF16 in registers, and the grouped product that reads them.

    W[n, k] = e2m1(code[n, k]) * 2^(scale[n, k / 32] - 127)
    C[r, n] = bias[e, n] + sum over k of A[r, k] * W[e, n, k],   e: expert of row r

| Array   | Shape              | Type      | Layout                                               |
|---------|--------------------|-----------|------------------------------------------------------|
| blocks  | [N, K/32, 16]      | uint8     | as checkpoints hold it: two codes a byte, low k low  |
| scales  | [N, K/32]          | uint8     | as checkpoints hold it                               |
| codes   | [X, N/64, K/2, 64] | uint8     | packed: lines of `mxfp4_lanes.py`, 2 k of 64 columns |
| (same)  | [X, N/64, K/32, 64]| uint8     | packed scales                                        |
| A       | [R, K]             | BF16      | contiguous, rows of one expert beside each other     |
| offsets | [X + 1]            | int64     | rows of expert e are offsets[e] to offsets[e + 1]    |
| bias    | [X, N]             | f32, None | contiguous                                           |
| C       | [R, N]             | f32       | contiguous                                           |

The e2m1 values are 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives. X experts, 1 for a plain weight.
Moves: 17/32 N K bytes for every expert that has a row, 2 R K + 4 R N; BF16 weights would move 3.8
    times as much.
Does: 2 R N K FLOPs and, for every 4 rows, about 4 instructions per 32 weights to expand them.
Order: as `gemm`. W is exact in BF16 (two significant bits, a power of two), so C has the very bits
    of `moe.grouped_gemm` on the expanded weight.
Error: as `gemm`.
Cautions: scales must be 2 to 252, so that every value is a normal BF16 number (checked when
    packing; 255 means NaN in the format). K is a multiple of 32.
Source: OCP Microscaling Formats 1.0 (MXFP4); PACE expands to BF16 at load (pace/utils/mxfp4.py).
Notebook: 19 MoE and MXFP4.
Ledger: quant.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numba import prange

from pace_nb.kernels import jit
from pace_nb.kernels.arrays import Array, contiguous, require, writable
from pace_nb.kernels.bf16 import narrow, to_f32
from pace_nb.kernels.memory import empty
from pace_nb.kernels.moe import check_offsets, grouped_gemm_ref, pad_bias
from pace_nb.kernels.mxfp4_lanes import MXFP4_TABLE, mxfp4_exponents, mxfp4_pairs
from pace_nb.kernels.tiles import tile_dot_pairs, tile_load, tile_store, tile_store_tail, tile_zeros

NR = 64  # columns of a panel: a line of codes
BLOCK = 32  # weights of one row that share a scale
LOWEST, HIGHEST = 2, 252  # scales whose products with every code are normal BF16 numbers


class PackedMXFP4(NamedTuple):
    """X expert weights [N, K] in four bits, as the kernel reads them; both arrays flat."""

    codes: Array
    scales: Array
    num_experts: int
    n: int
    k: int


# ---- definitions ---------------------------------------------------------------------------------
def dequantize_mxfp4_ref(blocks: Array, scales: Array) -> Array:
    """blocks [N, K/32, 16], scales [N, K/32] -> [N, K] float64, by the formula."""
    codes = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(len(blocks), -1)
    exponents = scales.astype(np.int64).repeat(BLOCK, axis=-1) - 127
    return np.ldexp(to_f32(MXFP4_TABLE)[codes].astype(np.float64), exponents)


def grouped_gemm_mxfp4_ref(
    x: Array, weight: PackedMXFP4, offsets: Array, bias: Array | None = None
) -> Array:
    """x BF16 [R, K] times the expanded experts -> [R, N], float64."""
    experts = [dequantize_mxfp4_ref(*unpack_mxfp4(weight, e)) for e in range(weight.num_experts)]
    return grouped_gemm_ref(x, experts, offsets, bias)


def unpack_mxfp4(weight: PackedMXFP4, e: int) -> tuple[Array, Array]:
    """(blocks, scales) of expert e, as `pack_mxfp4` was given them."""
    panels = -(-weight.n // NR)
    lines = weight.codes.reshape(weight.num_experts, panels, -1, NR)[e]
    scales = weight.scales.reshape(weight.num_experts, panels, -1, NR)[e]
    blocks = _from_lines(lines).transpose(0, 2, 1).reshape(panels * NR, -1, BLOCK // 2)[: weight.n]
    return blocks, scales.transpose(0, 2, 1).reshape(panels * NR, -1)[: weight.n]


def pack_mxfp4_expert_ref(blocks: Array, scales: Array) -> tuple[Array, Array]:
    """blocks [N, K/32, 16], scales [N, K/32] of an expert -> codes [N/64, K/2, 64], scales [N/64,
    K/32, 64], with codes of 0 and scales of 1 where N is padded."""
    padding = ((0, -len(blocks) % NR), (0, 0))
    pairs = np.pad(blocks.reshape(len(blocks), -1), padding).reshape(-1, NR, blocks[0].size)
    powers = np.pad(scales, padding, constant_values=127).reshape(-1, NR, scales.shape[1])
    return _to_lines(pairs.transpose(0, 2, 1)), powers.transpose(0, 2, 1)


def _regrouped(x: Array, y: Array) -> tuple[Array, Array]:
    """Bytes of the lower codes of both, and of the upper ones. Done twice, it is undone."""
    return (x & 15) | (y << 4), (x >> 4) | (y & 0xF0)


def _to_lines(pairs: Array) -> Array:
    """Bytes [.., 64] of the pair of codes of one column each -> [.., 64], a line each."""
    quarters = pairs.reshape(*pairs.shape[:-1], 4, 16)
    line = np.empty((*pairs.shape[:-1], 16, 2, 2), np.uint8)  # column, k, half of a word
    for half in range(2):
        lower, upper = quarters[..., 2 * half, :], quarters[..., 2 * half + 1, :]
        line[..., 0, half], line[..., 1, half] = _regrouped(lower, upper)
    return line.reshape(pairs.shape)


def _from_lines(lines: Array) -> Array:
    """What `_to_lines` was given."""
    line = lines.reshape(*lines.shape[:-1], 16, 2, 2)
    quarters = np.empty((*lines.shape[:-1], 4, 16), np.uint8)
    for half in range(2):
        even, odd = line[..., 0, half], line[..., 1, half]
        quarters[..., 2 * half, :], quarters[..., 2 * half + 1, :] = _regrouped(even, odd)
    return quarters.reshape(lines.shape)


# ---- one row tile against one panel --------------------------------------------------------------
def _row_tile(mr):
    """The device function for `mr` rows."""

    @jit.device_fn
    def rows(a, a0, lda, codes, c0, scales, s0, blocks, bias, column, c, at, ldc, columns):
        # a [mr, 32 blocks] at a0; codes [16 blocks, 64] at c0; scales [blocks, 64] at s0
        acc = tile_load(mr, 4, bias, column, 0) if bias.size else tile_zeros(mr, 4)
        for block in range(blocks):
            s = s0 + block * NR
            e0, e1 = mxfp4_exponents(scales, s), mxfp4_exponents(scales, s + 16)
            e2, e3 = mxfp4_exponents(scales, s + 32), mxfp4_exponents(scales, s + 48)
            for p in range(block * 16, block * 16 + 16):
                i = c0 + p * NR
                b0, b1 = mxfp4_pairs(codes, i, 0, e0), mxfp4_pairs(codes, i, 1, e1)
                b2, b3 = mxfp4_pairs(codes, i, 2, e2), mxfp4_pairs(codes, i, 3, e3)
                acc = tile_dot_pairs(acc, a, a0 + 2 * p, lda, b0, b1, b2, b3)
        if columns == NR:
            tile_store(acc, c, at, ldc)
        else:
            tile_store_tail(acc, c, at, ldc, columns)

    return rows


# Rows of a tile: 4 x 4 accumulators, 4 exponents, 4 expanded vectors, the table and A fill 31 of 32
# registers, so a fifth row would spill.
_rows_4, _rows_2, _rows_1 = (_row_tile(mr) for mr in (4, 2, 1))


@jit.device_fn
def _panel(a, a0, codes, scales, j, bias, column, c, at, ldc, m, k, columns):
    """c [m, columns] at `at` = bias[column:] + a [m, k] at a0 times panel j."""
    blocks, c0, s0, i = k // BLOCK, j * (k // 2) * NR, j * (k // BLOCK) * NR, 0
    while m - i >= 4:
        _rows_4(
            a, a0 + i * k, k, codes, c0, scales, s0, blocks, bias, column, c, at + i * ldc, ldc,
            columns,
        )  # fmt: skip
        i += 4
    if m - i >= 2:
        _rows_2(
            a, a0 + i * k, k, codes, c0, scales, s0, blocks, bias, column, c, at + i * ldc, ldc,
            columns,
        )  # fmt: skip
        i += 2
    if m - i >= 1:
        _rows_1(
            a, a0 + i * k, k, codes, c0, scales, s0, blocks, bias, column, c, at + i * ldc, ldc,
            columns,
        )  # fmt: skip


# ---- kernel --------------------------------------------------------------------------------------
@jit.kernel
def _grouped_gemm_mxfp4_kernel(a, codes, scales, busy, offsets, bias, c, n, k, panels):
    for task in prange(len(busy) * panels):  # one panel of one expert that has rows per task
        e, j = busy[task // panels], task % panels
        row, m = offsets[e], offsets[e + 1] - offsets[e]
        column, at = (e * panels + j) * NR, row * n + j * NR
        width = min(NR, n - j * NR)
        _panel(a, row * k, codes, scales, e * panels + j, bias, column, c, at, n, m, k, width)


@jit.kernel
def _pack_mxfp4_kernel(blocks, scales, words, packed, n, width, groups):
    """blocks [n, width], scales [n, groups] into words [panels, width, 32] of 16 bits, and packed
    [panels, groups, NR]."""
    for j in prange((n + NR - 1) // NR):  # one panel per task
        for p in range(width):
            for c in range(16):
                even, odd = np.uint32(0), np.uint32(0)
                for quarter in range(4):
                    row = j * NR + 16 * quarter + c
                    if row < n:
                        pair = np.uint32(blocks[row * width + p])
                        even |= (pair & 15) << 4 * quarter
                        odd |= (pair >> 4) << 4 * quarter
                at = (j * width + p) * 32 + 2 * c
                words[at], words[at + 1] = even, odd
        for g in range(groups):
            for c in range(NR):
                row = j * NR + c
                packed[(j * groups + g) * NR + c] = scales[row * groups + g] if row < n else 127


# ---- public wrappers -----------------------------------------------------------------------------
def new_mxfp4(num_experts: int, n: int, k: int) -> PackedMXFP4:
    """Weights of X experts [N, K], K a multiple of 32, to be filled by `pack_mxfp4_expert`."""
    if min(num_experts, n, k) < 1 or k % BLOCK:
        raise ValueError(
            f"new_mxfp4: {num_experts} experts ({n}, {k}), expected at least one, a row, and a"
            f" multiple of {BLOCK} columns"
        )
    size = num_experts * -(-n // NR) * NR * k
    return PackedMXFP4(
        empty(size // 2, np.uint8), empty(size // BLOCK, np.uint8), num_experts, n, k
    )


def pack_mxfp4_expert(weight: PackedMXFP4, e: int, blocks: Array, scales: Array) -> None:
    """Put expert e, blocks uint8 [N, K/32, 16] and scales uint8 [N, K/32], into its place.

    ValueError for scales outside 2 .. 252, whose values BF16 cannot hold as normal numbers.
    """
    name, groups = "pack_mxfp4", weight.k // BLOCK
    _check_packed(name, weight)
    if not 0 <= e < weight.num_experts:
        raise ValueError(f"{name}: expert {e}, expected 0 to {weight.num_experts - 1}")
    require(name, f"blocks[{e}]", blocks, (weight.n, groups, BLOCK // 2), (np.uint8,))
    require(name, f"scales[{e}]", scales, (weight.n, groups), (np.uint8,))
    if scales.min() < LOWEST or scales.max() > HIGHEST:
        raise ValueError(
            f"{name}: scales[{e}] holds {scales.min()} to {scales.max()}, "
            f"expected {LOWEST} to {HIGHEST}"
        )
    writable(name, "weight.codes", weight.codes)
    writable(name, "weight.scales", weight.scales)
    codes = weight.codes.reshape(weight.num_experts, -1)[e]
    packed = weight.scales.reshape(weight.num_experts, -1)[e]
    if jit.use_reference():
        lines, powers = pack_mxfp4_expert_ref(blocks, scales)
        codes[...], packed[...] = lines.reshape(-1), powers.reshape(-1)
        return
    given = [np.ascontiguousarray(x).reshape(-1) for x in (blocks, scales)]
    for x in given:
        x.flags.writeable = False  # one type, whatever the source: a kernel compiles once
    with jit.threads_for(blocks.nbytes):
        width = groups * BLOCK // 2
        _pack_mxfp4_kernel(*given, codes.view(np.uint16), packed, weight.n, width, groups)


def pack_mxfp4(blocks: Sequence[Array], scales: Sequence[Array]) -> PackedMXFP4:
    """Pack X experts: blocks[e] uint8 [N, K/32, 16] and scales[e] uint8 [N, K/32].

    Errors as `pack_mxfp4_expert`.
    """
    name = "pack_mxfp4"
    if not blocks or len(blocks) != len(scales):
        raise ValueError(f"{name}: found {len(blocks)} blocks and {len(scales)} scales")
    require(name, "blocks[0]", blocks[0], ("N", "K/32", BLOCK // 2), (np.uint8,))
    n, groups = blocks[0].shape[:2]
    weight = new_mxfp4(len(blocks), n, groups * BLOCK)
    for e, (block, scale) in enumerate(zip(blocks, scales, strict=True)):
        pack_mxfp4_expert(weight, e, block, scale)
    return weight


def _check_packed(name: str, weight: PackedMXFP4) -> None:
    """`weight` must be what its numbers say."""
    size = weight.num_experts * -(-weight.n // NR) * NR * weight.k
    require(name, "weight.codes", weight.codes, (size // 2,), (np.uint8,))
    require(name, "weight.scales", weight.scales, (size // BLOCK,), (np.uint8,))
    contiguous(name, "weight.codes", weight.codes)
    contiguous(name, "weight.scales", weight.scales)


def grouped_gemm_mxfp4(
    x: Array, weight: PackedMXFP4, offsets: Array, bias: Array | None = None
) -> Array:
    """Each row of x BF16 [R, K] times the weight of its expert: float32 [R, N].

    offsets int64 [X + 1] from 0 to R, ascending; bias f32 [X, N] or None. TypeError or ValueError
    names the argument that does not fit.
    """
    name, count, n, k = "grouped_gemm_mxfp4", weight.num_experts, weight.n, weight.k
    panels = -(-n // NR)
    _check_packed(name, weight)
    require(name, "x", x, ("R", k), (np.uint16,))
    check_offsets(name, offsets, count, len(x))
    if bias is not None:
        require(name, "bias", bias, (count, n))
    out = np.empty((len(x), n), np.float32)
    if jit.use_reference():
        out[...] = narrow(grouped_gemm_mxfp4_ref(x, weight, offsets, bias), np.float32)
        return out
    flat, busy = np.ascontiguousarray(x).reshape(-1), np.flatnonzero(np.diff(offsets))
    bias, out_flat = pad_bias(bias, NR), out.reshape(-1)
    _grouped_gemm_mxfp4_kernel(
        flat, weight.codes, weight.scales, busy, offsets, bias, out_flat, n, k, panels
    )
    return out
