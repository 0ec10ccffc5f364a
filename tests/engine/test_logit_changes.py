"""What each parameter changes in the row of a request's next token; the arrays of many requests."""

from __future__ import annotations

import numpy as np
import pytest

from pace_nb.engine.logit_changes import NO_CHANGE, Change, LogitChanges, edits_of, packed
from pace_nb.errors import InvalidRequestError
from pace_nb.kernels.logit_edits import check_edits

V = 40
NEVER = -np.inf


def changes(scripted, prompt=(1, 2), generated=(), **params):
    """(the request after `generated`, its changes)"""
    request = scripted.request("a", list(prompt), max_tokens=50, **params)
    request.token_ids += generated
    return request, LogitChanges(request, V)


def added(change):
    return dict(zip(change.add_ids, change.add_values, strict=True))


def counted(change):
    return dict(zip(change.seen_ids, change.seen_counts, strict=True))


def test_parameters_that_only_filter_change_nothing(scripted):
    request, own = changes(scripted, temperature=0.5, top_k=3, top_p=0.5, min_p=0.1, logprobs=2)
    assert own.of_next_token(request) is NO_CHANGE


def test_bias_bans_and_ends_are_added_in_one_list(scripted):
    request, own = changes(
        scripted, logit_bias={3: 1.5}, bad_words=[[7], [5, 6]], min_tokens=3, stop_token_ids=[9, 99]
    )
    end = dict.fromkeys([9, *request.eos_token_ids], NEVER)
    assert added(own.of_next_token(request)) == {3: 1.5, 7: NEVER} | end
    assert added(own.of_next_token(request, [8, 5])) == {3: 1.5, 7: NEVER, 6: NEVER} | end
    assert added(own.of_next_token(request, [8, 5, 5])) == {3: 1.5, 7: NEVER, 6: NEVER}


def test_tokens_are_counted_as_they_come_and_again_when_they_go(scripted):
    """Prompt tokens are seen and not counted; what was only guessed is forgotten."""
    request, own = changes(scripted, prompt=[1, 2, 1], generated=[2, 5], frequency_penalty=0.5)
    assert counted(own.of_next_token(request)) == {1: 0, 2: 1, 5: 1}
    assert counted(own.of_next_token(request, [5, 6])) == {1: 0, 2: 1, 5: 2, 6: 1}
    assert counted(own.of_next_token(request)) == {1: 0, 2: 1, 5: 1}
    own.of_next_token(request, [7, 7])  # guesses: two others were taken
    own.forget_counts()
    request.token_ids += [6, 6]
    assert counted(own.of_next_token(request)) == {1: 0, 2: 1, 5: 1, 6: 2}


def test_a_mask_and_allowed_tokens_are_one_mask(scripted):
    mask = np.zeros(V, bool)
    mask[[1, 3, 39]] = True
    for given in (mask, packed(mask, V), lambda generated: mask):
        request, own = changes(scripted, token_mask=given, allowed_token_ids=[3, 4])
        assert own.of_next_token(request).mask.tolist() == [0b1000, 0]
        request, own = changes(scripted, token_mask=given)
        assert own.of_next_token(request).mask.tolist() == [0b1010, 1 << 7]


def test_a_mask_is_packed_or_refused():
    assert packed(np.ones(33, bool), 33).tolist() == [-1, 1]
    assert packed(np.array([7, 2**31], np.uint32), 64).tolist() == [7, -(2**31)]
    for wrong in (np.ones(3, bool), np.ones(3, np.int32), np.ones(V)):
        with pytest.raises(ValueError, match=r"expected bool of \(40,\) or int32 of \(2,\)"):
            packed(wrong, V)


def test_what_a_mask_does_wrong_is_said(scripted):
    request, own = changes(scripted, token_mask=lambda generated: {}["key"])
    with pytest.raises(InvalidRequestError, match=r"^token_mask raised KeyError: 'key'$"):
        own.of_next_token(request)
    request, own = changes(scripted, token_mask=lambda generated: np.ones(3, bool))
    with pytest.raises(InvalidRequestError, match=r"^token_mask is bool of shape \(3,\)"):
        own.of_next_token(request)


def test_edits_are_the_changes_end_to_end():
    assert edits_of([NO_CHANGE, NO_CHANGE]) is None
    mask, other = packed(np.ones(V, bool), V), packed(np.zeros(V, bool), V)
    edits = edits_of(
        [
            Change(mask, [3, 4], [1.0, NEVER]),
            NO_CHANGE,
            Change(other, [5], [2.0], [1, 2], [0, 3]),
            Change(None, [], [], [7], [1]),
        ]
    )
    check_edits("test", edits, 4, V)
    assert edits.mask_rows.tolist() == [0, -1, 1, -1]
    assert edits.masks.tolist() == [mask.tolist(), other.tolist()]
    assert edits.add_starts.tolist() == [0, 2, 2, 3, 3]
    assert edits.add_ids.tolist() == [3, 4, 5]
    assert edits.add_values.tolist() == [1.0, NEVER, 2.0]
    assert edits.seen_starts.tolist() == [0, 0, 0, 2, 3]
    assert edits.seen_ids.tolist() == [1, 2, 7]
    assert edits.seen_counts.tolist() == [0, 3, 1]
