"""Tool calls as models write them, whole, in pieces, and wrong."""

from __future__ import annotations

import json
import time
from dataclasses import replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pace_nb.openai_api.message_pieces import Message, as_message, joined
from pace_nb.openai_api.tool_calls import (
    HermesReader,
    Llama3JsonReader,
    MistralReader,
    NamedReader,
    RequiredReader,
)

READERS = {
    "hermes": HermesReader,
    "llama3_json": Llama3JsonReader,
    "mistral": MistralReader,
    "named": lambda: NamedReader("f"),
    "required": RequiredReader,
}
WEATHER = '{"city": "Berlin", "days": [1, 2], "note": "a \\"}\\" b"}'


def read(name, *texts):
    reader = READERS[name]()
    return as_message([piece for text in texts for piece in reader.push(text)] + reader.finish())


@pytest.mark.parametrize(
    ("name", "text", "content", "calls"),
    [
        # One call, and several; text around them.
        ("hermes", f'<tool_call>\n{{"name": "weather", "arguments": {WEATHER}}}\n</tool_call>',
         "", [("weather", WEATHER)]),
        ("hermes", 'Let me see.\n\n<tool_call>{"name":"f","arguments":{}}</tool_call>\n'
         '<tool_call>{"arguments": {"a": 1}, "name": "g"}</tool_call>\n',
         "Let me see.", [("f", "{}"), ("g", '{"a": 1}')]),
        ("hermes", '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>',
         "", [("f", '{"a": 1}')]),
        ("hermes", '<tool_call>{"name": "f"}</tool_call> done', "done", [("f", "{}")]),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "x\ny"}}</tool_call>',
         "", [("f", '{"a": "x\ny"}')]),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1', "", [("f", '{"a": 1')]),
        # No calls: as it was written.
        ("hermes", "Just text, 1 < 2.\n", "Just text, 1 < 2.\n", []),
        ("hermes", "<tool_call>nothing</tool_call> so", "<tool_call>nothing</tool_call> so", []),
        ("hermes", '<tool_call>{"name": 1}</tool_call>', '<tool_call>{"name": 1}</tool_call>', []),
        ("hermes", '<tool_call>{"name": "f"', '<tool_call>{"name": "f"', []),
        ("hermes", "a <tool_call>", "a <tool_call>", []),
        ("llama3_json", f'{{"name": "weather", "parameters": {WEATHER}}}', "",
         [("weather", WEATHER)]),
        ("llama3_json", '<|python_tag|>{"name": "f", "parameters": {}}; '
         '{"type": "function", "name": "g", "parameters": {"a": "ä"}}',
         "", [("f", "{}"), ("g", '{"a": "ä"}')]),
        ("llama3_json", "Hello {you}", "Hello {you}", []),
        ("llama3_json", '{"answer": 42}', '{"answer": 42}', []),
        ("llama3_json", '{"name": "Bob", "age": 4}', '{"name": "Bob", "age": 4}', []),
        ("llama3_json", "[1, 2]", "[1, 2]", []),
        ("llama3_json", "[ ]", "[ ]", []),
        ("llama3_json", " {", " {", []),
        ("mistral", f'[TOOL_CALLS] [{{"name": "weather", "arguments": {WEATHER}}}]', "",
         [("weather", WEATHER)]),
        ("mistral", 'Yes. [TOOL_CALLS][{"name": "f", "arguments": {}}, {"name": "g", '
         '"arguments": {"a": 1}}]', "Yes.", [("f", "{}"), ("g", '{"a": 1}')]),
        ("mistral", f"[TOOL_CALLS]weather[ARGS]{WEATHER}", "", [("weather", WEATHER)]),
        ("mistral", 'a\n[TOOL_CALLS]f{"x": {}}[TOOL_CALLS]g[CALL_ID]abcdefghi[ARGS]{}\n', "a",
         [("f", '{"x": {}}'), ("g", "{}")]),
        ("mistral", "[TOOL_CALLS]no arguments", "[TOOL_CALLS]no arguments", []),
        ("mistral", "[TOOL_CALLS] {}", "[TOOL_CALLS] {}", []),
        ("mistral", "[TOOL_CALLS]", "[TOOL_CALLS]", []),
        ("mistral", "[TOOL_CALLS]f{", "", [("f", "{")]),
        ("named", '{"a": 1}', "", [("f", '{"a": 1}')]),
        ("required", '[{"name": "f", "parameters": {"a": 1}}, {"name": "g", "parameters": {}}]',
         "", [("f", '{"a": 1}'), ("g", "{}")]),
        # Cut off by max_tokens: no part of a call is content.
        ("required", '[{"name": "f", "parameters": {"a": 1}}, {"name": "g", "par',
         "", [("f", '{"a": 1}')]),
        ("required", '[{"name": "f", "parameters": {"a"', "", [("f", '{"a"')]),
        ("required", '[{"name": "f', "", []),
        ("required", "[ ", "", []),
        ("required", "no [call]", "no [call]", []),
    ],
)  # fmt: skip
def test_messages(name, text, content, calls):
    expected = Message("", content, calls)
    assert read(name, text) == expected
    assert read(name, *text) == expected  # character by character


def test_arguments_come_while_they_are_written():
    reader = HermesReader()
    assert joined(reader.push('<tool_call>{"name": "f", "argu')) == []
    call, arguments = joined(reader.push('ments": {"code": "pri'))
    assert (call.kind, call.text) == ("call", "f")
    assert (arguments.kind, arguments.text) == ("arguments", '{"code": "pri')
    (more,) = joined(reader.push('nt(1)"'))
    assert more.text == 'nt(1)"'
    assert joined(reader.push("}}</tool_ca")) == [replace(more, text="}")]
    assert joined(reader.push("ll>") + reader.finish()) == []


def test_names_and_arguments_can_always_be_sent():
    message = read("hermes", '<tool_call>{"arguments": {"a": "\\ud800"}, "name": "\\ud800"}')
    for name, arguments in message.calls:
        assert (name + arguments).encode()
        assert json.loads(arguments) == {"a": "\ud800"}
    deep = '<tool_call>{"arguments": ' + "[" * 100_000
    assert read("hermes", deep).content == deep


PARTS = [
    "<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "{",
    "}", "[", "]", '"', "\\", ":", ",", ";", " ", "\n", "f", '"name"', '"arguments"', "1", "é",
    '{"name": "f", "arguments": {', '{"name": "g", "parameters": {}}', '{"a": "}"}', "<", "[TOOL",
    "x" * 300,
]  # fmt: skip


@pytest.mark.parametrize("name", READERS)
@given(
    parts=st.lists(st.sampled_from(PARTS), max_size=14),
    places=st.lists(st.integers(0, 400), max_size=10),
)
@example(parts=["[TOOL_CALLS]", "x" * 300, "[TOOL_CALLS]", "f", "{", "}"], places=[100, 330])
def test_any_cut_gives_the_same_message_and_nothing_raises(name, parts, places):
    text = "".join(parts)
    ends = sorted(place % (len(text) + 1) for place in places)
    pieces = [text[a:b] for a, b in zip([0, *ends], [*ends, len(text)], strict=True)]
    whole = read(name, text)
    assert read(name, *pieces) == whole
    assert read(name, *text) == whole
    if not whole.calls and (whole.content or name != "required"):  # nothing is lost
        assert whole.content == text


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize(
    "text",
    ["{" * 100_000, '"\\' * 50_000, " " * 100_000, '{"name": "' + "\\" * 100_000, "<" * 100_000,
     "[TOOL_CALLS]" * 8000, '<tool_call>{"name": "f", "arguments": {' + "[{" * 50_000],
)  # fmt: skip
def test_S24_long_and_odd_texts_take_little_time(name, text):
    start = time.process_time()
    read(name, text)
    assert time.process_time() - start < 2.0
