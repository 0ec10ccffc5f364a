"""`Experts`: a feed-forward half made of experts; `top_experts`: which of them a token takes.

Knows how expert tensors lie in a checkpoint, as floats or as MXFP4, and the order of a mixture:
sort the tokens by expert, a grouped product, the gated unit, another product, the weighted sum.
Does not know which scores a family makes of the router's logits, nor the products' arithmetic
(`kernels/moe.py`, `kernels/quant.py`).

    h[t, i] = unit(x[t] @ gate_up_proj[e] + bias) @ down_proj[e] + bias,    e = chosen[t, i]
    y[t]    = sum over i of scores[t, i] * h[t, i];  with scale_input the score multiplies x[t]

| tensor                       | shape                          | multiplied as        |
|------------------------------|--------------------------------|----------------------|
| gate_up_proj, down_proj      | [X, E, 2F], [X, F, E]          | x @ W, unlike Linear |
| .._proj_bias                 | [X, 2F], [X, E]                |                      |
| .._proj_blocks, .._scales    | [X, N, K/32, 16], [X, N, K/32] | x @ W^T (MXFP4)      |

A token's result has the same bits whatever else is in the batch: routing looks at one row at a
time, and so do the products and the sum.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

from pace_nb.errors import ModelFormatError
from pace_nb.kernels import bf16, gemm, moe, quant
from pace_nb.kernels.memory import zeros
from pace_nb.layers.module import Module, Shape
from pace_nb.layers.weights import Float32Array, StorageDtype, Weights

Int64Array = NDArray[np.int64]


class GatedUnit(Protocol):
    """act(gate) * up of rows [gate, up]; `gated_activation` with its kind given, for example."""

    def __call__(self, gate_up: Float32Array, *, out: NDArray[Any]) -> Any:
        """gate_up f32[R, 2F] -> out storage[R, F]."""


# ---- routing -------------------------------------------------------------------------------------
def top_experts(logits: Float32Array, k: int) -> tuple[Int64Array, Float32Array]:
    """The k largest of each row, largest first, the lower expert first where they are equal.

    logits f32[T, X] -> (experts int64[T, k], their logits f32[T, k]). A NaN comes last.
    """
    chosen = np.argsort(-logits, axis=1, kind="stable")[:, :k]
    return np.ascontiguousarray(chosen), np.take_along_axis(logits, chosen, axis=1)


def softmax(logits: Float32Array) -> Float32Array:
    """Over the last axis, computed in float64."""
    with np.errstate(invalid="ignore"):
        x = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
        weights: Float32Array = (x / x.sum(axis=-1, keepdims=True)).astype(np.float32)
    return weights


def sigmoid(logits: Float32Array) -> Float32Array:
    """1 / (1 + exp(-x)), computed in float64."""
    with np.errstate(over="ignore"):
        return (1.0 / (1.0 + np.exp(-logits.astype(np.float64)))).astype(np.float32)


# ---- one projection of all experts ---------------------------------------------------------------
class ExpertLinear(Module):
    """y[r] = x[r] @ weight[e] + bias[e], where e is the expert of row r; weight [X, K, N].

    interleaved: the outputs in the checkpoint are gate, up, gate, up, ...; here, all gates come
    first (the bits of an output do not depend on its place).
    """

    def __init__(
        self,
        num_experts: int,
        in_features: int,
        out_features: int,
        *,
        bias: bool = False,
        interleaved: bool = False,
    ) -> None:
        self.num_experts = num_experts
        self.in_features = in_features
        self.out_features = out_features
        self._bias_wanted = bias
        self._order = slice(None) if not interleaved else _evens_first(out_features)
        self._weight: moe.PackedExperts | quant.PackedMXFP4
        self._bias: Float32Array | None = None

    def _weight_tensors(self, name: str) -> Iterator[tuple[str, Shape]]:
        yield name, (self.num_experts, self.in_features, self.out_features)

    def tensors(self, name: str) -> Iterator[tuple[str, Shape]]:
        yield from self._weight_tensors(name)
        if self._bias_wanted:
            yield f"{name}_bias", (self.num_experts, self.out_features)

    def load(self, weights: Weights, name: str = "") -> None:
        self._weight = self._pack(weights, name)
        if self._bias_wanted:
            bias = weights.vector(f"{name}_bias", (self.num_experts, self.out_features))
            self._bias = np.ascontiguousarray(bias[:, self._order])

    def _pack(self, weights: Weights, name: str) -> moe.PackedExperts | quant.PackedMXFP4:
        ((_, shape),) = self._weight_tensors(name)
        experts = (expert for block in weights.rows(name, shape) for expert in block)
        finite, packed = self._pack_floats(
            (expert.T[self._order] for expert in experts), weights.storage_dtype
        )
        if not finite:
            raise weights.not_finite(name, shape)
        return packed

    def _pack_floats(
        self, experts: Iterable[NDArray[Any]], dtype: DTypeLike
    ) -> tuple[bool, moe.PackedExperts]:
        """Pack experts, [N, K], one after another: only one copy exists at a time. False: one of
        them is not finite."""
        size = gemm.packed_size(self.out_features, self.in_features, dtype)
        packed = moe.PackedExperts(
            zeros(self.num_experts * size, dtype),
            self.num_experts,
            self.out_features,
            self.in_features,
        )
        finite = [gemm.pack_rows(packed.expert(e), 0, w) for e, w in enumerate(experts)]
        return all(finite), packed

    def __call__(self, x: NDArray[Any], offsets: Int64Array) -> Float32Array:
        """x storage[R, K], rows of expert e at offsets[e] to offsets[e + 1] -> f32[R, N]."""
        if isinstance(self._weight, quant.PackedMXFP4):
            return quant.grouped_gemm_mxfp4(x, self._weight, offsets, self._bias)
        return moe.grouped_gemm(x, self._weight, offsets, self._bias)


class MXFP4ExpertLinear(ExpertLinear):
    """The same from MXFP4 tensors: kept in four bits for "bfloat16", expanded for "float32"."""

    def __init__(self, num_experts: int, in_features: int, *args: Any, **kwargs: Any) -> None:
        if in_features % quant.BLOCK:
            raise ModelFormatError(
                f"experts in MXFP4 have {in_features} inputs (hidden_size or intermediate_size),"
                f" expected a multiple of {quant.BLOCK}"
            )
        super().__init__(num_experts, in_features, *args, **kwargs)

    def _weight_tensors(self, name: str) -> Iterator[tuple[str, Shape]]:
        groups = self.num_experts, self.out_features, self.in_features // quant.BLOCK
        yield f"{name}_blocks", (*groups, quant.BLOCK // 2)
        yield f"{name}_scales", groups

    def _pack(self, weights: Weights, name: str) -> moe.PackedExperts | quant.PackedMXFP4:
        (blocks_name, blocks_shape), (scales_name, scales_shape) = self._weight_tensors(name)
        blocks = weights.codes(blocks_name, blocks_shape)
        scales = _usable_scales(weights.codes(scales_name, scales_shape), blocks, scales_name)
        packed = self._pack_codes(weights.dtype, blocks, scales)
        weights.release(blocks_name)
        weights.release(scales_name)
        return packed

    def _pack_codes(
        self, dtype: StorageDtype, blocks: NDArray[np.uint8], scales: NDArray[np.uint8]
    ) -> moe.PackedExperts | quant.PackedMXFP4:
        if dtype == "float32":
            expanded = (
                quant.dequantize_mxfp4_ref(blocks[e][self._order], scales[e][self._order])
                for e in range(self.num_experts)
            )
            return self._pack_floats((w.astype(np.float32) for w in expanded), np.float32)[1]
        packed = quant.new_mxfp4(self.num_experts, self.out_features, self.in_features)
        for e in range(self.num_experts):
            quant.pack_mxfp4_expert(packed, e, blocks[e][self._order], scales[e][self._order])
        return packed


def _evens_first(n: int) -> Int64Array:
    """0, 2, 4, ..., 1, 3, 5, ..."""
    return np.concatenate([np.arange(0, n, 2), np.arange(1, n, 2)])


def _usable_scales(
    scales: NDArray[np.uint8], blocks: NDArray[np.uint8], name: str
) -> NDArray[np.uint8]:
    """Scales that the kernel takes; that of a block of zeros, which means nothing, becomes 1."""
    outside = (scales < quant.LOWEST) | (scales > quant.HIGHEST)
    if not outside.any():
        return scales
    wrong = outside & ((blocks & 0x77).any(axis=-1) | (scales == 255))  # 255 is NaN, even times 0
    if wrong.any():
        raise ModelFormatError(
            f"tensor {name} holds the scale {scales[wrong][0]},"
            f" expected {quant.LOWEST} to {quant.HIGHEST} (2^-125 to 2^125)"
        )
    return np.where(outside, np.uint8(127), scales)


# ---- the mixture ---------------------------------------------------------------------------------
class Experts(Module):
    """The routed experts of a layer: `gate_up_proj`, `unit`, `down_proj`.

    scale_input: scores multiply what goes into an expert (Llama 4), not what comes out.
    """

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        unit: GatedUnit,
        *,
        bias: bool = False,
        interleaved: bool = False,
        mxfp4: bool = False,
        scale_input: bool = False,
    ) -> None:
        linear = MXFP4ExpertLinear if mxfp4 else ExpertLinear
        self._unit = unit
        self._scale_input = scale_input
        self._dtype: np.dtype[Any]
        self.gate_up_proj = linear(
            num_experts, hidden_size, 2 * intermediate_size, bias=bias, interleaved=interleaved
        )
        self.down_proj = linear(num_experts, intermediate_size, hidden_size, bias=bias)

    def load(self, weights: Weights, name: str = "") -> None:
        super().load(weights, name)
        self._dtype = weights.storage_dtype

    def __call__(self, x: NDArray[Any], chosen: Int64Array, scores: Float32Array) -> Float32Array:
        """x storage[T, E]; chosen int64[T, I] and scores f32[T, I], by token -> f32[T, E]."""
        token, place, offsets = moe.sort_by_expert(chosen, self.gate_up_proj.num_experts)
        rows = x[token]
        if self._scale_input:
            row_scores = np.empty(scores.size, np.float32)
            row_scores[place.reshape(-1)] = scores.reshape(-1)
            rows, scores = _scaled(rows, row_scores), np.ones_like(scores)
        hidden = np.empty((len(rows), self.down_proj.in_features), self._dtype)
        self._unit(self.gate_up_proj(rows, offsets), out=hidden)
        return moe.combine(self.down_proj(hidden, offsets), place, scores)


def _scaled(rows: NDArray[Any], scores: Float32Array) -> NDArray[Any]:
    """rows storage[R, E] times scores f32[R], in storage dtype."""
    if rows.dtype == np.uint16:
        return bf16.from_f32(bf16.to_f32(rows) * scores[:, None])
    return rows * scores[:, None]
