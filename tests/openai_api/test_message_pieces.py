from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pace_nb.openai_api.message_pieces import Message, Piece, Scanner, Trimmed, as_message, joined

MARKERS = ("<think>", "</think>", "[X]")
TEXTS = st.lists(st.sampled_from([*MARKERS, "<", "<th", "[", "a", " ", "\n"]), max_size=12)


def cuts(text, places):
    """The text cut at these places."""
    ends = sorted(place % (len(text) + 1) for place in places)
    return [text[a:b] for a, b in zip([0, *ends], [*ends, len(text)], strict=True)]


def scan(pieces):
    scanner, found = Scanner(), []
    for piece in pieces:
        scanner.push(piece)
        while True:
            before, marker = scanner.until(*MARKERS)
            found += [before, (marker,)] if marker else [before]
            if marker is None:
                break
    return [one for one in [*found, scanner.rest()] if one]


def as_one(found):
    """Neighbouring texts joined."""
    told = []
    for one in found:
        if told and isinstance(one, str) and isinstance(told[-1], str):
            told[-1] += one
        else:
            told.append(one)
    return told


@given(TEXTS, st.lists(st.integers(0, 200), max_size=8))
def test_a_scanner_finds_the_same_however_the_text_is_cut(parts, places):
    text = "".join(parts)
    found = as_one(scan(cuts(text, places)))
    assert found == as_one(scan([text]))
    assert "".join(one if isinstance(one, str) else one[0] for one in found) == text
    assert all(marker not in one for one in found if isinstance(one, str) for marker in MARKERS)


def test_a_scanner_holds_back_only_what_may_be_a_marker():
    scanner = Scanner()
    scanner.push("a < b <th")
    assert scanner.until(*MARKERS) == ("a < b ", None)
    scanner.push("e")
    assert scanner.until(*MARKERS) == ("<the", None)


@given(st.text(" \na", max_size=12), st.lists(st.integers(0, 50), max_size=5), st.booleans())
def test_trimmed_text(text, places, leading):
    trimmed = Trimmed(leading=leading)
    shown = "".join(map(trimmed.push, cuts(text, places)))
    assert shown == (text.strip() if leading else text.rstrip())
    assert shown + trimmed.end() == (text.lstrip() if leading else text)


def test_neighbours_are_joined_and_empty_ones_go():
    pieces = [
        Piece("content", "a"), Piece("content", ""), Piece("content", "b"),
        Piece("call", "f", 0), Piece("arguments", "{", 0), Piece("arguments", "}", 0),
        Piece("call", "g", 1), Piece("arguments", "{}", 1),
    ]  # fmt: skip
    assert joined(pieces) == [
        Piece("content", "ab"), Piece("call", "f", 0), Piece("arguments", "{}", 0),
        Piece("call", "g", 1), Piece("arguments", "{}", 1),
    ]  # fmt: skip
    assert as_message(pieces) == Message("", "ab", [("f", "{}"), ("g", "{}")])


@pytest.mark.parametrize("marker", MARKERS)
def test_a_marker_at_the_end_is_found_with_its_last_character(marker):
    scanner = Scanner()
    for character in marker[:-1]:
        scanner.push(character)
        assert scanner.until(*MARKERS) == ("", None)
    scanner.push(marker[-1])
    assert scanner.until(*MARKERS) == ("", marker)
