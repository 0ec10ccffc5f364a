"""`PagedCache`: blocks that sequences with the same beginning share, kept for whoever comes next.

Knows blocks, how many sequences use each, and which tokens each full one holds. Does not know
layers' arithmetic or who deserves room.

A block is in one of three states:

    used     in the tables of `refs` sequences, at least one
    cached   in none, but it holds tokens that may be wanted again: given away last, and of those
             first the one that was not used for the longest time (LRU)
    free     in none, and nobody could want what it holds

Prefix caching. A full block is known by what is in it: a digest of its token ids and the digest of
the block before it, the first of the salt, so by all tokens up to its end:

    digest[i] = BLAKE2b(digest[i - 1] + token ids of block i, 4 bytes each)

`reuse` follows a request's blocks through the table of digests as far as they are there. A digest
is only a way to find a block: token ids, salt and the block before are compared, so two sequences
whose digests collide do not get each other's keys. `commit` puts full blocks into the table; where
an equal one is there already, the request uses that from now on and gives its own back. What is in
the table never changes: a request that cuts itself back (`truncate`) and grows again writes into a
copy of its last block, or takes it out of the table where nobody else uses it.

Only what was committed is ever found, and the engine commits a request's blocks once its logits
were finite. The blocks of a request that fails leave the table, whoever computed them: if one of
them is what is wrong, the next request computes it anew.

A sequence gives its blocks back from its end, so that beginnings, which more requests share, stay
longest. A salt separates those who must not find out, by the time it takes, what others have asked.
Source: vLLM v1 `vllm/v1/core/block_pool.py`, `kv_cache_utils.py`; Kwon et al. 2023, PagedAttention.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

import numpy as np

from pace_nb.batch import Batch
from pace_nb.config import CacheConfig
from pace_nb.kv_cache.base import UNIT, KVCacheConfig, KVPool, KVView, no_room, zero_units

DIGEST_SIZE = 32  # bytes: no collision is expected, or can be made


@dataclass(frozen=True, slots=True, eq=False)
class _Content:
    """What a full block holds: its tokens and, by way of the block before it, all before them."""

    digest: bytes
    token_ids: bytes
    before: _Content | None  # None for the first block
    salt: str | None

    def equals(self, other: _Content) -> bool:
        """The same tokens after the same tokens; every content in the table of digests is one
        object, so those before need not be compared one by one."""
        mine = (self.token_ids, self.salt)
        return mine == (other.token_ids, other.salt) and self.before is other.before


@dataclass(slots=True)
class _Sequence:
    """What a request has."""

    table: array[int] = field(default_factory=lambda: array("q"))  # its blocks, in order
    num_tokens: int = 0  # that it may store there
    num_committed: int = 0  # blocks, from the first, that `commit` or `reuse` is done with
    packed: bytes | None = None  # `table` as `view` needs it; None where it has changed since


class PagedCache:
    """The `paged` KV cache (protocol: base.KVCache). A block goes by its first unit's number."""

    def __init__(self, model: KVCacheConfig, config: CacheConfig) -> None:
        self._block_size = config.block_size
        self._units_per_block = config.block_size // UNIT
        self._num_units = config.num_tokens // UNIT
        self._caching = config.enable_prefix_caching and not model.keys_by_length
        self._layers = model.allocate_layers(self._num_units)
        blocks = range(0, self._num_units, self._units_per_block)
        self._sequences: dict[str, _Sequence] = {}
        self._refs = dict.fromkeys(blocks, 0)  # block: sequences that use it
        self._free = list(blocks)[::-1]  # a stack
        self._cached: OrderedDict[int, None] = OrderedDict()  # the longest unused first
        self._contents: dict[int, _Content] = {}  # of blocks that are used or cached
        self._by_digest: dict[bytes, int] = {}  # the block of each content

    @property
    def num_total_tokens(self) -> int:
        """Tokens the pool holds."""
        return self._num_units * UNIT

    @property
    def num_free_tokens(self) -> int:
        """Tokens in blocks that no sequence uses."""
        return self._num_available * self._block_size

    def allocate(self, request_id: str, num_tokens: int) -> bool:
        """Give the request room for `num_tokens` in total; False = no room, nothing has changed."""
        sequence = self._sequences.get(request_id) or _Sequence()
        if num_tokens > sequence.num_tokens:
            table, sequence.packed = sequence.table, None
            last, used = divmod(sequence.num_tokens, self._block_size)
            # The last block is written to if it has room left. Others may use it after `truncate`.
            copied = bool(used) and self._refs[table[last]] > 1
            num_new = self._num_blocks(num_tokens) - len(table)
            if num_new + copied > self._num_available:
                return False
            if copied:
                table[last] = self._copy(table[last])
            elif used:
                self._forget(table[last])
            table.extend(self._take() for _ in range(num_new))
            sequence.num_tokens = num_tokens
        self._sequences[request_id] = sequence
        return True

    def truncate(self, request_id: str, num_tokens: int) -> None:
        """Forget all but the first `num_tokens`; blocks that hold nothing more go back."""
        sequence = self._sequences[request_id]
        sequence.packed = None
        sequence.num_tokens = kept = min(num_tokens, sequence.num_tokens)
        sequence.num_committed = min(sequence.num_committed, kept // self._block_size)
        self._give_back(sequence.table[self._num_blocks(kept) :])
        del sequence.table[self._num_blocks(kept) :]

    def free(self, request_id: str, *, zero: bool = False) -> None:
        """Give back all the request owns (unknown ids: nothing).

        zero: nobody will reuse any of it, and what no other sequence uses is overwritten.
        """
        sequence = self._sequences.pop(request_id, _Sequence())
        if zero:
            for block in sequence.table:
                self._forget(block)
                if self._refs[block] == 1:
                    zero_units(self._layers, block, block + self._units_per_block)
        self._give_back(sequence.table)

    def reuse(
        self, request_id: str, token_ids: Sequence[int], num_tokens: int, salt: str | None
    ) -> int:
        """Give the request the blocks that hold its first `num_tokens` tokens, as far as there are.

        Returns how many tokens, from the first, it need not compute: a multiple of the block size.
        Where it has blocks for them already, those go back.
        """
        sequence = self._sequences.get(request_id) or _Sequence()
        while self._has_more(sequence, num_tokens):
            block = self._find(self._next_content(sequence, token_ids, salt))
            if block is None:
                break
            self._use(sequence, block)
        found = sequence.num_committed * self._block_size
        if found:
            sequence.num_tokens = max(sequence.num_tokens, found)
            self._sequences[request_id] = sequence
        return found

    def commit(
        self, request_id: str, token_ids: Sequence[int], num_tokens: int, salt: str | None
    ) -> None:
        """Let others use the blocks that the first `num_tokens` tokens of the request fill."""
        sequence = self._sequences[request_id]
        while self._has_more(sequence, num_tokens):
            content = self._next_content(sequence, token_ids, salt)
            if content is None:
                break
            block = self._find(content)
            if block is None:
                self._add(sequence.table[sequence.num_committed], content)
                sequence.num_committed += 1
            else:
                self._use(sequence, block)

    def view(self, batch: Batch) -> KVView:
        """block_table int64[B, X]; RuntimeError if a request has no room for its context."""
        rows = []
        for request_id, context_len in zip(
            batch.request_ids, batch.context_lens.tolist(), strict=True
        ):
            sequence = self._sequences.get(request_id) or _Sequence()
            if context_len > sequence.num_tokens:
                raise no_room(request_id, context_len, sequence.num_tokens)
            if sequence.packed is None:
                sequence.packed = sequence.table.tobytes()
            rows.append(sequence.packed)
        length = max(map(len, rows), default=0)
        padded = bytearray().join([row.ljust(length, b"\xff") for row in rows])  # -1
        block_table = np.frombuffer(padded, np.int64).reshape(len(rows), length // 8)
        return KVView(block_table, self._units_per_block)

    def layer(self, index: int) -> KVPool:
        """Pool of layer `index`."""
        return self._layers[index]

    def check(self) -> None:
        """RuntimeError unless each block is in one state, `refs` counts the tables that hold it,
        lengths fit, and each content is found under its digest."""
        counted = dict.fromkeys(self._refs, 0)
        for request_id, sequence in self._sequences.items():
            if len(set(sequence.table)) < len(sequence.table):
                raise RuntimeError(f"request {request_id} has a block twice")
            if (
                len(sequence.table) != self._num_blocks(sequence.num_tokens)
                or sequence.num_committed > sequence.num_tokens // self._block_size
            ):
                raise RuntimeError(
                    f"request {request_id}: {sequence.num_tokens} tokens in "
                    f"{len(sequence.table)} blocks, {sequence.num_committed} committed"
                )
            for block in sequence.table:
                counted[block] += 1
        if counted != self._refs:
            raise RuntimeError("refs of a block are not the number of tables that hold it")
        used = [block for block, refs in self._refs.items() if refs]
        blocks = range(0, self._num_units, self._units_per_block)
        if sorted([*used, *self._free, *self._cached]) != list(blocks):
            raise RuntimeError("a block is lost, is not one of the pool's or is in two states")
        if not self._cached.keys() <= self._contents.keys() <= {*used, *self._cached}:
            raise RuntimeError("a cached block without content or a free one with content")
        digests = {content.digest: block for block, content in self._contents.items()}
        if digests != self._by_digest:
            raise RuntimeError("contents and the table of digests disagree")

    # ---- blocks ----

    @property
    def _num_available(self) -> int:
        """Blocks that no sequence uses."""
        return len(self._free) + len(self._cached)

    def _num_blocks(self, num_tokens: int) -> int:
        """Blocks that so many tokens take."""
        return -(-num_tokens // self._block_size)

    def _take(self) -> int:
        """A block for one sequence; the longest unused content goes if there is no free one."""
        if not self._free:
            self._forget(next(iter(self._cached)))
        block = self._free.pop()
        self._refs[block] = 1
        return block

    def _give_back(self, blocks: Sequence[int]) -> None:
        """Blocks that one sequence has used, in its order; its end is the first to be evicted."""
        for block in reversed(blocks):
            self._refs[block] -= 1
            if self._refs[block]:
                continue
            if block in self._contents:
                self._cached[block] = None
            else:
                self._free.append(block)

    def _copy(self, block: int) -> int:
        """A block of one's own with the same in it, for one that others use, too."""
        copy = self._take()
        for array_ in (array_ for pool in self._layers for array_ in pool):
            source = array_[:, block : block + self._units_per_block]
            array_[:, copy : copy + self._units_per_block] = source
        self._give_back([block])
        return copy

    # ---- contents ----

    def _has_more(self, sequence: _Sequence, num_tokens: int) -> bool:
        """`num_tokens` fill a block that is not committed yet."""
        return self._caching and (sequence.num_committed + 1) * self._block_size <= num_tokens

    def _next_content(
        self, sequence: _Sequence, token_ids: Sequence[int], salt: str | None
    ) -> _Content | None:
        """Of the first block that is not committed; None if the one before has been forgotten."""
        index = sequence.num_committed
        before = self._contents.get(sequence.table[index - 1]) if index else None
        if index and before is None:
            return None
        new = token_ids[index * self._block_size : (index + 1) * self._block_size]
        packed = array("i", new).tobytes()
        parent = _salt_digest(salt) if before is None else before.digest
        return _Content(_digest(parent, packed), packed, before, salt)

    def _find(self, content: _Content | None) -> int | None:
        """The block that holds it, if there is one."""
        block = None if content is None else self._by_digest.get(content.digest)
        if block is None or content is None or not self._contents[block].equals(content):
            return None
        return block

    def _use(self, sequence: _Sequence, block: int) -> None:
        """Make `block`, which holds the same, the first one that was not committed."""
        sequence.packed = None
        self._refs[block] += 1
        self._cached.pop(block, None)
        index = sequence.num_committed
        if index < len(sequence.table):
            self._give_back([sequence.table[index]])
            sequence.table[index] = block
        else:
            sequence.table.append(block)
        sequence.num_committed += 1

    def _add(self, block: int, content: _Content) -> None:
        """Put a used block into the table of digests; of two with one digest the later stays."""
        other = self._by_digest.get(content.digest)
        if other is not None:
            self._forget(other)
        self._contents[block] = content
        self._by_digest[content.digest] = block

    def _forget(self, block: int) -> None:
        """Take a block, if it is there, out of the table of digests; a cached one is free then."""
        content = self._contents.pop(block, None)
        if content is None:
            return
        del self._by_digest[content.digest]
        if block in self._cached:
            del self._cached[block]
            self._free.append(block)


def _digest(before: bytes, token_ids: bytes) -> bytes:
    return blake2b(before + token_ids, digest_size=DIGEST_SIZE, person=b"tokens").digest()


def _salt_digest(salt: str | None) -> bytes:
    """Stands before the first block. `person` keeps salts and tokens apart."""
    data = b"" if salt is None else salt.encode("utf-8", "surrogatepass")
    return blake2b(data, digest_size=DIGEST_SIZE, person=b"salt").digest()
