"""Special tokens in messages: found the way the tokenizer would, hidden, and shown as text."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from pace_nb.disguise import Disguise, Piece, SpecialTokenFinder
from pace_nb.errors import InvalidRequestError

FINDER = SpecialTokenFinder([AddedToken(t, special=True) for t in ("<a>", "<b>", "b>c", "|")])


def test_special_tokens_are_found_in_order() -> None:
    assert FINDER.find("x<a>☕<b><a>") == [(1, 4), (5, 8), (8, 11)]
    assert FINDER.find("nothing < a >") == []
    assert SpecialTokenFinder([]).find("<a>") == []


def test_literals_are_replaced_everywhere_and_come_back() -> None:
    disguise = Disguise(FINDER)
    value = [{"content": "x<a>y", "<b>": [{"deep": ("<a>", 1, None, True)}]}]
    hidden = disguise.hide(value)
    assert "<a>" not in repr(hidden)
    assert "<b>" not in repr(hidden)
    assert value[0]["content"] == "x<a>y"  # the caller's own is as it was
    assert len(hidden[0]["content"]) == 3
    assert disguise.reveal(hidden[0]["content"]) == "x<a>y"
    assert hidden[0][next(k for k in hidden[0] if k != "content")][0]["deep"][1:] == [1, None, True]


def test_a_mark_is_no_character_of_the_messages() -> None:
    """Private-use characters in a message mean what they are."""
    disguise = Disguise(FINDER)
    text = "\U0010fffd<a>\U0010fffc"
    hidden = disguise.hide(text)
    assert hidden[0] == "\U0010fffd"
    assert hidden[1] not in text
    assert disguise.reveal(hidden) == text


def test_text_is_cut_beside_the_templates_tokens_and_inside_literals() -> None:
    disguise = Disguise(FINDER)
    hidden = disguise.hide("say <b>!")
    assert disguise.split(f"<a>one<b><a>{hidden}<b>two") == [
        Piece("<a>one<b><a>", False),
        Piece("say <", True),
        Piece("b>!", True),
        Piece("<b>two", False),
    ]


def test_a_cut_makes_no_new_special_token() -> None:
    """Inside `<b>c` hides `b>c`, which a cut after `<` would bring out."""
    pieces = FINDER.pieces_without("<b>c")
    assert pieces == ["<", "b", ">c"]


def test_without_literals_there_is_one_piece() -> None:
    disguise = Disguise(FINDER)
    messages = [{"content": "plain"}]
    assert disguise.hide(messages) is messages
    assert disguise.split("<a>plain<b>") == [Piece("<a>plain<b>", False)]


def test_deep_values_are_refused() -> None:
    value: object = "x"
    for _ in range(100_000):
        value = [value]
    with pytest.raises(InvalidRequestError, match="too deep"):
        Disguise(FINDER).hide(value)
    while isinstance(value, list):  # else freeing it may recurse as deep
        value = value.pop()


@settings(deadline=None)
@given(st.lists(st.sampled_from(["<a>", "<b>", "<", "a", ">", "b", "c", "é", " "]), max_size=12))
def test_pieces_add_up_and_hold_no_special_token(parts: list[str]) -> None:
    text = "".join(parts)
    disguise = Disguise(FINDER)
    rendered = f"<a>{disguise.hide(text)}<b>"
    pieces = disguise.split(rendered)
    assert "".join(piece.text for piece in pieces) == f"<a>{text}<b>"
    for piece in pieces:
        if piece.is_literal:
            assert not [s for s in FINDER.find(piece.text) if s[1] - s[0] > 1]
