"""SamplingParams: vLLM's defaults, normalised values, and a one-line refusal of everything else."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pace_nb.errors import InvalidRequestError
from pace_nb.sampling_params import MAX_LOGIT_BIAS, RequestOutputKind, SamplingParams

FIELDS = [f.name for f in dataclasses.fields(SamplingParams)]


def test_defaults_are_vllms() -> None:
    defaults = {name: getattr(SamplingParams(), name) for name in FIELDS}
    assert defaults == {
        "n": 1,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "seed": None,
        "stop": (),
        "stop_token_ids": (),
        "ignore_eos": False,
        "max_tokens": 16,
        "min_tokens": 0,
        "logprobs": None,
        "prompt_logprobs": None,
        "detokenize": True,
        "skip_special_tokens": True,
        "include_stop_str_in_output": False,
        "logit_bias": None,
        "allowed_token_ids": None,
        "bad_words": (),
        "token_mask": None,
        "structured_outputs": None,
        "truncate_prompt_tokens": None,
        "output_kind": RequestOutputKind.CUMULATIVE,
    }


@pytest.mark.parametrize(
    ("given_value", "field", "stored"),
    [
        ("END", "stop", ("END",)),
        (["b", "a", "b"], "stop", ("b", "a")),
        (None, "stop", ()),
        ([7, 3, 7], "stop_token_ids", (7, 3)),
        (None, "stop_token_ids", ()),
        (-1, "top_k", 0),
        (0, "top_k", 0),
        (-1, "seed", None),
        (2**64 - 1, "seed", 2**64 - 1),
        (-2, "seed", 2**64 - 2),
        (-(2**63), "seed", 2**63),
        ({"5": 1, 6: -100}, "logit_bias", {5: 1.0, 6: -100.0}),
        ({}, "logit_bias", None),
        (range(3), "allowed_token_ids", (0, 1, 2)),
        ("bad", "bad_words", ("bad",)),
        (1, "temperature", 1.0),
        (np.float32(0.5), "top_p", 0.5),
        (np.int32(4), "max_tokens", 4),
        (None, "max_tokens", None),
        (0, "logprobs", 0),
        (-1, "truncate_prompt_tokens", -1),
    ],
)
def test_values_are_normalised(given_value: Any, field: str, stored: Any) -> None:
    value = getattr(SamplingParams(**{field: given_value}), field)
    assert value == stored
    assert type(value) is type(stored)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 0),
        ("n", 1025),
        ("n", True),
        ("n", 1.0),
        ("presence_penalty", 2.01),
        ("frequency_penalty", -2.01),
        ("repetition_penalty", 0),
        ("repetition_penalty", -1.0),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", 10**400),
        ("temperature", "hot"),
        ("temperature", False),
        ("top_p", 0),
        ("top_p", -0.0),
        ("top_p", 1.0001),
        ("top_p", 1e-400),
        ("top_k", -2),
        ("top_k", 2.0),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("seed", -(2**63) - 1),
        ("seed", 2**64),
        ("seed", 1.5),
        ("stop", [""]),
        ("stop", ""),
        ("stop", ["x" * 257]),
        ("stop", ["x"] * 17),
        ("stop", [1]),
        ("stop", b"x"),
        ("stop", {"x": 1}),
        ("stop", ["\ud800"]),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", [2**31]),
        ("stop_token_ids", [1.0]),
        ("stop_token_ids", [True]),
        ("stop_token_ids", list(range(65))),
        ("stop_token_ids", 5),
        ("ignore_eos", 1),
        ("ignore_eos", "yes"),
        ("ignore_eos", None),
        ("max_tokens", 0),
        ("max_tokens", -5),
        ("min_tokens", -1),
        ("min_tokens", 17),
        ("logprobs", 21),
        ("logprobs", -1),
        ("logprobs", True),
        ("prompt_logprobs", 21),
        ("logit_bias", {1: 100.5}),
        ("logit_bias", {1: math.nan}),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {"x": 1.0}),
        ("logit_bias", {"²": 1.0}),
        ("logit_bias", [1]),
        ("logit_bias", dict.fromkeys(range(MAX_LOGIT_BIAS + 1), 0.0)),
        ("allowed_token_ids", []),
        ("allowed_token_ids", [-3]),
        ("bad_words", [""]),
        ("bad_words", ["w"] * 129),
        ("output_kind", "DELTA"),
        ("output_kind", 1),
        ("truncate_prompt_tokens", 0),
        ("truncate_prompt_tokens", -2),
    ],
)
def test_bad_values_are_refused_in_one_line(field: str, value: Any) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        SamplingParams(**{field: value})
    message = str(refused.value)
    assert message.startswith(field)
    assert ", expected " in message
    assert len(message.splitlines()) == 1
    assert len(message) < 250


def test_an_integer_too_long_to_print_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="max_tokens is an integer of more than 39"):
        SamplingParams(max_tokens=10**5000)


def test_a_refusal_names_field_value_and_range() -> None:
    with pytest.raises(InvalidRequestError) as refused:
        SamplingParams(top_p=1.5)
    assert str(refused.value) == "top_p is 1.5, expected a number above 0 and at most 1"


def test_min_tokens_cannot_exceed_max_tokens() -> None:
    with pytest.raises(InvalidRequestError, match=r"min_tokens is 9, expected at most max_tokens"):
        SamplingParams(max_tokens=8, min_tokens=9)
    assert SamplingParams(max_tokens=None, min_tokens=9).min_tokens == 9


def test_stop_strings_need_text() -> None:
    with pytest.raises(InvalidRequestError, match="detokenize"):
        SamplingParams(stop="x", detokenize=False)


def test_greedy_starts_below_1e_5() -> None:
    assert SamplingParams(temperature=0).greedy
    assert SamplingParams(temperature=9.9e-6).greedy
    assert not SamplingParams(temperature=1e-5).greedy


def test_an_unknown_field_is_refused() -> None:
    with pytest.raises(TypeError, match="best_of"):
        SamplingParams(best_of=2)  # type: ignore[call-arg]


def test_it_is_frozen_hashable_and_survives_copies() -> None:
    params = SamplingParams(stop=["a"], logit_bias={3: 1.5}, seed=7)
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.n = 2  # type: ignore[misc]
    for twin in (copy.copy(params), copy.deepcopy(params)):
        assert twin == params
        assert hash(twin) == hash(params)
    longer = dataclasses.replace(params, max_tokens=99)
    assert (longer.max_tokens, longer.stop, longer.seed) == (99, ("a",), 7)


def test_the_callers_own_lists_are_not_kept() -> None:
    biases, stops = {3: 1.5}, ["a"]
    params = SamplingParams(stop=stops, logit_bias=biases)
    biases[4] = 2.0
    stops.append("b")
    assert params.logit_bias == {3: 1.5}
    assert params.stop == ("a",)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=10**4400, max_value=10**4401)
    | st.floats(allow_nan=True, allow_infinity=True)
    | st.text(alphabet=st.characters(exclude_categories=()), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)


@given(field=st.sampled_from(FIELDS), value=json_values)
def test_any_json_value_is_taken_or_refused(field: str, value: Any) -> None:
    """S19: whatever JSON puts in a field, the only exception is ours, and it fits on one line."""
    try:
        params = SamplingParams(**{field: value})
    except InvalidRequestError as error:
        assert len(str(error).splitlines()) == 1
        str(error).encode()
    else:
        stored = getattr(params, field)
        assert not (isinstance(stored, float) and not math.isfinite(stored))
        assert dataclasses.replace(params) == params


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"top_k": 2**40}, "top_k is 1099511627776, expected an integer from -1 to 2147483647"),
        ({"max_tokens": 2**31}, "max_tokens is 2147483648, expected an integer from 1 to 2147483"),
        ({"stop_token_ids": [2**31]}, "entry is 2147483648, expected an integer from 0 to 214748"),
        ({"seed": 2**64}, r"expected an integer from -2\*\*63 to 2\*\*64 - 1"),
    ],
)
def test_a_refusal_gives_both_bounds(values: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        SamplingParams(**values)
