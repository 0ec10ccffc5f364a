"""`LogitChanges`: what one request changes in its logits before a token is drawn from them.

Knows the parameters that change logits (token_mask, allowed_token_ids, bad_words, min_tokens,
logit_bias, penalties) and counts tokens as they come: a step costs what is new. All of it can be
made again from the request, so asking twice, or again after a step that failed, gives the same.
Does not know how a token is drawn; `edits_of` makes of many requests' changes the arrays that the
kernels read (kernels/logit_edits.py).
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pace_nb.engine.request import Request
from pace_nb.engine.stopping import ending_token_ids
from pace_nb.errors import InvalidRequestError
from pace_nb.kernels.logit_edits import Edits


class Change(NamedTuple):
    """One row's part of `Edits`. mask: int32[ceil(V / 32)] or None."""

    mask: NDArray[np.int32] | None = None
    add_ids: Sequence[int] = ()
    add_values: Sequence[float] = ()
    seen_ids: Sequence[int] = ()
    seen_counts: Sequence[int] = ()


NO_CHANGE = Change()


class LogitChanges:
    """What a request's parameters have become, and how often it has its tokens so far."""

    def __init__(self, request: Request, vocab_size: int) -> None:
        params = request.params
        self._vocab_size = vocab_size
        self._bias = params.logit_bias or {}
        self._allowed = None
        if params.allowed_token_ids is not None:
            allowed = np.zeros(vocab_size, bool)
            allowed[list(params.allowed_token_ids)] = True
            self._allowed = packed(allowed, vocab_size)
        self._ending = [
            token_id
            for token_id in ending_token_ids(params, request.eos_token_ids)
            if params.min_tokens and token_id < vocab_size
        ]
        self._seen: _Seen | None = None
        penalties = params.repetition_penalty, params.frequency_penalty, params.presence_penalty
        if penalties != (1, 0, 0):
            self._seen = _Seen(request)
        self._any = bool(
            self._bias
            or self._allowed is not None
            or self._ending
            or self._seen is not None
            or request.bad_words_token_ids
            or params.token_mask is not None
        )

    def forget_counts(self) -> None:
        """Count the request's tokens anew when they are needed."""
        if self._seen is not None:
            self._seen.count(())

    def of_next_token(self, request: Request, ahead: Sequence[int] = ()) -> Change:
        """What the request does to the row of its next token.

        ahead: tokens that were drawn or guessed before it and are not the request's yet.
        InvalidRequestError says what is wrong with what its token_mask gave.
        """
        if not self._any:
            return NO_CHANGE
        add_ids, add_values = list(self._bias), list(self._bias.values())
        banned = _bad_word_ends(request, ahead)
        if request.num_generated_tokens + len(ahead) < request.params.min_tokens:
            banned += self._ending
        add_ids += banned
        add_values += [-np.inf] * len(banned)
        mask = self._allowed
        if request.params.token_mask is not None:
            own = _token_mask(request, ahead, self._vocab_size)
            mask = own if mask is None else own & mask
        if self._seen is None:
            return Change(mask, add_ids, add_values)
        self._seen.count([*request.token_ids, *ahead] if ahead else request.token_ids)
        return Change(mask, add_ids, add_values, self._seen.ids, self._seen.counts)


class _Seen:
    """The different tokens of a request, and how often each is in its output."""

    def __init__(self, request: Request) -> None:
        self._num_prompt = request.num_prompt_tokens
        self._begin()

    def _begin(self) -> None:
        self.ids = array("q")
        self.counts = array("q")
        self._index: dict[int, int] = {}
        self._num_counted = 0

    def count(self, token_ids: Sequence[int]) -> None:
        """Count what has been added to the request's tokens since the last call.

        Where they are fewer, a step is sampled again that drew several of them.
        """
        if len(token_ids) < self._num_counted:
            self._begin()
        for position in range(self._num_counted, len(token_ids)):
            token_id = token_ids[position]
            index = self._index.setdefault(token_id, len(self.ids))
            if index == len(self.ids):
                self.ids.append(token_id)
                self.counts.append(0)
            self.counts[index] += position >= self._num_prompt
        self._num_counted = len(token_ids)


def _bad_word_ends(request: Request, ahead: Sequence[int]) -> list[int]:
    """Last tokens of the bad words that the output so far would complete."""
    if not request.bad_words_token_ids:
        return []
    generated = [*request.generated_token_ids, *ahead]
    ends = []
    for word in request.bad_words_token_ids:
        start = len(generated) - (len(word) - 1)
        if start >= 0 and generated[start:] == list(word[:-1]):
            ends.append(word[-1])
    return ends


def packed(mask: NDArray[Any], vocab_size: int) -> NDArray[np.int32]:
    """A token mask, bool[V] or packed already, as int32[ceil(V / 32)]: bit i % 32 of word i // 32.

    ValueError, saying what it is and what was expected.
    """
    mask = np.asarray(mask)
    num_words = -(-vocab_size // 32)
    if mask.dtype == np.bool_ and mask.shape == (vocab_size,):
        padded = np.zeros(32 * num_words, np.bool_)
        padded[:vocab_size] = mask
        return np.packbits(padded, bitorder="little").view(np.int32)
    if mask.dtype in (np.int32, np.uint32) and mask.shape == (num_words,):
        return np.ascontiguousarray(mask).view(np.int32)
    raise ValueError(
        f"is {mask.dtype} of shape {mask.shape}, expected bool of ({vocab_size},) or int32 of "
        f"({num_words},)"
    )


def _token_mask(request: Request, ahead: Sequence[int], vocab_size: int) -> NDArray[np.int32]:
    """The request's own mask for its next token, packed."""
    mask = request.params.token_mask
    try:
        given = mask([*request.generated_token_ids, *ahead]) if callable(mask) else mask
    except Exception as error:
        reason = " ".join(str(error).split())
        raise InvalidRequestError(f"token_mask raised {type(error).__name__}: {reason}") from error
    try:
        return packed(given, vocab_size)
    except ValueError as error:
        raise InvalidRequestError(f"token_mask {error}") from error


def edits_of(changes: Sequence[Change]) -> Edits | None:
    """The changes of all rows; None if there are none."""
    if all(change is NO_CHANGE for change in changes):
        return None
    masks = [change.mask for change in changes if change.mask is not None]
    mask_rows = np.cumsum([change.mask is not None for change in changes], dtype=np.int64) - 1
    mask_rows[[change.mask is None for change in changes]] = -1
    add_starts, seen_starts = np.zeros((2, len(changes) + 1), np.int64)
    np.cumsum([len(change.add_ids) for change in changes], out=add_starts[1:])
    np.cumsum([len(change.seen_ids) for change in changes], out=seen_starts[1:])
    return Edits(
        np.stack(masks) if masks else np.zeros((0, 0), np.int32),
        mask_rows,
        add_starts,
        np.concatenate([np.array(change.add_ids, np.int64) for change in changes]),
        np.concatenate([np.array(change.add_values, np.float32) for change in changes]),
        seen_starts,
        np.concatenate([np.array(change.seen_ids, np.int64) for change in changes]),
        np.concatenate([np.array(change.seen_counts, np.int64) for change in changes]),
    )
