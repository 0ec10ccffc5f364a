"""`Request`: one sequence on its way, and `RequestStatus`.

Knows its tokens and how many of them the model has computed. Does not know arrays, caches,
schedules or text.

There are no phases. A request has `token_ids`, the prompt and what has been generated so far, and
`num_computed_tokens` of them have their keys and values in the cache. It is behind by the
difference and must catch up; when it has, the next token can be sampled. A new prompt is far
behind, a decoding request is behind by one, a preempted one is as far behind as if it were new.
Source: vLLM v1 (`vllm/v1/request.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol

from pace_nb.outputs import FinishReason, RequestMetrics, TokenLogprobs
from pace_nb.sampling_params import SamplingParams


class Grammar(Protocol):
    """What knows when a text of a form is complete; `structured_output.TokenGrammar` is one."""

    def is_complete(self, generated: Sequence[int]) -> bool:
        """Whether these ids are a whole text, to which nothing can be added."""
        ...


class RequestStatus(Enum):
    """Where a request is. WAITING: new or preempted, owns no cache. FINISHED: see finish_reason."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False, slots=True)
class Request:
    """One prompt and what becomes of it.

    Attributes:
        request_id: Unique among unfinished requests.
        prompt_token_ids: At least one.
        params: What the user asked for; `n` is fanned out before, so it counts as 1 here.
        max_tokens: Most tokens to generate; the context's end included, unlike `params.max_tokens`.
        metrics: When things happened.
        eos_token_ids: The model's end tokens.
        bad_words_token_ids: `params.bad_words` as token ids, one sequence per spelling.
        grammar: Of the form that its text must have; it is its `params.token_mask`, too.
        cache_salt: Its keys and values are shared only with requests of the same salt.
        priority: Lower runs first, where the engine's scheduling policy is "priority".
        seed: Of its random numbers; set by the engine where `params.seed` is None.
        arrival: Its number in order of arrival, set by the engine.
        takes_largest: Its tokens are those of the largest logits and nothing else is asked of them:
            greedy, nothing changes its logits, no logprobs.
        token_ids: The prompt, then what was generated.
        num_computed_tokens: How many of them have keys and values in the cache.
        draft_token_ids: Guesses for the tokens after these, which the step that catches up
            verifies (speculative.py).
        draft_probabilities: As in speculative.Draft; there may be more rows than guesses.
        num_cached_tokens: How many of its prompt it did not compute: the cache had them.
        num_preemptions: How often it lost its cache to an older request.
        logprobs: One dict per generated token, where asked for.
        prompt_logprobs: One entry per prompt token so far, the first None, where asked for.
        grammar_complete: It ended with its last token, because its form was complete.
        finish_reason, stop_reason: As in outputs.CompletionOutput, None while it is unfinished.
        error: Why it failed, in one line, with finish_reason "error".
    """

    request_id: str
    prompt_token_ids: Sequence[int]
    params: SamplingParams
    max_tokens: int
    metrics: RequestMetrics
    eos_token_ids: frozenset[int] = frozenset()
    bad_words_token_ids: Sequence[Sequence[int]] = ()
    grammar: Grammar | None = None
    cache_salt: str | None = None
    priority: int = 0
    seed: int = 0
    arrival: int = 0
    status: RequestStatus = RequestStatus.WAITING
    takes_largest: bool = field(init=False)
    token_ids: list[int] = field(init=False)
    num_computed_tokens: int = 0
    draft_token_ids: Sequence[int] = ()
    draft_probabilities: Any = None
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    logprobs: list[TokenLogprobs] | None = field(init=False)
    prompt_logprobs: list[TokenLogprobs | None] | None = field(init=False)
    grammar_complete: bool = False
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None
    error: str | None = None

    def __post_init__(self) -> None:
        self.takes_largest = self.params.only_greedy and not self.bad_words_token_ids
        self.token_ids = list(self.prompt_token_ids)
        self.logprobs = None if self.params.logprobs is None else []
        self.prompt_logprobs = None if self.params.prompt_logprobs is None else [None]

    @property
    def num_tokens(self) -> int:
        """Prompt and generated tokens."""
        return len(self.token_ids)

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return len(self.prompt_token_ids)

    @property
    def num_generated_tokens(self) -> int:
        """Tokens generated so far."""
        return len(self.token_ids) - len(self.prompt_token_ids)

    @property
    def generated_token_ids(self) -> list[int]:
        """A copy of what has been generated so far."""
        return self.token_ids[len(self.prompt_token_ids) :]

    @property
    def num_behind(self) -> int:
        """Tokens that the model has yet to compute before the next one can be sampled."""
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def num_reusable_tokens(self) -> int:
        """Tokens, from the first, whose logits nobody needs: the cache may have them already.

        All but the last; with `prompt_logprobs`, those before the first row of `num_logits`.
        """
        if self.prompt_logprobs is None or len(self.prompt_logprobs) == self.num_prompt_tokens:
            return self.num_tokens - 1
        return len(self.prompt_logprobs) - 1

    def num_logits(self, num_tokens: int) -> int:
        """Of the next `num_tokens` to be computed, how many at the end need logits.

        The last of all gives the next token, and each guess behind it another. With
        `prompt_logprobs` so does every row that predicts a prompt token not reported yet; those
        rows are always at the end of what is computed, because the first token is sampled only
        after the prompt is through.
        """
        end = self.num_computed_tokens + num_tokens
        if self.prompt_logprobs is None or len(self.prompt_logprobs) == self.num_prompt_tokens:
            return 1 + len(self.draft_token_ids) if end == self.num_tokens else 0
        first = max(self.num_computed_tokens, len(self.prompt_logprobs) - 1)
        return max(0, end - first)
