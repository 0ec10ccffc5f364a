"""When a request ends, and which of its text may be shown before that is known.

Two levels, because the engine knows tokens and no text:

- **Tokens** (used by `Engine`): `check_tokens` is a pure function over the ids a step produced. End
  tokens, stop ids and `max_tokens` decide. The sampler masks `ending_token_ids` while fewer than
  `min_tokens` tokens are generated, so that none of them is drawn too early.
- **Text** (used by `LLM` and everything else that shows text): one `StopChecker` per completion
  turns ids into text, looks for stop strings and holds back what might become one. It is given the
  engine's verdict with the ids and may overrule it: a stop string wins over `max_tokens` and over
  an end token at the same token. Where it finds one and the engine is still running, the caller
  finishes the request in the engine.

Several tokens may arrive per step (speculation). The result is as if they came one by one: the
text ends with the first token that completes a stop string, and what follows is dropped. Of
overlapping stop strings the one that is complete first wins, of two complete at the same character
the longer; so the result does not depend on how the text was cut into tokens.

Knows nothing of arrays, models, schedules or how ids become text.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple, Protocol

from pace_nb.outputs import FinishReason
from pace_nb.sampling_params import SamplingParams


class TokenStop(NamedTuple):
    """What `check_tokens` says: keep `num_kept` of the new ids, and end there if a reason is given.

    `stop_reason` is the id for one of `stop_token_ids`; None for an end token of the model.
    """

    num_kept: int
    finish_reason: FinishReason | None
    stop_reason: int | None


GOES_ON = TokenStop(1, None, None)  # what nearly every step of every request says


def ending_token_ids(params: SamplingParams, eos_token_ids: Collection[int]) -> frozenset[int]:
    """Ids that end the request; to be masked while fewer than `min_tokens` are generated."""
    if params.ignore_eos:
        return frozenset(params.stop_token_ids)
    return frozenset(params.stop_token_ids) | frozenset(eos_token_ids)


def check_tokens(
    new_token_ids: Sequence[int],
    num_generated: int,
    params: SamplingParams,
    eos_token_ids: Collection[int],
    max_tokens: int | None,
) -> TokenStop:
    """Where, if anywhere, the ids of one step end a request.

    Args:
        new_token_ids: What this step generated, in order; more than one with speculation.
        num_generated: Ids generated before this step.
        params: The request's; `max_tokens` is read from the next argument instead.
        eos_token_ids: The model's end tokens; a set, where it is more than a few.
        max_tokens: Most ids to generate: the smaller of `params.max_tokens` and what the context
            holds. None is no limit.

    Returns:
        How many of the new ids belong to the request (the ending one included), and why it ends.
    """
    generated = num_generated
    for token_id in new_token_ids:
        generated += 1
        if generated > params.min_tokens:
            if not params.ignore_eos and token_id in eos_token_ids:
                return TokenStop(generated - num_generated, "stop", None)
            if token_id in params.stop_token_ids:
                return TokenStop(generated - num_generated, "stop", token_id)
        if max_tokens is not None and generated >= max_tokens:
            return TokenStop(generated - num_generated, "length", None)
    return GOES_ON if len(new_token_ids) == 1 else TokenStop(len(new_token_ids), None, None)


class TextDecoder(Protocol):
    """Turns ids into text as they come; `pace_nb.tokenizer.IncrementalDecoder` is one."""

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that became certain with these ids."""
        ...

    def flush(self) -> str:
        """The rest, when no more ids will come."""
        ...


class StopResult(NamedTuple):
    """What one `StopChecker.push` gives.

    Attributes:
        num_kept: How many of the pushed ids belong to the completion; fewer than were pushed only
            where a stop string was complete before the last of them.
        text: New text to show; later text never takes any of it back.
        finish_reason: Why the completion ends here, or None.
        stop_reason: The stop string or stop id, or None.
    """

    num_kept: int
    text: str
    finish_reason: FinishReason | None
    stop_reason: int | str | None


class StopChecker:
    """Text of one completion as it may be shown, ended by stop strings.

    Args:
        params: The request's.
        decoder: A fresh one for this completion; None (or `detokenize=False`) shows no text.

    Raises:
        ValueError: stop strings without a decoder.

    Attributes:
        num_tokens: Ids kept so far.
    """

    def __init__(self, params: SamplingParams, decoder: TextDecoder | None) -> None:
        if params.stop and decoder is None:
            raise ValueError("stop strings need a decoder")
        self.num_tokens = 0
        self._shown: list[str] = []
        self._decoder = decoder if params.detokenize else None
        self._stops = tuple(params.stop)
        self._keep_stop = params.include_stop_str_in_output
        self._min_tokens = params.min_tokens
        self._held = ""  # decoded but not shown: it may be the beginning of a stop string
        self._searched = 0  # characters of _held in which no match may end any more
        self._finished = False

    @property
    def text(self) -> str:
        """Everything shown so far."""
        return "".join(self._shown)

    def push(
        self,
        token_ids: Sequence[int],
        finish_reason: FinishReason | None = None,
        stop_reason: int | str | None = None,
        *,
        ended_by_text: bool = False,
    ) -> StopResult:
        """Take the ids of one step and the engine's verdict on them (None while it runs).

        With a verdict everything held is flushed: call `push([], "abort")` to end a completion that
        has no more ids. The id that ended it by itself (`"stop"`) is not decoded, unless
        `include_stop_str_in_output`, or `ended_by_text`: it ended what a grammar wanted.

        Raises:
            RuntimeError: the completion has ended before.
        """
        if self._finished:
            raise RuntimeError("push() after the completion has ended")
        last_is_text = finish_reason != "stop" or self._keep_stop or ended_by_text
        decoded = token_ids if last_is_text else token_ids[:-1]
        before = len(self._shown)
        num_kept = len(token_ids)
        match = None
        if self._stops:
            for position, token_id in enumerate(decoded, start=1):
                self.num_tokens += 1
                match = self._take(self._decode([token_id]))
                if match is not None:
                    num_kept = position
                    break
            else:
                self.num_tokens += len(token_ids) - len(decoded)
        else:  # nothing to look for, so the step is decoded in one go
            self.num_tokens += len(token_ids)
            self._take(self._decode(decoded))

        if match is None and finish_reason is not None:
            match = self._take(self._flush())
            self._shown.append(self._held)
            self._held = ""
        if match is not None and finish_reason in (None, "stop", "length"):
            finish_reason, stop_reason = "stop", match
        self._finished = finish_reason is not None
        return StopResult(num_kept, "".join(self._shown[before:]), finish_reason, stop_reason)

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._decoder.push(token_ids) if self._decoder is not None else ""

    def _flush(self) -> str:
        return self._decoder.flush() if self._decoder is not None else ""

    def _take(self, new_text: str) -> str | None:
        """Add text; show what no stop string can claim any more; return the one that is complete.

        Only matches that end in text of a token after the first `min_tokens` count; they may begin
        earlier.
        """
        self._held += new_text
        if self.num_tokens <= self._min_tokens:
            self._searched = len(self._held)
        matches = []  # (end, start, stop string)
        for stop in self._stops:
            start = self._held.find(stop, max(0, self._searched - len(stop) + 1))
            if start >= 0:
                matches.append((start + len(stop), start, stop))
        if matches:
            end, start, stop = min(matches)  # the first to end; of those, the longest
            self._shown.append(self._held[: end if self._keep_stop else start])
            self._held = ""
            return stop
        certain = self._first_possible_stop()
        self._shown.append(self._held[:certain])
        self._held = self._held[certain:]
        self._searched = len(self._held)
        return None

    def _first_possible_stop(self) -> int:
        """Where the longest end of the held text that begins some stop string starts."""
        longest = max(map(len, self._stops), default=1) - 1
        for start in range(max(0, len(self._held) - longest), len(self._held)):
            tail = self._held[start:]
            if any(stop.startswith(tail) for stop in self._stops):
                return start
        return len(self._held)
