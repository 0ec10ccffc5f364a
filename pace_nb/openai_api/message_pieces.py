"""`Piece`, what a model's text is made of for a chat's client, and what cuts text into them.

Knows text that comes in parts, cut anywhere, and markers in it. A reader (`MessageReader`) is given
the text as it comes and yields pieces, empty ones too; how the text was cut makes no difference to
what they say when those of one kind are joined. Does not know any model's format: reasoning.py,
harmony.py and tool_calls.py do.

No reader raises, whatever a model writes: what is no call, though it began as one, is content.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, Protocol

Kind = Literal["content", "reasoning", "call", "arguments"]


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a message. text of a "call": the function's name; index: which call it is."""

    kind: Kind
    text: str
    index: int = 0


class MessageReader(Protocol):
    """Reads one message. `finish` is called once, when no more text will come."""

    def push(self, text: str) -> list[Piece]:
        """What has become certain with this text."""
        ...

    def finish(self) -> list[Piece]:
        """What was held back."""
        ...


class PlainReader:
    """All text is content."""

    def push(self, text: str) -> list[Piece]:
        return [Piece("content", text)] if text else []

    def finish(self) -> list[Piece]:
        return []


class Scanner:
    """Text as it comes, cut at markers.

    No marker may be found inside another one of those that are looked for together: then the first
    that is complete is the first that began, however the text comes.
    """

    def __init__(self) -> None:
        self.held = ""

    def push(self, text: str) -> None:
        """Add text."""
        self.held += text

    def until(self, *markers: str) -> tuple[str, str | None]:
        """The text before the first marker, and that marker, both taken; without any marker (None)
        the text that cannot be part of one."""
        found = [(start, one) for one in markers if (start := self.held.find(one)) >= 0]
        if found:
            start, marker = min(found)
            before, self.held = self.held[:start], self.held[start + len(marker) :]
            return before, marker
        kept = max(map(self._beginning, markers))
        end = len(self.held) - kept
        before, self.held = self.held[:end], self.held[end:]
        return before, None

    def rest(self) -> str:
        """All that is held, taken."""
        rest, self.held = self.held, ""
        return rest

    def _beginning(self, marker: str) -> int:
        """How many of the last characters may be the beginning of a marker."""
        for length in range(min(len(marker) - 1, len(self.held)), 0, -1):
            if marker.startswith(self.held[-length:]):
                return length
        return 0


class Trimmed:
    """Text without the white space at its beginning, and at its end where that is wanted.

    leading: whether white space at the beginning is dropped.
    """

    def __init__(self, *, leading: bool = True) -> None:
        self._leading = leading
        self._space: list[str] = []

    def push(self, text: str) -> str:
        """The text up to the last character that is no white space."""
        if self._leading:
            text = text.lstrip()
            self._leading = not text
        body = text.rstrip()
        if not body:
            self._space.append(text)
            return ""
        shown = "".join(self._space) + body
        self._space = [text[len(body) :]]
        return shown

    def end(self) -> str:
        """The white space at the end, for who wants it."""
        space = "".join(self._space)
        self._space = []
        return space


def joined(pieces: Iterable[Piece]) -> list[Piece]:
    """The same without empty ones, neighbours of one kind as one."""
    told: list[Piece] = []
    for piece in pieces:
        if not piece.text and piece.kind != "call":
            continue
        last = told[-1] if told else None
        same = last is not None and (last.kind, last.index) == (piece.kind, piece.index)
        if last is not None and same and piece.kind != "call":
            told[-1] = replace(last, text=last.text + piece.text)
        else:
            told.append(piece)
    return told


class Message(NamedTuple):
    """A whole message. reasoning, content: "" where there is none; calls: (name, arguments)."""

    reasoning: str
    content: str
    calls: list[tuple[str, str]]


def as_message(pieces: Sequence[Piece]) -> Message:
    """The message that pieces make."""
    calls: dict[int, list[str]] = {}
    for piece in pieces:
        if piece.kind == "call":
            calls[piece.index] = [piece.text, ""]
        elif piece.kind == "arguments":
            calls[piece.index][1] += piece.text
    return Message(
        "".join(piece.text for piece in pieces if piece.kind == "reasoning"),
        "".join(piece.text for piece in pieces if piece.kind == "content"),
        [(name, arguments) for name, arguments in calls.values()],
    )
