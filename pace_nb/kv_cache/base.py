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
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from pace_nb.batch import Batch
from pace_nb.errors import ConfigError, OutOfMemoryError
from pace_nb.kernels.kv_write import UNIT, KVPool, new_pool

__all__ = ["UNIT", "BatchKV", "KVCache", "KVCacheConfig", "KVPool", "KVView"]


@dataclass(frozen=True)
class KVCacheConfig:
    """What a model needs to have cached; dtype is "bfloat16" or "float32".

    Raises ConfigError for values that no cache can have.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: str

    def __post_init__(self) -> None:
        if self.dtype not in ("bfloat16", "float32"):
            raise ConfigError(f"KV cache dtype must be bfloat16 or float32, got {self.dtype!r}")
        if min(self.num_layers, self.num_kv_heads, self.head_dim) < 1 or self.head_dim % self.pair:
            raise ConfigError(
                f"KV cache: num_layers {self.num_layers}, num_kv_heads {self.num_kv_heads} and "
                f"head_dim {self.head_dim} must be at least 1, head_dim even for bfloat16"
            )

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
        per_head = UNIT * (self.head_dim + self.padded_head_dim)
        return self.num_layers * self.num_kv_heads * per_head * self.storage_dtype.itemsize

    def allocate_layers(self, num_units: int) -> tuple[KVPool, ...]:
        """One pool of `num_units` per layer, zero; pages cost no memory until they are written.

        OutOfMemoryError where the system refuses even that.
        """
        try:
            return tuple(
                new_pool(num_units, self.num_kv_heads, self.head_dim, self.storage_dtype)
                for _ in range(self.num_layers)
            )
        except MemoryError as error:
            raise OutOfMemoryError(
                f"no memory for a KV cache of {num_units * self.bytes_per_unit} bytes"
            ) from error


class KVView(NamedTuple):
    """Where a batch's requests live: block_table int64[B, X] of first-unit numbers, -1 = none."""

    block_table: NDArray[np.int64]
    units_per_block: int


class BatchKV(NamedTuple):
    """The cache as one batch sees it: what `model(batch, kv)` is given."""

    view: KVView
    cache: KVCache

    def layer(self, index: int) -> KVPool:
        """Pool of layer `index`."""
        return self.cache.layer(index)


class KVCache(Protocol):
    """Storage of keys and values by request id; tests/kv_cache/test_base.py is its law."""

    @property
    def num_total_tokens(self) -> int:
        """Tokens the pool holds; also the most that a single request can hold."""

    @property
    def num_free_tokens(self) -> int:
        """Tokens in units that nobody owns."""

    def allocate(self, request_id: str, num_tokens: int) -> bool:
        """Give the request room for `num_tokens` in total, keeping what it has stored.

        Asking for fewer than it has room for changes nothing. False = no room, and nothing has
        changed.
        """

    def truncate(self, request_id: str, num_tokens: int) -> None:
        """Forget all but the first `num_tokens`; room not needed for them may go back."""

    def free(self, request_id: str, *, zero: bool = False) -> None:
        """Give back all the request owns (unknown ids: nothing).

        zero: overwrite it first, where it may hold NaN.
        """

    def view(self, batch: Batch) -> KVView:
        """Where the batch's requests live; RuntimeError if one has no room for its context."""

    def layer(self, index: int) -> KVPool:
        """Pool of layer `index`."""

    def check(self) -> None:
        """RuntimeError unless free + used = total, no unit has two owners and lengths fit."""
