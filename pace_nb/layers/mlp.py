"""`GatedMLP`, `MLP` and `ACTIVATIONS`: the feed-forward half of a decoder layer.

Knows the names `gate_proj`, `up_proj`, `down_proj` (Llama, Qwen, Mistral, Gemma) and which
activation an HF name means. Does not know the arithmetic (`kernels/mlp.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pace_nb.errors import UnsupportedModelError
from pace_nb.kernels import mlp
from pace_nb.layers.linear import Linear
from pace_nb.layers.module import Module, sibling
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


# Tokens whose hidden values exist at a time: they stay in L2 and L3 between the two products.
TILE = 256


def activation_kind(name: str) -> str:
    """Kernel name of an HF activation. UnsupportedModelError naming the supported ones."""
    if name not in ACTIVATIONS:
        raise UnsupportedModelError(
            f"activation {name!r} is not supported, supported: {', '.join(sorted(ACTIVATIONS))}"
        )
    return ACTIVATIONS[name]


class ActivatedLinear(Linear):
    """act(gate(x)) * up(x), or, not gated, act(fc1(x)): [T, F] in storage dtype.

    out_features: 2 F where gated, else F. parts: names of the tensors, siblings of this one, that
    hold equal shares of the rows; none if this one holds all.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kind: str,
        *,
        gated: bool,
        bias: bool = False,
        parts: Sequence[str] = (),
    ) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self._kind = kind
        self._gated = gated
        self._parts = tuple(parts)
        self._packed: mlp.MLPWeight

    def _part_names(self, name: str) -> list[tuple[str, int]]:
        if not self._parts:
            return super()._part_names(name)
        rows = self.out_features // len(self._parts)
        return [(sibling(name, part), rows) for part in self._parts]

    def load(self, weights: Weights, name: str = "") -> None:
        lanes = mlp.GATE_AND_UP if self._gated else 1
        bias = self._load_bias(weights, name)
        self._packed = mlp.new_mlp_weight(
            self.out_features // lanes,
            self.in_features,
            weights.storage_dtype,
            gated=self._gated,
            biases=None if bias is None else bias.reshape(lanes, -1),
        )
        self._pack(weights, name, partial(mlp.pack_mlp_rows, self._packed))

    def __call__(self, x: NDArray[Any], out: NDArray[Any] | None = None) -> NDArray[Any]:
        """x storage[T, K] -> storage[T, F], `out` where it is given."""
        return mlp.mlp(x, self._packed, self._kind, out)


def feed_forward(x: NDArray[Any], first: ActivatedLinear, second: Linear) -> Float32Array:
    """second(first(x)), a tile of tokens at a time. Rows do not depend on each other."""
    out = np.empty((len(x), second.out_features), np.float32)
    hidden = np.empty((min(len(x), TILE), second.in_features), x.dtype)
    for start in range(0, len(x), TILE):
        rows = x[start : start + TILE]
        second(first(rows, hidden[: len(rows)]), out[start : start + TILE])
    return out


class GatedMLP(Module):
    """down(act(gate(x)) * up(x)), gate and up one packed weight. `hidden_act` is the HF name.

    parts: () where the checkpoint has both as one tensor, `gate_up_proj`.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        hidden_act: str,
        *,
        bias: bool = False,
        parts: Sequence[str] = ("gate_proj", "up_proj"),
    ) -> None:
        self.gate_up_proj = ActivatedLinear(
            hidden_size,
            2 * intermediate_size,
            activation_kind(hidden_act),
            gated=True,
            bias=bias,
            parts=parts,
        )
        self.down_proj = Linear(intermediate_size, hidden_size, bias=bias)

    def __call__(self, x: NDArray[Any]) -> Float32Array:
        """x[T, E] storage dtype -> f32[T, E]."""
        return feed_forward(x, self.gate_up_proj, self.down_proj)


class MLP(Module):
    """fc2(act(fc1(x))), the two named as the checkpoint names them. Used by OPT, Phi and GPT-J."""

    def __init__(
        self, hidden_size: int, intermediate_size: int, hidden_act: str, *, bias: bool = True
    ) -> None:
        kind = activation_kind(hidden_act)
        self.fc1 = ActivatedLinear(hidden_size, intermediate_size, kind, gated=False, bias=bias)
        self.fc2 = Linear(intermediate_size, hidden_size, bias=bias)

    def __call__(self, x: NDArray[Any]) -> Float32Array:
        """x[T, E] storage dtype -> f32[T, E]."""
        return feed_forward(x, self.fc1, self.fc2)
