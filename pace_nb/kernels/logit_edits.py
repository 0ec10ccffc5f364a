"""What a request changes in its row of logits before anything is drawn from it.

    1. mask: tokens whose bit is 0 to -inf;  add: l += a (a bias, or -inf for a banned token)
    2. repetition r on tokens of prompt and output:  l / r where l > 0, else l * r
       frequency f, presence p on tokens of the output:  l - f * count, then - p

Knows: the ragged arrays in which rows say what they change, as most change nothing. Does not know:
how a token is drawn (sampling.py).
Error: none, each operation rounded once to f32; the reference gives the same bits.
Cautions: device functions do not check; `check_edits` does.
Source: vLLM v1 `vllm/v1/sample/`. Notebook: 18 sampling. Ledger: sampling.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from pace_nb.kernels import jit
from pace_nb.kernels.arrays import Array, ascends, contiguous, in_range, require


class Edits(NamedTuple):
    """What rows change in their logits before anything is drawn. Row r has the entries of its
    ranges add_starts[r] : add_starts[r + 1] and seen_starts[r] : seen_starts[r + 1].

    masks: int32[K, ceil(V / 32)]; bit i % 32 of word i // 32 says whether token i may be drawn.
    mask_rows: int64[R], which of masks; -1 is none.
    add_ids, add_values: int64, f32; a row names an id once per value added to it.
    seen_ids, seen_counts: int64; tokens of prompt and output, each id once per row, and how often
    it is in the output.
    """

    masks: Array
    mask_rows: Array
    add_starts: Array
    add_ids: Array
    add_values: Array
    seen_starts: Array
    seen_ids: Array
    seen_counts: Array

    @classmethod
    def none(cls, rows: int) -> Edits:
        """No row changes anything."""
        nothing, starts = np.zeros(0, np.int64), np.zeros(rows + 1, np.int64)
        return cls(
            np.zeros((0, 0), np.int32),
            np.full(rows, -1, np.int64),
            starts,
            nothing,
            np.zeros(0, np.float32),
            starts,
            nothing,
            nothing,
        )


# ---- definition ----------------------------------------------------------------------------------
def edited_ref(row: Array, edits: Edits, r: int, penalties: Array) -> Array:
    """Steps 1 and 2 on a copy of row r; penalties: repetition, frequency, presence."""
    row = row.copy()
    if edits.mask_rows[r] >= 0:
        words = np.ascontiguousarray(edits.masks[edits.mask_rows[r]]).view(np.uint8)
        row[np.unpackbits(words, bitorder="little")[: len(row)] == 0] = -np.inf
    added = slice(edits.add_starts[r], edits.add_starts[r + 1])
    np.add.at(row, edits.add_ids[added], edits.add_values[added])
    seen = slice(edits.seen_starts[r], edits.seen_starts[r + 1])
    ids, counts = edits.seen_ids[seen], edits.seen_counts[seen]
    repetition, frequency, presence = penalties.astype(np.float32)
    values = row[ids]
    with np.errstate(over="ignore"):  # a row that leaves float32 has no token
        values = np.where(values > 0, values / repetition, values * repetition)
        penalised = (values - frequency * counts.astype(np.float32)) - presence
    row[ids] = np.where(counts > 0, penalised, values)
    return row


# ---- device functions ----------------------------------------------------------------------------
@jit.device_fn
def _mask_row(row, v, masks, m):
    """-inf where the bit of a token is 0."""
    lowest = np.float32(-np.inf)
    for word in range((v + 31) // 32):
        bits = masks[m, word]
        if bits != -1:
            first = 32 * word
            for i in range(first, min(first + 32, v)):
                if (bits >> (i - first)) & 1 == 0:
                    row[i] = lowest


@jit.device_fn
def _penalise(row, first, end, ids, counts, repetition, frequency, presence):
    """Step 2 on row[ids[first : end]]."""
    zero = np.float32(0.0)
    for j in range(first, end):
        i, count = ids[j], counts[j]
        value = row[i]
        value = value / repetition if value > zero else value * repetition
        if count > 0:
            value = (value - frequency * np.float32(count)) - presence
        row[i] = value


@jit.device_fn
def edit(row, v, edits, r, repetition, frequency, presence):
    """Steps 1 and 2 in place."""
    masks, mask_rows, add_starts, add_ids, add_values, seen_starts, seen_ids, seen_counts = edits
    if mask_rows[r] >= 0:
        _mask_row(row, v, masks, mask_rows[r])
    for j in range(add_starts[r], add_starts[r + 1]):
        row[add_ids[j]] += add_values[j]
    first, end = seen_starts[r], seen_starts[r + 1]
    _penalise(row, first, end, seen_ids, seen_counts, repetition, frequency, presence)


# ---- checks --------------------------------------------------------------------------------------
def check_edits(kernel: str, edits: Edits, rows: int, v: int) -> None:
    """Every index that `edit` follows for `rows` rows of v logits must be there."""
    require(kernel, "edits.masks", edits.masks, ("K", None), (np.int32,))
    contiguous(kernel, "edits.masks", edits.masks)
    require(kernel, "edits.mask_rows", edits.mask_rows, (rows,), (np.int64,))
    if (edits.mask_rows >= 0).any():
        require(kernel, "edits.masks", edits.masks, ("K", -(-v // 32)), (np.int32,))
        in_range(kernel, "edits.mask_rows", edits.mask_rows + 1, len(edits.masks) + 1)
    for name, starts, ids, numbers, dtype in (
        ("add", edits.add_starts, edits.add_ids, edits.add_values, np.float32),
        ("seen", edits.seen_starts, edits.seen_ids, edits.seen_counts, np.int64),
    ):
        require(kernel, f"edits.{name}_starts", starts, (rows + 1,), (np.int64,))
        require(kernel, f"edits.{name}_ids", ids, ("N",), (np.int64,))
        require(kernel, f"edits.{name}_values or counts", numbers, ids.shape, (dtype,))
        if starts[0] != 0 or starts[-1] != len(ids) or not ascends(starts):
            raise ValueError(
                f"{kernel}: edits.{name}_starts must ascend from 0 to {len(ids)}, got {starts}"
            )
        in_range(kernel, f"edits.{name}_ids", ids, v)
