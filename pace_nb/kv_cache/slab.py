"""`SlabCache`: one pool in blocks of fixed size, each owned by one sequence.

Knows blocks: who owns which, which are free. Does not know layers' arithmetic or who deserves room.

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

from array import array
from collections.abc import Sequence
from pathlib import Path

from pace_nb.batch import Batch
from pace_nb.config import CacheConfig
from pace_nb.kv_cache.base import UNIT, KVCacheConfig, KVPool, KVView, view_of, zero_units

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
        self._units_per_block = config.block_size // UNIT
        self._num_units = config.num_tokens // UNIT
        self._layers = model.allocate_layers(self._num_units)
        self._tables: dict[str, array[int]] = {}  # blocks that a request owns, in order
        self._num_tokens: dict[str, int] = {}  # tokens it may store there
        self._free = list(range(0, self._num_units, self._units_per_block))[::-1]  # a stack

    @property
    def num_total_tokens(self) -> int:
        """Tokens the pool holds."""
        return self._num_units * UNIT

    @property
    def num_free_tokens(self) -> int:
        """Tokens in blocks that nobody owns."""
        return len(self._free) * self._block_size

    def allocate(self, request_id: str, num_tokens: int) -> bool:
        """Give the request room for `num_tokens` in total; False = no room, nothing has changed."""
        table = self._tables.get(request_id, array("q"))
        num_new = self._num_blocks(num_tokens) - len(table)
        if num_new > len(self._free):
            return False
        table.extend(self._free.pop() for _ in range(num_new))
        self._tables[request_id] = table
        self._num_tokens[request_id] = max(num_tokens, self._num_tokens.get(request_id, 0))
        return True

    def truncate(self, request_id: str, num_tokens: int) -> None:
        """Forget all but the first `num_tokens`; blocks that hold nothing more go back."""
        table = self._tables[request_id]
        kept = min(num_tokens, self._num_tokens[request_id])
        self._num_tokens[request_id] = kept
        self._free.extend(reversed(table[self._num_blocks(kept) :]))
        del table[self._num_blocks(kept) :]

    def free(self, request_id: str, *, zero: bool = False) -> None:
        """Give back all the request owns (unknown ids: nothing); zero: overwrite it first."""
        table = self._tables.pop(request_id, array("q"))
        self._num_tokens.pop(request_id, None)
        if zero:
            for block in table:
                zero_units(self._layers, block, block + self._units_per_block)
        self._free.extend(reversed(table))

    def reuse(
        self, request_id: str, token_ids: Sequence[int], num_tokens: int, salt: str | None
    ) -> int:
        """0: a block has one owner."""
        return 0

    def commit(
        self, request_id: str, token_ids: Sequence[int], num_tokens: int, salt: str | None
    ) -> None:
        """Nothing: see `reuse`."""

    def view(self, batch: Batch) -> KVView:
        """block_table int64[B, X]; RuntimeError if a request has no room for its context."""
        return view_of(batch, self._tables, self._num_tokens, self._units_per_block)

    def layer(self, index: int) -> KVPool:
        """Pool of layer `index`."""
        return self._layers[index]

    def check(self) -> None:
        """RuntimeError unless each block is free or has one owner, and every length fits."""
        if self._tables.keys() != self._num_tokens.keys():
            raise RuntimeError("requests with blocks and requests with a length differ")
        for request_id, table in self._tables.items():
            if len(table) != self._num_blocks(self._num_tokens[request_id]):
                raise RuntimeError(
                    f"request {request_id}: {self._num_tokens[request_id]} tokens in "
                    f"{len(table)} blocks"
                )
        blocks = sorted(
            [*self._free, *(block for table in self._tables.values() for block in table)]
        )
        if blocks != list(range(0, self._num_units, self._units_per_block)):
            raise RuntimeError("a block is lost, is not one of the pool's or has two owners")

    def _num_blocks(self, num_tokens: int) -> int:
        """Blocks that so many tokens take."""
        return -(-num_tokens // self._block_size)
