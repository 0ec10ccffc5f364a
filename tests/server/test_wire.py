"""Parameters and outputs survive the socket; pieces that are joined are what one piece would be."""

from __future__ import annotations

import copy
import json

from hypothesis import given
from hypothesis import strategies as st

from pace_nb.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from pace_nb.sampling_params import SamplingParams
from pace_nb.server import wire


def through_json(found):
    return json.loads(json.dumps(found))


def test_parameters_survive_and_defaults_are_not_sent():
    assert wire.params_to_json(SamplingParams()) == {}
    params = SamplingParams(
        n=3, temperature=0.5, seed=2**64 - 1, stop=["a", "b"], logit_bias={5: -1.5},
        max_tokens=None, allowed_token_ids=[1, 2],
        bad_words=["no"], logprobs=0, prompt_logprobs=2, min_p=0.1,
        structured_outputs={"json": {"type": "object"}, "disable_any_whitespace": True},
        stop_token_ids=[7], ignore_eos=True, top_k=5, top_p=0.9, repetition_penalty=1.1,
    )  # fmt: skip
    assert wire.params_from_json(through_json(wire.params_to_json(params))) == params


LOGPROB = st.builds(
    Logprob,
    st.floats(max_value=0, allow_nan=False),
    st.none() | st.integers(1, 100),
    st.none() | st.text(),
)
ENTRIES = st.dictionaries(st.integers(0, 50), LOGPROB, min_size=1, max_size=3)


@st.composite
def completions(draw):
    num = draw(st.integers(0, 4))
    with_logprobs = draw(st.booleans())
    finish = draw(st.sampled_from([None, "stop", "length", "error"]))
    return CompletionOutput(
        index=draw(st.integers(0, 3)),
        text=draw(st.text()),
        token_ids=draw(st.lists(st.integers(0, 50), min_size=num, max_size=num)),
        cumulative_logprob=draw(st.floats(-9, 0)) if with_logprobs else None,
        logprobs=draw(st.lists(ENTRIES, min_size=num, max_size=num)) if with_logprobs else None,
        finish_reason=finish,
        stop_reason=draw(st.none() | st.integers(0, 9) | st.text()) if finish else None,
    )


@given(
    st.lists(completions(), max_size=3, unique_by=lambda one: one.index),
    st.none() | st.lists(st.none() | ENTRIES, max_size=3),
    st.booleans(),
    st.booleans(),
)
def test_an_output_survives(outputs, prompt_logprobs, finished, first):
    metrics = RequestMetrics(1.0, 2.0, None, 4.0)
    output = RequestOutput("7", "hi", [1, 2], prompt_logprobs, outputs, finished, 5, metrics)
    found = through_json(wire.output_to_json(output, first=first))
    received = wire.output_from_json(found, "7", "hi", [1, 2])
    if not first:
        assert received.prompt_logprobs is None
        received.prompt_logprobs = prompt_logprobs
    assert received == output


def piece(index, text, ids, finish=None, logprobs=None):
    entries = None if logprobs is None else [{i: Logprob(-1.0)} for i in ids]
    return CompletionOutput(index, text, ids, logprobs, entries, finish, None)


def output(*pieces, finished=False, cached=0):
    return RequestOutput("7", None, [1], None, list(pieces), finished, cached)


def test_pieces_are_joined_by_index():
    first = output(piece(0, "a", [1], logprobs=-1.0), piece(2, "x", [9]), cached=3)
    second = output(
        piece(1, "q", [4]), piece(0, "bc", [2, 3], "stop", -3.0), finished=True, cached=3
    )
    expected = copy.deepcopy([first, second])
    first.add(second)
    joined = first
    by_index = {one.index: one for one in joined.outputs}
    assert by_index[0].text == "abc" and by_index[0].token_ids == [1, 2, 3]
    assert by_index[0].logprobs == (
        expected[0].outputs[0].logprobs + expected[1].outputs[1].logprobs
    )
    assert (by_index[0].finish_reason, by_index[0].cumulative_logprob) == ("stop", -3.0)
    assert by_index[2] == expected[0].outputs[1] and by_index[1] == expected[1].outputs[0]
    assert joined.finished and joined.num_cached_tokens == 3
