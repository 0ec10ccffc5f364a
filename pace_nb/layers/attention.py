"""`Attention`: rotate, write to the cache, attend; `choose_kernel`: the one place that picks.

Knows the cache's view of a batch and that a step mixes sequences with one query token and with
many. Does not know projections, masks' arithmetic (`kernels/attention_*.py`) or where weights come
from: a model file projects q, k and v, hands them over here, and projects the result.

A step calls each kernel at most once per layer, over the flat arrays and with the indices of the
sequences it serves, so nothing is gathered or padded. What layers share is checked and cut into
tasks once (`Step`); where they see equally far, they share all of it. Decode and prefill kernels
give the same bits for the same row: the choice changes speed only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pace_nb.batch import Batch
from pace_nb.kernels import (
    attention_decode,
    attention_plan,
    attention_prefill,
    kv_write,
    rope,
)
from pace_nb.kernels.attention_rows import FEW
from pace_nb.kernels.kv_write import KVPool
from pace_nb.kernels.rope import Rotation
from pace_nb.kernels.rope_kv_write import HeadNorms, rope_kv_write
from pace_nb.kv_cache.base import BatchKV, KVView
from pace_nb.layers.module import Module
from pace_nb.layers.weights import Float32Array

Int32Array = NDArray[np.int32]

Kernel = Literal["attention_decode", "attention_prefill"]


def choose_kernel(query_len: int, group: int) -> Kernel:
    """The attention kernel for a sequence with this many query tokens in the step.

    group: query heads per key/value head. Few rows are bound by reading the keys: in order, and
    split among threads. More take the tiles of a prompt.
    """
    few = query_len == 1 or query_len * group <= FEW
    return "attention_decode" if few else "attention_prefill"


class Calls(NamedTuple):
    """A step's attention, planned for layers of one window and chunk; None: no such sequence."""

    decode: attention_plan.Plan | None
    prefill: attention_plan.Plan | None


class Step:
    """What every layer of one forward pass shares."""

    def __init__(self, batch: Batch, kv: BatchKV) -> None:
        self.batch = batch
        self.kv = kv
        self._query_lens = np.diff(batch.cu_seqlens_q)
        self.sequence_lens: Int32Array = np.repeat(batch.seq_lens, self._query_lens)  # [T]
        # For layers whose positions enter elsewhere or nowhere: tables of no angles.
        none = np.empty((1, 0), np.float32)
        self.unturned = rope.rotation(none, none, np.zeros(len(batch.token_ids), np.int64))
        # By view: layers that see equally far have one, the same object (`KVCache.view`).
        self._writes: dict[int, kv_write.WritePlan] = {}
        self._calls: dict[tuple[int, ...], Calls] = {}

    def writes(self, view: KVView, pool: KVPool) -> kv_write.WritePlan:
        """Where the step's keys and values go, in every layer of this view."""
        if id(view) not in self._writes:
            batch = self.batch
            self._writes[id(view)] = kv_write.plan(
                pool.num_units,
                len(batch.token_ids),
                *view,
                batch.cu_seqlens_q,
                batch.context_lens,
            )
        return self._writes[id(view)]

    def calls(
        self, q_shape: tuple[int, ...], view: KVView, pool: KVPool, window: int, chunk: int
    ) -> Calls:
        """The attention of layers with this view, window and chunk; planned when the first asks."""
        key = (*q_shape, id(view), window, chunk)
        if key not in self._calls:
            group = q_shape[1] // pool.k.shape[0]
            chosen = [choose_kernel(n, group) for n in self._query_lens.tolist()]
            self._calls[key] = Calls(
                self._plan("attention_decode", chosen, q_shape, view, pool, window, chunk),
                self._plan("attention_prefill", chosen, q_shape, view, pool, window, chunk),
            )
        return self._calls[key]

    def _plan(
        self,
        kernel: Kernel,
        chosen: list[Kernel],
        q_shape: tuple[int, ...],
        view: KVView,
        pool: KVPool,
        window: int,
        chunk: int,
    ) -> attention_plan.Plan | None:
        mine = np.array([i for i, name in enumerate(chosen) if name == kernel], np.int64)
        if not len(mine):
            return None
        batch = self.batch
        return attention_plan.plan(
            kernel,
            q_shape,
            pool,
            *view,
            batch.cu_seqlens_q,
            batch.context_lens,
            window,
            chunk,
            mine,
            split_keys=kernel == "attention_decode",
        )


class Attention:
    """softmax(q k^T * scale) v over the cached keys a token may see: its own position and before.

    window: how many positions a token sees, itself included; 0 = all. chunk: positions are cut at
    its multiples, and a token sees what is in its own piece; 0 = uncut. At most one of them is not
    0. `layer_index` names the layer's cache pool.
    """

    def __init__(self, layer_index: int, scale: float, *, window: int = 0, chunk: int = 0) -> None:
        self.window = window
        self.chunk = chunk
        self._layer_index = layer_index
        self._scale = scale

    def __call__(
        self,
        qkv: Float32Array,
        step: Step,
        rotation: Rotation | None,
        sinks: Float32Array | None = None,
        norms: HeadNorms | None = None,
    ) -> NDArray[Any]:
        """qkv f32[T, (H + 2 KVH) D], contiguous: heads of q, of k, of v -> storage[T, H D].

        rotation None: positions enter elsewhere (OPT) or nowhere (Llama 4's NoPE layers). sinks
        f32[H]: one extra logit per head, in the softmax's denominator only. norms: what q's and k's
        heads go through before they rotate.
        """
        view, pool = step.kv.views[self._layer_index], step.kv.layer(self._layer_index)
        turns = step.unturned if rotation is None else rotation
        if qkv.ndim != 2 or qkv.shape[1] % pool.head_dim or not qkv.flags.c_contiguous:
            raise ValueError(
                f"attention: qkv has shape {qkv.shape}, expected contiguous rows of heads of"
                f" {pool.head_dim}"
            )
        heads = qkv.reshape(len(qkv), -1, pool.head_dim)
        queries = rope_kv_write(heads, turns, pool, step.writes(view, pool), norms)
        decode, prefill = step.calls(queries.shape, view, pool, self.window, self.chunk)
        out = np.empty(queries.shape, queries.dtype)
        if decode is not None:
            attention_decode.attend(decode, queries, pool, self._scale, sinks, out)
        if prefill is not None:
            attention_prefill.attend(prefill, queries, pool, self._scale, sinks, out)
        return out.reshape(len(out), -1)


class Sees(NamedTuple):
    """How far each layer sees, as `KVCacheConfig` has it: empty where all see everything."""

    windows: tuple[int, ...]
    chunks: tuple[int, ...]

    @classmethod
    def of(cls, layers: Sequence[Module]) -> Sees:
        """Read off the layers themselves: what is cached cannot disagree with what is looked at."""
        found = [next(_attentions(layer), None) for layer in layers]
        windows = tuple(0 if one is None else one.window for one in found)
        chunks = tuple(0 if one is None else one.chunk for one in found)
        return cls(windows if any(windows) else (), chunks if any(chunks) else ())


def _attentions(module: Module) -> Iterator[Attention]:
    """Those of a layer: one."""
    for value in vars(module).values():
        if isinstance(value, Attention):
            yield value
        elif isinstance(value, Module):
            yield from _attentions(value)
