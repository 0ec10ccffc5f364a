from __future__ import annotations

import json

import pytest

from pace_nb.errors import InvalidRequestError
from pace_nb.structured_outputs import StructuredOutputsParams


def nested(depth):
    schema = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


@pytest.mark.parametrize(
    "given",
    [
        {"json": {"type": "object", "properties": {"a": {"enum": ["x"] * 1024}}}},
        {"json": nested(15)},
        {"regex": "[a-z]+", "reasoning_end": "</think>", "reasoning_start": "<think>"},
        {"choice": ("yes", "no")},
        {"grammar": 'start: "a"'},
        {"json_object": True, "disable_any_whitespace": True},
    ],
)
def test_they_go_through_json_unchanged(given):
    made = StructuredOutputsParams.of(given)
    assert made.to_json() == given
    assert StructuredOutputsParams.of(json.loads(json.dumps(made.to_json()))) == made
    assert StructuredOutputsParams.of(made) is made


def test_a_schema_may_be_text():
    assert StructuredOutputsParams(json='{"type": "null"}').json == {"type": "null"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "has nothing, expected one of json, regex"),
        ({"json_object": False}, "has nothing"),
        ({"json": {}, "regex": "a"}, "has json and regex, expected one of"),
        ({"structural_tag": "x"}, "has 'structural_tag', expected json, regex"),
        ("json", "is a str, expected an object"),
        ({"json": "{"}, "the text is no JSON"),
        ({"json": "[" * 60000}, "the text is no JSON"),
        ({"json": "1"}, "json is wrong, expected a JSON schema, as an object or as text"),
        ({"json": [1]}, "json is wrong, expected a JSON schema, as an object or as text"),
        ({"json": nested(16)}, "nested at most 32 levels deep"),
        ({"json": {"anyOf": [{"a": {}}] * 600}}, "at most 1024 objects"),
        ({"json": {"enum": [1] * 1025}}, "at most 1024 values in a list"),
        ({"json": {"pattern": "a" * 70000}}, "at most 65536 bytes"),
        ({"json": {"const": float("nan")}}, "schema of JSON's values"),
        ({"regex": ""}, "regex is wrong, expected text of 1 to 16384 characters"),
        ({"regex": "a" * 16385}, "text of 1 to 16384 characters"),
        ({"regex": "\ud800"}, "text without lone surrogates"),
        ({"grammar": 5}, "grammar is wrong, expected text of 1 to 65536"),
        ({"choice": []}, "choice is wrong, expected a list of 1 to 1024 texts"),
        ({"choice": ["a", ""]}, "texts of at least one character"),
        ({"choice": ["a" * 60000, "b" * 60000]}, "at most 65536 characters together"),
        ({"json_object": 1}, "json_object is wrong, expected true or false"),
        ({"regex": "a", "disable_any_whitespace": 1}, "expected true or false"),
        ({"regex": "a", "reasoning_start": "<think>"}, "expected reasoning_end beside it"),
    ],
)
def test_S23_what_is_refused_is_refused_in_one_line(given, message):
    with pytest.raises(InvalidRequestError) as caught:
        StructuredOutputsParams.of(given)
    assert message in str(caught.value) and str(caught.value).startswith("structured_outputs")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200
