"""How far a request is behind, and which of its rows need logits."""

from __future__ import annotations

import pytest


def test_a_request_is_behind_and_catches_up(scripted):
    request = scripted.request("a", [1, 2, 3, 4, 5])
    assert (request.num_tokens, request.num_behind, request.num_generated_tokens) == (5, 5, 0)
    request.num_computed_tokens = 5
    request.token_ids.append(9)
    assert (request.num_behind, request.num_generated_tokens) == (1, 1)
    assert request.generated_token_ids == [9]
    assert request.prompt_token_ids == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    "computed, num_tokens, expected", [(0, 5, 1), (0, 4, 0), (3, 1, 0), (3, 2, 1)]
)
def test_only_the_last_row_needs_logits(scripted, computed, num_tokens, expected):
    request = scripted.request("a", [1, 2, 3, 4, 5])
    request.num_computed_tokens = computed
    assert request.num_logits(num_tokens) == expected


@pytest.mark.parametrize(
    "reported, computed, num_tokens, expected",
    [
        (1, 0, 5, 5),  # every row predicts a prompt token, the last one the first new token
        (1, 0, 3, 3),
        (4, 3, 2, 2),
        (4, 0, 5, 2),  # computed anew after a preemption: what was reported is not needed again
        (4, 0, 2, 0),
        (5, 0, 5, 1),
    ],
)
def test_prompt_logprobs_need_every_row_once(scripted, reported, computed, num_tokens, expected):
    request = scripted.request("a", [1, 2, 3, 4, 5], prompt_logprobs=0)
    request.prompt_logprobs += [{}] * (reported - 1)
    request.num_computed_tokens = computed
    assert request.num_logits(num_tokens) == expected


def test_logprobs_are_kept_only_where_asked_for(scripted):
    request = scripted.request("a", [1])
    assert request.logprobs is None and request.prompt_logprobs is None
    request = scripted.request("a", [1], logprobs=0, prompt_logprobs=0)
    assert request.logprobs == [] and request.prompt_logprobs == [None]
