"""`GatedMLP` and `ACTIVATIONS`: the feed-forward half of a decoder layer.

Knows the names `gate_proj`, `up_proj`, `down_proj` (Llama, Qwen, Mistral, Gemma) and which
activation an HF name means. Does not know the activations' arithmetic (`kernels/activation.py`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pace_nb.errors import UnsupportedModelError
from pace_nb.kernels import activation
from pace_nb.layers.linear import FusedLinear, Linear
from pace_nb.layers.module import Module
from pace_nb.layers.weights import Float32Array, Weights

# HF name -> kernel. The erf and the tanh form of GELU differ by up to 5e-4: `gelu` is erf,
# `gelu_new`, `gelu_fast` and `gelu_pytorch_tanh` are three spellings of tanh (transformers,
# activations.py).
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


# Tokens whose intermediate values exist at a time. They stay in L3 (16 MB of float32 for 16,384
# columns), and glibc gives them memory it has: from 32 MB on every array is new pages, which cost
# the product that writes them a tenth of its time. Rows do not depend on each other.
TILE = 256


def activation_kind(name: str) -> str:
    """Kernel name of an HF activation. UnsupportedModelError naming the supported ones."""
    if name not in ACTIVATIONS:
        raise UnsupportedModelError(
            f"activation {name!r} is not supported, supported: {', '.join(sorted(ACTIVATIONS))}"
        )
    return ACTIVATIONS[name]


class GatedMLP(Module):
    """down(act(gate(x)) * up(x)), gate and up one packed weight. `hidden_act` is the HF name."""

    def __init__(
        self, hidden_size: int, intermediate_size: int, hidden_act: str, *, bias: bool = False
    ) -> None:
        self._kind = activation_kind(hidden_act)
        self._dtype: np.dtype[Any]
        self.gate_up_proj = FusedLinear(
            hidden_size, {"gate_proj": intermediate_size, "up_proj": intermediate_size}, bias=bias
        )
        self.down_proj = Linear(intermediate_size, hidden_size, bias=bias)

    def load(self, weights: Weights, name: str = "") -> None:
        super().load(weights, name)
        self._dtype = weights.storage_dtype

    def __call__(self, x: NDArray[Any]) -> Float32Array:
        """x[T, E] storage dtype -> f32[T, E]."""
        out = np.empty((len(x), self.down_proj.out_features), np.float32)
        for start in range(0, len(x), TILE):
            rows = slice(start, start + TILE)
            gate_up = self.gate_up_proj(x[rows])
            hidden = np.empty((len(gate_up), self.down_proj.in_features), self._dtype)
            activation.gated_activation(gate_up, self._kind, out=hidden)
            self.down_proj(hidden, out=out[rows])
        return out


class MLP(Module):
    """fc2(act(fc1(x))), the two named as the checkpoint names them. Used by OPT, Phi and GPT-J."""

    def __init__(
        self, hidden_size: int, intermediate_size: int, hidden_act: str, *, bias: bool = True
    ) -> None:
        self._kind = activation_kind(hidden_act)
        self._dtype: np.dtype[Any]
        self.fc1 = Linear(hidden_size, intermediate_size, bias=bias)
        self.fc2 = Linear(intermediate_size, hidden_size, bias=bias)

    def load(self, weights: Weights, name: str = "") -> None:
        super().load(weights, name)
        self._dtype = weights.storage_dtype

    def __call__(self, x: NDArray[Any]) -> Float32Array:
        """x[T, E] storage dtype -> f32[T, E]."""
        out = np.empty((len(x), self.fc2.out_features), np.float32)
        for start in range(0, len(x), TILE):
            rows = slice(start, start + TILE)
            inner = self.fc1(x[rows])
            hidden = np.empty((len(inner), self.fc2.in_features), self._dtype)
            activation.activation(inner, self._kind, out=hidden)
            self.fc2(hidden, out=out[rows])
        return out
