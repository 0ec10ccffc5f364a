"""moe.py against its float64 references: uneven groups, empty experts, order, bad input."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pace_nb.kernels import jit
from pace_nb.kernels.bf16 import from_f32, widen
from pace_nb.kernels.gemm import gemm, pack_weight, unpack_weight
from pace_nb.kernels.moe import (
    combine,
    combine_ref,
    grouped_gemm,
    grouped_gemm_ref,
    pack_experts,
    sort_by_expert,
)

Array = NDArray[Any]
DTYPES = [np.uint16, np.float32]


def normal(rng: np.random.Generator, shape: Any, dtype: Any) -> Array:
    x = rng.standard_normal(shape).astype(np.float32)
    return from_f32(x) if dtype == np.uint16 else x


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("counts", [[1], [0, 3, 0, 9, 1], [7, 0, 0], [0, 0], [2, 13, 4, 5]])
@pytest.mark.parametrize("shape", [(65, 17), (64, 32), (130, 9)])
def test_matches_reference(counts: list[int], shape: tuple[int, int], dtype: Any) -> None:
    n, k = shape
    rng = np.random.default_rng(sum(counts) + n)
    experts = [normal(rng, (n, k), dtype) for _ in counts]
    x, bias = (
        normal(rng, (sum(counts), k), dtype),
        rng.standard_normal((len(counts), n), np.float32),
    )
    offsets = np.concatenate([[0], np.cumsum(counts)])
    packed = pack_experts(experts)
    for e, w in enumerate(experts):
        np.testing.assert_array_equal(unpack_weight(packed.expert(e)), w)
    for b in (None, bias):
        c = grouped_gemm(x, packed, offsets, b)
        sizes = grouped_gemm_ref(
            np.abs(widen(x)).astype(np.float32),
            [np.abs(widen(w)).astype(np.float32) for w in experts],
            offsets,
            None if b is None else np.abs(b),
        )
        error = np.abs(c - grouped_gemm_ref(x, experts, offsets, b))
        assert np.all(error <= 2 * (k + 1) * 2.0**-24 * sizes + 1e-37)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_have_the_bits_of_a_plain_product(dtype: Any) -> None:
    """Batch invariance: a row's result is that of its expert's own gemm, whatever else is there."""
    rng = np.random.default_rng(1)
    counts, k, n = [5, 0, 8, 1], 40, 70
    experts = [normal(rng, (n, k), dtype) for _ in counts]
    x, offsets = normal(rng, (sum(counts), k), dtype), np.concatenate([[0], np.cumsum(counts)])
    packed, threads = pack_experts(experts), jit.num_threads()
    c = grouped_gemm(x, packed, offsets)
    for e, w in enumerate(experts):
        for r in range(offsets[e], offsets[e + 1]):
            np.testing.assert_array_equal(c[r : r + 1], gemm(x[r : r + 1], pack_weight(w)))
    try:
        jit.set_num_threads(1)
        np.testing.assert_array_equal(grouped_gemm(x, packed, offsets), c)
    finally:
        jit.set_num_threads(threads)


@pytest.mark.parametrize("shape", [(0, 2), (1, 1), (5, 3), (9, 4)])
def test_sorting_puts_every_choice_in_its_expert(shape: tuple[int, int]) -> None:
    chosen = np.random.default_rng(2).integers(0, 6, shape)
    tokens, place, offsets = sort_by_expert(chosen, 6)
    assert offsets[0] == 0 and offsets[-1] == chosen.size
    np.testing.assert_array_equal(np.sort(place, axis=None), np.arange(chosen.size))
    for t in range(shape[0]):
        for i in range(shape[1]):
            row = place[t, i]
            assert tokens[row] == t
            assert offsets[chosen[t, i]] <= row < offsets[chosen[t, i] + 1]
    for e in range(6):
        group = tokens[offsets[e] : offsets[e + 1]]
        np.testing.assert_array_equal(group, np.sort(group))


@pytest.mark.parametrize("n", [1, 15, 16, 33, 130])
def test_combine_matches_reference(n: int) -> None:
    rng = np.random.default_rng(n)
    c, scale = rng.standard_normal((12, n), np.float32), rng.standard_normal((5, 3), np.float32)
    place = rng.integers(0, 12, (5, 3))
    sizes = combine_ref(np.abs(c), place, np.abs(scale))
    error = np.abs(combine(c, place, scale) - combine_ref(c, place, scale))
    assert np.all(error <= 6 * 2.0**-24 * sizes)
    np.testing.assert_array_equal(combine(c, place[2:3], scale[2:3]), combine(c, place, scale)[2:3])


def test_nan_stays_with_its_token() -> None:
    rng = np.random.default_rng(3)
    packed = pack_experts([rng.standard_normal((20, 8), np.float32) for _ in range(2)])
    x = rng.standard_normal((4, 8), np.float32)
    offsets = np.array([0, 2, 4])
    clean = grouped_gemm(x, packed, offsets)
    x[2, 7] = np.nan
    c = grouped_gemm(x, packed, offsets)
    assert np.isnan(c[2]).all()
    np.testing.assert_array_equal(c[[0, 1, 3]], clean[[0, 1, 3]])


def test_reference_mode_runs_the_references() -> None:
    rng = np.random.default_rng(4)
    experts = [normal(rng, (20, 8), np.uint16) for _ in range(2)]
    x, offsets = normal(rng, (4, 8), np.uint16), np.array([0, 3, 4])
    with jit.using("reference"):
        c = grouped_gemm(x, pack_experts(experts), offsets)
        place, scale = np.array([[0, 3]]), np.ones((1, 2), np.float32)
        y = combine(c, place, scale)
    np.testing.assert_array_equal(c, grouped_gemm_ref(x, experts, offsets).astype(np.float32))
    np.testing.assert_array_equal(y, combine_ref(c, place, scale).astype(np.float32))


def test_bad_input_names_the_argument() -> None:
    packed = pack_experts([np.zeros((3, 4), np.float32)] * 2)
    x = np.zeros((5, 4), np.float32)
    for offsets in ([0, 6, 5], [1, 2, 5], [0, 2, 4]):
        with pytest.raises(ValueError, match="grouped_gemm: offsets must ascend from 0 to 5"):
            grouped_gemm(x, packed, np.array(offsets))
    three = pack_experts([np.zeros((3, 4), np.float32)] * 3)
    with pytest.raises(ValueError, match="offsets must ascend"):  # differences would wrap
        grouped_gemm(x, three, np.array([0, 2**63 - 1, -2, 5]))
    strided = packed._replace(data=np.repeat(packed.data, 2)[::2])
    with pytest.raises(ValueError, match=r"weight\.data is not a contiguous array"):
        grouped_gemm(x, strided, np.array([0, 2, 5]))
    with pytest.raises(ValueError, match=r"offsets has shape \(2,\), expected \(3\)"):
        grouped_gemm(x, packed, np.array([0, 5]))
    with pytest.raises(ValueError, match="chosen holds 2, expected 0 to 1"):
        sort_by_expert(np.array([[2]]), 2)
    with pytest.raises(ValueError, match="place holds -1, expected 0 to 4"):
        combine(x, np.array([[-1]]), np.ones((1, 1), np.float32))
    with pytest.raises(ValueError, match=r"experts\[1\] has shape \(4, 4\), expected \(3, 4\)"):
        pack_experts([np.zeros((3, 4), np.float32), np.zeros((4, 4), np.float32)])
    with pytest.raises(ValueError, match="experts is empty"):
        pack_experts([])
