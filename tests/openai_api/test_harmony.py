from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pace_nb.openai_api.harmony import HarmonyReader
from pace_nb.openai_api.message_pieces import Message, as_message

PARTS = [
    "<|channel|>", "<|message|>", "<|start|>", "<|end|>", "<|return|>", "<|call|>",
    "<|constrain|>", "assistant", "analysis", "final", "commentary", " to=functions.f ", "json",
    "<|", "<", "a", " ", "\n", '{"a": 1}',
]  # fmt: skip


def read(texts):
    reader = HarmonyReader()
    return as_message([piece for text in texts for piece in reader.push(text)] + reader.finish())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<|channel|>analysis<|message|>Two and two.<|end|><|start|>assistant<|channel|>final"
         "<|message|>Four.", Message("Two and two.", "Four.", [])),
        ("<|channel|>final<|message|>Four.<|return|>", Message("", "Four.", [])),
        ("<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary "
         'to=functions.weather <|constrain|>json<|message|>{"city": "Rome"}<|call|>',
         Message("Hm.", "", [("weather", '{"city": "Rome"}')])),
        (" to=functions.weather<|channel|>commentary json<|message|>{}",
         Message("", "", [("weather", "{}")])),
        ("<|channel|>commentary<|message|>I look.<|end|><|start|>assistant<|channel|>commentary "
         "to=functions.f<|message|>{}<|call|><|start|>assistant to=functions.g<|channel|>commentary"
         '<|message|>{"a": 1}', Message("", "I look.", [("f", "{}"), ("g", '{"a": 1}')])),
        ("<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>analysis<|message|>b",
         Message("a\nb", "", [])),
        ("<|channel|>analysis<|message|>a<|channel|>final<|message|>b", Message("a", "b", [])),
        ("no channel at all", Message("", "no channel at all", [])),
        ("<|channel|>fin", Message("", "", [])),
    ],
)  # fmt: skip
def test_messages(text, expected):
    assert read([text]) == expected
    assert read(text) == expected  # character by character


@given(st.lists(st.sampled_from(PARTS), max_size=16), st.lists(st.integers(0, 200), max_size=8))
def test_any_cut_gives_the_same_message_and_nothing_raises(parts, places):
    text = "".join(parts)
    ends = sorted(place % (len(text) + 1) for place in places)
    pieces = [text[a:b] for a, b in zip([0, *ends], [*ends, len(text)], strict=True)]
    assert read(pieces) == read([text]) == read(text)
