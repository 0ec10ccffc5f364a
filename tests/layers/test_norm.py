"""Norms against NumPy, and the residual addition they carry."""

from __future__ import annotations

import numpy as np
import pytest

from pace_nb.layers.norm import HeadL2Norm, LayerNorm, Normed, RMSNorm, head_norms


def rms(x, weight, eps):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def layer(x, weight, bias, eps):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps) * weight + bias


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", [RMSNorm, LayerNorm])
def test_norm_with_and_without_the_addition(load, rng, dtype, value, kind, bias):
    eps = 0.05  # large enough to matter
    weight, shift = rng.standard_normal((2, 37)).astype(np.float32)
    tensors = {"weight": weight}
    if kind is LayerNorm and bias:
        tensors["bias"] = shift
    else:
        shift = np.zeros_like(shift)
    module = RMSNorm(37, eps) if kind is RMSNorm else LayerNorm(37, eps, bias=bias)
    load(module, dtype, tensors)
    residual = rng.standard_normal((4, 37)).astype(np.float32)
    delta = rng.standard_normal((4, 37)).astype(np.float32)
    total = residual + delta

    def expected(x):
        x = x.astype(np.float64)
        return rms(x, weight, eps) if kind is RMSNorm else layer(x, weight, shift, eps)

    bound = 1e-5 if dtype == "float32" else 2**-8
    kept = residual.copy()
    found = module(residual)
    assert found.dtype == (np.float32 if dtype == "float32" else np.uint16)
    np.testing.assert_allclose(value(found), expected(residual), rtol=bound, atol=1e-5)
    np.testing.assert_array_equal(residual, kept)
    found = module(residual, delta)
    np.testing.assert_allclose(value(found), expected(total), rtol=bound, atol=1e-5)
    np.testing.assert_array_equal(residual, total)


def test_what_is_added_may_be_normalized_first(load, rng, dtype, value):
    outer, inner = RMSNorm(37, 0.05), RMSNorm(37, 0.05)
    weights = rng.standard_normal((2, 37)).astype(np.float32)
    for module, weight in zip((outer, inner), weights, strict=True):
        load(module, dtype, {"weight": weight})
    residual, x = rng.standard_normal((2, 4, 37)).astype(np.float32)
    total = residual + Normed(x, inner).value()
    np.testing.assert_allclose(total - residual, rms(x, weights[1], 0.05), atol=1e-5)
    found = outer(residual, Normed(x, inner))
    np.testing.assert_array_equal(residual, total)
    bound = 1e-5 if dtype == "float32" else 2**-8
    np.testing.assert_allclose(value(found), rms(total, weights[0], 0.05), rtol=bound, atol=1e-5)


def test_what_is_added_is_normalized_with_its_own_eps(load, rng, dtype, value):
    outer, inner = RMSNorm(37, 0.05), RMSNorm(37, 3.0)
    weights = rng.standard_normal((2, 37)).astype(np.float32)
    for module, weight in zip((outer, inner), weights, strict=True):
        load(module, dtype, {"weight": weight})
    residual, x = rng.standard_normal((2, 4, 37)).astype(np.float32)
    total = residual + rms(x, weights[1], 3.0)
    found = outer(residual, Normed(x, inner))
    np.testing.assert_allclose(residual, total, atol=1e-5)
    bound = 1e-5 if dtype == "float32" else 2**-8
    np.testing.assert_allclose(value(found), rms(total, weights[0], 0.05), rtol=bound, atol=1e-5)


def test_norms_of_heads_have_one_eps():
    with pytest.raises(ValueError, match="head_norms: eps are 1e-06 and 1e-05, expected one"):
        head_norms(RMSNorm(20, 1e-6), RMSNorm(20, 1e-5))


def test_norms_of_heads_are_the_two_weights(load, rng):
    q, k = RMSNorm(20, 0.05), RMSNorm(20, 0.05)
    weights = rng.standard_normal((2, 20)).astype(np.float32)
    for module, weight in zip((q, k), weights, strict=True):
        load(module, "float32", {"weight": weight})
    norms = head_norms(q, k)
    np.testing.assert_array_equal(norms.q, weights[0])
    np.testing.assert_array_equal(norms.k, weights[1])
    assert norms.eps == 0.05


def test_heads_are_normalized_without_a_weight(rng):
    heads = rng.standard_normal((3, 7, 20)).astype(np.float32)[:, 2:6]
    found = HeadL2Norm(0.05)(heads)
    np.testing.assert_allclose(found, rms(heads.astype(np.float64), 1.0, 0.05), atol=1e-6)
    assert not np.shares_memory(found, heads)
