"""`ParallelDrafter`: a second, smaller model that guesses K tokens in one forward pass (PARD).

A draft model of the usual kind runs once for each token that it guesses. One that was trained for
it (PARD) reads what is new of a sequence and, behind it, K - 1 times a mask token; it guesses a
token from the row of the last token and one from each mask:

    reads     t7   t8   [M]  [M]  [M]       K = 4; t0 .. t6 are in its cache
    guesses        d1   d2   d3   d4

The guesses of all requests are one ragged batch. The draft model has a KV cache of its own, of the
target's kind. It holds committed tokens only: the masks are trimmed as soon as they have been read,
and what the target accepts is read as new tokens before the next guess. A request that is far
behind, because its prompt is long, catches up by at most `max_num_batched_tokens` a step and gets
no guesses until then; one that finds no room gets none either.

Guesses are the draft's likeliest tokens, or, with `draft_sample_method` "probabilistic", drawn from
the draft's logits after all that the request does to the target's.

Knows requests and its model. Does not know checkpoints, or what becomes of the guesses.
Source: An et al. 2025, PARD, arXiv:2504.18583; PACE `pace/llm/speculative.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pace_nb.batch import Batch
from pace_nb.config import EngineConfig
from pace_nb.engine.model_runner import Float32Array, ModelRunner
from pace_nb.engine.request import Request
from pace_nb.engine.sampler import Sampler
from pace_nb.engine.speculative import Draft
from pace_nb.kernels import jit
from pace_nb.kernels.sampling import greedy
from pace_nb.kv_cache.base import KVCache

if TYPE_CHECKING:
    from pace_nb.models.registry import Model


class ParallelDrafter:
    """Guesses tokens with a model that was trained by PARD (protocol: speculative.Drafter).

    mask_token_id: its `pard_token`. vocab_size: the target's; larger ids are never guessed.
    """

    def __init__(
        self,
        model: Model,
        cache: KVCache,
        config: EngineConfig,
        mask_token_id: int,
        vocab_size: int,
    ) -> None:
        self.cache = cache
        self._runner = ModelRunner(model, cache, config)
        self._kernels = config.kernels
        self._most_tokens = config.max_num_batched_tokens
        self._max_model_len = model.max_position_embeddings
        self._mask_token_id = mask_token_id
        self._vocab_size = min(vocab_size, model.vocab_size)
        self._num_computed: dict[Request, int] = {}  # tokens that the draft's cache holds
        speculative = config.speculative_config
        probabilistic = speculative and speculative.draft_sample_method == "probabilistic"
        self._sampler = Sampler(config.seed, config.kernels) if probabilistic else None

    def propose(self, requests: Sequence[Request], limits: Sequence[int]) -> list[Draft]:
        """See `speculative.Drafter`."""
        drafts = [Draft() for _ in requests]
        budget, spans, guessing = self._most_tokens, [], []
        for index, (request, limit) in enumerate(zip(requests, limits, strict=True)):
            start = self._start(request)
            end = request.num_tokens
            limit = min(limit, self._max_model_len + 1 - end)
            num_masks, num_rows = limit - 1, limit
            if end - start + num_masks > budget:  # it catches up first
                end, num_masks, num_rows = min(end, start + budget), 0, 0
            if limit < 1 or end <= start or max(request.token_ids[start:end]) >= self._vocab_size:
                continue
            if not self._make_room(request, end + num_masks, requests):
                continue
            tokens = request.token_ids[start:end] + num_masks * [self._mask_token_id]
            spans.append((request, start, end, tokens, num_rows))
            guessing.append(index)
            budget -= len(tokens)
        if not spans:
            return drafts
        logits = self._run(spans)
        row = 0
        for index, (request, _, end, _, num_rows) in zip(guessing, spans, strict=True):
            # Only what the request has for certain stays: the masks go.
            self.cache.truncate(request.request_id, end)
            self._num_computed[request] = end
            drafts[index] = self._guesses(request, logits[row : row + num_rows])
            if len(drafts[index].token_ids) == num_rows > 0:
                salt = request.cache_salt
                self.cache.commit(request.request_id, request.token_ids, end, salt)
            row += num_rows
        return drafts

    def forget(self, request: Request) -> None:
        """See `speculative.Drafter`."""
        if self._num_computed.pop(request, None) is not None:
            self.cache.free(request.request_id)
        if self._sampler is not None:
            self._sampler.forget(request)

    def _start(self, request: Request) -> int:
        """How many tokens of the request need not be read."""
        done = self._num_computed.get(request)
        switch = self._runner.switch_length
        if done and switch is not None and done <= switch < request.num_tokens:
            self.forget(request)  # it has outgrown its keys
            done = None
        if done is None:
            done = self.cache.reuse(
                request.request_id, request.token_ids, request.num_tokens - 1, request.cache_salt
            )
            if done:
                self._num_computed[request] = done
        return done

    def _make_room(self, request: Request, num_tokens: int, here: Sequence[Request]) -> bool:
        """Room for so many tokens, if need be that of requests that are not here now."""
        if not self.cache.allocate(request.request_id, num_tokens):
            for other in [one for one in self._num_computed if one not in here]:
                self.forget(other)
            if not self.cache.allocate(request.request_id, num_tokens):
                return False
        self._num_computed.setdefault(request, 0)  # `forget` has something to free
        return True

    def _run(self, spans: Sequence[tuple[Request, int, int, list[int], int]]) -> Float32Array:
        """f32[R, V] of the rows that guess."""
        batch = Batch.from_spans(
            [
                (request.request_id, start, tokens, num_rows)
                for request, start, _, tokens, num_rows in spans
            ]
        )
        logits = self._runner.run_batch(batch).rows(slice(None))
        return logits[:, : self._vocab_size]

    def _guesses(self, request: Request, rows: Float32Array) -> Draft:
        """A token for each row; fewer where a row is not finite."""
        if not len(rows):
            return Draft()
        if self._sampler is not None and not request.params.greedy:
            return Draft(*self._sampler.draw_guesses(request, rows))
        with jit.using(self._kernels):
            tokens = greedy(rows)[0].tolist()
        return Draft(tokens[: tokens.index(-1)] if -1 in tokens else tokens)
