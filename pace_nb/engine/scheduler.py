"""`Scheduler`: which request gets how many tokens in this step.

Knows how far each request is behind, the token budget and whether the cache has room. Does not know
models, arrays or text.

A step has `max_num_batched_tokens` to give away:

1. Running requests first. Those that are behind by one token (they decode) come before those that
   are behind by more (they prefill), so a long prompt never makes the others wait for more than one
   budget. Within each group the first in line is first. Guesses that are to be verified
   (`Request.draft_token_ids`) get what is left when every decoding request has its token, and at
   most half of it where others wait for it; room in the cache they get where there is some.
2. What is left goes to waiting requests, in line, while fewer than `max_num_seqs` run and the cache
   has room for all the tokens they have now.

The line is the order of arrival; with scheduling policy "priority", the order of priority and then
of arrival.

What the cache has of a request's tokens already, computed for another request with the same
beginning, counts as computed. It is asked when a request is admitted and again in each step in
which the request is behind: requests that came together may share what the first of them has
computed by now.

With chunked prefill a request takes what is left of the budget, of which one prompt gets no more
than `long_prefill_token_threshold`, and goes on in the next step. Without it a prompt runs whole or
waits, and the first one of a step may exceed the budget.

When a running request needs room and there is none, the running request that is last in line is
preempted, the least urgent and of those the youngest: it gives all its room back, waits at its old
place and later computes its tokens anew. The first that runs is never preempted, and alone it
always fits (the engine refuses what never could), so it finishes, and then the next is the first.
Source: vLLM v1 (`vllm/v1/core/sched/scheduler.py`).
"""

from __future__ import annotations

import time
from bisect import insort
from typing import TYPE_CHECKING

from pace_nb.config import EngineConfig
from pace_nb.engine.request import Request, RequestStatus

if TYPE_CHECKING:
    from pace_nb.kv_cache.base import KVCache  # it imports numpy


UNIT = 16  # kv_cache.base.UNIT, whose module imports NumPy


# A request and how many of its tokens this step computes, at least one. Where these are all it has,
# its guesses are computed behind them.
Scheduled = tuple[Request, int]


class Scheduler:
    """Owns the waiting and the running requests, each in the order of the line.

    by_priority: whether the policy is "priority".
    """

    def __init__(self, config: EngineConfig, cache: KVCache) -> None:
        self._max_num_seqs = config.max_num_seqs
        self._max_num_batched_tokens = config.max_num_batched_tokens
        self._chunked_prefill = config.enable_chunked_prefill
        self._longest_chunk = config.long_prefill_token_threshold  # 0: no bound but the budget
        self.by_priority = config.scheduling_policy == "priority"
        self._cache = cache
        self.waiting: list[Request] = []
        self.running: list[Request] = []

    def add(self, request: Request) -> None:
        """Put a new request into the line."""
        insort(self.waiting, request, key=self._place)

    def schedule(self) -> list[Scheduled]:
        """Share out one step's budget.

        Empty only when nothing waits or runs, or when the cache refuses room to the first in line
        although nobody else has any.
        """
        scheduled: list[Scheduled] = []
        budget = self._max_num_batched_tokens

        decoding, prefilling = self._by_need()
        if prefilling:
            for request in prefilling:
                # It has room for all its tokens since it was admitted, unless it decoded and then
                # had to begin anew (`Engine`, keys that were outgrown).
                if self._make_room(request):
                    self._reuse(request)
            decoding, prefilling = self._by_need()
        spare = budget - len(decoding)  # for guesses
        if prefilling or self.waiting:
            spare //= 2
        # Those that prefill have their room by now. So only the decoding ones may preempt, in the
        # order of the line: their victims are not scheduled yet.
        guessing: list[Request] = []
        for request in decoding:
            if budget > 0 and self._make_room(request):
                scheduled.append((request, 1))
                budget -= 1
                if request.draft_token_ids:
                    request.draft_token_ids = request.draft_token_ids[: max(spare, 0)]
                    spare -= len(request.draft_token_ids)
                    budget -= len(request.draft_token_ids)
                    guessing.append(request)
        for request in prefilling:
            num_tokens = self._share(request, budget, scheduled)
            if num_tokens and self._make_room(request):
                scheduled.append((request, num_tokens))
                budget -= num_tokens
        for request in guessing:  # all have their own room by now: guesses take what is left
            if not self._has_room_for_guesses(request):
                request.draft_token_ids = ()

        while self.waiting and len(self.running) < self._max_num_seqs and budget > 0:
            request = self.waiting[0]
            self._reuse(request)
            num_tokens = self._share(request, budget, scheduled)
            if not num_tokens or not self._cache.allocate(request.request_id, request.num_tokens):
                self._begin_anew(request)
                break
            insort(self.running, self.waiting.pop(0), key=self._place)
            request.status = RequestStatus.RUNNING
            if request.metrics.first_scheduled_time is None:
                request.metrics.first_scheduled_time = time.monotonic()
            scheduled.append((request, num_tokens))
            budget -= num_tokens
        return scheduled

    def finish(self, request: Request, *, zero: bool = False) -> None:
        """Take a request out, wherever it is, and give its room back.

        zero: what it stored may be NaN, so it is overwritten first.
        """
        (self.running if request.status is RequestStatus.RUNNING else self.waiting).remove(request)
        request.status = RequestStatus.FINISHED
        self._cache.free(request.request_id, zero=zero)

    def _by_need(self) -> tuple[list[Request], list[Request]]:
        """Those that run: who is behind by one token, and who by more."""
        decoding: list[Request] = []
        prefilling: list[Request] = []
        for request in self.running:
            (prefilling if request.num_behind > 1 else decoding).append(request)
        return decoding, prefilling

    def _share(self, request: Request, budget: int, scheduled: list[Scheduled]) -> int:
        """Tokens the request gets of what is left of the budget; 0 = it has to wait."""
        wanted = request.num_behind
        if self._chunked_prefill:
            return min(wanted, max(budget, 0), self._longest_chunk or wanted)
        if wanted <= budget:
            return wanted
        return 0 if any(num_tokens > 1 for _, num_tokens in scheduled) else wanted

    def _reuse(self, request: Request) -> None:
        """Bring the request forward by what the cache has of its tokens already."""
        found = self._cache.reuse(
            request.request_id, request.token_ids, request.num_reusable_tokens, request.cache_salt
        )
        if found > request.num_computed_tokens:
            if not request.num_generated_tokens:
                request.num_cached_tokens += found - request.num_computed_tokens
            request.num_computed_tokens = found

    def _make_room(self, request: Request) -> bool:
        """Room for all tokens of a running request; False where it had to give way itself.

        It asks for whole units, which is what caches give, so it seldom asks for more than it has.
        """
        room = -(-request.num_tokens // UNIT) * UNIT
        while request.status is RequestStatus.RUNNING:
            if self._cache.allocate(request.request_id, room):
                return True
            self._preempt(self.running[-1])
        return False

    def _has_room_for_guesses(self, request: Request) -> bool:
        """Room for them behind its tokens; nobody gives way to guesses."""
        room = -(-(request.num_tokens + len(request.draft_token_ids)) // UNIT) * UNIT
        return self._cache.allocate(request.request_id, room)

    def _preempt(self, request: Request) -> None:
        """Take the room of a running request; it waits in its old place."""
        self.running.remove(request)
        self._begin_anew(request)
        request.status = RequestStatus.WAITING
        request.num_preemptions += 1
        insort(self.waiting, request, key=self._place)

    def _begin_anew(self, request: Request) -> None:
        """Take all the room of a request: nothing of it is computed any more."""
        self._cache.free(request.request_id)
        request.num_computed_tokens = 0
        request.draft_token_ids = ()
        if not request.num_generated_tokens:
            request.num_cached_tokens = 0

    def _place(self, request: Request) -> tuple[int, int]:
        """Where in the line it stands: the lowest comes first."""
        return (request.priority if self.by_priority else 0, request.arrival)
