"""`Engine`: the `step()` loop. Requests in, tokens out.

Knows the order of things: draft (with speculation), schedule, run, sample, update. Does not know
text, HTTP or arithmetic.

What fails, fails alone:

- A request that could never run is refused by `check`, with the numbers, before it waits.
- Logits from which no token can be taken end their request with finish_reason "error" and the
  reason in `Request.error`; its room in the cache is overwritten before others get it.
- When a step raises, each of its requests is run again by itself (what it computes does not depend
  on the batch, and nothing has been updated yet). Those that raise again end with "error".
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from pace_nb.config import EngineConfig
from pace_nb.engine.logit_changes import packed
from pace_nb.engine.model_runner import FORWARD_ID, Float32Array, ModelRunner
from pace_nb.engine.request import Request
from pace_nb.engine.sampler import Sampled, Sampler
from pace_nb.engine.scheduler import Scheduled, Scheduler
from pace_nb.engine.speculative import Drafter, PromptLookup, Speculation, SpeculativeStats
from pace_nb.engine.stopping import check_tokens
from pace_nb.errors import InvalidRequestError, WrongThreadError
from pace_nb.kv_cache.base import KVCache
from pace_nb.outputs import FinishReason

if TYPE_CHECKING:
    from pace_nb.models.registry import Model


_log = logging.getLogger(__name__)


# What a step did for a request: new tokens, its end, or both.
Progress = tuple[Request, Sequence[int]]


class EngineLoad(NamedTuple):
    """How busy an engine is.

    num_running, num_waiting: requests. kv_cache_usage: the share of the KV cache that running
    requests own, 0 to 1. num_step_tokens: what the last step computed.
    """

    num_running: int
    num_waiting: int
    kv_cache_usage: float
    num_step_tokens: int


class Engine:
    """Serves requests with one model and one KV cache.

    The first thread that calls `step` or `forward` owns it: from then on they, `add` and `abort`
    raise WrongThreadError in any other (`EngineThread` takes calls from all). `check`, which looks
    at nothing that changes, may be called from anywhere.

    max_model_len: the longest sequence, prompt and output together. drafter: guesses tokens, where
    the config has a speculative_config; None is the one that needs no model.
    """

    def __init__(
        self,
        model: Model,
        cache: KVCache,
        config: EngineConfig,
        max_model_len: int,
        drafter: Drafter | None = None,
    ) -> None:
        self.max_model_len = max_model_len
        self._cache = cache
        self._runner = ModelRunner(model, cache, config)
        self._scheduler = Scheduler(config, cache)
        self._sampler = Sampler(config.seed, config.kernels)
        self._speculation: Speculation | None = None
        if (speculative := config.speculative_config) is not None:
            self._speculation = Speculation(
                drafter or PromptLookup(speculative), speculative, self._runner.switch_length
            )
        self._requests: dict[str, Request] = {}  # unfinished
        self._num_arrived = 0
        self._num_step_tokens = 0
        self._owner: threading.Thread | None = None

    def step(self) -> list[Progress]:
        """Bring requests forward by one step; returns those with new tokens or an end."""
        self._own()
        if self._speculation is not None:
            self._speculation.draft(self._scheduler.running)
        scheduled, self._num_step_tokens = self._scheduler.schedule(), 0
        if not scheduled:
            return self._end_stall()
        begun = time.perf_counter()
        try:
            logits = self._runner.run(scheduled)
            self._num_step_tokens = logits.num_tokens
            sampled = self._sampler.sample(scheduled, logits)
            if self._speculation is not None:
                requests = [request for request, _ in scheduled]
                self._speculation.ran(requests, time.perf_counter() - begun)
        except Exception:
            sampled = self._one_by_one(scheduled)
        return self._update(scheduled, sampled)

    def add(self, request: Request) -> None:
        """Accept a request that `check` accepts; it runs in the steps to come."""
        self._expect_owner()
        self.check(request)
        if request.request_id in self._requests or request.request_id == FORWARD_ID:
            raise InvalidRequestError(f"request id {request.request_id!r} is taken")
        request.arrival = self._num_arrived
        self._num_arrived += 1
        if request.params.seed is None:
            request.seed = self._sampler.draw_seed(request.arrival)
        else:
            request.seed = request.params.seed
        self._requests[request.request_id] = request
        self._scheduler.add(request)

    def check(self, request: Request) -> None:
        """InvalidRequestError, saying what and by how much, for a request that cannot be served."""
        prompt, params = request.prompt_token_ids, request.params
        if not prompt:
            raise InvalidRequestError("the prompt is empty, expected at least one token")
        self.check_token_ids("prompt token id", prompt)
        self.check_token_ids("stop_token_ids entry", params.stop_token_ids)
        self.check_token_ids("allowed_token_ids entry", params.allowed_token_ids or ())
        self.check_token_ids("logit_bias key", params.logit_bias or ())
        if params.token_mask is not None and not callable(params.token_mask):
            try:
                packed(params.token_mask, self.vocab_size)
            except ValueError as error:
                raise InvalidRequestError(f"token_mask {error}") from None
        for word in request.bad_words_token_ids:
            self.check_token_ids("token id of a bad word", word)
        if len(prompt) >= self.max_model_len:
            raise InvalidRequestError(
                f"the prompt has {len(prompt)} tokens, expected at most {self.max_model_len - 1}: "
                f"this model's maximum context length is {self.max_model_len} tokens "
                "(max_model_len), prompt and output together"
            )
        salt = request.cache_salt
        if salt is not None and (not isinstance(salt, str) or not salt):
            raise InvalidRequestError(f"cache_salt is {salt!r}, expected a non-empty string")
        if request.priority and not self._scheduler.by_priority:
            raise InvalidRequestError(
                f"priority is {request.priority}, expected 0: the engine's scheduling_policy is "
                "'fcfs', not 'priority'"
            )
        # The last token that is generated is never computed, so it needs no room.
        needed = len(prompt) + request.max_tokens - 1
        if needed > self._cache.num_total_tokens:
            raise InvalidRequestError(
                f"{len(prompt)} prompt tokens and {request.max_tokens} new ones need KV cache for "
                f"{needed} tokens, the whole cache holds {self._cache.num_total_tokens}: lower "
                "max_tokens or raise kv_cache_memory_bytes"
            )
        if not 1 <= request.max_tokens <= self.max_model_len - len(prompt):
            raise InvalidRequestError(
                f"max_tokens is {request.max_tokens}, expected 1 to "
                f"{self.max_model_len - len(prompt)}: the prompt has {len(prompt)} tokens, the "
                f"context {self.max_model_len}"
            )

    def check_token_ids(self, name: str, token_ids: Iterable[int]) -> None:
        """InvalidRequestError for the first that is no int in the vocabulary."""
        vocab_size = self.vocab_size
        for token_id in token_ids:
            if type(token_id) is not int or not 0 <= token_id < vocab_size:
                raise InvalidRequestError(
                    f"{name} is {token_id!r}, expected an integer from 0 to {vocab_size - 1}"
                )

    def abort(self, request_id: str) -> None:
        """End a request now, wherever it is, and give its room back; unknown ids: nothing."""
        self._expect_owner()
        request = self._requests.get(request_id)
        if request is not None:
            self._finish(request, "abort")

    def forward(self, token_ids: Sequence[int]) -> Float32Array:
        """Logits f32[T, V] of one sequence, beside whatever runs.

        Raises InvalidRequestError for token ids or a length that the model cannot take,
        OutOfMemoryError where the cache has no room left.
        """
        if not 1 <= len(token_ids) <= self.max_model_len:
            raise InvalidRequestError(
                f"forward got {len(token_ids)} tokens, expected 1 to {self.max_model_len}"
            )
        self.check_token_ids("token id", token_ids)
        self._own()
        return self._runner.forward(token_ids)

    def load(self) -> EngineLoad:
        """How busy it is, after its last step."""
        return EngineLoad(
            num_running=len(self._scheduler.running),
            num_waiting=len(self._scheduler.waiting),
            kv_cache_usage=1 - self._cache.num_free_tokens / self._cache.num_total_tokens,
            num_step_tokens=self._num_step_tokens,
        )

    @property
    def speculative_stats(self) -> SpeculativeStats | None:
        """What speculation did so far; None where it is off."""
        return None if self._speculation is None else self._speculation.stats

    @property
    def num_kv_tokens(self) -> int:
        """Tokens that the KV cache holds, all requests together."""
        return self._cache.num_total_tokens

    @property
    def vocab_size(self) -> int:
        """V."""
        return self._runner.vocab_size

    @property
    def num_unfinished(self) -> int:
        """Requests that wait or run."""
        return len(self._requests)

    def _own(self) -> None:
        """Kernels are launched by one thread: OpenMP would start another pool for a second one, and
        Numba's own pool ends the process when two are inside at the same time."""
        if self._owner is None:
            self._owner = threading.current_thread()
            self._runner.use_threads()  # Numba keeps their number for each thread
        self._expect_owner()

    def _expect_owner(self) -> None:
        """WrongThreadError outside the thread that owns the engine, once there is one."""
        if self._owner is not None and self._owner is not (here := threading.current_thread()):
            raise WrongThreadError(
                f"the engine was called from thread {here.name!r}, expected {self._owner.name!r}, "
                "which ran its first step: one thread launches kernels (EngineThread and AsyncLLM "
                "may be called from any)"
            )

    def _end_stall(self) -> list[Progress]:
        """Nothing could be scheduled: the first in line, if there is one, would wait for ever."""
        if not self._scheduler.waiting:
            return []
        request = self._scheduler.waiting[0]
        reason = f"no room in the KV cache for {request.num_tokens} tokens, though it is idle"
        return [self._fail(request, reason)]

    def _one_by_one(self, scheduled: Sequence[Scheduled]) -> list[Sampled]:
        """A step that raised, again, one request at a time and without guesses."""
        _log.warning("a step of %d requests failed", len(scheduled), exc_info=True)
        sampled = []
        for request, num_tokens in scheduled:
            request.draft_token_ids = ()
            alone = [(request, num_tokens)]
            try:
                sampled += self._sampler.sample(alone, self._runner.run(alone))
            except Exception as error:
                sampled.append(Sampled(error=_described(error)))
        return sampled

    def _update(self, scheduled: Sequence[Scheduled], sampled: Sequence[Sampled]) -> list[Progress]:
        """Write the results of a step into its requests; end those that are done."""
        progress = []
        now, switch_length = time.monotonic(), self._runner.switch_length
        for (request, num_tokens), result in zip(scheduled, sampled, strict=True):
            try:
                moved = self._advance(request, num_tokens, result, now, switch_length)
            except Exception as error:  # a defect, but it must not cost the others their tokens
                _log.warning("request %s failed", request.request_id, exc_info=True)
                moved = self._fail(request, _described(error))
            if moved is not None:
                progress.append(moved)
        return progress

    def _advance(
        self,
        request: Request,
        num_tokens: int,
        result: Sampled,
        now: float,
        switch_length: int | None,
    ) -> Progress | None:
        """Write what a step gave one request into it; None where there is nothing to tell."""
        if result.error is not None:
            return self._fail(request, result.error)
        request.num_computed_tokens += num_tokens
        if request.prompt_logprobs is not None:
            request.prompt_logprobs += result.prompt_logprobs
        if not result.token_ids:
            return None
        num_kept, finish_reason, request.stop_reason = check_tokens(
            result.token_ids,
            request.num_generated_tokens,
            request.params,
            request.eos_token_ids,
            request.max_tokens,
        )
        if request.grammar is not None:
            generated = [*request.generated_token_ids, *result.token_ids[:num_kept]]
            for position in range(len(generated) - num_kept + 1, len(generated) + 1):
                ended = finish_reason == "stop" and position == len(generated)
                if not ended and request.grammar.is_complete(generated[:position]):
                    num_kept -= len(generated) - position
                    finish_reason, request.stop_reason = "stop", None
                    request.grammar_complete = True
                    break
        request.token_ids += result.token_ids[:num_kept]
        if request.draft_token_ids:
            # Each kept token but the last was a guess that is stored; the rest of them is not it.
            request.num_computed_tokens += num_kept - 1
            self._cache.truncate(request.request_id, request.num_computed_tokens)
            if self._speculation is not None:
                held = len(result.token_ids) - 1
                self._speculation.verified(request, min(held, num_kept))
            request.draft_token_ids = ()
        # Its logits are finite, and they have seen all it has stored.
        self._cache.commit(
            request.request_id,
            request.token_ids,
            request.num_computed_tokens,
            request.cache_salt,
        )
        if request.logprobs is not None:
            request.logprobs += result.logprobs[:num_kept]
        request.metrics.last_token_time = now
        if request.metrics.first_token_time is None:
            request.metrics.first_token_time = now
        if finish_reason is not None:
            self._finish(request, finish_reason)
        elif (
            switch_length is not None
            and request.num_tokens - num_kept <= switch_length < request.num_tokens
        ):
            # It has outgrown its keys: it stays where it is and runs from its beginning.
            request.num_computed_tokens = 0
        return request, result.token_ids[:num_kept]

    def _fail(self, request: Request, reason: str) -> Progress:
        """End a request with "error"."""
        request.error = reason
        if request.prompt_logprobs is not None and not request.num_generated_tokens:
            del request.prompt_logprobs[1:]  # how many there are hangs on the chunks
        self._finish(request, "error")
        return request, ()

    def _finish(self, request: Request, finish_reason: FinishReason) -> None:
        del self._requests[request.request_id]
        self._scheduler.finish(request, zero=finish_reason == "error")
        self._sampler.forget(request)
        if self._speculation is not None:
            self._speculation.forget(request)
        request.finish_reason = finish_reason
        request.metrics.finished_time = time.monotonic()


def _described(error: Exception) -> str:
    """An exception on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
