"""Special tokens that a message writes out, kept from becoming the tokens.

`<|im_end|>` inside a user's message must not end his turn and begin another's (CVE-2026-44222). So
before a template is rendered each such literal is replaced by one private-use character, and
afterwards those stretches of the text are cut in pieces that hold no special token.

Knows messages as JSON values and the spelling of special tokens; not templates, not ids.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend
from tokenizers.models import WordLevel

from pace_nb.errors import InvalidRequestError


class SpecialTokenFinder:
    """Where special tokens are written out in a text, in one linear pass.

    It is a tokenizer that knows nothing else: the library's automaton finds them the way it will
    when the text is encoded.
    """

    def __init__(self, tokens: Sequence[AddedToken]) -> None:
        self._backend: Backend | None = None
        if tokens:
            self._backend = Backend(WordLevel({"": 0}, unk_token=""))  # everything else is id 0
            self._backend.add_special_tokens(list(tokens))

    def find(self, text: str) -> list[tuple[int, int]]:
        """Begin and end (in characters) of each, in order. InvalidRequestError: lone surrogates."""
        if self._backend is None:
            return []
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequestError(
                f"a message has a lone surrogate at character {error.start}, expected Unicode text"
            ) from None
        found = self._backend.encode(text, add_special_tokens=False)
        return [span for i, span in zip(found.ids, found.offsets, strict=True) if i != 0]

    def pieces_without(self, text: str) -> list[str]:
        """`text` cut so that no piece holds a special token (one of a single character stays)."""
        pieces = []
        while spans := [span for span in self.find(text) if span[1] - span[0] > 1]:
            cut = spans[0][0] + 1
            pieces.append(text[:cut])
            text = text[cut:]
        return [*pieces, text]


class Piece(NamedTuple):
    """A stretch of text: as the template wrote it, or with the literals of messages in it."""

    text: str
    is_literal: bool


class Disguise:
    """One conversation's literals and the private-use characters that stand for them."""

    def __init__(self, finder: SpecialTokenFinder) -> None:
        self._finder = finder
        self._literals: dict[str, str] = {}  # private-use character -> special token
        self._marks: dict[str, str] = {}  # the other way round

    def hide(self, value: Any) -> Any:
        """A copy of messages (or other JSON) with the literals in its strings replaced.

        Raises:
            InvalidRequestError: values nest too deep, or no private-use character is left.
        """
        try:
            texts = list(_texts(value))
            self._choose_marks(texts)
            return self._hide(value) if self._literals else value
        except RecursionError:
            raise InvalidRequestError("the messages nest too deep") from None

    def reveal(self, text: str) -> str:
        """Rendered text with the literals in their places."""
        for mark, literal in self._literals.items():
            text = text.replace(mark, literal)
        return text

    def split(self, text: str) -> list[Piece]:
        """Rendered text in pieces to encode by themselves; with the literals in their places.

        Without literals that is one piece. Cuts are beside special tokens, where no merge of the
        tokenizer reaches across, or inside literals.
        """
        if not self._literals:
            return [Piece(text, False)]
        pieces: list[Piece] = []
        begin = end_of_token = 0  # of what the template wrote; of the last special token
        for start, end in [*self._finder.find(text), (len(text), len(text))]:
            between = text[end_of_token:start]
            if any(mark in between for mark in self._literals):
                pieces.append(Piece(text[begin:end_of_token], False))
                revealed = self.reveal(between)
                pieces += [Piece(p, True) for p in self._finder.pieces_without(revealed)]
                begin = start
            end_of_token = end
        pieces.append(Piece(text[begin:], False))
        return [piece for piece in pieces if piece.text]

    def _choose_marks(self, texts: Sequence[str]) -> None:
        taken = {c for text in texts for c in text if c >= "\U000f0000"} | set(self._literals)
        free = (c for c in map(chr, range(0x10FFFD, 0xEFFFF, -1)) if c not in taken)
        for text in texts:
            for start, end in self._finder.find(text):
                literal = text[start:end]
                if literal not in self._marks:
                    mark = next(free, None)
                    if mark is None:
                        raise InvalidRequestError("the messages use every private-use character")
                    self._marks[literal], self._literals[mark] = mark, literal

    def _hide(self, value: Any) -> Any:
        if isinstance(value, str):
            hidden, end = [], 0
            for start, stop in self._finder.find(value):
                hidden += [value[end:start], self._marks[value[start:stop]]]
                end = stop
            return "".join([*hidden, value[end:]])
        if isinstance(value, Mapping):
            return {self._hide(key): self._hide(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._hide(item) for item in value]
        return value


def _texts(value: Any) -> Iterator[str]:
    """Every string in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _texts(key)
            yield from _texts(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _texts(item)
