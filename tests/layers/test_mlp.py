"""Gated and plain MLPs against NumPy, and HF's names of activations."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pace_nb.errors import UnsupportedModelError
from pace_nb.layers.mlp import ACTIVATIONS, MLP, GatedMLP

ERF = np.vectorize(math.erf)
FORMULAS = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "swish": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: 0.5 * x * (1 + ERF(x / math.sqrt(2))),
    "gelu_new": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "gelu_fast": lambda x: 0.5 * x * (1 + np.tanh(0.7978845608 * x * (1 + 0.044715 * x * x))),
    "relu": lambda x: np.maximum(x, 0),
}
FORMULAS["gelu_pytorch_tanh"] = FORMULAS["gelu_new"]


def test_every_name_has_a_formula():
    assert FORMULAS.keys() == ACTIVATIONS.keys()


def weights_of(rng, stored, parts):
    """{name: (out, in)} -> stored tensors with biases, and their float64 values."""
    tensors, values = {}, {}
    for name, (rows, columns) in parts.items():
        w, w64 = stored(rng.standard_normal((rows, columns)) / math.sqrt(columns))
        b = rng.standard_normal(rows).astype(np.float32)
        tensors |= {f"{name}.weight": w, f"{name}.bias": b}
        values[name] = lambda x, w=w64, b=b: x @ w.T + b
    return tensors, values


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gated(load, rng, dtype, stored, name):
    x, x64 = stored(rng.standard_normal((5, 24)) * 2)
    tensors, f = weights_of(
        rng, stored, {"gate_proj": (40, 24), "up_proj": (40, 24), "down_proj": (24, 40)}
    )
    mlp = GatedMLP(24, 40, name, bias=True)
    load(mlp, dtype, tensors)
    expected = f["down_proj"](FORMULAS[name](f["gate_proj"](x64)) * f["up_proj"](x64))
    np.testing.assert_allclose(mlp(x), expected, atol=1e-5 if dtype == "float32" else 0.05)


def test_plain_tells_erf_from_tanh(load, rng, stored, dtype):
    if dtype == "bfloat16":
        pytest.skip("the two differ by less than BF16 resolves")
    x, x64 = stored(rng.standard_normal((64, 24)) * 2)
    tensors, f = weights_of(rng, stored, {"fc1": (40, 24), "fc2": (24, 40)})
    outputs = {}
    for name in ("gelu", "gelu_new", "relu"):
        mlp = MLP(24, 40, name)
        load(mlp, dtype, tensors)
        outputs[name] = mlp(x)
        expected = f["fc2"](FORMULAS[name](f["fc1"](x64)))
        np.testing.assert_allclose(outputs[name], expected, atol=1e-5)
    assert np.abs(outputs["gelu"] - outputs["gelu_new"]).max() > 1e-4


def test_an_unknown_activation_names_the_supported():
    with pytest.raises(UnsupportedModelError, match=r"'mish' is not supported.*gelu_new.*silu"):
        GatedMLP(8, 8, "mish")
