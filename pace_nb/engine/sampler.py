"""`Sampler`: rows of logits in, next tokens and log-probabilities out.

Knows which arrays of kernels/sampling.py a request's parameters become. Does not know models,
schedules, caches or text; the arithmetic is in the kernels.

One row of logits l f32[V] becomes a token in this order (vLLM's):

    1. log-probabilities are reported from here: the model's own logits, before anything below
    2. token_mask, allowed_token_ids, ends of bad_words and, while fewer than min_tokens are
       generated, tokens that would end the request: -inf;  logit_bias is added
    3. repetition_penalty on tokens of prompt and output, then frequency_penalty and
       presence_penalty on tokens of the output
    4. greedy (temperature < 1e-5): the largest l, ties to the lowest id; done
    5. temperature, min_p, top_k, top_p, and one draw: `kernels.sampling.sample`

The random number is keyed by the request's seed, at the counter of the output position. So a token
does not depend on what else runs, on preemption or on how the prompt was cut; and rows are
independent, so its bits are those it has alone.

What a request's parameters become is kept from its first token until `forget` (logit_changes.py for
what they change in the logits). All of it can be made again from the request, so sampling a step
twice, or after it failed, gives the same.

A logprob's rank is 1 + the number of tokens that are likelier, or as likely and of lower id.

A row whose largest logit is not finite (NaN anywhere, +inf, or nothing but -inf) fails its request,
with the reason, and no other.
Source: vLLM v1 `vllm/v1/sample/`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pace_nb.engine.logit_changes import NO_CHANGE, LogitChanges, edits_of
from pace_nb.engine.request import Request
from pace_nb.engine.scheduler import Scheduled
from pace_nb.errors import InvalidRequestError
from pace_nb.kernels import jit
from pace_nb.kernels.logit_edits import Edits
from pace_nb.kernels.logprobs import Logprobs, token_logprobs
from pace_nb.kernels.sampling import (
    NEUTRAL,
    NUM_SETTINGS,
    Drawn,
    distribution,
    greedy,
    sample,
    sample_residual,
    uniform_bits,
)
from pace_nb.outputs import Logprob, TokenLogprobs

if TYPE_CHECKING:
    from pace_nb.engine.model_runner import StepLogits

Float32Array = NDArray[np.float32]
Int64Array = NDArray[np.int64]

# Streams of random numbers, see `kernels.sampling.uniform_bits`.
ACCEPTING, REPLACING, GUESSING = 1, 2, 3
PROMPT_ROWS = 64  # rows of prompt logits that exist at the same time: 33 MB of f32 at V = 128k


@dataclass(slots=True)
class Sampled:
    """What a step gives one request.

    token_ids: the new tokens, none while it is behind. logprobs: one entry per new token, where
    asked for. prompt_logprobs: entries for the next prompt tokens. error: why it failed, or None.
    """

    token_ids: Sequence[int] = ()
    logprobs: Sequence[TokenLogprobs] = ()
    prompt_logprobs: Sequence[TokenLogprobs] = ()
    error: str | None = None


class _Kept(NamedTuple):
    """What is kept for a request. slot: its row of settings and seeds."""

    slot: int
    changes: LogitChanges


class _FailedError(Exception):
    """A request from whose row no token can be taken; the message says why."""


class Sampler:
    """Picks tokens (`sample`) and hands out seeds (`draw_seed`). kernels: as in EngineConfig."""

    def __init__(self, seed: int, kernels: Literal["numba", "reference"] = "numba") -> None:
        self._seed = seed % 2**64
        self._kernels = kernels
        self._kept: dict[Request, _Kept] = {}
        self._free_slots: list[int] = []
        self._settings = np.empty((0, NUM_SETTINGS))
        self._seeds = np.empty(0, np.uint64)

    def draw_seed(self, arrival: int) -> int:
        """Seed of the request that is the `arrival`-th and brought none."""
        # The upper half of the 128-bit key keeps this stream apart from those of requests.
        return int(np.random.Philox(key=self._seed + 2**64, counter=arrival).random_raw())

    def forget(self, request: Request) -> None:
        """The request has ended: nothing is kept for it any more."""
        kept = self._kept.pop(request, None)
        if kept is not None:
            self._free_slots.append(kept.slot)

    def sample(self, scheduled: Sequence[Scheduled], logits: StepLogits) -> list[Sampled]:
        """One result per scheduled request, in order. logits: the rows that `Request.num_logits`
        asked for, request after request.

        A request with guesses gets the token of its first row, and that of each next one for as
        long as the guess before it was the token drawn. Where guesses were drawn themselves, their
        probabilities decide (`_judge`), and tokens are others than without speculation, of the same
        distribution. Where a row but the first gives no token, the request gets those before it;
        the row comes again.
        """
        with jit.using(self._kernels):
            for request, num_tokens in scheduled:
                if not request.takes_largest or num_tokens != request.num_behind:
                    return self._sample(scheduled, logits)
            tokens, largest = greedy(logits.rows(slice(None)))
            if len(tokens) > len(scheduled):
                return _accepted(scheduled, tokens.tolist(), largest)
            return [
                Sampled((token,)) if token >= 0 else Sampled(error=_bad_logits(largest[row]))
                for row, token in enumerate(tokens.tolist())
            ]

    def _sample(self, scheduled: Sequence[Scheduled], logits: StepLogits) -> list[Sampled]:
        """`sample` for whatever requests ask for."""
        results: list[Sampled] = []
        drawing: list[int] = []  # which of the results get a token
        first_rows: list[int] = []  # of each of them
        end = 0
        for request, num_tokens in scheduled:
            start, end = end, end + request.num_logits(num_tokens)
            catches_up = request.num_behind == num_tokens
            num_drawn = 1 + len(request.draft_token_ids) if catches_up else 0
            try:
                entries = _prompt_logprobs(request, logits, start, end - num_drawn)
            except _FailedError as problem:
                results.append(Sampled(error=str(problem)))
                continue
            if catches_up:
                drawing.append(len(results))
                first_rows.append(end - num_drawn)
            results.append(Sampled(prompt_logprobs=entries))
        if drawing:
            requests = [scheduled[index][0] for index in drawing]
            for index, drawn in zip(
                drawing, self._verify(requests, first_rows, logits), strict=True
            ):
                if drawn.error is None:
                    drawn.prompt_logprobs = results[index].prompt_logprobs
                results[index] = drawn
        return results

    def _verify(
        self, requests: Sequence[Request], first_rows: Sequence[int], logits: StepLogits
    ) -> list[Sampled]:
        """The next tokens of each request, whose rows begin at first_rows: one, and one more for
        each guess that is what was drawn."""
        wanted = [
            first + ahead
            for request, first in zip(requests, first_rows, strict=True)
            for ahead in range(1 + len(request.draft_token_ids))
        ]
        rows = logits.rows(np.array(wanted))
        if len(wanted) == len(requests):
            return self._draw(requests, rows)
        results = self._draw(requests, rows[_starts(requests)])
        going_on = [index for index, one in enumerate(results) if _holds(requests[index], one)]
        while going_on:
            starts = _starts(requests)
            again = [requests[index] for index in going_on]
            here = [starts[index] + len(results[index].token_ids) for index in going_on]
            drawn = self._draw(again, rows[here], [results[index].token_ids for index in going_on])
            still = []
            for index, one in zip(going_on, drawn, strict=True):
                if one.error is not None:
                    continue
                before = results[index]
                results[index] = Sampled(
                    [*before.token_ids, *one.token_ids], [*before.logprobs, *one.logprobs]
                )
                if _holds(requests[index], results[index]):
                    still.append(index)
            going_on = still
        return results

    def _draw(
        self,
        requests: Sequence[Request],
        rows: Float32Array,
        ahead: Sequence[Sequence[int]] | None = None,
    ) -> list[Sampled]:
        """The next token of each request from its row of rows f32[R, V], with its logprobs.

        ahead: tokens of each that were drawn in this step before this one.
        """
        slots, positions, errors, changes = [], [], [], []
        for index, request in enumerate(requests):
            kept = self._kept.get(request) or self._keep(request, rows.shape[1])
            error, change = None, NO_CHANGE
            before = ahead[index] if ahead is not None else ()
            try:
                change = kept.changes.of_next_token(request, before)
            except InvalidRequestError as problem:
                error = str(problem)
            slots.append(kept.slot)
            positions.append(request.num_generated_tokens + len(before))
            errors.append(error)
            changes.append(change)
        drawn = sample(
            rows,
            self._settings,
            self._seeds,
            np.array(slots, np.int64),
            np.array(positions, np.int64),
            edits_of(changes),
        )
        judged = [
            row
            for row, request in enumerate(requests)
            if request.draft_probabilities is not None
            and (0 if ahead is None else len(ahead[row])) < len(request.draft_token_ids)
            and not request.params.greedy
            and drawn.tokens[row] >= 0
        ]
        if judged:
            drawn.tokens[judged] = self._judge(
                [requests[row] for row in judged],
                rows[judged],
                np.array([slots[row] for row in judged], np.int64),
                np.array([positions[row] for row in judged], np.int64),
                edits_of([changes[row] for row in judged]),
            )
        tokens = drawn.tokens.tolist()
        entries = _token_logprobs(requests, rows, tokens)
        results = []
        for row, (token, error) in enumerate(zip(tokens, errors, strict=True)):
            if error is None and token < 0:
                error = _why_none(drawn, row)
            if error is None:
                results.append(Sampled((token,), entries.get(row, ())))
            else:
                results.append(Sampled(error=error))
        return results

    def _judge(
        self,
        requests: Sequence[Request],
        rows: Float32Array,
        slots: Int64Array,
        positions: Int64Array,
        edits: Edits | None,
    ) -> Int64Array:
        """Tokens for rows whose guess was drawn from a known q: the guess g where u q(g) < p(g),
        else one of max(p - q, 0), or of p where that is nothing.

        Whatever q is, the tokens follow p. A guess that q could not have given (q(g) = 0) stands
        where p can give it.
        """
        ahead = positions - [request.num_generated_tokens for request in requests]
        guesses = np.array(
            [one.draft_token_ids[i] for one, i in zip(requests, ahead, strict=True)], np.int64
        )
        q = np.stack([one.draft_probabilities[i] for one, i in zip(requests, ahead, strict=True)])
        p, seeds = distribution(rows, self._settings, slots, edits), self._seeds[slots]
        u = (uniform_bits(seeds, positions, ACCEPTING) >> np.uint64(11)) * 2.0**-53
        each = np.arange(len(guesses))
        refused = ~(u * q[each, guesses] < p[each, guesses])
        if refused.any():
            bits = uniform_bits(seeds[refused], positions[refused], REPLACING)
            guesses[refused] = sample_residual(p[refused], q[refused], bits)
        return guesses

    def draw_guesses(self, request: Request, rows: Float32Array) -> tuple[list[int], Float32Array]:
        """Guesses for the request's next tokens, one from each of rows f32[K, V] of a draft model,
        and what each was drawn from, f32[K, V]. Fewer where no token can be taken from a row.

        The rows are changed, filtered and weighed as the target's are; those after the first see
        the guesses before them.
        """
        kept = self._kept.get(request) or self._keep(request, rows.shape[1])
        kept.changes.forget_counts()  # of guesses that did not hold
        slots, seeds = np.array([kept.slot], np.int64), self._seeds[[kept.slot]]
        guesses: list[int] = []
        probabilities = np.empty_like(rows, order="C")
        with jit.using(self._kernels):
            for ahead in range(len(rows)):
                try:
                    change = kept.changes.of_next_token(request, guesses)
                except InvalidRequestError:
                    break
                row = np.ascontiguousarray(rows[ahead : ahead + 1])
                q = distribution(row, self._settings, slots, edits_of([change]))
                if not np.isfinite(q[0, 0]):
                    break
                position = np.array([request.num_generated_tokens + ahead], np.int64)
                bits = uniform_bits(seeds, position, GUESSING)
                guesses.append(int(sample_residual(q, np.zeros_like(q), bits)[0]))
                probabilities[ahead] = q[0]
        return guesses, probabilities

    def _keep(self, request: Request, vocab_size: int) -> _Kept:
        """Give the request a row of the settings, and remember what it changes in its logits."""
        if not self._free_slots:
            num = len(self._seeds)
            more = max(8, num)
            self._settings = np.vstack([self._settings, np.tile(NEUTRAL, (more, 1))])
            self._seeds = np.append(self._seeds, np.zeros(more, np.uint64))
            self._free_slots = list(range(num, num + more))[::-1]
        slot, params = self._free_slots.pop(), request.params
        self._settings[slot] = (
            0.0 if params.greedy else params.temperature,
            params.top_k,
            params.top_p,
            np.log(params.min_p) if params.min_p else -np.inf,
            params.repetition_penalty,
            params.frequency_penalty,
            params.presence_penalty,
        )
        self._seeds[slot] = request.seed
        kept = self._kept[request] = _Kept(slot, LogitChanges(request, vocab_size))
        return kept


# ---- rows and guesses ----------------------------------------------------------------------------
def _starts(requests: Sequence[Request]) -> NDArray[np.int64]:
    """Each request's first row, where each has one for itself and one for each guess."""
    counts = [1 + len(request.draft_token_ids) for request in requests]
    return np.cumsum([0, *counts[:-1]], dtype=np.int64)


def _holds(request: Request, drawn: Sampled) -> bool:
    """There is a guess for the last token that was drawn, and it is that token."""
    num_drawn, drafts = len(drawn.token_ids), request.draft_token_ids
    return 0 < num_drawn <= len(drafts) and drafts[num_drawn - 1] == drawn.token_ids[-1]


def _accepted(
    scheduled: Sequence[Scheduled], tokens: Sequence[int], largest: Float32Array
) -> list[Sampled]:
    """`Sampler.sample` from the largest of each row; tokens -1: the row has none."""
    results, row = [], 0
    for request, _ in scheduled:
        drafts, drawn = request.draft_token_ids, [tokens[row]]
        while len(drawn) <= len(drafts) and drawn[-1] == drafts[len(drawn) - 1]:
            drawn.append(tokens[row + len(drawn)])
        if drawn[-1] >= 0:
            results.append(Sampled(drawn))
        elif len(drawn) > 1:
            results.append(Sampled(drawn[:-1]))
        else:
            results.append(Sampled(error=_bad_logits(largest[row])))
        row += 1 + len(drafts)
    return results


# ---- why there is no token -----------------------------------------------------------------------
def _bad_logits(largest: float) -> str:
    return (
        f"the model gave logits whose largest is {largest}, expected a finite number; its weights, "
        "finite as they are, may be damaged"
    )


def _why_none(drawn: Drawn, row: int) -> str:
    """Why a row gave no token."""
    if not np.isfinite(drawn.largest[row]):
        return _bad_logits(drawn.largest[row])
    if drawn.left[row] > 0:
        return f"logit_bias and penalties raise a logit to {drawn.left[row]}, beyond float32"
    return (
        "no token is left to sample: token_mask, allowed_token_ids, bad_words and min_tokens rule "
        "out every one"
    )


# ---- log-probabilities ---------------------------------------------------------------------------
def _entries(found: Logprobs, row: int, token: int, n: int) -> TokenLogprobs:
    """`token` first, then the `n` likeliest of a row; no text."""
    entries = {token: Logprob(float(found.own[row]), int(found.ranks[row]))}
    top_ids, top = found.top_ids[row, :n].tolist(), found.top[row, :n].tolist()
    for rank, (token_id, logprob) in enumerate(zip(top_ids, top, strict=True), start=1):
        if token_id >= 0:  # -1: the vocabulary is smaller than n
            entries.setdefault(token_id, Logprob(logprob, rank))
    return entries


def _token_logprobs(
    requests: Sequence[Request], rows: Float32Array, tokens: Sequence[int]
) -> dict[int, list[TokenLogprobs]]:
    """Row: the one entry for its token, where the request asks for it."""
    wanted = {
        row: request.params.logprobs
        for row, request in enumerate(requests)
        if request.params.logprobs is not None and tokens[row] >= 0
    }
    if not wanted:
        return {}
    chosen = list(wanted)
    found = token_logprobs(
        rows[chosen], np.array([tokens[row] for row in chosen], np.int64), max(wanted.values())
    )
    return {
        row: [_entries(found, index, tokens[row], wanted[row])] for index, row in enumerate(chosen)
    }


def _prompt_logprobs(
    request: Request, logits: StepLogits, first_row: int, end_row: int
) -> list[TokenLogprobs]:
    """Entries for the prompt tokens that these rows predict."""
    n = request.params.prompt_logprobs
    if n is None or request.prompt_logprobs is None:
        return []
    entries: list[TokenLogprobs] = []
    next_token = len(request.prompt_logprobs)
    for start in range(first_row, end_row, PROMPT_ROWS):
        rows = np.arange(start, min(start + PROMPT_ROWS, end_row))
        tokens = request.token_ids[next_token : next_token + len(rows)]
        found = token_logprobs(logits.rows(rows), np.array(tokens, np.int64), n)
        for row, token in enumerate(tokens):
            if not np.isfinite(found.largest[row]):
                raise _FailedError(_bad_logits(found.largest[row]))
            entries.append(_entries(found, row, token, n))
        next_token += len(rows)
    return entries
