"""logit_edits.py: the reference by hand, the kernel against it, what may not be followed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numba import prange

from pace_nb.kernels import jit
from pace_nb.kernels.logit_edits import Edits, check_edits, edit, edited_ref

BY_HAND = Edits.none(1)._replace(
    masks=np.array([[0b011111]], np.int32),
    mask_rows=np.array([0]),
    add_starts=np.array([0, 2]),
    add_ids=np.array([0, 2]),
    add_values=np.float32([-np.inf, 4]),
    seen_starts=np.array([0, 3]),
    seen_ids=np.array([1, 2, 4]),
    seen_counts=np.array([0, 2, 1]),
)


@jit.kernel
def _edit_kernel(rows, v, edits, penalties, n):
    for r in prange(n):
        repetition, frequency, presence = penalties[r, 0], penalties[r, 1], penalties[r, 2]
        edit(rows[r], v, edits, r, repetition, frequency, presence)


def test_edits_by_hand() -> None:
    """Mask, bias and ban, then repetition, then frequency and presence."""
    row, penalties = np.float32([4, 3, 2, 1, -1, 9]), np.float32([2.0, 0.5, 0.25])
    #          banned   3/2 prompt only  (2+4)/2-2*.5-.25       -1*2-.5-.25  masked
    expected = [-np.inf, 1.5, 1.75, 1, -2.75, -np.inf]
    assert edited_ref(row, BY_HAND, 0, penalties).tolist() == expected
    assert row[5] == 9
    _edit_kernel(row[None], 6, BY_HAND, penalties[None], 1)
    assert row.tolist() == expected


@pytest.mark.parametrize("v", [1, 17, 32, 70, 300])
def test_edits_are_those_of_the_reference(v: int) -> None:
    rng = np.random.default_rng(v)
    n = 5
    rows = rng.normal(0, 3, (n, v)).astype(np.float32)
    penalties = np.float32([[1, 0, 0], [1.3, 0.4, -0.6], [0.5, 0, 0], [1, -1, 0], [1, 0, 2]])
    adds = [rng.choice(v, min(3 * r, v), replace=False) for r in range(n)]
    seen = [rng.choice(v, min(4 * r, v), replace=False) for r in range(n)]
    values = rng.normal(0, 5, sum(map(len, adds))).astype(np.float32)
    values[::4] = -np.inf
    edits = Edits(
        rng.integers(-(2**31), 2**31, (2, -(-v // 32))).astype(np.int32),
        np.array([-1, 0, 1, -1, 0]),
        np.cumsum([0, *map(len, adds)]),
        np.concatenate(adds).astype(np.int64),
        values,
        np.cumsum([0, *map(len, seen)]),
        np.concatenate(seen).astype(np.int64),
        rng.integers(0, 4, sum(map(len, seen))),
    )
    check_edits("test", edits, n, v)
    expected = np.stack([edited_ref(rows[r], edits, r, penalties[r]) for r in range(n)])
    _edit_kernel(rows, v, edits, penalties, n)
    np.testing.assert_array_equal(rows, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask_rows": np.array([0, -1])}, r"edits.masks has shape \(0, 0\), expected \(K, 1\)"),
        ({"mask_rows": np.array([-1])}, r"edits.mask_rows has shape \(1,\), expected \(2\)"),
        ({"masks": np.zeros((1, 1), np.int32), "mask_rows": np.array([0, 1])}, "mask_rows holds 2"),
        ({"masks": np.zeros((2, 2), np.int32)[:, ::2]}, "edits.masks is not a contiguous array"),
        ({"add_starts": np.array([0, 1, 1])}, "edits.add_starts must ascend from 0 to 0"),
        ({"add_values": np.zeros(0)}, "edits.add_values or counts has dtype float64"),
        (
            {
                "seen_starts": np.array([0, 1, 1]),
                "seen_ids": np.array([4]),
                "seen_counts": np.array([1]),
            },
            "edits.seen_ids holds 4, expected 0 to 3",
        ),
    ],
)
def test_what_could_not_be_followed_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        check_edits("test", Edits.none(2)._replace(**change), 2, 4)
