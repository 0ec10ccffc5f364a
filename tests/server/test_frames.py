"""Frames: what goes in comes out, however it is cut; what is no frame raises."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pace_nb.server import frames

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)
MESSAGES = st.lists(st.dictionaries(st.text(), VALUES), max_size=5)


@settings(max_examples=30, deadline=None)
@given(MESSAGES, st.lists(st.integers(1, 30)))
def test_messages_come_out_whole_and_in_order(messages, cuts):
    data = b"".join(map(frames.encode, messages))
    decoder, received = frames.Decoder(), []
    for cut in [*cuts, len(data)]:
        received += decoder.push(data[:cut])
        data = data[cut:]
    assert received == messages


def test_infinity_and_lone_surrogates_survive():
    message = {"logprob": float("-inf"), "text": "\ud800 \u2028 é"}
    (received,) = frames.Decoder().push(frames.encode(message))
    assert received == message


def test_what_is_no_frame_raises(monkeypatch):
    body = json.dumps([1]).encode()
    with pytest.raises(ValueError, match="expected an object"):
        list(frames.Decoder().push(len(body).to_bytes(4, "big") + body))
    with pytest.raises(ValueError, match="Expecting value"):
        list(frames.Decoder().push(b"\0\0\0\1x"))
    monkeypatch.setattr(frames, "MAX_FRAME", 100)
    with pytest.raises(ValueError, match="expected at most 100"):
        list(frames.Decoder().push(b"\xff\xff\xff\xff"))
    with pytest.raises(ValueError, match="expected at most 100"):
        frames.encode({"a": "b" * 100})


def test_what_came_before_a_damaged_frame_is_given_out():
    decoder = frames.Decoder()
    received = decoder.push(frames.encode({"a": 1}) + b"\0\0\0\1x")
    assert next(received) == {"a": 1}
    with pytest.raises(ValueError, match="Expecting value"):
        next(received)
