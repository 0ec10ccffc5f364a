"""Masks of real grammars over the demo model's vocabulary; no model runs here."""

from __future__ import annotations

import json
import random
import re
import time
from pathlib import Path

import numpy as np
import pytest

import pace_nb
from pace_nb.engine.structured_output import GrammarCompiler
from pace_nb.errors import InvalidRequestError
from pace_nb.llm import LLM
from pace_nb.sampling_params import SamplingParams
from pace_nb.structured_outputs import StructuredOutputsParams
from pace_nb.tokenizer import Tokenizer

V = 1536
EOS = 1
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["cat", "dog"]},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = Tokenizer.from_directory(Path(pace_nb.__file__).parent / "demo")
    yield tokenizer
    tokenizer.close()


@pytest.fixture(scope="module")
def compiler(tokenizer):
    return GrammarCompiler(tokenizer, V, tokenizer.eos_token_ids)


def allowed(mask):
    bits = np.unpackbits(np.ascontiguousarray(mask).view(np.uint8), bitorder="little")
    assert mask.dtype == np.int32 and mask.shape == (V // 32,)
    return np.flatnonzero(bits[:V]).tolist()


def walk(grammar, seed, most=400):
    """Ids drawn among those that are allowed, until the form is complete or ended."""
    ids, draw = [], random.Random(seed)
    while not grammar.is_complete(ids) and len(ids) < most:
        choice = draw.choice(allowed(grammar(ids)))
        if choice == EOS or choice == 2:
            break
        ids.append(choice)
    return ids


@pytest.mark.parametrize("seed", range(12))
def test_any_walk_through_the_masks_of_a_schema_is_valid_json(compiler, tokenizer, seed):
    grammar = compiler.compile(StructuredOutputsParams(json=PERSON))
    found = json.loads(tokenizer.decode(walk(grammar, seed)))
    assert list(found) == ["name", "age", "kind"]
    assert len(found["name"]) <= 8 and 0 <= found["age"] <= 150 and found["kind"] in ("cat", "dog")


@pytest.mark.parametrize(
    ("given", "pattern"),
    [
        ({"regex": r"[a-c]{2,4}-[0-9]{3}"}, r"[a-c]{2,4}-[0-9]{3}"),
        ({"choice": ['say "hi"', "a\nb", "größer", "/x/ | y"]}, None),
        ({"grammar": 'start: ("x" | "y") ("1" | "2")'}, r"[xy][12]"),
        ({"grammar": 'root ::= [xy] num\nnum ::= "1" | "2"'}, r"[xy][12]"),
    ],
)
def test_other_forms(compiler, tokenizer, given, pattern):
    grammar = compiler.compile(StructuredOutputsParams.of(given))
    texts = {tokenizer.decode(walk(grammar.copy(), seed)) for seed in range(12)}
    assert len(texts) > 1
    for text in texts:
        assert text in given["choice"] if pattern is None else re.fullmatch(pattern, text)


def test_json_objects_without_white_space(compiler, tokenizer):
    form = StructuredOutputsParams(json_object=True, disable_any_whitespace=True)
    ids = tokenizer.encode('{"a":[1,{}]}', add_special_tokens=False)
    grammar = compiler.compile(form)
    assert grammar.is_complete(ids) and not grammar.is_complete(ids[:-1])
    with pytest.raises(ValueError):
        grammar(tokenizer.encode('{"a": 1', add_special_tokens=False))
    loose = compiler.compile(StructuredOutputsParams(json_object=True))
    spaced = tokenizer.encode('{\n    "a": 1', add_special_tokens=False)
    assert allowed(loose(spaced))
    with pytest.raises(ValueError):  # a small model would write spaces for ever
        loose(tokenizer.encode("{" + " " * 40 + '"a', add_special_tokens=False))


def test_it_may_be_asked_about_any_ids(compiler, tokenizer):
    """Speculation looks ahead, and a step that failed is run again."""
    grammar = compiler.compile(StructuredOutputsParams(json=PERSON))
    ids = walk(grammar, 3)
    fresh = grammar.copy()
    for length in [len(ids), 3, 4, 0, 5, 5, 2]:
        expected = grammar.copy()(ids[:length])
        assert np.array_equal(fresh(ids[:length]), expected)
    assert fresh.is_complete(ids) and not fresh.is_complete(ids[:1])
    assert allowed(fresh([*ids, EOS])) == list(range(V))  # past its end anything goes


def test_only_an_end_token_may_follow_what_may_be_longer(compiler, tokenizer):
    grammar = compiler.compile(StructuredOutputsParams(choice=["a", "ab"]))
    ids = tokenizer.encode("a", add_special_tokens=False)
    assert not grammar.is_complete(ids)
    found = {tokenizer.decode([one]) for one in allowed(grammar(ids))}
    assert found == {"", "b"}
    assert EOS in allowed(grammar(ids))


def test_reasoning_comes_before_the_form(compiler, tokenizer):
    def compiled(**options):
        return compiler.compile(StructuredOutputsParams(choice=["yes"], **options))

    free = tokenizer.encode("so be it</th", add_special_tokens=False)
    end = tokenizer.encode("ink>", add_special_tokens=False)
    yes = tokenizer.encode("yes", add_special_tokens=False)
    grammar = compiled(reasoning_end="</think>")
    for length in range(len(free) + len(end)):
        assert len(allowed(grammar([*free, *end][:length]))) == V
    assert len(allowed(grammar([*free, *end]))) < 10
    assert grammar.is_complete([*free, *end, *yes]) and not grammar.is_complete(yes)
    # The first token says whether there is any: here <|mask|> stands for <think>.
    grammar = compiled(reasoning_start="<|mask|>", reasoning_end="</think>")
    (start,) = tokenizer.encode("<|mask|>", add_special_tokens=False)
    constrained = allowed(compiled()([]))
    assert sorted([*constrained, start]) == allowed(grammar([]))
    assert len(allowed(grammar([start]))) == V and grammar.is_complete(yes)
    assert grammar.is_complete([start, *free, *end, *yes])
    # A model without such a token does not reason.
    assert allowed(compiled(reasoning_start="<think>", reasoning_end="</think>")([])) == constrained


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"json": {"type": "words"}}, "json cannot be followed"),
        ({"json": {"$ref": "http://example.com/schema"}}, "json cannot be followed"),
        ({"json": {"type": "string", "pattern": "(?=a)b"}}, "json cannot be followed"),
        ({"json": False}, "expected one of"),
        ({"regex": "("}, "regex cannot be followed"),
        ({"regex": "(?=a)b"}, "look-around"),
        ({"regex": "(" * 8000 + "a" + ")" * 8000}, "regex cannot be followed"),
        ({"grammar": "start: foo"}, "unknown name"),
        ({"grammar": "root ::= " + "(" * 20000}, "grammar cannot be followed"),
        ({"grammar": 'root ::= "' + "\\" * 20001}, "grammar cannot be followed"),
    ],
)
def test_S23_what_cannot_be_followed_is_refused_in_one_line(compiler, given, message):
    with pytest.raises(InvalidRequestError) as caught:
        compiler.compile(StructuredOutputsParams.of(given))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 320


MANY = range(300)


@pytest.mark.parametrize(
    "given",
    [
        {"regex": "(a{1,1000}){1,1000}"},
        {"regex": "((a|b){0,500}c){0,500}"},
        {"regex": "(x+x+)+y"},
        {"regex": "[ab]*a[ab]{40}"},
        {"regex": "(a?){3000}a{3000}"},
        {"regex": "((((a{0,20}){0,20}){0,20}){0,20}){0,20}"},
        {"json": {"type": "string", "maxLength": 10**8}},
        {"json": {"type": "object", "properties": {f"k{i}": {} for i in range(1000)}}},
        {"json": {"anyOf": [{"properties": {f"k{i}": {"maxLength": 999 + i}}} for i in MANY]}},
        {"json": {"allOf": [{"properties": {f"k{i}": {"pattern": "^a*b{0,50}$"}}} for i in MANY]}},
        {"json": {"minItems": 10**6, "items": {"minItems": 10**6}}},
        {"grammar": 'start: x x x x\nx: x x | "a" | ""'},
        {"grammar": "root ::= a\n" + "a ::= a\n" * 5000},
    ],
)
def test_S23_costly_forms_are_refused_or_followed_within_two_seconds(compiler, tokenizer, given):
    start = time.process_time()
    try:
        grammar = compiler.compile(StructuredOutputsParams.of(given))
        walk(grammar, 1, most=5)
    except (InvalidRequestError, ValueError):  # the second: a step beyond its limits
        pass
    assert time.process_time() - start < 2.0


def test_the_package_may_be_missing(compiler, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    with pytest.raises(InvalidRequestError, match=r"llguidance: pip install 'pace-nb\[server\]'"):
        compiler.compile(StructuredOutputsParams(regex="a"))


def test_a_form_is_kept_to_with_speculation_as_without():
    """Guesses hold, and go on past the place where the form is complete."""
    line = "the small cat sat on the old mat."
    form = {"choice": [line, "a dog sat on a log."]}
    params = [
        SamplingParams(temperature=t, seed=5, max_tokens=40, structured_outputs=form)
        for t in (0, 1)
    ]
    guessing = {"method": "prompt_lookup", "num_speculative_tokens": 3, "adaptive": False}
    found = []
    for config in (None, guessing):
        with LLM(kernels="reference", speculative_config=config) as llm:
            outputs = llm.generate([f"{line} {line} {line} "] * 2, params, use_tqdm=False)
            found.append([(one.outputs[0].text, one.outputs[0].token_ids) for one in outputs])
            stats = llm.get_speculative_stats()
        assert {one.outputs[0].finish_reason for one in outputs} == {"stop"}
    assert found[0] == found[1] and {text for text, _ in found[0]} <= set(form["choice"])
    assert stats.num_accepted_tokens > 3
