"""quant.py: exact expansion, the bits of the BF16 product, edges of the format, bad input."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pace_nb.kernels import jit
from pace_nb.kernels.bf16 import from_f32, to_f32
from pace_nb.kernels.moe import grouped_gemm, pack_experts
from pace_nb.kernels.quant import (
    dequantize_mxfp4_ref,
    grouped_gemm_mxfp4,
    grouped_gemm_mxfp4_ref,
    new_mxfp4,
    pack_mxfp4,
    pack_mxfp4_expert,
    unpack_mxfp4,
)

Array = NDArray[Any]


def experts(
    rng: np.random.Generator, count: int, n: int, k: int, spread: tuple[int, int] = (118, 130)
) -> tuple[list[Array], list[Array]]:
    blocks = [rng.integers(0, 256, (n, k // 32, 16), np.uint8) for _ in range(count)]
    scales = [rng.integers(*spread, (n, k // 32)).astype(np.uint8) for _ in range(count)]
    return blocks, scales


def test_the_formula_on_known_values() -> None:
    blocks = np.arange(16, dtype=np.uint8).reshape(1, 1, 16)  # low nibble 0 .. 15, high nibble 0
    values = dequantize_mxfp4_ref(blocks, np.array([[128]], np.uint8))[0, 0::2]
    magnitudes = [0, 1, 2, 3, 4, 6, 8, 12]
    np.testing.assert_array_equal(values, magnitudes + [-m for m in magnitudes])


@pytest.mark.parametrize("counts", [[1], [0, 3, 0, 9], [4, 1, 7], [0]])
@pytest.mark.parametrize("shape", [(64, 32), (70, 96), (9, 64)])
def test_has_the_bits_of_the_expanded_bf16_product(
    counts: list[int], shape: tuple[int, int]
) -> None:
    n, k = shape
    rng = np.random.default_rng(sum(counts) + n)
    blocks, scales = experts(rng, len(counts), n, k)
    x = from_f32(rng.standard_normal((sum(counts), k), np.float32))
    bias = rng.standard_normal((len(counts), n), np.float32)
    offsets = np.concatenate([[0], np.cumsum(counts)])
    packed = pack_mxfp4(blocks, scales)
    expanded = []
    for e in range(len(counts)):
        again = unpack_mxfp4(packed, e)
        np.testing.assert_array_equal(again[0], blocks[e])
        np.testing.assert_array_equal(again[1], scales[e])
        values = dequantize_mxfp4_ref(blocks[e], scales[e]).astype(np.float32)
        expanded.append(from_f32(values))
        np.testing.assert_array_equal(to_f32(expanded[-1]), values)  # exact in BF16
    for b in (None, bias):
        np.testing.assert_array_equal(
            grouped_gemm_mxfp4(x, packed, offsets, b),
            grouped_gemm(x, pack_experts(expanded), offsets, b),
        )


@pytest.mark.parametrize("shape", [(64, 32), (70, 96), (9, 64), (130, 32)])
def test_packing_has_the_layout_of_its_reference(shape: tuple[int, int]) -> None:
    blocks, scales = experts(np.random.default_rng(5), 3, *shape)
    packed = pack_mxfp4(blocks, scales)
    with jit.using("reference"):
        again = pack_mxfp4(blocks, scales)
    np.testing.assert_array_equal(packed.codes, again.codes)
    np.testing.assert_array_equal(packed.scales, again.scales)
    column, k = shape[0] - 1, 3  # one code, by the layout's own words
    word = packed.codes.view(np.uint16).reshape(3, -1, shape[1] // 2, 16, 2)
    found = word[2, column // 64, k // 2, column % 16, k % 2] >> (column % 64 // 16 * 4) & 15
    assert found == blocks[2][column, 0, k // 2] >> 4
    assert packed.codes.ctypes.data % 64 == packed.scales.ctypes.data % 64 == 0


def test_an_expert_is_packed_into_its_place() -> None:
    blocks, scales = experts(np.random.default_rng(6), 3, 20, 64)
    packed = new_mxfp4(3, 20, 64)
    for e in (2, 0, 1):
        pack_mxfp4_expert(packed, e, blocks[e], scales[e])
    for mine, whole in zip(packed, pack_mxfp4(blocks, scales), strict=True):
        np.testing.assert_array_equal(mine, whole)
    with pytest.raises(ValueError, match="expert 3, expected 0 to 2"):
        pack_mxfp4_expert(packed, 3, blocks[0], scales[0])
    with pytest.raises(ValueError, match=r"new_mxfp4: 2 experts \(20, 48\), expected .* of 32 col"):
        new_mxfp4(2, 20, 48)
    for wrong in (packed._replace(codes=packed.codes[:-1]), packed._replace(num_experts=4)):
        with pytest.raises(ValueError, match=r"weight\.codes has shape"):
            pack_mxfp4_expert(wrong, 0, blocks[0], scales[0])


def test_scales_at_the_ends_of_the_range() -> None:
    blocks = np.full((1, 2, 16), 0x71, np.uint8)  # 0.5 and 6
    scales = np.array([[2, 252]], np.uint8)
    one_hot = np.zeros((64, 64), np.float32)
    np.fill_diagonal(one_hot, 1)
    offsets = np.array([0, 64])
    c = grouped_gemm_mxfp4(from_f32(one_hot), pack_mxfp4([blocks], [scales]), offsets)
    np.testing.assert_array_equal(c[:, 0], dequantize_mxfp4_ref(blocks, scales)[0])


def test_a_row_does_not_depend_on_the_others_or_on_threads() -> None:
    rng = np.random.default_rng(2)
    packed = pack_mxfp4(*experts(rng, 2, 130, 64))
    x, offsets = from_f32(rng.standard_normal((11, 64), np.float32)), np.array([0, 7, 11])
    whole, threads = grouped_gemm_mxfp4(x, packed, offsets), jit.num_threads()
    for r in range(11):
        alone = np.array([0, 1, 1]) if r < 7 else np.array([0, 0, 1])
        np.testing.assert_array_equal(
            grouped_gemm_mxfp4(x[r : r + 1], packed, alone), whole[r : r + 1]
        )
    try:
        jit.set_num_threads(1)
        np.testing.assert_array_equal(grouped_gemm_mxfp4(x, packed, offsets), whole)
    finally:
        jit.set_num_threads(threads)


def test_reference_mode_runs_the_reference() -> None:
    rng = np.random.default_rng(3)
    packed = pack_mxfp4(*experts(rng, 2, 20, 64))
    x, offsets = from_f32(rng.standard_normal((4, 64), np.float32)), np.array([0, 3, 4])
    with jit.using("reference"):
        c = grouped_gemm_mxfp4(x, packed, offsets)
    ref = grouped_gemm_mxfp4_ref(x, packed, offsets)
    np.testing.assert_array_equal(c, ref.astype(np.float32))
    np.testing.assert_allclose(grouped_gemm_mxfp4(x, packed, offsets), ref, rtol=1e-4, atol=1e-4)


def test_bad_input_names_the_argument() -> None:
    blocks, scales = experts(np.random.default_rng(4), 1, 4, 32)
    packed = pack_mxfp4(blocks, scales)
    with pytest.raises(ValueError, match=r"scales\[0\] holds 1 to 1, expected 2 to 252"):
        pack_mxfp4(blocks, [np.ones((4, 1), np.uint8)])
    with pytest.raises(ValueError, match=r"scales\[0\] has shape \(4, 2\), expected \(4, 1\)"):
        pack_mxfp4(blocks, [np.full((4, 2), 127, np.uint8)])
    with pytest.raises(ValueError, match="found 1 blocks and 0 scales"):
        pack_mxfp4(blocks, [])
    with pytest.raises(TypeError, match="x has dtype float32, expected uint16"):
        grouped_gemm_mxfp4(np.zeros((1, 32), np.float32), packed, np.array([0, 1]))
    with pytest.raises(ValueError, match="offsets must ascend from 0 to 1"):
        grouped_gemm_mxfp4(np.zeros((1, 32), np.uint16), packed, np.array([0, 2]))
