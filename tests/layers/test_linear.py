"""A linear layer is x W^T + b; a fused one is its parts side by side, to the bit."""

from __future__ import annotations

import numpy as np
import pytest

from pace_nb.errors import ModelFormatError
from pace_nb.layers.linear import FusedLinear, Linear
from pace_nb.layers.module import Module


@pytest.mark.parametrize("bias", [False, True])
def test_product_and_bias(load, rng, dtype, stored, bias):
    x, x64 = stored(rng.standard_normal((5, 24)))
    w, w64 = stored(rng.standard_normal((33, 24)))
    b = rng.standard_normal(33).astype(np.float32)
    layer = Linear(24, 33, bias=bias)
    source = load(layer, dtype, {"weight": w} | ({"bias": b} if bias else {}))
    expected = x64 @ w64.T + (b if bias else 0.0)
    y = layer(x)
    assert y.dtype == np.float32
    np.testing.assert_allclose(y, expected, atol=1e-5, rtol=1e-5)
    assert "layer.weight" in source.released


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("part", ["q_proj.weight", "v_proj.weight", "k_proj.bias"])
def test_what_is_not_finite_is_refused_by_its_tensor(load, rng, dtype, part, value):
    """In each part, at its end; everything beside it is sound."""
    tensors = {}
    for name in ("q_proj", "k_proj", "v_proj"):
        tensors[f"{name}.weight"] = rng.standard_normal((70, 5)).astype(np.float32)
        tensors[f"{name}.bias"] = rng.standard_normal(70).astype(np.float32)
    sizes = {"q_proj": 70, "k_proj": 70, "v_proj": 70}
    load(Parent(FusedLinear(5, sizes, bias=True)), dtype, tensors)
    tensors[part][(-1,) * tensors[part].ndim] = value
    with pytest.raises(ModelFormatError, match=rf"tensor layer\.{part} holds {value} at \[69"):
        load(Parent(FusedLinear(5, sizes, bias=True)), dtype, tensors)


def test_fused_parts_lie_side_by_side(load, rng, dtype, stored):
    x, _ = stored(rng.standard_normal((3, 20)))
    sizes = {"q_proj": 40, "k_proj": 6, "v_proj": 6}
    tensors, columns = {}, []
    for part, rows in sizes.items():
        tensors[f"{part}.weight"] = stored(rng.standard_normal((rows, 20)))[0]
        tensors[f"{part}.bias"] = rng.standard_normal(rows).astype(np.float32)
        alone = Linear(20, rows, bias=True)
        load(
            alone,
            dtype,
            {"weight": tensors[f"{part}.weight"], "bias": tensors[f"{part}.bias"]},
        )
        columns.append(alone(x))
    fused = Parent(FusedLinear(20, sizes, bias=True))
    load(fused, dtype, tensors)
    np.testing.assert_array_equal(fused.qkv_proj(x), np.concatenate(columns, axis=1))


def test_missing_bias_and_wrong_shape_are_found_before_loading(load, rng):
    w = rng.standard_normal((4, 8)).astype(np.float32)
    with pytest.raises(ModelFormatError, match=r"layer\.bias is missing.*\[4\]"):
        load(Linear(8, 4, bias=True), "float32", {"weight": w})
    with pytest.raises(ModelFormatError, match=r"layer\.weight has shape \[4, 8\].*\[8, 4\]"):
        load(Linear(4, 8), "float32", {"weight": w})


class Parent(Module):
    """Holds the fused layer as `qkv_proj`; its parts are then siblings of that name."""

    def __init__(self, layer):
        self.qkv_proj = layer
