"""Generated text on a terminal and in a pipe."""

from __future__ import annotations

import io

from pace_nb.cli.text_output import TextOutput


class Terminal(io.StringIO):
    def isatty(self):
        return True


def written(stream, *pieces):
    output = TextOutput(stream)
    for piece in pieces:
        output.write(piece)
    return stream.getvalue()


def test_a_terminal_never_sees_a_control_character():
    text = written(Terminal(), "a\x1b]0;title\x07b\x9b2J\x7f\r", "\n\tc")
    assert text == "a␛]0;title␇b�2J␡␍\n\tc"


def test_a_terminal_never_sees_text_turned_around():
    assert written(Terminal(), "a\u202eb\u2066c") == "a�b�c"


def test_a_pipe_gets_the_text_unchanged():
    assert written(io.StringIO(), "a\x1b[1m", "\u202e\r\n") == "a\x1b[1m\u202e\r\n"


def test_other_scripts_and_joiners_reach_the_terminal():
    text = "naïve 漢字 \U0001f469\u200d\U0001f52c"
    assert written(Terminal(), text) == text


def test_what_the_encoding_lacks_is_a_question_mark():
    raw = io.BytesIO()
    output = TextOutput(io.TextIOWrapper(raw, encoding="ascii"))
    output.write("na\u00efve")
    assert raw.getvalue() == b"na?ve"


def test_each_piece_is_flushed():
    raw = io.BytesIO()
    output = TextOutput(io.TextIOWrapper(raw, encoding="utf-8"))
    output.write("a")
    assert raw.getvalue() == b"a"


def test_end_line_adds_a_newline_only_where_one_is_missing():
    stream = io.StringIO()
    output = TextOutput(stream)
    output.end_line()
    output.write("a")
    output.end_line()
    output.write("b\n")
    output.end_line()
    assert stream.getvalue() == "a\nb\n"
