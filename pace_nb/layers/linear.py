"""`Linear` and `FusedLinear`: y = x W^T + b over a weight packed once at load.

Knows how checkpoint tensors become one packed weight. Does not know the packed layout
(`kernels/gemm.py`) or what the product means. A fused layer declares its parts in one mapping, part
name -> output rows:

    FusedLinear(hidden_size, {"q_proj": 4096, "k_proj": 1024, "v_proj": 1024})

reads the sibling tensors `q_proj.weight`, `k_proj.weight`, `v_proj.weight`, stacks them along the
outputs in that order, and computes all of them in one pass over x.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pace_nb.kernels import gemm
from pace_nb.layers.module import Module, Shape, sibling
from pace_nb.layers.weights import Float32Array, Weights


class Linear(Module):
    """y[T, N] f32 = x[T, K] @ weight[N, K]^T + bias[N]; x in storage dtype, bias f32."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool = False) -> None:
        self.in_features = in_features
        self.out_features = out_features
        self._bias_wanted = bias
        self._weight: gemm.PackedWeight
        self._bias: Float32Array | None = None

    def _part_names(self, name: str) -> list[tuple[str, int]]:
        """(checkpoint name, output rows) of the tensors that are stacked."""
        return [(name, self.out_features)]

    def tensors(self, name: str) -> Iterator[tuple[str, Shape]]:
        for part, rows in self._part_names(name):
            yield f"{part}.weight", (rows, self.in_features)
            if self._bias_wanted:
                yield f"{part}.bias", (rows,)

    def load(self, weights: Weights, name: str = "") -> None:
        self._weight = gemm.new_weight(self.out_features, self.in_features, weights.storage_dtype)
        self._pack(weights, name, partial(gemm.pack_rows, self._weight))
        self._bias = self._load_bias(weights, name)

    def _pack(self, weights: Weights, name: str, pack_rows: PackRows) -> None:
        """Give `pack_rows` the tensors, stacked."""
        tensors = [(f"{part}.weight", rows) for part, rows in self._part_names(name)]
        pack(weights, tensors, self.in_features, pack_rows)

    def _load_bias(self, weights: Weights, name: str) -> Float32Array | None:
        """f32[N], stacked as the tensors are."""
        if not self._bias_wanted:
            return None
        parts = self._part_names(name)
        return np.concatenate([weights.vector(f"{part}.bias", (rows,)) for part, rows in parts])

    def __call__(self, x: NDArray[Any], out: Float32Array | None = None) -> Float32Array:
        """x[T, K] storage dtype -> f32[T, N], `out` where it is given. ValueError naming the shapes
        when they do not fit."""
        return gemm.gemm(x, self._weight, self._bias, out)


class FusedLinear(Linear):
    """Several projections of one input, computed as one; output columns in the order of `parts`."""

    def __init__(self, in_features: int, parts: Mapping[str, int], *, bias: bool = False) -> None:
        super().__init__(in_features, sum(parts.values()), bias=bias)
        self._parts = dict(parts)

    def _part_names(self, name: str) -> list[tuple[str, int]]:
        return [(sibling(name, part), rows) for part, rows in self._parts.items()]


# (first row, rows[n, K]) -> are they all finite; puts them into a weight.
PackRows = Callable[[int, NDArray[Any]], bool]


def pack(
    weights: Weights, tensors: Sequence[tuple[str, int]], in_features: int, pack_rows: PackRows
) -> None:
    """Tensors, each of a name and so many rows, stacked and packed while they are read.

    ModelFormatError naming the tensor that holds a NaN or infinity.
    """
    row0 = 0
    for name, rows in tensors:
        shape = rows, in_features
        for block in weights.rows(name, shape):
            if not pack_rows(row0, block):
                raise weights.not_finite(name, shape)
            row0 += len(block)
