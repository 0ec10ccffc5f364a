"""`Router`: which of the engines gets a prompt, and whether there is room for it at all.

Knows how much each engine has to do and which beginnings it was given. Does not know processes or
HTTP.

Room. What is admitted is counted before anything is awaited, so a burst of requests cannot pass a
limit together. A request that is larger than the queue is admitted when nothing else is there.

Choice. An engine that was given the longest common beginning has its keys and values in the
cache, if it shares beginnings; it is preferred unless it has `AFFINITY_SLACK` more sequences to do
than the least busy one. Among equals the least busy, then the one chosen least recently.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Sequence
from hashlib import blake2b
from itertools import count
from typing import Final

from pace_nb.errors import ApiError
from pace_nb.sampling_params import SamplingParams
from pace_nb.server.engine_client import EngineClient, Ticket
from pace_nb.server.limits import Limits
from pace_nb.server.mailbox import Mailbox

AFFINITY_SLACK: Final = 4  # sequences
PIECE: Final = 64  # tokens: beginnings are compared in multiples of it
MAX_PIECES: Final = 64  # of one prompt
MAX_BEGINNINGS: Final = 2**16  # remembered; 16-byte digests


class Admission:
    """A request and its sequences, counted until `release`; twice is once."""

    def __init__(self, router: Router, num_sequences: int, client: bytes | str) -> None:
        self._router = router
        self._num_sequences = num_sequences
        self._client = client
        self._released = False
        router.num_admitted += num_sequences
        router.clients[client] += 1

    def release(self) -> None:
        """They are done, however that came."""
        if not self._released:
            self._released = True
            self._router.num_admitted -= self._num_sequences
            self._router.clients[self._client] -= 1
            if not self._router.clients[self._client]:
                del self._router.clients[self._client]


class Router:
    """Several engines as one.

    max_num_seqs: of one engine, as in `EngineConfig`.

    Attributes:
        num_admitted: Sequences that run or wait, or whose prompts are being read.
        clients: Requests under way of each client.
    """

    def __init__(self, engines: Sequence[EngineClient], max_num_seqs: int, limits: Limits) -> None:
        self.engines = list(engines)
        self.num_admitted = 0
        self.clients: Counter[bytes | str] = Counter()
        self._max_num_seqs = max_num_seqs
        self._limits = limits
        self._beginnings: OrderedDict[bytes, int] = OrderedDict()  # digest -> engine
        self._turns = count()
        self._last_turn = dict.fromkeys(range(len(self.engines)), -1)

    @property
    def ready(self) -> list[EngineClient]:
        """Engines that take requests."""
        return [engine for engine in self.engines if engine.ready]

    @property
    def capacity(self) -> int:
        """Sequences that may be there at a time, running and waiting."""
        queued = self._limits.max_queued_requests
        if queued is None:
            queued = 4 * self._max_num_seqs
        return len(self.ready) * (self._max_num_seqs + queued)

    def admit(self, num_sequences: int, client: bytes | str = "") -> Admission:
        """Count them in. ApiError 503 where there is no room, or no engine; 429 where it is this
        client who asks too much."""
        most = self._limits.max_requests_per_client
        if most is not None and self.clients[client] >= most:
            raise ApiError(
                f"you have {self.clients[client]} requests under way, at most {most} may be",
                status=429,
            )
        if not self.ready:
            raise ApiError("no engine is ready, please try again", status=503)
        if self.num_admitted and self.num_admitted + num_sequences > self.capacity:
            raise ApiError(
                f"the server is full: {self.num_admitted} sequences run or wait, at most "
                f"{self.capacity} may",
                status=503,
            )
        return Admission(self, num_sequences, client)

    def submit(
        self,
        mailbox: Mailbox,
        prompt_index: int,
        prompt: str | None,
        prompt_token_ids: list[int],
        params: SamplingParams,
        *,
        cache_salt: str | None,
        priority: int,
        arrival_time: float,
    ) -> tuple[EngineClient, Ticket]:
        """Give a prompt to the engine that suits it. ApiError 503 where none may have it."""
        digests = _beginnings(prompt_token_ids, cache_salt) if len(self.engines) > 1 else []
        engine = self._choose(digests)
        waiting = engine.num_waiting_tokens
        most = self._limits.max_queued_tokens
        if most is None:
            most = 4 * int(engine.facts["num_kv_tokens"])
        if waiting and waiting + len(prompt_token_ids) > most:
            raise ApiError(
                f"the server is full: {waiting} tokens of prompts wait, at most {most} may",
                status=503,
            )
        ticket = engine.submit(
            mailbox,
            prompt_index,
            prompt,
            prompt_token_ids,
            params,
            cache_salt=cache_salt,
            priority=priority,
            arrival_time=arrival_time,
        )
        self._last_turn[engine.index] = next(self._turns)
        for digest in digests:
            self._beginnings[digest] = engine.index
            self._beginnings.move_to_end(digest)
        while len(self._beginnings) > MAX_BEGINNINGS:
            self._beginnings.popitem(last=False)
        return engine, ticket

    def _choose(self, digests: Sequence[bytes]) -> EngineClient:
        ready = {engine.index: engine for engine in self.ready}
        if not ready:
            raise ApiError("no engine is ready, please try again", status=503)
        least = min(ready.values(), key=lambda one: (one.num_sequences, self._last_turn[one.index]))
        for digest in reversed(digests):  # the longest beginning first
            known = ready.get(self._beginnings.get(digest, -1))
            if known is not None:
                if known.num_sequences - least.num_sequences <= AFFINITY_SLACK:
                    return known
                break
        return least


def _beginnings(token_ids: Sequence[int], salt: str | None) -> list[bytes]:
    """A digest of each beginning of the prompt, the shortest first; of none shorter than PIECE."""
    hashed = blake2b((salt or "").encode("utf-8", "surrogatepass"), digest_size=16)
    digests = []
    for start in range(0, min(len(token_ids), MAX_PIECES * PIECE) - PIECE + 1, PIECE):
        hashed.update(repr(token_ids[start : start + PIECE]).encode())
        digests.append(hashed.digest())
    return digests
