"""`Embedding`: token ids to rows, and the tied output head, from one packed copy.

Knows that a tied head multiplies with the embedding's own weight. Does not know token ids' meaning;
that they are in range was checked where they entered (and is checked again here, in one vectorised
comparison per step).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pace_nb.errors import InvalidRequestError
from pace_nb.kernels import gemm
from pace_nb.layers.linear import pack
from pace_nb.layers.module import Module, Shape
from pace_nb.layers.weights import Float32Array, Weights


class Embedding(Module):
    """weight[V, E], packed as a GEMM weight so that the head and the lookup share it."""

    def __init__(self, num_embeddings: int, size: int) -> None:
        self.num_embeddings = num_embeddings
        self.size = size
        self._weight: gemm.PackedWeight

    def tensors(self, name: str) -> Iterator[tuple[str, Shape]]:
        yield f"{name}.weight", (self.num_embeddings, self.size)

    def load(self, weights: Weights, name: str = "") -> None:
        self._weight = gemm.new_weight(self.num_embeddings, self.size, weights.storage_dtype)
        tensors = [(f"{name}.weight", self.num_embeddings)]
        pack(weights, tensors, self.size, partial(gemm.pack_rows, self._weight))

    def __call__(self, token_ids: NDArray[np.int32]) -> Float32Array:
        """int32[T] -> f32[T, E]. InvalidRequestError for an id outside 0 .. V-1."""
        outside = (token_ids < 0) | (token_ids >= self.num_embeddings)
        if outside.any():
            first = int(token_ids[np.argmax(outside)])
            raise InvalidRequestError(
                f"token id {first} is outside the vocabulary, 0 to {self.num_embeddings - 1}"
            )
        return gemm.gather_rows(self._weight, token_ids)

    def project(self, x: NDArray[Any]) -> Float32Array:
        """The tied head: x[R, E] storage dtype -> logits f32[R, V]."""
        return gemm.gemm(x, self._weight, None)
