"""`BlockGroup`: the blocks of the layers that see equally far; what slab and paged are made of.

Knows blocks of one pool: which are free, which sequences use each, what each full one holds, and
which a sequence needs. Does not know layers' arithmetic, tokens, or who deserves room.

A model's layers fall into groups (`KVCacheConfig.groups`). A group has a pool of its own, and a
table per sequence. Where its layers see everything, a sequence owns blocks for all its tokens from
the moment it is given room. Where they see a window (or a chunk of positions), it owns the blocks
that its next token can see and those that the step writes:

    allocate    reserves as many blocks as the sequence can need in any one step; takes none
    place       at the step: blocks that no token from its first on can see go back, and those that
                its tokens are written to are taken. There is room: each sequence has at most what
                it has reserved, and no more is reserved than there is.

A block that went back is -1 in the table; the kernels never look at it. What a block holds
(`contents`) is for caches that share; others leave it alone. Source: vLLM v1's hybrid KV cache
manager (`single_type_kv_cache_manager.py`), which has one pool for all groups and takes a window's
blocks for the whole prompt at once.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from pace_nb.batch import Batch
from pace_nb.config import CacheConfig
from pace_nb.kv_cache.base import (
    UNIT,
    KVCacheConfig,
    KVView,
    LayerGroup,
    no_room,
    zero_units,
)


class BlockGroup:
    """A pool of blocks and the tables of the sequences that use them. A block goes by its first
    unit's number."""

    def __init__(self, model: KVCacheConfig, group: LayerGroup, config: CacheConfig) -> None:
        self.group = group
        self._block_size = config.block_size
        self._units_per_block = config.block_size // UNIT
        self._most = blocks_at_once(group, config)  # of one sequence; None: all of its blocks
        self.num_blocks = num_blocks(group, config)
        self.layers = model.allocate_layers(
            self.num_blocks * self._units_per_block, len(group.layers)
        )
        blocks = range(0, self.num_blocks * self._units_per_block, self._units_per_block)
        self.tables: dict[str, array[int]] = {}  # blocks of each sequence, in order; -1 = gone
        self._rows: dict[str, bytes] = {}  # tables as `view` needs them, where nothing has changed
        self._num_gone: dict[str, int] = {}  # how many of them are -1; all at the beginning
        self._reserved: dict[str, int] = {}  # blocks that a sequence may have; windows only
        self._num_reserved = 0
        self._refs = dict.fromkeys(blocks, 0)  # block: sequences that use it
        self._free = list(blocks)[::-1]  # a stack
        self._cached: OrderedDict[int, None] = OrderedDict()  # the longest unused first
        self.contents: dict[int, Any] = {}  # of blocks that are used or cached
        self.block_of: dict[Any, int] = {}  # the reverse

    @property
    def num_available(self) -> int:
        """Blocks that can be given away: no sequence uses them, or has reserved them."""
        if self.group.reach:
            return self.num_blocks - self._num_reserved
        return len(self._free) + len(self._cached)

    # ---- room for a sequence ----

    def open(self, request_id: str) -> None:
        """A sequence of no blocks, unless it is there already."""
        if request_id not in self.tables:
            self.tables[request_id], self._num_gone[request_id] = array("q"), 0
            if self.group.reach:
                self._reserved[request_id] = 0

    def can_grow(self, request_id: str, old: int, new: int) -> bool:
        """Is there room for `new` tokens of a sequence that has room for `old`?"""
        if self.group.reach:
            return self.can_reserve(request_id, new)
        table = self.tables.get(request_id, ())
        return self._blocks(new) - len(table) + self._must_copy(table, old) <= self.num_available

    def grow(self, request_id: str, old: int, new: int) -> None:
        """Give it that room. The rest of its last block will be written to: nobody else may use
        that block, or find it."""
        self.open(request_id)
        table = self.tables[request_id]
        last, used = divmod(old, self._block_size)
        if used and last < len(table) and table[last] >= 0:
            if self._must_copy(table, old):
                table[last] = self._copy(table[last])
                self._rows.pop(request_id, None)
            else:
                self.forget(table[last])
        if self.group.reach:
            self.reserve(request_id, new)
        else:
            self._extend(request_id, self._blocks(new) - len(table))

    def check_cut(self, request_id: str, num_tokens: int) -> None:
        """RuntimeError where a token after `num_tokens` would see what went back already."""
        gone = self._num_gone[request_id]
        if num_tokens and self._first_block(num_tokens) < gone:
            raise RuntimeError(
                f"request {request_id} is cut to {num_tokens} tokens, and what is seen from there "
                f"is gone: the first {gone * self._block_size} tokens"
            )

    def cut(self, request_id: str, num_tokens: int) -> None:
        """Keep room for the first `num_tokens` only (see `check_cut`)."""
        table, kept = self.tables[request_id], self._blocks(num_tokens)
        if num_tokens == 0:
            self._num_gone[request_id] = 0
        self.give_back(table[kept:])
        del table[kept:]
        self._rows.pop(request_id, None)
        if self.group.reach:
            self._set_reserved(
                request_id, min(self._reserved[request_id], self._needed(num_tokens))
            )

    def drop(self, request_id: str, *, zero: bool = False) -> None:
        """Give back all that a sequence has; zero: overwrite what it alone uses."""
        table = self.tables.pop(request_id, array("q"))
        self._num_gone.pop(request_id, None)
        self._rows.pop(request_id, None)
        if zero:
            for block in table:
                if block >= 0 and self._refs[block] == 1:
                    zero_units(self.layers, block, block + self._units_per_block)
        self.give_back(table)
        self._num_reserved -= self._reserved.pop(request_id, 0)

    def view(self, batch: Batch, num_tokens: Mapping[str, int]) -> KVView:
        """Where the batch's sequences lie; blocks of windows are given back and taken for it.

        num_tokens: what each has room for. RuntimeError if that is less than its context.
        """
        contexts = batch.context_lens.tolist()
        for request_id, context_len in zip(batch.request_ids, contexts, strict=True):
            if context_len > (room := num_tokens.get(request_id, 0)):
                raise no_room(request_id, context_len, room)
        if self.group.reach:
            starts = batch.positions[batch.cu_seqlens_q[:-1]].tolist()
            for request_id, start, end in zip(batch.request_ids, starts, contexts, strict=True):
                self._place(request_id, start, end)
        rows = [self._rows.get(one) or self._row(one) for one in batch.request_ids]
        length = max(map(len, rows), default=0)
        padded = bytearray().join([row.ljust(length, b"\xff") for row in rows])  # -1
        block_table = np.frombuffer(padded, np.int64).reshape(len(rows), length // 8)
        return KVView(block_table, self._units_per_block)

    def _row(self, request_id: str) -> bytes:
        """A table that has changed, as `view` needs it."""
        row = self._rows[request_id] = self.tables[request_id].tobytes()
        return row

    def _place(self, request_id: str, start: int, end: int) -> None:
        """Positions start .. end - 1 are computed now."""
        table, first = self.tables[request_id], self._first_block(start)
        if first < self._num_gone[request_id]:
            raise RuntimeError(
                f"request {request_id} goes back to {start}, which sees what is gone"
            )
        self.release(request_id, first)
        num_new = self._blocks(end) - len(table)
        if num_new > len(self._free) + len(self._cached):
            raise RuntimeError(
                f"request {request_id} needs {num_new} blocks that it did not reserve"
            )
        self._extend(request_id, num_new)

    def _extend(self, request_id: str, num_new: int) -> None:
        """Take so many blocks for the end of a sequence."""
        if num_new > 0:
            self.tables[request_id].extend(self._take() for _ in range(num_new))
            self._rows.pop(request_id, None)

    def release(self, request_id: str, first: int) -> None:
        """Give back the blocks before number `first` of the sequence's table."""
        table, gone = self.tables[request_id], self._num_gone[request_id]
        if first <= gone:
            return
        self.give_back(table[gone:first])
        table[gone:first] = array("q", [-1]) * (first - gone)
        self._num_gone[request_id] = first
        self._rows.pop(request_id, None)

    def _blocks(self, num_tokens: int) -> int:
        """Blocks that so many tokens take."""
        return -(-num_tokens // self._block_size)

    def _needed(self, num_tokens: int) -> int:
        """The most blocks that a sequence of so many tokens has at any time."""
        blocks = self._blocks(num_tokens)
        return blocks if self._most is None else min(blocks, self._most)

    def _first_block(self, position: int) -> int:
        """The first one that the token at `position`, or any after it, sees."""
        return self.group.first_key(position) // self._block_size

    def _set_reserved(self, request_id: str, num: int) -> None:
        self._num_reserved += num - self._reserved[request_id]
        self._reserved[request_id] = num

    # ---- sharing: blocks that hold what others may want ----

    def can_reserve(self, request_id: str, num_tokens: int) -> bool:
        """Does a window have what a sequence of so many tokens can need at once?"""
        more = self._needed(num_tokens) - self._reserved.get(request_id, 0)
        return not self.group.reach or more <= self.num_available

    def reserve(self, request_id: str, num_tokens: int) -> None:
        """Keep that for it; no less than it has."""
        if self.group.reach:
            num = max(self._reserved[request_id], self._needed(num_tokens))
            self._set_reserved(request_id, num)

    def sees_from(self, num_tokens: int) -> int:
        """Number of the first block that the token after `num_tokens` sees."""
        return self._first_block(num_tokens)

    def num_gone(self, request_id: str) -> int:
        """Blocks at the beginning of a sequence's table that went back."""
        return self._num_gone.get(request_id, 0)

    def use(self, request_id: str, first: int, blocks: Sequence[int]) -> None:
        """Make `blocks` those of the sequence from number `first` on; what it had there goes back.
        It has the blocks before, as far as they are not gone."""
        table = self.tables[request_id]
        self._rows.pop(request_id, None)
        for index, block in enumerate(blocks, first):
            self._refs[block] += 1
            self._cached.pop(block, None)
            if index < len(table):
                self.give_back([table[index]])
                table[index] = block
            else:
                table.append(block)

    def add(self, block: int, content: Any) -> None:
        """A used block is full and final, and holds `content`."""
        self.forget(block)
        self.contents[block] = content
        self.block_of[content] = block

    def forget(self, block: int) -> None:
        """What the block holds, if anything, is not to be found any more; a cached one is free."""
        content = self.contents.pop(block, None)
        if content is None:
            return
        del self.block_of[content]
        if block in self._cached:
            del self._cached[block]
            self._free.append(block)

    def give_back(self, blocks: Iterable[int]) -> None:
        """Blocks that one sequence has used, in its order; its end is the first to be evicted."""
        for block in reversed([block for block in blocks if block >= 0]):
            self._refs[block] -= 1
            if self._refs[block]:
                continue
            if block in self.contents:
                self._cached[block] = None
            else:
                self._free.append(block)

    def _take(self) -> int:
        """A block for one sequence; the longest unused content goes if there is no free one."""
        if not self._free:
            self.forget(next(iter(self._cached)))
        block = self._free.pop()
        self._refs[block] = 1
        return block

    def _must_copy(self, table: Sequence[int], num_tokens: int) -> bool:
        """Do others use the block that the next token is written to?"""
        last, used = divmod(num_tokens, self._block_size)
        return bool(used) and last < len(table) and table[last] >= 0 and self._refs[table[last]] > 1

    def _copy(self, block: int) -> int:
        """A block of one's own with the same in it, for one that others use, too."""
        copy = self._take()
        for stored in (stored for pool in self.layers for stored in pool):
            source = stored[:, block : block + self._units_per_block]
            stored[:, copy : copy + self._units_per_block] = source
        self.give_back([block])
        return copy

    def check(self, num_tokens: Mapping[str, int]) -> None:
        """RuntimeError unless each block is in one state, `refs` counts the tables that hold it,
        tables fit the tokens and what is reserved, and contents are found."""
        if self.tables.keys() != num_tokens.keys():
            raise RuntimeError("requests with blocks and requests with a length differ")
        counted = dict.fromkeys(self._refs, 0)
        for request_id, table in self.tables.items():
            gone = self._num_gone[request_id]
            held = table[gone:]
            blocks = self._blocks(num_tokens[request_id])
            if len(set(held)) < len(held):
                raise RuntimeError(f"request {request_id} has a block twice")
            if len(table) > blocks or (len(table) < blocks and not self.group.reach):
                raise RuntimeError(
                    f"request {request_id}: {num_tokens[request_id]} tokens in {len(table)} blocks"
                )
            if min(held, default=0) < 0 or max(table[:gone], default=-1) >= 0:
                raise RuntimeError(f"request {request_id}: a block is gone after one that is not")
            if self.group.reach and len(held) > self._reserved[request_id]:
                raise RuntimeError(
                    f"request {request_id} has {len(held)} blocks and has reserved "
                    f"{self._reserved[request_id]}"
                )
            for block in held:
                if block not in counted:
                    raise RuntimeError(f"block {block} is not one of the pool's")
                counted[block] += 1
        if counted != self._refs:
            raise RuntimeError("refs of a block are not the number of tables that hold it")
        used = [block for block, refs in self._refs.items() if refs]
        if sorted([*used, *self._free, *self._cached]) != list(self._refs):
            raise RuntimeError("a block is lost, is not one of the pool's or is in two states")
        if not self._cached.keys() <= self.contents.keys() <= {*used, *self._cached}:
            raise RuntimeError("a cached block without content or a free one with content")
        if {content: block for block, content in self.contents.items()} != self.block_of:
            raise RuntimeError("contents and the table of contents disagree")
        reserved = sum(self._reserved.values())
        if reserved != self._num_reserved or reserved > self.num_blocks:
            raise RuntimeError(f"{reserved} blocks of {self.num_blocks} are reserved")


def blocks_at_once(group: LayerGroup, config: CacheConfig) -> int | None:
    """The most blocks that one sequence has in a group at any time; None: all of its blocks.

    A step of s tokens sees reach - 1 + s positions at most, and n neighbouring positions lie in at
    most ceil((n - 1) / block_size) + 1 blocks.
    """
    if not group.reach or config.max_step_tokens is None:
        return None
    return -(-(group.reach - 2 + config.max_step_tokens) // config.block_size) + 1


def num_blocks(group: LayerGroup, config: CacheConfig) -> int:
    """Blocks of a group's pool: `num_tokens`, or what `max_num_seqs` can have at once."""
    blocks = config.num_tokens // config.block_size
    most = blocks_at_once(group, config)
    if most is None or config.max_num_seqs is None:
        return blocks
    return min(blocks, most * config.max_num_seqs)


def groups_by_layer(groups: Sequence[BlockGroup]) -> list[tuple[int, int]]:
    """For each layer the number of its group and its place there."""
    places = {
        layer: (number, place)
        for number, group in enumerate(groups)
        for place, layer in enumerate(group.group.layers)
    }
    return [places[layer] for layer in range(len(places))]


def num_free_tokens(first: BlockGroup, num_tokens: int, block_size: int) -> int:
    """Of a cache of `num_tokens`, those nobody has: its first group's, which is the fullest. (Where
    that has a window, too, its pool may be smaller than the cache: windows hold longer texts.)"""
    return num_tokens - (first.num_blocks - first.num_available) * block_size
