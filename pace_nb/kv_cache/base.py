"""What every KV cache is: its storage format and the `KVCache` protocol.

Knows how keys and values lie in memory and what a cache must offer. Does not know who gets space
(the scheduler), what a request is (a cache only sees ids), or how a kind of cache hands out units.

Storage, shared by all kinds: the pool is cut into units of UNIT = 16 tokens, kept in the layout the
kernels multiply with. One layer (S = 2 for bfloat16, values in pairs as `vdpbf16ps` takes them,
else 1; Dp = D rounded up to 16):

    k[KVH, U, D/S, 16, S]     key of the token in slot t: k[h, u, :, t, :], its D dims in S-tuples
    v[KVH, U, 16/S, Dp, S]    value of the token in slot t: v[h, u, t // S, :D, t % S]

The token at position p of the b-th request of a batch lives in

    unit  block_table[b, (p // 16) // units_per_block] + (p // 16) % units_per_block,   slot p % 16

The pool starts as zeros (pages that were never written cost no memory), but what an unused slot
holds means nothing: kernels must give masked keys and values no say, whatever is stored there.

Three kinds. They differ in where a sequence lies and in nothing that comes out:

    contiguous   one unbroken range of units per sequence, moved when it cannot grow where it is
    slab         blocks from one pool, each owned by one sequence
    paged        blocks that sequences with a common beginning share (prefix caching)

Layers with a sliding window, or with attention in chunks of positions, see a part of a sequence.
Slab and paged keep that part for them and no more (blocks.py); contiguous keeps all.

Prefix caching needs to know which tokens a block holds. So a cache is told twice: `reuse`, when a
request is behind, asks what is there of its tokens already; `commit`, when the model has computed
tokens and what it gave was sound, says that others may use them. Kinds that share nothing answer 0
and do nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from pace_nb.batch import Batch
from pace_nb.errors import ConfigError, OutOfMemoryError
from pace_nb.kernels.kv_write import UNIT, KVPool, new_pool

__all__ = [
    "UNIT",
    "BatchKV",
    "KVCache",
    "KVCacheConfig",
    "KVPool",
    "KVView",
    "no_room",
    "view_of",
    "zero_units",
]


@dataclass(frozen=True)
class KVCacheConfig:
    """What a model needs to have cached; dtype is "bfloat16" or "float32".

    keys_by_length: the keys of a token depend on more than the tokens up to it, namely on how long
    its sequence is (longrope, dynamic NTK). Then two sequences cannot share their beginning.
    windows, chunks: per layer, what `layers/attention.py` is given, 0 = it sees all before it; left
    empty where no layer has any.

    Raises ConfigError for values that no cache can have.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    keys_by_length: bool = False
    windows: tuple[int, ...] = ()
    chunks: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.dtype not in ("bfloat16", "float32"):
            raise ConfigError(f"KV cache dtype must be bfloat16 or float32, got {self.dtype!r}")
        if min(self.num_layers, self.num_kv_heads, self.head_dim) < 1 or self.head_dim % self.pair:
            raise ConfigError(
                f"KV cache: num_layers {self.num_layers}, num_kv_heads {self.num_kv_heads} and "
                f"head_dim {self.head_dim} must be at least 1, head_dim even for bfloat16"
            )
        for name, values in (("windows", self.windows), ("chunks", self.chunks)):
            if len(values) not in (0, self.num_layers) or min(values, default=0) < 0:
                raise ConfigError(
                    f"KV cache: {name} is {values}, expected one number from 0 per layer, "
                    f"{self.num_layers} in all"
                )

    def groups(self, max_model_len: int) -> tuple[LayerGroup, ...]:
        """Layers that see equally far, those that see a whole sequence first.

        One group where `keys_by_length`: such a sequence may have to begin anew where it is, with
        room for all its tokens.
        """
        if self.keys_by_length:
            return (self.whole,)
        windows = self.windows or (0,) * self.num_layers
        chunks = self.chunks or (0,) * self.num_layers
        found: dict[tuple[int, int], list[int]] = {}
        for layer, (window, chunk) in enumerate(zip(windows, chunks, strict=True)):
            sees = (window, chunk) if 0 < max(window, chunk) < max_model_len else (0, 0)
            found.setdefault(sees, []).append(layer)
        return tuple(LayerGroup(tuple(layers), *sees) for sees, layers in sorted(found.items()))

    @property
    def whole(self) -> LayerGroup:
        """All layers as one group that keeps everything."""
        return LayerGroup(tuple(range(self.num_layers)), 0, 0)

    @property
    def pair(self) -> int:
        """S: elements that are stored together."""
        return 2 if self.dtype == "bfloat16" else 1

    @property
    def storage_dtype(self) -> np.dtype[Any]:
        """uint16 (BF16 bits) or float32."""
        return np.dtype(np.uint16 if self.dtype == "bfloat16" else np.float32)

    @property
    def padded_head_dim(self) -> int:
        """Dp: D rounded up to 16."""
        return -(-self.head_dim // 16) * 16

    @property
    def bytes_per_unit(self) -> int:
        """Bytes that 16 tokens take, all layers, keys and values."""
        return self.num_layers * self.layer_bytes_per_unit

    @property
    def layer_bytes_per_unit(self) -> int:
        """The same of one layer."""
        per_head = UNIT * (self.head_dim + self.padded_head_dim)
        return self.num_kv_heads * per_head * self.storage_dtype.itemsize

    def allocate_layers(self, num_units: int, num_layers: int | None = None) -> tuple[KVPool, ...]:
        """One pool of `num_units` per layer, zero; pages cost no memory until they are written.

        num_layers: as many, not all. OutOfMemoryError where the system refuses even that.
        """
        num_layers = self.num_layers if num_layers is None else num_layers
        try:
            return tuple(
                new_pool(num_units, self.num_kv_heads, self.head_dim, self.storage_dtype)
                for _ in range(num_layers)
            )
        except MemoryError as error:
            raise OutOfMemoryError(
                "no memory for a KV cache of "
                f"{num_units * num_layers * self.layer_bytes_per_unit} bytes"
            ) from error


class LayerGroup(NamedTuple):
    """Layers that see equally far: `window` positions back, or their chunk; neither: all."""

    layers: tuple[int, ...]
    window: int
    chunk: int

    @property
    def reach(self) -> int:
        """Positions that a token sees at most; 0 = no bound."""
        return self.window or self.chunk

    def first_key(self, position: int) -> int:
        """The first position that the token at `position`, or any after it, sees."""
        if self.chunk:
            return position // self.chunk * self.chunk
        return max(0, position + 1 - self.window) if self.window else 0


class KVView(NamedTuple):
    """Where a batch's requests live: block_table int64[B, X] of first-unit numbers, -1 = none."""

    block_table: NDArray[np.int64]
    units_per_block: int


class BatchKV(NamedTuple):
    """The cache as one batch sees it: what `model(batch, kv)` is given. `views` by layer."""

    views: tuple[KVView, ...]
    cache: KVCache

    def layer(self, index: int) -> KVPool:
        """Pool of layer `index`."""
        return self.cache.layer(index)


def no_room(request_id: str, context_len: int, room: int) -> RuntimeError:
    """What a view raises for a request whose keys would go where others' lie."""
    return RuntimeError(f"request {request_id} needs room for {context_len} tokens, has {room}")


def view_of(
    batch: Batch,
    tables: Mapping[str, Sequence[int]],
    num_tokens: Mapping[str, int],
    units_per_block: int,
) -> KVView:
    """The view of a batch, from each request's first-unit numbers and the tokens it has room for.

    RuntimeError if a request has no room for its context: its keys would go where others' lie.
    """
    rows = []
    for request_id, context_len in zip(batch.request_ids, batch.context_lens.tolist(), strict=True):
        room = num_tokens.get(request_id, 0)
        if context_len > room:
            raise no_room(request_id, context_len, room)
        rows.append(tables[request_id])
    block_table = np.full((len(rows), max(map(len, rows), default=0)), -1, np.int64)
    for out, row in zip(block_table, rows, strict=True):
        out[: len(row)] = row
    return KVView(block_table, units_per_block)


def zero_units(layers: Sequence[KVPool], first: int, end: int) -> None:
    """Overwrite units first .. end - 1 of every layer with zeros."""
    for pool in layers:
        pool.k[:, first:end] = 0
        pool.v[:, first:end] = 0


class KVCache(Protocol):
    """Storage of keys and values by request id; tests/kv_cache/test_base.py is its law."""

    @property
    def num_total_tokens(self) -> int:
        """Tokens the pool holds; also the most that a single request can hold."""

    @property
    def num_free_tokens(self) -> int:
        """Tokens in units that nobody owns, those that are only kept for `reuse` included."""

    def allocate(self, request_id: str, num_tokens: int) -> bool:
        """Give the request room for `num_tokens` in total, keeping what it has stored.

        A layer with a window needs room for what it sees only; `view` says how.

        Asking for fewer than it has room for changes nothing. False = no room, and nothing has
        changed.
        """

    def truncate(self, request_id: str, num_tokens: int) -> None:
        """Forget all but the first `num_tokens`; room not needed for them may go back.

        Never below the first position of the request's last step, unless to 0: what a window had
        passed by then is gone.
        """

    def free(self, request_id: str, *, zero: bool = False) -> None:
        """Give back all the request owns (unknown ids: nothing).

        zero: it failed and may have stored NaN. What it alone owns is overwritten, and nobody will
        `reuse` anything it had, so that a request that comes again is computed again.
        """

    def reuse(
        self, request_id: str, token_ids: Sequence[int], num_tokens: int, salt: str | None
    ) -> int:
        """Give the request what is stored of the first `num_tokens` of its `token_ids`.

        Returns how many tokens, from the first, it need not compute (it may itself have computed
        more). For a request that is new, then before `allocate`, or behind; room it has, it keeps.
        Only what was committed with the same salt is found.
        """

    def commit(
        self, request_id: str, token_ids: Sequence[int], num_tokens: int, salt: str | None
    ) -> None:
        """Say that what the request has stored for its first `num_tokens` is sound and final.

        `token_ids` begins with these tokens; it is read here and not kept.
        """

    def view(self, batch: Batch) -> tuple[KVView, ...]:
        """Where the batch's requests live, per layer. Asked once for each batch that is run.

        What no token of a request sees from its first position in the batch on may be gone from
        then: layers with a window keep that much (-1 in the table). A batch that goes back behind
        that is a RuntimeError, and so is one that needs more than a request has room for.
        """

    def layer(self, index: int) -> KVPool:
        """Pool of layer `index`."""

    def check(self) -> None:
        """RuntimeError unless free + used = total, no unit has two owners and lengths fit."""
