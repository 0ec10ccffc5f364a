from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pace_nb.openai_api.message_pieces import as_message
from pace_nb.openai_api.reasoning import ThinkReader


def read(texts, prompt="", always=False):
    reader = ThinkReader(prompt, always=always)
    message = as_message([p for text in texts for p in reader.push(text)] + reader.finish())
    return message.reasoning, message.content


@pytest.mark.parametrize(
    ("prompt", "always", "text", "expected"),
    [
        ("", False, "<think>\nWell.\n</think>\n\nFour.", ("Well.", "Four.")),
        ("", False, "\n<think>Well.</think>Four.\n", ("Well.", "Four.\n")),
        ("", False, "  Four < five.\n", ("", "  Four < five.\n")),
        ("", False, "No <think>x</think>", ("", "No <think>x</think>")),
        ("", False, "<think>cut off", ("cut off", "")),
        ("", False, "<thin", ("", "<thin")),
        ("u<think>\n", False, "Well.\n</think>\n\nFour.", ("Well.", "Four.")),
        ("u<think>\n", False, "<think>Well.</think>Four.", ("Well.", "Four.")),
        ("<think>\n\n</think>\n\n", False, "Four.", ("", "Four.")),
        ("<think>\n\n</think>\n\n", True, "Four.", ("", "Four.")),
        ("", True, "Well.</think>Four.", ("Well.", "Four.")),
        ("", True, "<think>Well.</think>Four.", ("Well.", "Four.")),
        ("", True, "all of it", ("all of it", "")),
        ("", False, "<think></think>", ("", "")),
    ],
)
def test_messages(prompt, always, text, expected):
    assert read([text], prompt, always) == expected
    assert read(text, prompt, always) == expected  # character by character


@given(
    st.lists(st.sampled_from(["<think>", "</think>", "<", "</", "a", " ", "\n"]), max_size=12),
    st.sampled_from(["", "<think>\n", "</think>\n"]),
    st.booleans(),
    st.lists(st.integers(0, 100), max_size=6),
)
def test_any_cut_gives_the_same_message(parts, prompt, always, places):
    text = "".join(parts)
    ends = sorted(place % (len(text) + 1) for place in places)
    pieces = [text[a:b] for a, b in zip([0, *ends], [*ends, len(text)], strict=True)]
    assert read(pieces, prompt, always) == read([text], prompt, always)
