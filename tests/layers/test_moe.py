"""Mixtures of experts against plain loops: routing, layouts of checkpoints, MXFP4, invariance."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from pace_nb.errors import ModelFormatError
from pace_nb.kernels import activation, jit, quant
from pace_nb.kernels.gemm import NR
from pace_nb.layers.moe import (
    ExpertLinear,
    Experts,
    MXFP4ExpertLinear,
    sigmoid,
    softmax,
    top_experts,
)

X, E, F, CHOICES = 5, 64, 32, 2
SILU = partial(activation.gated_activation, kind="silu")


# ---- routing -------------------------------------------------------------------------------------
def test_the_largest_come_first_and_ties_go_to_the_lower_expert():
    logits = np.float32([[1, 3, 2, 3], [0, 0, 0, 0], [-1, -2, -1, -1], [5, np.nan, 7, 6]])
    chosen, values = top_experts(logits, 3)
    np.testing.assert_array_equal(chosen, [[1, 3, 2], [0, 1, 2], [0, 2, 3], [2, 3, 0]])
    np.testing.assert_array_equal(values, [[3, 3, 2], [0, 0, 0], [-1, -1, -1], [7, 6, 5]])
    signed = np.float32([[-0.0, 0.0, -0.0]])
    np.testing.assert_array_equal(top_experts(signed, 2)[0], [[0, 1]])  # -0.0 equals 0.0


def test_routing_of_a_row_does_not_depend_on_the_others(rng):
    """To the bit: NumPy's vector loops must not treat the ends of an array differently."""
    logits = (rng.standard_normal((97, 32)) * 4).astype(np.float32)
    for k in (1, 4, 9, 32):
        chosen, values = top_experts(logits, k)
        weights, scores = softmax(values), sigmoid(values)
        for t in range(97):
            one, its_values = top_experts(logits[t : t + 1], k)
            np.testing.assert_array_equal(one[0], chosen[t])
            np.testing.assert_array_equal(softmax(its_values)[0], weights[t])
            np.testing.assert_array_equal(sigmoid(its_values)[0], scores[t])


def test_softmax_and_sigmoid_are_the_formulas_and_bear_extremes():
    x = np.float32([[0, 1, -2], [200, 100, -300]])
    e = np.exp(x.astype(np.float64) - x.max(axis=1, keepdims=True))
    np.testing.assert_array_equal(softmax(x), (e / e.sum(axis=1, keepdims=True)).astype("f4"))
    expected = [[0.5, 0.7310585786, 0.1192029220], [1, 1, 0]]
    np.testing.assert_allclose(sigmoid(x), expected, rtol=1e-7, atol=1e-40)
    np.testing.assert_array_equal(sigmoid(np.float32([-3e38, 3e38])), [0, 1])
    assert np.isnan(softmax(np.float32([[np.nan, 1]]))).all()


# ---- one projection ------------------------------------------------------------------------------
def products(x64, offsets, w64, bias):
    """x rows of expert e times w64[e] [K, N] plus bias[e], float64."""
    return np.concatenate(
        [x64[offsets[e] : offsets[e + 1]] @ w64[e] + bias[e] for e in range(len(w64))]
    )


@pytest.mark.parametrize("interleaved", [False, True])
def test_a_projection_from_float_tensors(load, rng, dtype, stored, interleaved):
    n, k, counts = 10, 7, [2, 0, 3, 1, 0]  # odd sizes; experts without rows
    w, w64 = stored(rng.standard_normal((X, k, n)))
    bias = rng.standard_normal((X, n)).astype(np.float32)
    x, x64 = stored(rng.standard_normal((sum(counts), k)))
    offsets = np.concatenate([[0], np.cumsum(counts)])
    linear = ExpertLinear(X, k, n, bias=True, interleaved=interleaved)
    source = load(linear, dtype, {"w": w, "w_bias": bias}, "layer.w")
    assert source.released == ["layer.w", "layer.w_bias"]
    expected = products(x64, offsets, w64, bias)
    if interleaved:
        expected = np.concatenate([expected[:, ::2], expected[:, 1::2]], axis=1)
    np.testing.assert_allclose(linear(x, offsets), expected, atol=1e-5)
    with jit.using("reference"):
        np.testing.assert_allclose(linear(x, offsets), expected, atol=1e-6)


def mxfp4(rng, n, k):
    """(blocks [X, N, K/32, 16], scales [X, N, K/32], their values float64 [X, N, K])."""
    blocks = rng.integers(0, 256, (X, n, k // 32, 16)).astype(np.uint8)
    scales = rng.integers(118, 127, (X, n, k // 32)).astype(np.uint8)
    values = np.stack([quant.dequantize_mxfp4_ref(blocks[e], scales[e]) for e in range(X)])
    return blocks, scales, values


@pytest.mark.parametrize("interleaved", [False, True])
def test_a_projection_from_mxfp4_tensors(load, rng, dtype, stored, interleaved):
    n, k, counts = 10, 64, [2, 0, 3, 1, 0]
    blocks, scales, values = mxfp4(rng, n, k)
    bias = rng.standard_normal((X, n)).astype(np.float32)
    x, x64 = stored(rng.standard_normal((sum(counts), k)))
    offsets = np.concatenate([[0], np.cumsum(counts)])
    linear = MXFP4ExpertLinear(X, k, n, bias=True, interleaved=interleaved)
    tensors = {"w_blocks": blocks, "w_scales": scales, "w_bias": bias}
    source = load(linear, dtype, tensors, "layer.w")
    assert sorted(source.released) == ["layer.w_bias", "layer.w_blocks", "layer.w_scales"]
    expected = products(x64, offsets, values.transpose(0, 2, 1), bias)
    if interleaved:
        expected = np.concatenate([expected[:, ::2], expected[:, 1::2]], axis=1)
    np.testing.assert_allclose(linear(x, offsets), expected, atol=1e-5)
    # BF16 keeps four bits (17/32 byte per weight, in panels of 64 columns); f32 expands.
    held = sum(a.nbytes for a in vars(linear)["_weight"] if isinstance(a, np.ndarray))
    assert held == (X * 64 * k * 17 // 32 if dtype == "bfloat16" else X * NR * k * 4)


def test_mxfp4_has_the_bits_of_the_same_weights_in_bf16(load, rng, stored):
    n, k, counts = 20, 96, [4, 1, 0, 2, 9]
    blocks, scales, values = mxfp4(rng, n, k)
    bits = (values.transpose(0, 2, 1).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    x = (rng.standard_normal((16, k)).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    offsets = np.concatenate([[0], np.cumsum(counts)])
    packed, plain = MXFP4ExpertLinear(X, k, n), ExpertLinear(X, k, n)
    load(packed, "bfloat16", {"w_blocks": blocks, "w_scales": scales}, "layer.w")
    load(plain, "bfloat16", {"w": np.ascontiguousarray(bits)}, "layer.w")
    np.testing.assert_array_equal(packed(x, offsets), plain(x, offsets))


def test_the_scale_of_a_block_of_zeros_means_nothing(load, rng, dtype, stored):
    blocks, scales, values = mxfp4(rng, 10, 64)
    blocks[1, 3, 1], scales[1, 3, 1] = 0x80, 0  # 0 and -0, scale 2^-127
    values[1, 3, 32:] = 0
    x, x64 = stored(rng.standard_normal((3, 64)))
    offsets = np.array([0, 0, 3, 3, 3, 3])
    linear = MXFP4ExpertLinear(X, 64, 10)
    load(linear, dtype, {"w_blocks": blocks, "w_scales": scales}, "layer.w")
    np.testing.assert_allclose(linear(x, offsets), x64 @ values[1].T, atol=1e-5)


@pytest.mark.parametrize(("scale", "code"), [(255, 0), (255, 1), (1, 1), (253, 1)])
def test_a_scale_that_bf16_cannot_hold_is_refused(load, rng, dtype, scale, code):
    blocks, scales, _ = mxfp4(rng, 10, 64)
    blocks[4, 9, 1], scales[4, 9, 1] = code, scale
    with pytest.raises(ModelFormatError, match=rf"layer\.w_scales holds the scale {scale}, exp"):
        load(
            MXFP4ExpertLinear(X, 64, 10), dtype, {"w_blocks": blocks, "w_scales": scales}, "layer.w"
        )


def test_mxfp4_needs_whole_blocks():
    with pytest.raises(ModelFormatError, match=r"have 40 inputs .*, expected a multiple of 32"):
        MXFP4ExpertLinear(X, 40, 8)


# ---- the mixture ---------------------------------------------------------------------------------
@pytest.fixture
def experts(load, rng, dtype, stored):
    """experts(**options) = (loaded Experts, a plain loop over tokens and choices)."""

    def experts(**options):
        up, up64 = stored(rng.standard_normal((X, E, 2 * F)) / 8)
        down, down64 = stored(rng.standard_normal((X, F, E)) / 6)
        tensors = {"gate_up_proj": up, "down_proj": down}
        up_bias, down_bias = np.zeros((X, 2 * F)), np.zeros((X, E))
        if options.get("bias"):
            up_bias, down_bias = (rng.standard_normal(b.shape) for b in (up_bias, down_bias))
            tensors["gate_up_proj_bias"] = up_bias.astype(np.float32)
            tensors["down_proj_bias"] = down_bias.astype(np.float32)
        layer = Experts(X, E, F, SILU, **options)
        load(layer, dtype, tensors)

        def loop(x, chosen, scores):
            y = np.zeros(x.shape)
            for t, i in np.ndindex(chosen.shape):
                e, inward = chosen[t, i], options.get("scale_input", False)
                h = (x[t] * scores[t, i] if inward else x[t]) @ up64[e] + up_bias[e]
                pair = (h[::2], h[1::2]) if options.get("interleaved") else np.split(h, 2)
                gated = activation.gated_activation_ref(np.concatenate(pair)[None], "silu")[0]
                y[t] += (1 if inward else scores[t, i]) * (gated @ down64[e] + down_bias[e])
            return y

        return layer, loop

    return experts


OPTIONS = {
    "as Llama 4": {"scale_input": True},
    "as GPT-OSS": {"bias": True, "interleaved": True},
}


def tokens(rng, stored, count):
    """x, its float64 values, choices (no expert twice), scores."""
    x, x64 = stored(rng.standard_normal((count, E)))
    chosen, values = top_experts(rng.standard_normal((count, X)).astype(np.float32), CHOICES)
    return x, x64, chosen, sigmoid(values)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_matches_a_loop_over_experts(experts, rng, dtype, stored, options):
    layer, loop = experts(**options)
    x, x64, chosen, scores = tokens(rng, stored, 23)
    bound = 1e-5 if dtype == "float32" else 0.03
    expected = loop(x64, chosen, scores)
    np.testing.assert_allclose(layer(x, chosen, scores), expected, atol=bound)
    with jit.using("reference"):
        np.testing.assert_allclose(layer(x, chosen, scores), expected, atol=bound)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_token_does_not_depend_on_the_batch(experts, rng, stored, options):
    """To the bit: alone, in another order, beside tokens that crowd its experts."""
    layer, _ = experts(**options)
    x, _, chosen, scores = tokens(rng, stored, 40)
    whole = layer(x, chosen, scores)
    order = rng.permutation(40)
    np.testing.assert_array_equal(layer(x[order], chosen[order], scores[order]), whole[order])
    for t in range(0, 40, 7):
        one = slice(t, t + 1)
        np.testing.assert_array_equal(layer(x[one], chosen[one], scores[one]), whole[one])
    crowded = np.tile(chosen[:1], (40, 1))
    np.testing.assert_array_equal(layer(x, crowded, scores)[0], whole[0])


def test_no_tokens(experts, stored):
    layer, _ = experts()
    x, _ = stored(np.zeros((0, E)))
    none = np.zeros((0, CHOICES))
    assert layer(x, none.astype(np.int64), none.astype(np.float32)).shape == (0, E)


def test_the_layout_of_a_linear_is_refused(load, rng, stored, dtype):
    """[X, N, K] in place of [X, K, N]; nothing is read before every shape has been compared."""
    up, _ = stored(rng.standard_normal((X, 2 * F, 48)))
    down, _ = stored(rng.standard_normal((X, F, 48)))
    with pytest.raises(
        ModelFormatError, match=r"gate_up_proj has shape \[5, 64, 48\].*\[5, 48, 64"
    ):
        load(Experts(X, 48, F, SILU), dtype, {"gate_up_proj": up, "down_proj": down})
