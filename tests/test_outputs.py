"""The result records: what a caller reads off them."""

from __future__ import annotations

import dataclasses

import pytest

from pace_nb.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput


def test_a_completion_is_finished_when_it_has_a_reason() -> None:
    running = CompletionOutput(index=0, text="so far", token_ids=[1, 2])
    ended = dataclasses.replace(running, finish_reason="stop", stop_reason="\n")
    assert not running.finished()
    assert ended.finished()
    assert (ended.text, ended.token_ids, ended.stop_reason) == ("so far", [1, 2], "\n")


def test_a_logprob_cannot_be_changed() -> None:
    entry = Logprob(-0.5, 1, " a")
    with pytest.raises(dataclasses.FrozenInstanceError):
        entry.logprob = 0.0  # type: ignore[misc]


def test_time_to_first_token_counts_from_arrival() -> None:
    metrics = RequestMetrics(arrival_time=10.0)
    assert metrics.time_to_first_token is None
    metrics.first_token_time = 10.25
    assert metrics.time_to_first_token == 0.25


def test_the_fields_are_vllms() -> None:
    """Code written against vLLM's outputs reads ours."""
    names = [f.name for f in dataclasses.fields(RequestOutput)]
    assert names == [
        "request_id",
        "prompt",
        "prompt_token_ids",
        "prompt_logprobs",
        "outputs",
        "finished",
        "num_cached_tokens",
        "metrics",
    ]
    assert [f.name for f in dataclasses.fields(CompletionOutput)] == [
        "index",
        "text",
        "token_ids",
        "cumulative_logprob",
        "logprobs",
        "finish_reason",
        "stop_reason",
    ]
    assert [f.name for f in dataclasses.fields(Logprob)] == ["logprob", "rank", "decoded_token"]
