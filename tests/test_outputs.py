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


def piece(index: int, text: str, token_ids: list[int], **fields: object) -> CompletionOutput:
    logprobs = [{i: Logprob(-1.0, 1)} for i in token_ids]
    return CompletionOutput(index, text, token_ids, -1.0, logprobs, **fields)  # type: ignore[arg-type]


def news(*pieces: CompletionOutput, finished: bool = False, cached: int = 0) -> RequestOutput:
    return RequestOutput("r", "p", [1], None, list(pieces), finished, cached)


def test_news_that_follows_is_added_to_what_there_is() -> None:
    total = news(piece(1, "b", [5]))
    total.add(news(piece(0, "a", [4]), piece(1, "c", [6, 7])))
    before = total.copy()
    last = news(piece(0, "z", [], finish_reason="stop", stop_reason="!"), finished=True, cached=3)
    last.prompt_logprobs = [None]
    last.outputs[0].cumulative_logprob = -9.0
    total.add(last)

    first, second = total.outputs
    assert (first.index, first.text, first.token_ids) == (0, "az", [4])
    assert (first.finish_reason, first.stop_reason, first.cumulative_logprob) == ("stop", "!", -9.0)
    assert (second.text, second.token_ids) == ("bc", [5, 6, 7])
    assert second.logprobs == [{i: Logprob(-1.0, 1)} for i in (5, 6, 7)]
    assert (total.finished, total.num_cached_tokens, total.prompt_logprobs) == (True, 3, [None])
    assert (before.finished, before.outputs[0].text, before.outputs[0].finish_reason) == (
        False,
        "a",
        None,
    )


def test_a_copy_shares_no_list_that_grows() -> None:
    total = news(piece(0, "a", [4]))
    copy = total.copy()
    total.add(news(piece(0, "b", [5])))
    assert copy.outputs[0].token_ids == [4] and len(copy.outputs[0].logprobs or ()) == 1
