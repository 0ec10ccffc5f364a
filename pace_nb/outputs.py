"""What a request gives back: texts, token ids, log-probabilities, why it ended, how long it took.

Plain records in vLLM's names, and how pieces of one are joined. They know nothing of how they came
about; the engine and the text front doors fill them.

Source: vLLM `vllm/outputs.py`, `vllm/logprobs.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

FinishReason = Literal["stop", "length", "abort", "error"]
"""`stop`: an end token, stop id or stop string. `length`: `max_tokens` or the end of the context.
`abort`: given up by the caller. `error`: the request failed (for instance, NaN logits)."""


@dataclass(frozen=True, slots=True)
class Logprob:
    """The log-probability of one token at one position.

    Attributes:
        logprob: Natural logarithm of the probability, from the logits as the model gave them.
        rank: 1 for the most likely token of the vocabulary, and so on; ties go to the lower id.
            None where it was not computed.
        decoded_token: The token as text by itself, None where nothing was decoded.
    """

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


TokenLogprobs = dict[int, Logprob]
"""Token id -> Logprob for one position: the token that is there, and the most likely ones."""


@dataclass(slots=True)
class CompletionOutput:
    """One of the `n` continuations of a prompt.

    Attributes:
        index: Which of the `n`, from 0.
        text: The generated text, without the stop string unless it was asked for.
        token_ids: The generated ids, an end token or stop id included. A stop string may cut
            `text` short of what these decode to.
        cumulative_logprob: Sum of the log-probabilities of `token_ids`; None unless `logprobs`.
        logprobs: One dict for each of `token_ids`; None unless `logprobs` were asked for.
        finish_reason: Why it ended; None while it runs.
        stop_reason: The stop string or stop token id that ended it; None for anything else, the
            model's own end token included.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None

    def finished(self) -> bool:
        """True once there is a finish reason."""
        return self.finish_reason is not None

    def add(self, later: CompletionOutput) -> None:
        """Append the piece of the same completion that follows this one."""
        self.text += later.text
        self.token_ids += later.token_ids
        if self.logprobs is not None and later.logprobs is not None:
            self.logprobs += later.logprobs
        self.cumulative_logprob = later.cumulative_logprob
        self.finish_reason, self.stop_reason = later.finish_reason, later.stop_reason

    def copy(self) -> CompletionOutput:
        """One that later pieces do not change."""
        logprobs = None if self.logprobs is None else list(self.logprobs)
        return replace(self, token_ids=list(self.token_ids), logprobs=logprobs)


@dataclass(slots=True)
class RequestMetrics:
    """When things happened to a request, in seconds of `time.monotonic()`; None until they did.

    Attributes:
        arrival_time: The request was accepted.
        first_scheduled_time: Its first token was given to the model.
        first_token_time: Its first new token came out.
        last_token_time: Its latest new token came out.
        finished_time: It ended.
    """

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    last_token_time: float | None = None
    finished_time: float | None = None

    @property
    def time_to_first_token(self) -> float | None:
        """Seconds from arrival to the first new token."""
        if self.first_token_time is None:
            return None
        return self.first_token_time - self.arrival_time


@dataclass(slots=True)
class RequestOutput:
    """One prompt with its continuations, finished or so far.

    Attributes:
        request_id: The engine's name for the request.
        prompt: The prompt as text; None where it came as token ids.
        prompt_token_ids: The ids the model saw, special tokens included.
        prompt_logprobs: One dict for each prompt token, None for the first (nothing predicts it);
            None unless `prompt_logprobs` were asked for.
        outputs: `n` completions, by index.
        finished: All of `outputs` have ended.
        num_cached_tokens: Prompt tokens whose keys and values were found in the cache.
        metrics: When things happened; None where it was not recorded.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[TokenLogprobs | None] | None
    outputs: list[CompletionOutput]
    finished: bool
    num_cached_tokens: int = 0
    metrics: RequestMetrics | None = None

    def add(self, later: RequestOutput) -> None:
        """Append the news of the same request that follows these, so that two become one."""
        own = {completion.index: completion for completion in self.outputs}
        for completion in later.outputs:
            if completion.index in own:
                own[completion.index].add(completion)
            else:
                self.outputs.append(completion)
        self.outputs.sort(key=lambda completion: completion.index)
        if later.prompt_logprobs is not None:  # a piece that came over a socket may leave them out
            self.prompt_logprobs = later.prompt_logprobs
        self.finished = later.finished
        self.num_cached_tokens, self.metrics = later.num_cached_tokens, later.metrics

    def copy(self) -> RequestOutput:
        """One that later news do not change."""
        return replace(self, outputs=[completion.copy() for completion in self.outputs])
