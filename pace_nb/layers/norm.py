"""`RMSNorm` and `LayerNorm`, with the residual addition before them; norms of heads.

Knows the weight, eps and the dtype of the GEMM input that follows. Does not know the arithmetic
(`kernels/norm.py`). The residual stream is float32 and belongs to the caller; `delta` is what the
previous sub-layer adds to it:

    y = norm(residual)
    y = norm(residual, delta)                   # residual += delta in place, then normalize
    y = norm(residual, Normed(delta, inner))    # residual += inner(delta), then normalize
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pace_nb.kernels import norm
from pace_nb.kernels.rope_kv_write import HeadNorms
from pace_nb.layers.module import Module, Shape
from pace_nb.layers.weights import Float32Array, Weights


class RMSNorm(Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, E values; output in storage dtype."""

    def __init__(self, size: int, eps: float) -> None:
        self.size = size
        self.eps = eps
        self.weight: Float32Array
        self._dtype: np.dtype[Any]

    def tensors(self, name: str) -> Iterator[tuple[str, Shape]]:
        yield f"{name}.weight", (self.size,)

    def load(self, weights: Weights, name: str = "") -> None:
        self.weight = weights.vector(f"{name}.weight", (self.size,))
        self._dtype = weights.storage_dtype

    def __call__(
        self, residual: Float32Array, delta: Float32Array | Normed | None = None
    ) -> NDArray[Any]:
        """residual f32[T, E], delta f32[T, E] (added to residual in place) -> storage[T, E]."""
        out = np.empty(residual.shape, self._dtype)
        if delta is None:
            return norm.rms_norm(residual, self.weight, self.eps, out=out)
        inner = None
        if isinstance(delta, Normed):
            same = delta.norm.eps == self.eps  # the kernel has one for both
            delta, inner = (delta.x, delta.norm.weight) if same else (delta.value(), None)
        return norm.add_rms_norm(delta, residual, self.weight, self.eps, out=out, inner=inner)


class Normed(NamedTuple):
    """What a sub-layer gives to the residual stream: `norm` of x f32[T, E], not yet computed, as
    the RMSNorm that follows does it, in its one pass if both have one eps."""

    x: Float32Array
    norm: RMSNorm

    def value(self) -> Float32Array:
        """f32[T, E]."""
        return norm.rms_norm(self.x, self.norm.weight, self.norm.eps)


def head_norms(q_norm: RMSNorm, k_norm: RMSNorm) -> HeadNorms:
    """RMSNorm over the D values of every head of q and k, as attention applies it before rotating.

    ValueError unless both have one eps.
    """
    if q_norm.eps != k_norm.eps:
        raise ValueError(f"head_norms: eps are {q_norm.eps} and {k_norm.eps}, expected one")
    return HeadNorms(q_norm.weight, k_norm.weight, q_norm.eps)


class HeadL2Norm:
    """x / sqrt(mean(x^2) + eps) over the D values of every head, as Llama 4 normalizes queries and
    keys after rotating them."""

    def __init__(self, eps: float) -> None:
        self.eps = eps

    def __call__(self, heads: Float32Array) -> Float32Array:
        """f32[T, H, D] -> f32[T, H, D], its own array."""
        rows = heads.reshape(-1, heads.shape[-1])
        ones = np.ones(heads.shape[-1], np.float32)
        return norm.rms_norm(rows, ones, self.eps).reshape(heads.shape)


class LayerNorm(Module):
    """(x - mean) / sqrt(var + eps) * weight + bias over the last axis; output in storage dtype."""

    def __init__(self, size: int, eps: float, *, bias: bool = True) -> None:
        self.size = size
        self.eps = eps
        self._bias_wanted = bias
        self._weight: Float32Array
        self._bias: Float32Array | None = None
        self._dtype: np.dtype[Any]

    def tensors(self, name: str) -> Iterator[tuple[str, Shape]]:
        yield f"{name}.weight", (self.size,)
        if self._bias_wanted:
            yield f"{name}.bias", (self.size,)

    def load(self, weights: Weights, name: str = "") -> None:
        self._weight = weights.vector(f"{name}.weight", (self.size,))
        if self._bias_wanted:
            self._bias = weights.vector(f"{name}.bias", (self.size,))
        self._dtype = weights.storage_dtype

    def __call__(self, residual: Float32Array, delta: Float32Array | None = None) -> NDArray[Any]:
        """residual f32[T, E], delta f32[T, E] (added to residual in place) -> storage[T, E]."""
        out = np.empty(residual.shape, self._dtype)
        if delta is None:
            return norm.layer_norm(residual, self._weight, self._bias, self.eps, out=out)
        return norm.add_layer_norm(delta, residual, self._weight, self._bias, self.eps, out=out)
