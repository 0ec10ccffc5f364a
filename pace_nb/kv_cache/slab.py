"""`SlabCache`: blocks of fixed size, each owned by one sequence.

Knows how large a block is. Does not know which blocks are whose (blocks.py), layers' arithmetic or
who deserves room.

A sequence takes blocks as it grows and never moves; what it wastes is the rest of its last block.
Free blocks are a stack: to take or to give back is O(1), and what was used last, and may still be
in a CPU cache, is used next. To take is all or nothing.

Blocks are as large as they may be without a layer's keys and values of one block filling more than
a quarter of L2 (`tuned_block_size`), so that a block can stay there while the query heads that
share it go over it. Block table: one entry per block, its first unit; a block goes by that number.
Source: PACE `csrc/ops/attention/slab/slab_pool*` and `pace/llm/attention/slab/cache.py`.
There a layer has a pool of its own and keeps keys beside values; a failure
half-way through an allocation loses what was taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pace_nb.batch import Batch
from pace_nb.config import CacheConfig
from pace_nb.kv_cache.base import KVCacheConfig, KVPool, KVView
from pace_nb.kv_cache.blocks import BlockGroup, groups_by_layer, num_free_tokens

BLOCK_SIZES = (256, 128, 64, 32)  # tokens, PACE's
DEFAULT_BLOCK_SIZE = 64  # PACE's, where the size of L2 is not known


def tuned_block_size(model: KVCacheConfig, root: Path = Path("/")) -> int:
    """The largest of BLOCK_SIZES whose keys and values, of one layer, take a quarter of L2 or less.

    The smallest where none does. Reads the size of L2 below `root`/sys.
    """
    try:
        text = (root / "sys/devices/system/cpu/cpu0/cache/index2/size").read_text().strip()
        l2 = int(text.removesuffix("K")) * 1024
    except (OSError, ValueError):
        return DEFAULT_BLOCK_SIZE
    per_token = 2 * model.num_kv_heads * model.head_dim * model.storage_dtype.itemsize
    return next((size for size in BLOCK_SIZES if size * per_token <= l2 // 4), BLOCK_SIZES[-1])


class SlabCache:
    """The `slab` KV cache (protocol: base.KVCache)."""

    def __init__(self, model: KVCacheConfig, config: CacheConfig) -> None:
        self._block_size = config.block_size
        self._num_tokens_in_pool = config.num_tokens
        groups = model.groups(config.max_model_len)
        self._groups = [BlockGroup(model, group, config) for group in groups]
        self._group_of = groups_by_layer(self._groups)
        self._num_tokens: dict[str, int] = {}  # tokens that a request may store

    @property
    def num_total_tokens(self) -> int:
        """Tokens the pool holds."""
        return self._num_tokens_in_pool

    @property
    def num_free_tokens(self) -> int:
        """Tokens in blocks that nobody owns."""
        return num_free_tokens(self._groups[0], self._num_tokens_in_pool, self._block_size)

    def allocate(self, request_id: str, num_tokens: int) -> bool:
        """Give the request room for `num_tokens` in total; False = no room, nothing has changed."""
        old = self._num_tokens.get(request_id, 0)
        if num_tokens > old or request_id not in self._num_tokens:
            if not all(group.can_grow(request_id, old, num_tokens) for group in self._groups):
                return False
            for group in self._groups:
                group.grow(request_id, old, num_tokens)
            self._num_tokens[request_id] = num_tokens
        return True

    def truncate(self, request_id: str, num_tokens: int) -> None:
        """Forget all but the first `num_tokens`; blocks that hold nothing more go back."""
        kept = min(num_tokens, self._num_tokens[request_id])
        for group in self._groups:
            group.check_cut(request_id, kept)
        for group in self._groups:
            group.cut(request_id, kept)
        self._num_tokens[request_id] = kept

    def free(self, request_id: str, *, zero: bool = False) -> None:
        """Give back all the request owns (unknown ids: nothing); zero: overwrite it first."""
        self._num_tokens.pop(request_id, None)
        for group in self._groups:
            group.drop(request_id, zero=zero)

    def reuse(
        self, request_id: str, token_ids: Sequence[int], num_tokens: int, salt: str | None
    ) -> int:
        """0: a block has one owner."""
        return 0

    def commit(
        self, request_id: str, token_ids: Sequence[int], num_tokens: int, salt: str | None
    ) -> None:
        """Nothing: see `reuse`."""

    def view(self, batch: Batch) -> tuple[KVView, ...]:
        """block_table int64[B, X] per layer; RuntimeError if a request has no room for its
        context."""
        views = [group.view(batch, self._num_tokens) for group in self._groups]
        return tuple(views[group] for group, _ in self._group_of)

    def layer(self, index: int) -> KVPool:
        """Pool of layer `index`."""
        group, place = self._group_of[index]
        return self._groups[group].layers[place]

    def check(self) -> None:
        """RuntimeError unless each block is free or has one owner, and every length fits."""
        for group in self._groups:
            group.check(self._num_tokens)
