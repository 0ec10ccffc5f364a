"""`ModelRunner`: from what is scheduled to logits. It owns the model and its KV cache.

Knows how requests become a `Batch`. Does not know who should run (scheduler.py) or what the logits
are for (sampler.py). It is the only place in the engine that calls a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pace_nb import env
from pace_nb.batch import Batch
from pace_nb.config import EngineConfig
from pace_nb.engine.scheduler import Scheduled
from pace_nb.errors import ConfigError, OutOfMemoryError
from pace_nb.kernels import jit, memory
from pace_nb.kv_cache.base import BatchKV, KVCache

if TYPE_CHECKING:
    from pace_nb.models.registry import Model

Float32Array = NDArray[np.float32]

FORWARD_ID = "forward"  # names the cache's room of `ModelRunner.forward`; requests have other ids


class StepLogits:
    """Logits of one step's `Batch.logits_rows`, computed when they are asked for.

    A long prompt whose log-probabilities are wanted has more rows than should exist at once.
    """

    def __init__(self, runner: ModelRunner, hidden: Float32Array, batch: Batch) -> None:
        self._runner = runner
        self._hidden = hidden
        self._logits_rows = batch.logits_rows

    def __len__(self) -> int:
        """R: rows there are."""
        return len(self._logits_rows)

    @property
    def num_tokens(self) -> int:
        """T: tokens the step computed."""
        return len(self._hidden)

    def rows(self, indices: NDArray[np.int64] | slice) -> Float32Array:
        """f32[len(indices), V]: the given rows, counted within `Batch.logits_rows`."""
        return self._runner.logits(self._hidden, self._logits_rows[indices])


class ModelRunner:
    """Runs batches through the model, with the kernels that the config names."""

    def __init__(self, model: Model, cache: KVCache, config: EngineConfig) -> None:
        self._model = model
        self._kernels = config.kernels
        self._max_num_batched_tokens = config.max_num_batched_tokens
        self._num_threads = config.num_threads
        self.cache = cache
        self.use_threads()
        if not env.malloc_is_tuned():
            memory.keep_freed()

    def use_threads(self) -> None:
        """Run kernels that the calling thread launches with the config's number of threads.

        Raises ConfigError for more than there are.
        """
        if self._num_threads is not None:
            try:
                jit.set_num_threads(self._num_threads)
            except ValueError as error:
                raise ConfigError(str(error)) from None

    @property
    def vocab_size(self) -> int:
        """V."""
        return self._model.vocab_size

    @property
    def switch_length(self) -> int | None:
        """The keys of a sequence that grows beyond this many tokens are no longer right (longrope);
        None, which most models leave unsaid, = they always are."""
        return getattr(self._model, "switch_length", None)

    def run(self, scheduled: Sequence[Scheduled]) -> StepLogits:
        """Compute the next tokens of each request, and its guesses; store keys and values."""
        return self.run_batch(_batch_of(scheduled))

    def run_batch(self, batch: Batch) -> StepLogits:
        """The same for a batch that was made elsewhere."""
        return StepLogits(self, self._hidden(batch), batch)

    def logits(self, hidden: Float32Array, rows: NDArray[np.int32]) -> Float32Array:
        """f32[len(rows), V] of rows of hidden[T, E]."""
        if not len(rows):
            return np.empty((0, self.vocab_size), np.float32)
        with jit.using(self._kernels):
            return self._model.logits(hidden, rows)

    def forward(self, token_ids: Sequence[int]) -> Float32Array:
        """Logits f32[T, V] of all tokens of one sequence; its room is given back.

        Raises OutOfMemoryError, with the numbers, when the cache has no room beside what runs or
        there is no memory for so many logits.
        """
        if not self.cache.allocate(FORWARD_ID, len(token_ids)):
            raise OutOfMemoryError(
                f"forward needs KV cache for {len(token_ids)} tokens, free are "
                f"{self.cache.num_free_tokens} of {self.cache.num_total_tokens}"
            )
        try:
            out = self._empty_logits(len(token_ids))
            for start in range(0, len(token_ids), self._max_num_batched_tokens):
                chunk = token_ids[start : start + self._max_num_batched_tokens]
                batch = Batch.from_spans([(FORWARD_ID, start, chunk, len(chunk))], [len(token_ids)])
                hidden = self._hidden(batch)
                out[start : start + len(chunk)] = self.logits(hidden, batch.logits_rows)
            return out
        finally:
            self.cache.free(FORWARD_ID)

    def _empty_logits(self, num_rows: int) -> Float32Array:
        try:
            return np.empty((num_rows, self.vocab_size), np.float32)
        except MemoryError as error:
            raise OutOfMemoryError(
                f"no memory for logits of {num_rows} tokens x {self.vocab_size}"
            ) from error

    def _hidden(self, batch: Batch) -> Float32Array:
        """f32[T, E]."""
        with jit.using(self._kernels):
            return self._model(batch, BatchKV(self.cache.view(batch), self.cache))


def _batch_of(scheduled: Sequence[Scheduled]) -> Batch:
    """The flat arrays of a step."""
    requests = [request for request, _ in scheduled]
    if all(request.num_behind == 1 and not request.draft_token_ids for request in requests):
        return Batch.of_last_tokens(
            [request.request_id for request in requests],
            [request.token_ids[-1] for request in requests],
            [request.num_computed_tokens for request in requests],
        )
    return Batch.from_spans(
        [
            (
                request.request_id,
                (start := request.num_computed_tokens),
                [*request.token_ids[start : start + num_tokens], *request.draft_token_ids],
                request.num_logits(num_tokens),
            )
            for request, num_tokens in scheduled
        ],
        [request.num_tokens + len(request.draft_token_ids) for request in requests],
    )
