"""`PagedCache`: blocks that sequences with the same beginning share, kept for whoever comes next.

Knows which tokens a full block holds, and who may have it. Does not know how blocks are kept
(blocks.py), layers' arithmetic or who deserves room.

A block is in one of three states:

    used     in the tables of `refs` sequences, at least one
    cached   in none, but it holds tokens that may be wanted again: given away last, and of those
             first the one that was not used for the longest time (LRU)
    free     in none, and nobody could want what it holds

Prefix caching. A full block is known by what is in it: a digest of its token ids and the digest of
the block before it, the first of the salt, so by all tokens up to its end:

    digest[i] = BLAKE2b(digest[i - 1] + token ids of block i, 4 bytes each)

`reuse` follows a request's blocks through the table of digests as far as they are there. A digest
is only a way to find what is the same: token ids, salt and the content before are compared, so two
sequences whose digests collide do not get each other's keys. `commit` puts full blocks into the
table; where an equal one is there already, the request uses that from now on and gives its own
back. What is in the table never changes: a request that cuts itself back (`truncate`) and grows
again writes into a copy of its last block, or takes it out of the table where nobody else uses it.

A content may have a block in each group of layers. Those with a window give theirs back when it has
passed, so a beginning is found up to a point where every group has all that the next token sees:
all blocks before it, or those in its window. The table knows a content for as long as any block, or
any later content, stands on it.

Only what was committed is ever found, and the engine commits a request's blocks once its logits
were finite. The blocks of a request that fails leave the table, whoever computed them: if one of
them is what is wrong, the next request computes it anew.

A sequence gives its blocks back from its end, so that beginnings, which more requests share, stay
longest. A salt separates those who must not find out, by the time it takes, what others have asked.
Source: vLLM v1 `vllm/v1/core/block_pool.py`, `kv_cache_utils.py`; Kwon et al. 2023, PagedAttention.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from weakref import WeakValueDictionary

from pace_nb.batch import Batch
from pace_nb.config import CacheConfig
from pace_nb.kv_cache.base import KVCacheConfig, KVPool, KVView
from pace_nb.kv_cache.blocks import BlockGroup, groups_by_layer, num_free_tokens

DIGEST_SIZE = 32  # bytes: no collision is expected, or can be made


@dataclass(slots=True, eq=False, weakref_slot=True)
class _Content:
    """What a full block holds: its tokens and, by way of the one before, all before them."""

    digest: bytes
    token_ids: bytes
    before: _Content | None  # None for the first block
    salt: str | None
    sound: bool = True  # False: it was in the hands of a request that failed

    def equals(self, other: _Content) -> bool:
        """The same tokens after the same tokens; every content in the table of digests is one
        object, so those before need not be compared one by one."""
        mine = (self.token_ids, self.salt)
        return mine == (other.token_ids, other.salt) and self.before is other.before


class PagedCache:
    """The `paged` KV cache (protocol: base.KVCache)."""

    def __init__(self, model: KVCacheConfig, config: CacheConfig) -> None:
        self._block_size = config.block_size
        self._num_tokens_in_pool = config.num_tokens
        self._caching = config.enable_prefix_caching and not model.keys_by_length
        groups = model.groups(config.max_model_len)
        self._groups = [BlockGroup(model, group, config) for group in groups]
        self._group_of = groups_by_layer(self._groups)
        self._num_tokens: dict[str, int] = {}  # tokens that a request may store
        self._contents: dict[str, list[_Content]] = {}  # of its blocks that are committed
        self._by_digest: WeakValueDictionary[bytes, _Content] = WeakValueDictionary()

    @property
    def num_total_tokens(self) -> int:
        """Tokens the pool holds."""
        return self._num_tokens_in_pool

    @property
    def num_free_tokens(self) -> int:
        """Tokens in blocks that no sequence uses."""
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
            self._contents.setdefault(request_id, [])
        return True

    def truncate(self, request_id: str, num_tokens: int) -> None:
        """Forget all but the first `num_tokens`; blocks that hold nothing more go back."""
        kept = min(num_tokens, self._num_tokens[request_id])
        for group in self._groups:
            group.check_cut(request_id, kept)
        for group in self._groups:
            group.cut(request_id, kept)
        self._num_tokens[request_id] = kept
        del self._contents[request_id][kept // self._block_size :]

    def free(self, request_id: str, *, zero: bool = False) -> None:
        """Give back all the request owns (unknown ids: nothing).

        zero: nobody will reuse any of it, and what no other sequence uses is overwritten.
        """
        self._num_tokens.pop(request_id, None)
        contents = self._contents.pop(request_id, [])
        if zero:
            for content in contents:
                self._condemn(content)
            for group in self._groups:  # and its last block, if it was cut back into that
                for block in group.tables.get(request_id, ()):
                    if block in group.contents:
                        self._condemn(group.contents[block])
        for group in self._groups:
            group.drop(request_id, zero=zero)

    def reuse(
        self, request_id: str, token_ids: Sequence[int], num_tokens: int, salt: str | None
    ) -> int:
        """Give the request the blocks that hold its first `num_tokens` tokens, as far as there are.

        Returns how many tokens, from the first, it need not compute: a multiple of the block size.
        Where it has blocks for them already, those go back.
        """
        contents = self._contents.get(request_id, [])
        own = len(contents)
        found = self._found(request_id, contents, token_ids, num_tokens, salt)
        end = len(found)
        if end > own:
            for group in self._groups:
                group.open(request_id)
                group.reserve(request_id, end * self._block_size)
                first = group.sees_from(end * self._block_size)
                group.release(request_id, first)
                first = max(first, own)
                group.use(request_id, first, [group.block_of[one] for one in found[first:]])
            self._contents[request_id] = found
            room = self._num_tokens.get(request_id, 0)
            self._num_tokens[request_id] = max(room, end * self._block_size)
        return end * self._block_size

    def commit(
        self, request_id: str, token_ids: Sequence[int], num_tokens: int, salt: str | None
    ) -> None:
        """Let others use the blocks that the first `num_tokens` tokens of the request fill."""
        if not self._caching:
            return
        contents = self._contents[request_id]
        while (len(contents) + 1) * self._block_size <= num_tokens:
            content = self._next_content(contents, token_ids, salt)
            if content is None:
                break
            known = self._known(content)
            if known is None:
                self._by_digest[content.digest] = known = content  # of two, the later stays
            index = len(contents)
            for group in self._groups:
                if index < group.num_gone(request_id):
                    continue
                block = group.tables[request_id][index]
                other = group.block_of.get(known)
                if other is None:
                    group.add(block, known)
                elif other != block:
                    group.use(request_id, index, [other])
            contents.append(known)

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
        """RuntimeError unless each block is in one state, refs count the tables that hold it,
        lengths fit, and what a sequence has committed is what its blocks hold."""
        if self._contents.keys() != self._num_tokens.keys():
            raise RuntimeError("requests with contents and requests with a length differ")
        for request_id, contents in self._contents.items():
            if len(contents) > self._num_tokens[request_id] // self._block_size:
                raise RuntimeError(
                    f"request {request_id}: {self._num_tokens[request_id]} tokens, "
                    f"{len(contents)} blocks committed"
                )
        for group in self._groups:
            group.check(self._num_tokens)
            for content, block in group.block_of.items():
                if not content.sound or group.contents[block] is not content:
                    raise RuntimeError("a block that holds what a failed request had")

    # ---- contents ----

    def _found(
        self,
        request_id: str,
        contents: list[_Content],
        token_ids: Sequence[int],
        num_tokens: int,
        salt: str | None,
    ) -> list[_Content]:
        """`contents`, and those that follow up to where every group has what is seen from there."""
        found, end = list(contents), len(contents)
        # Of each group, the block from which on all up to the current one are there.
        starts = [group.num_gone(request_id) for group in self._groups]
        while self._caching and (len(found) + 1) * self._block_size <= num_tokens:
            content = self._next_content(found, token_ids, salt)
            known = None if content is None else self._known(content)
            if known is None:
                break
            found.append(known)
            for number, group in enumerate(self._groups):
                if known not in group.block_of:
                    starts[number] = max(starts[number], len(found))
            if any(
                start and not group.group.reach
                for start, group in zip(starts, self._groups, strict=True)
            ):
                break
            length = len(found) * self._block_size
            if all(
                start <= group.sees_from(length) and group.can_reserve(request_id, length)
                for start, group in zip(starts, self._groups, strict=True)
            ):
                end = len(found)
        return found[:end]

    def _next_content(
        self, contents: Sequence[_Content], token_ids: Sequence[int], salt: str | None
    ) -> _Content | None:
        """Of the block after `contents`; None if the last of them is condemned."""
        before = contents[-1] if contents else None
        if before is not None and not before.sound:
            return None
        start = len(contents) * self._block_size
        packed = array("i", token_ids[start : start + self._block_size]).tobytes()
        parent = _salt_digest(salt) if before is None else before.digest
        return _Content(_digest(parent, packed), packed, before, salt)

    def _known(self, content: _Content) -> _Content | None:
        """The content in the table that is the same, if there is one."""
        known = self._by_digest.get(content.digest)
        return known if known is not None and known.equals(content) else None

    def _condemn(self, content: _Content) -> None:
        """Nobody finds it any more, nor what comes after it."""
        content.sound = False
        if self._by_digest.get(content.digest) is content:
            del self._by_digest[content.digest]
        for group in self._groups:
            block = group.block_of.get(content)
            if block is not None:
                group.forget(block)


def _digest(before: bytes, token_ids: bytes) -> bytes:
    return blake2b(before + token_ids, digest_size=DIGEST_SIZE, person=b"tokens").digest()


def _salt_digest(salt: str | None) -> bytes:
    """Stands before the first block. `person` keeps salts and tokens apart."""
    data = b"" if salt is None else salt.encode("utf-8", "surrogatepass")
    return blake2b(data, digest_size=DIGEST_SIZE, person=b"salt").digest()
