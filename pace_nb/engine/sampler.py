"""`Sampler`: rows of logits in, next tokens and log-probabilities out. It keeps no state.

Knows the arithmetic of sampling. Does not know models, schedules, caches or text.

One row of logits l f32[V] becomes a token in this order (vLLM's):

    1. log-probabilities are reported from here: the model's own logits, before anything below
    2. logit_bias added; all but allowed_token_ids, and ends of bad_words, to -inf
    3. fewer than min_tokens generated: tokens that would end the request to -inf
    4. repetition_penalty r on tokens of prompt and output:  l / r where l > 0, else l * r
       frequency_penalty, presence_penalty on tokens of the output:  l - f * count - p
    5. greedy (temperature < 1e-5): the largest l, ties to the lowest id; done
    6. l / temperature
    7. min_p:  keep where probability >= min_p * largest probability
    8. top_k:  keep the k largest, and what ties with the last of them
    9. top_p:  keep the shortest head of the likeliest that reaches top_p of what 8 kept,
               ties in order of id
    10. one uniform number u picks from what is kept, in order of id:
               the first id where the sum of probabilities exceeds u

u comes from Philox, keyed by the request's seed, at the counter of the output position. So it needs
no state and does not depend on what else runs, on preemption or on how the prompt was cut.
Every row is reduced by itself, in the order of its elements: the same bits in any batch.

A logprob's rank is 1 + the number of tokens that are likelier, or as likely and of lower id.

A row whose largest logit is not finite (NaN anywhere, +inf, or nothing but -inf) fails its request,
with the reason, and no other.
Source: vLLM v1 `vllm/v1/sample/`; Salmon et al. 2011 (Philox).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pace_nb.engine.request import Request
from pace_nb.engine.scheduler import Scheduled
from pace_nb.engine.stopping import ending_token_ids
from pace_nb.outputs import Logprob, TokenLogprobs
from pace_nb.sampling_params import SamplingParams

if TYPE_CHECKING:
    from pace_nb.engine.model_runner import StepLogits

Float32Array = NDArray[np.float32]
Int64Array = NDArray[np.int64]

PROMPT_ROWS = 64  # rows of prompt logits that exist at the same time: 33 MB of f32 at V = 128k
FIRST_HEAD = 256  # likeliest tokens that top_p looks at first; nearly always enough


class Sampled(NamedTuple):
    """What a step gives one request.

    token_ids: the new tokens, none while it is behind. logprobs: one entry per new token, where
    asked for. prompt_logprobs: entries for the next prompt tokens. error: why it failed, or None.
    """

    token_ids: Sequence[int] = ()
    logprobs: Sequence[TokenLogprobs] = ()
    prompt_logprobs: Sequence[TokenLogprobs] = ()
    error: str | None = None


class _BadLogitsError(Exception):
    """A row from which no token can be taken; the message says why."""


class Sampler:
    """Picks tokens (`sample`) and hands out seeds (`draw_seed`)."""

    def __init__(self, seed: int) -> None:
        self._seed = seed % 2**64

    def draw_seed(self, arrival: int) -> int:
        """Seed of the request that is the `arrival`-th and brought none."""
        # The upper half of the 128-bit key keeps this stream apart from those of requests.
        return int(np.random.Philox(key=self._seed + 2**64, counter=arrival).random_raw())

    def sample(self, scheduled: Sequence[Scheduled], logits: StepLogits) -> list[Sampled]:
        """One result per scheduled request, in order. logits: the rows that `Request.num_logits`
        asked for, request after request."""
        num_rows = [request.num_logits(num_tokens) for request, num_tokens in scheduled]
        ends = np.cumsum(num_rows, dtype=np.int64)
        catches_up = [request.num_behind == num_tokens for request, num_tokens in scheduled]
        last_rows = logits.rows(ends[catches_up] - 1)  # f32[R, V], one per request that catches up
        greedy = last_rows.argmax(axis=1)  # NaN counts as largest; ties go to the lowest id
        largest = last_rows[np.arange(len(greedy)), greedy]

        results = []
        row = 0
        for (request, _), end, num, catching_up in zip(
            scheduled, ends.tolist(), num_rows, catches_up, strict=True
        ):
            num_prompt_rows = num - catching_up
            try:
                prompt_logprobs = _prompt_logprobs(request, logits, end - num, num_prompt_rows)
                if not catching_up:
                    result = Sampled(prompt_logprobs=prompt_logprobs)
                else:
                    _check(float(largest[row]))
                    plain = request.params.greedy and not _changes_logits(request)
                    token = int(greedy[row]) if plain else sample_row(last_rows[row], request)
                    result = Sampled(
                        (token,), _token_logprobs(last_rows[row], token, request), prompt_logprobs
                    )
            except _BadLogitsError as problem:
                result = Sampled(error=str(problem))
            results.append(result)
            row += catching_up
        return results


def sample_row(logits: Float32Array, request: Request) -> int:
    """The next token of `request` from its row f32[V], which stays as it is (steps 2 to 10)."""
    params = request.params
    if _changes_logits(request):
        logits = _changed(logits.copy(), request)
        if logits.max() == -np.inf:
            raise _BadLogitsError(
                "no token is left to sample: allowed_token_ids, bad_words and min_tokens rule out "
                "every one"
            )
    if params.greedy:
        return int(logits.argmax())

    kept, weights = candidates(logits, params)
    cumulative = np.cumsum(weights)
    total = cumulative[-1]
    drawn = cumulative.searchsorted(uniform(request) * total, side="right")
    # u * total may round up to total: then it is the last token that has any weight.
    index = int(min(drawn, cumulative.searchsorted(total, side="left")))
    return index if kept is None else int(kept[index])


def candidates(
    logits: Float32Array, params: SamplingParams
) -> tuple[Int64Array | None, NDArray[np.float64]]:
    """Steps 6 to 9 on a row f32[V]: ids that may be drawn, ascending (None = all), and weights.

    A weight is the probability over that of the likeliest token.
    """
    with np.errstate(over="ignore"):  # what is too far below the largest is -inf
        scaled = (logits - logits.max()) / np.float32(params.temperature)  # the largest is 0
    kept: Int64Array | None = None
    floor = np.float32(-np.inf)
    if params.min_p > 0:
        floor = np.float32(np.log(params.min_p))
    if 0 < params.top_k < len(scaled):
        floor = max(floor, np.partition(scaled, -params.top_k)[-params.top_k])
    if floor > -np.inf:
        kept = np.flatnonzero(scaled >= floor)
        scaled = scaled[kept]
    weights = np.exp(scaled).astype(np.float64)
    if params.top_p < 1:
        head = _top_p(scaled, weights, params.top_p)
        kept = head if kept is None else kept[head]
        weights = weights[head]
    return kept, weights


def uniform(request: Request) -> float:
    """u in [0, 1) with 53 bits, for the request's next output position."""
    philox = np.random.Philox(key=request.seed, counter=request.num_generated_tokens)
    return float(int(philox.random_raw()) >> 11) * 2.0**-53


def likeliest(values: Float32Array, n: int) -> Int64Array:
    """Indices of the `n` largest of values[V], the largest first, ties in order of index.

    O(V + n log n): a partition finds the n-th largest, only what reaches it is sorted.
    """
    if n < len(values):
        candidates = np.flatnonzero(values >= np.partition(values, -n)[-n])
    else:
        candidates = np.arange(len(values))
    return candidates[np.argsort(-values[candidates], kind="stable")][:n]


def log_softmax(logits: Float32Array) -> Float32Array:
    """l - max - log(sum(exp(l - max))) of a row f32[V], the sum in float64."""
    shifted: Float32Array = logits - logits.max()
    return shifted - np.float32(np.log(np.exp(shifted).sum(dtype=np.float64)))


def _check(largest: float) -> None:
    """_BadLogitsError unless a row with this largest logit (NaN if it holds any) is sound."""
    if not np.isfinite(largest):
        raise _BadLogitsError(
            f"the model gave logits whose largest is {largest}, expected a finite number; its "
            "weights, finite as they are, may be damaged"
        )


def _changes_logits(request: Request) -> bool:
    """Whether steps 2 to 4 do anything."""
    params = request.params
    return bool(
        params.logit_bias
        or params.allowed_token_ids is not None
        or request.bad_words_token_ids
        or request.num_generated_tokens < params.min_tokens
        or params.repetition_penalty != 1
        or params.frequency_penalty
        or params.presence_penalty
    )


def _changed(logits: Float32Array, request: Request) -> Float32Array:
    """Steps 2 to 4 on a row that may be written to."""
    params = request.params
    generated = request.generated_token_ids
    if params.logit_bias:
        logits[list(params.logit_bias)] += np.fromiter(params.logit_bias.values(), np.float32)
    if params.allowed_token_ids is not None:
        allowed = list(params.allowed_token_ids)
        kept = logits[allowed]
        logits[:] = -np.inf
        logits[allowed] = kept
    for word in request.bad_words_token_ids:
        start = len(generated) - (len(word) - 1)
        if start >= 0 and generated[start:] == list(word[:-1]):
            logits[word[-1]] = -np.inf
    if len(generated) < params.min_tokens:
        ending = ending_token_ids(params, request.eos_token_ids)
        logits[[token_id for token_id in ending if token_id < len(logits)]] = -np.inf
    if params.repetition_penalty != 1:
        penalty = np.float32(params.repetition_penalty)
        seen = np.unique(np.array(request.token_ids))
        values = logits[seen]
        logits[seen] = np.where(values > 0, values / penalty, values * penalty)
    if generated and (params.frequency_penalty or params.presence_penalty):
        seen, counts = np.unique(np.array(generated), return_counts=True)
        logits[seen] -= np.float32(params.frequency_penalty) * counts.astype(np.float32)
        logits[seen] -= np.float32(params.presence_penalty)
    return logits


def _top_p(scaled: Float32Array, weights: NDArray[np.float64], top_p: float) -> Int64Array:
    """Indices, ascending, of the shortest head of the likeliest whose weight reaches top_p.

    Sorts a short head first and a longer one only if that is not enough: the likeliest n are the
    same, in the same order, whatever n is.
    """
    needed = top_p * weights.sum()
    n = FIRST_HEAD
    while True:
        head = likeliest(scaled, n)
        before = np.cumsum(weights[head])
        if before[-1] >= needed or n >= len(scaled):
            size = int(before.searchsorted(needed, side="left")) + 1
            return np.sort(head[:size])
        n *= 16


def _token_logprobs(logits: Float32Array, token: int, request: Request) -> list[TokenLogprobs]:
    """The one entry for a generated token, or none where none was asked for."""
    n = request.params.logprobs
    return [] if n is None else [row_logprobs(logits, token, n)]


def row_logprobs(logits: Float32Array, token: int, n: int) -> TokenLogprobs:
    """`token` first, then the `n` likeliest of a row f32[V]; no text."""
    values = log_softmax(logits)
    own = values[token]
    rank = 1 + int(np.count_nonzero(values > own)) + int(np.count_nonzero(values[:token] == own))
    entries = {token: Logprob(float(own), rank)}
    top = likeliest(values, n) if n else np.empty(0, np.int64)
    for position, token_id in enumerate(top.tolist(), start=1):
        entries.setdefault(token_id, Logprob(float(values[token_id]), position))
    return entries


def _prompt_logprobs(
    request: Request, logits: StepLogits, first_row: int, num_rows: int
) -> list[TokenLogprobs]:
    """Entries for the prompt tokens that these rows predict."""
    n = request.params.prompt_logprobs
    if n is None or request.prompt_logprobs is None or not num_rows:
        return []
    entries: list[TokenLogprobs] = []
    next_token = len(request.prompt_logprobs)
    for start in range(0, num_rows, PROMPT_ROWS):
        size = min(PROMPT_ROWS, num_rows - start)
        for row in logits.rows(np.arange(first_row + start, first_row + start + size)):
            _check(float(row.max()))
            entries.append(row_logprobs(row, request.token_ids[next_token], n))
            next_token += 1
    return entries
