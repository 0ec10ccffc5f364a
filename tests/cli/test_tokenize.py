"""`pace-nb tokenize` with the bundled model's tokenizer."""

from __future__ import annotations

import json

import pytest

from pace_nb.cli.main import main
from pace_nb.cli.tokenize import shown
from pace_nb.models.hub import DEMO_MODEL
from pace_nb.tokenizer import Tokenizer

TEXT = "Once upon a time, naïve 漢"


def output_of(capsys, *arguments):
    assert main(["tokenize", *arguments]) == 0
    return capsys.readouterr().out


def test_ids_are_the_tokenizer_s(capsys):
    tokenizer = Tokenizer.from_directory(DEMO_MODEL)
    assert json.loads(output_of(capsys, TEXT, "--ids")) == tokenizer.encode(TEXT)
    bare = json.loads(output_of(capsys, TEXT, "--ids", "--no-special-tokens"))
    assert bare == tokenizer.encode(TEXT, add_special_tokens=False)
    assert output_of(capsys, TEXT, "--count") == f"{len(tokenizer.encode(TEXT))}\n"


def test_a_line_per_token_that_spells_the_text(capsys):
    lines = output_of(capsys, TEXT, "--no-bos").splitlines()
    data = b""
    for line in lines:
        piece = line.split(maxsplit=1)[1]
        if piece.startswith('"'):
            data += json.loads(piece).encode()
        else:
            data += bytes(int(byte, 16) for byte in piece.split())
    assert data.decode() == TEXT


@pytest.mark.parametrize(
    ("token", "text"),
    [(b" a", '" a"'), (b"\n", '"\\n"'), ("漢".encode(), '"漢"'), (b"\xe6\xbc", "0xE6 0xBC")],
)
def test_a_token_is_shown_in_quotes_or_as_bytes(token, text):
    assert shown(token) == text
