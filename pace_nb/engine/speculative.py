"""Speculation: tokens that are guessed first and verified by the model afterwards, many at a time.

A step of decoding reads all weights to compute one token of each request; some tokens more cost it
little. So a `Drafter` guesses the next K tokens of a request (`Request.draft_token_ids`), the step
computes them behind the last token, and the sampler, from the K + 1 rows of logits, takes tokens
for as long as the guess before each was the token that it drew: n + 1 of them, where n guesses held
(engine/sampler.py). What was stored for the K - n others is trimmed.

    tokens       ... t    d1   d2   d3           K = 3
    rows give         x1   x2   x3   x4
    kept              x1   x2                    d1 = x1, d2 != x2: n = 1

A row of logits, its edits and its random number are those that the token would have had in a step
of its own. So a request gets the same tokens and log-probabilities, to the bit, with speculation as
without, greedy and sampled. A guess is accepted with the probability p of that token, and x is what
is left of p otherwise: that is the rejection rule of speculative sampling, for a q that is 1 at the
guess. Where a drafter draws its guesses, and says from what q, they are accepted with probability
min(1, p / q) and replaced by what max(p - q, 0) gives: more are accepted, the distribution stays
that of p, and the tokens are others than without speculation.

Knows requests, and when guessing is of use. Does not know models, arrays or text. Here is the
drafter that needs no model, `PromptLookup`; engine/pard.py has the one that has one.
Source: Leviathan et al. 2023, arXiv:2211.17192; Saxena 2023, prompt lookup decoding; vLLM v1
`vllm/v1/spec_decode/`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from pace_nb.config import SpeculativeConfig
from pace_nb.engine.draft_lengths import DraftLengths
from pace_nb.engine.request import Request

_log = logging.getLogger(__name__)


class Draft(NamedTuple):
    """Guesses for the next tokens of a request.

    probabilities: f32[len(token_ids), V], what each was drawn from; None where nothing was drawn.
    """

    token_ids: Sequence[int] = ()
    probabilities: Any = None


class Drafter(Protocol):
    """Guesses tokens."""

    def propose(self, requests: Sequence[Request], limits: Sequence[int]) -> Sequence[Draft]:
        """For each request up to `limits[i]` tokens, at least 0, that may follow its own."""

    def forget(self, request: Request) -> None:
        """The request has ended: nothing is kept for it any more. Unknown ones: nothing."""


@dataclass
class SpeculativeStats:
    """What speculation did since the engine began. Names are vLLM's.

    num_spec_tokens: K, the most guesses for a request in a step.
    num_drafts: how often a request's step held guesses.
    num_draft_tokens, num_accepted_tokens: guesses, and those that were right and kept.
    num_accepted_tokens_per_pos: of the first, second, ... guess, how many were accepted.
    num_steps_off: steps in which somebody could have had guesses and nobody got any, because they
        would not have paid, or to see what a step costs without (draft_lengths.py).
    """

    num_spec_tokens: int
    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    num_accepted_tokens_per_pos: list[int] = field(default_factory=list)
    num_steps_off: int = 0

    def __post_init__(self) -> None:
        self.num_accepted_tokens_per_pos = [0] * self.num_spec_tokens

    def observe(self, num_drafted: int, num_accepted: int) -> None:
        """One request's guesses were verified."""
        self.num_drafts += 1
        self.num_draft_tokens += num_drafted
        self.num_accepted_tokens += num_accepted
        for position in range(num_accepted):
            self.num_accepted_tokens_per_pos[position] += 1

    @property
    def mean_acceptance_length(self) -> float:
        """Tokens per step with guesses: those that were accepted, and the one that follows."""
        return 1 + self.num_accepted_tokens / max(self.num_drafts, 1)

    @property
    def acceptance_rate(self) -> float:
        """Of all guesses, the share that was accepted."""
        return self.num_accepted_tokens / max(self.num_draft_tokens, 1)

    @property
    def acceptance_rate_per_pos(self) -> list[float]:
        """Of the steps with guesses, the share in which the first, second, ... was accepted."""
        return [one / max(self.num_drafts, 1) for one in self.num_accepted_tokens_per_pos]


class PromptLookup:
    """Guesses that what followed the last tokens earlier, in prompt or output, follows again.

    Of the longest run of `prompt_lookup_max` to `prompt_lookup_min` last tokens that was there
    before, the latest place counts. Where that overlaps the end, the text has begun to repeat
    itself, and so does the guess.
    """

    def __init__(self, config: SpeculativeConfig) -> None:
        self._lengths = range(config.lookup_max, config.lookup_min - 1, -1)
        self._places: dict[Request, _Places] = {}

    def propose(self, requests: Sequence[Request], limits: Sequence[int]) -> list[Draft]:
        """See `Drafter`."""
        return [
            Draft(self._guess(request, limit))
            for request, limit in zip(requests, limits, strict=True)
        ]

    def forget(self, request: Request) -> None:
        """See `Drafter`."""
        self._places.pop(request, None)

    def _guess(self, request: Request, limit: int) -> list[int]:
        places = self._places.get(request)
        if places is None:
            places = self._places[request] = _Places(self._lengths)
        token_ids, end = request.token_ids, request.num_tokens
        start = places.of_last(token_ids)
        if start is None:
            return []
        return [token_ids[start + i % (end - start)] for i in range(limit)]


class _Places:
    """Where each run of tokens was last followed by something."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self._lengths = lengths
        self._follows: dict[tuple[int, ...], int] = {}  # run: position after it, latest
        self._num_seen = 0  # runs that end before this position are there

    def of_last(self, token_ids: Sequence[int]) -> int | None:
        """Where what once followed the last tokens begins; None where they are new."""
        end = len(token_ids)
        for position in range(self._num_seen + 1, end):
            for length in self._lengths:
                if length <= position:
                    self._follows[tuple(token_ids[position - length : position])] = position
        self._num_seen = max(self._num_seen, end - 1)
        for length in self._lengths:
            found = self._follows.get(tuple(token_ids[-length:])) if length < end else None
            if found is not None:
                return found
        return None


class Speculation:
    """Who gets guesses in a step, how many, and what became of them.

    switch_length: as in ModelRunner; a sequence must not outgrow it amid its guesses.
    """

    def __init__(
        self, drafter: Drafter, config: SpeculativeConfig, switch_length: int | None
    ) -> None:
        self._drafter = drafter
        self._config = config
        self._switch_length = switch_length
        self._lengths = DraftLengths() if config.is_adaptive else None
        self.stats = SpeculativeStats(config.num_tokens)

    def draft(self, running: Sequence[Request]) -> None:
        """Give the running requests that decode their guesses for the next step."""
        for request in running:
            request.draft_token_ids, request.draft_probabilities = (), None
        decoding = [one for one in running if one.num_behind == 1 and one.num_generated_tokens]
        limits = [self._limit(request) for request in decoding]
        if self._lengths is not None and any(limits):
            limits = self._lengths.choose(decoding, limits)
            self.stats.num_steps_off += not any(limits)
        wanted = [pair for pair in zip(decoding, limits, strict=True) if pair[1] > 0]
        if not wanted:
            return
        requests, limits = [request for request, _ in wanted], [limit for _, limit in wanted]
        begun = time.perf_counter()
        try:
            drafts = self._drafter.propose(requests, limits)
            for request, limit, draft in zip(requests, limits, drafts, strict=True):
                request.draft_token_ids = tuple(draft.token_ids[:limit])
                request.draft_probabilities = draft.probabilities
        except Exception:  # without guesses the requests run as they always do
            _log.warning("no drafts for %d requests", len(requests), exc_info=True)
            for request in requests:
                request.draft_token_ids, request.draft_probabilities = (), None
        if self._lengths is not None and all(request.draft_token_ids for request in requests):
            rows = sum(limits) + len(requests)
            self._lengths.draft.observe(rows, time.perf_counter() - begun)

    def ran(self, requests: Sequence[Request], seconds: float) -> None:
        """A step computed these requests, and their guesses, in so many seconds."""
        if self._lengths is not None and all(one.num_behind == 1 for one in requests):
            rows = sum([1 + len(request.draft_token_ids) for request in requests])
            self._lengths.target.observe(rows, seconds)

    def verified(self, request: Request, num_accepted: int) -> None:
        """Of the request's guesses the first `num_accepted` were right and kept."""
        self.stats.observe(len(request.draft_token_ids), num_accepted)
        if self._lengths is not None:
            self._lengths.verified(request, len(request.draft_token_ids), num_accepted)

    def forget(self, request: Request) -> None:
        """The request has ended."""
        self._drafter.forget(request)
        if self._lengths is not None:
            self._lengths.forget(request)

    def _limit(self, request: Request) -> int:
        """Most guesses: the step gives one token more, and none may be for nothing."""
        limit = min(self._config.num_tokens, request.max_tokens - request.num_generated_tokens - 1)
        switch = self._switch_length
        if switch is not None and request.num_tokens <= switch:
            limit = min(limit, switch - request.num_tokens)
        return limit
