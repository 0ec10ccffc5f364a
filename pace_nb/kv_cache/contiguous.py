"""`ContiguousCache`: every sequence in one unbroken range of the pool, growing in segments.

Knows ranges: who owns which, which are free. Does not know layers' arithmetic or who deserves room.

PACE calls it BMC, "balancing memory and compute": a buffer that grew token by token would be copied
at every step, one of full length would waste its tail. So a sequence is given whole segments of
about sqrt(max_model_len) tokens and is copied at most once per segment. Here the buffers are ranges
of one pool, so that requests share it and a request's size is not fixed when it arrives:

    grow   in place when the units behind the range are free,
           else by moving to the first free range that is long enough (first fit). A range counts
           its own units as free while it moves, so whatever fits in an otherwise empty pool fits.
    room   is asked for in whole segments, and without the slack where that does not fit.

A range holds all of a sequence, for layers with a sliding window too: they share it with the others
(one table for all layers), and its beginning cannot go back while its end stays. Slab and paged let
go what the windows have passed.

Block table: one entry, the first unit of the range; a "block" is longer than any pool.
Source: PACE `pace/llm/attention/contiguous/cache.py` (BMCKVCache).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isqrt

from pace_nb.batch import Batch
from pace_nb.config import CacheConfig
from pace_nb.kv_cache.base import UNIT, KVCacheConfig, KVPool, KVView, view_of, zero_units

UNITS_PER_BLOCK = 2**40  # one block per sequence, whatever its length


class ContiguousCache:
    """The `contiguous` KV cache (protocol: base.KVCache)."""

    def __init__(self, model: KVCacheConfig, config: CacheConfig) -> None:
        self._num_units = config.num_tokens // UNIT
        self._layers = model.allocate_layers(self._num_units)
        # PACE: max_seq // isqrt(max_seq) tokens
        segment = config.max_model_len // isqrt(config.max_model_len)
        self._segment_units = max(1, segment // UNIT)
        self._ranges: dict[str, range] = {}  # units that a request owns
        self._num_tokens: dict[str, int] = {}  # tokens it may store there
        self._free = [range(self._num_units)]  # ascending, no two adjacent, none empty

    @property
    def num_total_tokens(self) -> int:
        """Tokens the pool holds."""
        return self._num_units * UNIT

    @property
    def num_free_tokens(self) -> int:
        """Tokens in units that nobody owns, in however many pieces."""
        return UNIT * sum(map(len, self._free))

    def allocate(self, request_id: str, num_tokens: int) -> bool:
        """Give the request room for `num_tokens` in total; False = no room, nothing has changed."""
        needed = max(1, -(-num_tokens // UNIT))
        owned = self._ranges.get(request_id, range(0))
        if needed > len(owned):
            roomy = -(-needed // self._segment_units) * self._segment_units
            new = self._find(owned, roomy) or self._find(owned, needed)
            if new is None:
                return False
            if owned and new.start != owned.start:
                self._move(owned, new.start)
            self._release(owned)
            self._take(new)
            self._ranges[request_id] = new
        self._num_tokens[request_id] = max(num_tokens, self._num_tokens.get(request_id, 0))
        return True

    def truncate(self, request_id: str, num_tokens: int) -> None:
        """Forget all but the first `num_tokens`; units past their last segment go back."""
        owned = self._ranges[request_id]
        self._num_tokens[request_id] = min(num_tokens, self._num_tokens[request_id])
        needed = max(1, -(-self._num_tokens[request_id] // UNIT))
        kept = min(len(owned), -(-needed // self._segment_units) * self._segment_units)
        self._ranges[request_id] = owned[:kept]
        self._release(owned[kept:])

    def free(self, request_id: str, *, zero: bool = False) -> None:
        """Give back all the request owns (unknown ids: nothing); zero: overwrite it first."""
        owned = self._ranges.pop(request_id, range(0))
        self._num_tokens.pop(request_id, None)
        if zero:
            zero_units(self._layers, owned.start, owned.stop)
        self._release(owned)

    def reuse(
        self, request_id: str, token_ids: Sequence[int], num_tokens: int, salt: str | None
    ) -> int:
        """0: a range has one owner."""
        return 0

    def commit(
        self, request_id: str, token_ids: Sequence[int], num_tokens: int, salt: str | None
    ) -> None:
        """Nothing: see `reuse`."""

    def view(self, batch: Batch) -> tuple[KVView, ...]:
        """block_table int64[B, 1]; RuntimeError if a request has no room for its context."""
        starts = {request_id: (owned.start,) for request_id, owned in self._ranges.items()}
        view = view_of(batch, starts, self._num_tokens, UNITS_PER_BLOCK)
        return (view,) * len(self._layers)

    def layer(self, index: int) -> KVPool:
        """Pool of layer `index`."""
        return self._layers[index]

    def check(self) -> None:
        """RuntimeError unless owned and free ranges tile the pool and every length fits."""
        if self._ranges.keys() != self._num_tokens.keys():
            raise RuntimeError("requests with units and requests with a length differ")
        for request_id, owned in self._ranges.items():
            if not 0 <= self._num_tokens[request_id] <= len(owned) * UNIT:
                raise RuntimeError(
                    f"request {request_id}: {self._num_tokens[request_id]} tokens in "
                    f"{len(owned)} units"
                )
        end = 0
        for piece in sorted([*self._ranges.values(), *self._free], key=lambda piece: piece.start):
            if piece.start != end or not piece:
                raise RuntimeError(f"units {end} to {piece.start} are lost or have two owners")
            end = piece.stop
        if end != self._num_units:
            raise RuntimeError(f"units {end} to {self._num_units} are lost")
        for left, right in zip(self._free, self._free[1:], strict=False):
            if left.stop >= right.start:
                raise RuntimeError(f"free ranges {left} and {right} are not coalesced")

    def _find(self, owned: range, length: int) -> range | None:
        """Where a range of `length` units that replaces `owned` would go; None = nowhere."""
        free = self._coalesced([*self._free, owned])
        in_place = next((piece for piece in free if owned and owned.start in piece), range(0))
        if in_place.stop - owned.start >= length:
            return range(owned.start, owned.start + length)
        start = next((piece.start for piece in free if len(piece) >= length), None)
        return None if start is None else range(start, start + length)

    def _move(self, owned: range, start: int) -> None:
        """Copy the units of `owned` to `start`; the two overlap only where that is below.

        (Above it they would lie in one free range that starts no later than `owned`, and first fit
        takes its start.) In ascending pieces no longer than the way they go: then no piece overlaps
        itself, and NumPy needs no temporary. A move that stopped half-way for want of memory would
        have damaged the sequence.
        """
        way = start - owned.start
        pieces = [owned[i : i + abs(way)] for i in range(0, len(owned), abs(way))]
        for array in (array for pool in self._layers for array in pool):
            for head in array:
                for piece in pieces:
                    head[piece.start + way : piece.stop + way] = head[piece.start : piece.stop]

    def _take(self, taken: range) -> None:
        """Cut `taken`, which lies in one free range, out of it."""
        index = next(i for i, piece in enumerate(self._free) if taken.start in piece)
        piece = self._free[index]
        rest = (range(piece.start, taken.start), range(taken.stop, piece.stop))
        self._free[index : index + 1] = [part for part in rest if part]

    def _release(self, released: range) -> None:
        self._free = self._coalesced([*self._free, released])

    @staticmethod
    def _coalesced(pieces: list[range]) -> list[range]:
        """The same units in ascending ranges that do not touch."""
        merged: list[range] = []
        for piece in sorted(filter(None, pieces), key=lambda piece: piece.start):
            if merged and merged[-1].stop == piece.start:
                merged[-1] = range(merged[-1].start, piece.stop)
            else:
                merged.append(piece)
        return merged
