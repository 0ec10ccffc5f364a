"""`Attention`: rotate, write to the cache, attend; `choose_kernel`: the one place that picks.

Knows the cache's view of a batch and that a step mixes sequences with one query token and with
many. Does not know projections, masks' arithmetic (`kernels/attention_*.py`) or where weights come
from: a model file projects q, k and v, hands them over here, and projects the result.

A step calls each kernel at most once per layer, over the flat arrays and with the indices of the
sequences it serves, so nothing is gathered or padded. Decode and prefill kernels give the same bits
for the same row: the choice changes speed only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pace_nb.batch import Batch
from pace_nb.kernels import attention_decode, attention_prefill, bf16, kv_write, rope
from pace_nb.kv_cache.base import BatchKV
from pace_nb.layers.rope import Rotation
from pace_nb.layers.weights import Float32Array

Int32Array = NDArray[np.int32]
Kernel = Callable[..., NDArray[Any]]

# Up to here a sequence's query rows are bound by reading its keys and values, as one row is; above,
# the prefill kernel's tiles pay. Ledger: attention_decode.
DECODE_QUERY_LEN = 16


def choose_kernel(query_len: int) -> Kernel:
    """The attention kernel for a sequence with this many query tokens in the step."""
    if query_len <= DECODE_QUERY_LEN:
        return attention_decode.attention_decode
    return attention_prefill.attention_prefill


class Step(NamedTuple):
    """What every layer of one forward pass shares."""

    batch: Batch
    kv: BatchKV
    calls: tuple[tuple[Kernel, Int32Array | None], ...]  # kernel, its sequences (None = all)
    sequence_lens: Int32Array  # [T]: tokens known of each one's sequence, not only its keys

    @classmethod
    def of(cls, batch: Batch, kv: BatchKV) -> Step:
        """Plan a step; done once per forward pass."""
        query_lens = np.diff(batch.cu_seqlens_q)
        sequence_lens = np.repeat(batch.seq_lens, query_lens)
        return cls(batch, kv, _calls(query_lens), sequence_lens)


def _calls(query_lens: Int32Array) -> tuple[tuple[Kernel, Int32Array | None], ...]:
    """One call per kernel that `choose_kernel` names, with the indices of its sequences."""
    served: dict[Kernel, list[int]] = {}
    for sequence, query_len in enumerate(query_lens):
        served.setdefault(choose_kernel(int(query_len)), []).append(sequence)
    if len(served) == 1:
        return tuple((kernel, None) for kernel in served)
    return tuple((kernel, np.array(which, np.int32)) for kernel, which in served.items())


class Attention:
    """softmax(q k^T * scale) v over the cached keys a token may see: its own position and before.

    window: how many positions a token sees, itself included; 0 = all. chunk: positions are cut at
    its multiples, and a token sees what is in its own piece; 0 = uncut. At most one of them is not
    0. `layer_index` names the layer's cache pool.
    """

    def __init__(self, layer_index: int, scale: float, *, window: int = 0, chunk: int = 0) -> None:
        self._layer_index = layer_index
        self._scale = scale
        self._window = window
        self._chunk = chunk

    def __call__(
        self,
        q: Float32Array,
        k: Float32Array,
        v: Float32Array,
        step: Step,
        rotation: Rotation | None,
        sinks: Float32Array | None = None,
    ) -> NDArray[Any]:
        """q f32[T, H, D], k and v f32[T, KVH, D] (views with a contiguous last axis) -> storage[T,
        H * D].

        rotation None: positions enter elsewhere (OPT) or nowhere (Llama 4's NoPE layers). sinks
        f32[H]: one extra logit per head, in the softmax's denominator only.
        """
        view, pool = step.kv.view, step.kv.layer(self._layer_index)
        storage = pool.k.dtype
        queries, keys = rotated(q, rotation, storage), rotated(k, rotation, storage)
        kv_write.kv_write(keys, v, pool, *view, step.batch.cu_seqlens_q, step.batch.context_lens)
        out = np.empty(q.shape, storage)
        for kernel, sequences in step.calls:
            kernel(
                queries,
                pool,
                *view,
                step.batch.cu_seqlens_q,
                step.batch.context_lens,
                self._scale,
                window=self._window,
                sinks=sinks,
                out=out,
                sequences=sequences,
                chunk=self._chunk,
            )
        return out.reshape(len(out), -1)


def rotated(x: Float32Array, rotation: Rotation | None, storage: np.dtype[Any]) -> NDArray[Any]:
    """x f32[T, H, D] in storage dtype, rotated where there is a rotation; rounded once."""
    if rotation is None:
        return bf16.from_f32(x) if storage == np.uint16 else np.ascontiguousarray(x)
    return rope.rope(
        x,
        rotation.rows,
        rotation.cos,
        rotation.sin,
        out=np.empty(x.shape, storage),
        interleaved=rotation.interleaved,
    )
