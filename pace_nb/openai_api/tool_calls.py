"""Readers of tool calls, one for each way in which models write them.

    hermes       <tool_call>{"name": "f", "arguments": {...}}</tool_call>        Hermes, Qwen
    llama3_json  {"name": "f", "parameters": {...}}; {...}                       Llama 3.1 and on
    mistral      [TOOL_CALLS][{"name": "f", "arguments": {...}}, ...]            older
                 [TOOL_CALLS]f[ARGS]{...}  or  [TOOL_CALLS]f{...}                newer

and of the two forms that a grammar forces (request_body.py): the arguments of one named function,
and an array of calls. Knows text and JSON, as text: nothing that a model writes is ever evaluated.

Arguments are told as they come where the name came before them, character by character as the
model wrote them, so they are valid JSON if that was. A call that is written in another order is
told when it is complete. What begins as a call and is none becomes content, as it was written.
White space between content and calls is dropped.

Source: vLLM `vllm/tool_parsers/` (hermes, llama3_json, mistral), by their formats.
"""

from __future__ import annotations

import json
import re
from typing import Final

from pace_nb.openai_api.message_pieces import Piece, Scanner, Trimmed

HERMES_OPEN: Final = "<tool_call>"
HERMES_CLOSE: Final = "</tool_call>"
PYTHON_TAG: Final = "<|python_tag|>"
MISTRAL_CALLS: Final = "[TOOL_CALLS]"
MAX_NAME: Final = 256
SEPARATORS: Final = frozenset(" \t\r\n[],;")
# Everything before the arguments, where the name comes first. Its parts exclude each other, so no
# text makes it try twice.
_HEAD: Final = re.compile(
    r'\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*\{', re.DOTALL
)
# Where the depth of JSON, or whether it is inside a string, may change.
_TURN: Final = re.compile(r'[{}\[\]"\\]')


class _Json:
    """Follows one JSON object or array to its end."""

    def __init__(self) -> None:
        self.depth = 0
        self._in_string = False
        self._escaped = False

    def turn(self, text: str, start: int) -> int:
        """The place after the next character at which the depth changes, from `start` on;
        len(text) where there is none."""
        position = start
        while position < len(text):
            if self._escaped:
                self._escaped = False
                position += 1
                continue
            found = _TURN.search(text, position)
            if found is None:
                return len(text)
            position = found.end()
            character = found.group()
            if self._in_string:
                if character == '"':
                    self._in_string = False
                elif character == "\\":
                    self._escaped = True
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self.depth += 1
                return position
            elif character in "}]":
                self.depth -= 1
                return position
        return position


class _Object:
    """One call as JSON, from its `{`.

    Attributes:
        done: The object is complete.
        failed: It is no call; `raw` is what was written.
    """

    def __init__(self, index: int, needs_arguments: bool) -> None:
        self.done = self.failed = False
        self._index = index
        self._needs_arguments = needs_arguments
        self._json = _Json()
        self._raw: list[str] = []  # until the call is told
        self._head_seen = False
        self._telling = False  # arguments go out as they come
        self._told = False

    @property
    def raw(self) -> str:
        return "".join(self._raw)

    def push(self, text: str) -> tuple[list[Piece], str]:
        """What became certain, and the text after the object's end."""
        pieces: list[Piece] = []
        told: list[str] = []  # of the arguments
        position = 0
        while position < len(text) and not self.done:
            depth = self._json.depth
            end = self._json.turn(text, position)
            part, position = text[position:end], end
            if self._telling:
                told.append(part)
                self._telling = self._json.depth > 1
            elif not self._told:
                self._raw.append(part)
                if depth == 1 and self._json.depth == 2 and not self._head_seen:
                    self._head_seen = True
                    pieces += self._begin()
            self.done = self._json.depth <= 0
        if told:
            pieces.append(Piece("arguments", "".join(told), self._index))
        if self.done and not self._told:
            pieces += self._all_at_once()
        return pieces, text[position:]

    def _begin(self) -> list[Piece]:
        """The arguments' own `{` was read: tell the call, if the name came before."""
        found = _HEAD.fullmatch(self.raw)
        name = None if found is None else _name(_loaded(found[1]))
        if name is None:
            return []
        self._telling = self._told = True
        return [Piece("call", name, self._index), Piece("arguments", "{", self._index)]

    def _all_at_once(self) -> list[Piece]:
        found = _loaded(self.raw)
        name = _name(found.get("name")) if isinstance(found, dict) else None
        if name is None or not isinstance(found, dict):
            self.failed = True
            return []
        arguments = found.get("arguments", found.get("parameters"))
        if arguments is None and not self._needs_arguments:
            arguments = {}
        if isinstance(arguments, dict):
            arguments = _dumped(arguments)
        if not isinstance(arguments, str):
            self.failed = True
            return []
        self._told = True
        return [Piece("call", name, self._index), Piece("arguments", arguments, self._index)]

    @property
    def told(self) -> bool:
        """The call has been told, at least its name."""
        return self._told


class _Calls:
    """Calls one after the other, in an array or not; from the first thing that is none, content.

    first: the index of the first. before: the text that stands before them, which is content where
    no call follows.
    """

    def __init__(self, first: int, before: str = "", needs_arguments: bool = False) -> None:
        self.num_calls = self._first = first
        self.failed = False
        self._needs_arguments = needs_arguments
        self._skipped = [before]  # since the last call
        self._object: _Object | None = None

    def push(self, text: str) -> list[Piece]:
        pieces: list[Piece] = []
        while text:
            if self.failed:
                pieces.append(Piece("content", text))
                break
            if self._object is None:
                start = next((i for i, c in enumerate(text) if c not in SEPARATORS), len(text))
                self._skipped.append(text[:start])
                text = text[start:]
                if not text:
                    break
                if text[0] != "{":
                    pieces += self._fail("")
                    continue
                self._object = _Object(self.num_calls, self._needs_arguments)
            found, text = self._object.push(text)
            pieces += found
            if self._object.done:
                one, self._object = self._object, None
                if one.failed:
                    pieces += self._fail(one.raw)
                else:
                    self.num_calls += 1
                    self._skipped = []
        return pieces

    def finish(self) -> list[Piece]:
        one, self._object = self._object, None
        if one is not None:
            if one.told:  # cut off in the middle of its arguments
                self.num_calls += 1
                return []
            return self._fail(one.raw)
        if not self.failed and self.num_calls == self._first:  # nothing came
            return self._fail("")
        return []

    def _fail(self, raw: str) -> list[Piece]:
        self.failed = True
        skipped, self._skipped = "".join(self._skipped), []
        return [Piece("content", skipped + raw)] if skipped + raw else []


class HermesReader:
    """Calls between `<tool_call>` and `</tool_call>`, which ends one wherever it stands."""

    def __init__(self) -> None:
        self._scanner = Scanner()
        self._content = Trimmed(leading=False)
        self._calls: _Calls | None = None
        self._num_calls = 0

    def push(self, text: str) -> list[Piece]:
        self._scanner.push(text)
        pieces: list[Piece] = []
        while True:
            if self._calls is None:
                before, marker = self._scanner.until(HERMES_OPEN)
                pieces.append(Piece("content", self._content.push(before)))
                if marker is None:
                    return pieces
                self._calls = _Calls(self._num_calls, HERMES_OPEN)
            else:
                before, marker = self._scanner.until(HERMES_CLOSE)
                pieces += _placed(self._content, self._calls.push(before))
                if marker is None:
                    return pieces
                pieces += self._end(HERMES_CLOSE)

    def finish(self) -> list[Piece]:
        rest = self._scanner.rest()
        if self._calls is None:
            pieces = [Piece("content", self._content.push(rest))]
        else:
            pieces = _placed(self._content, self._calls.push(rest)) + self._end("")
        if not self._num_calls:  # after a call white space stands for nothing
            pieces.append(Piece("content", self._content.end()))
        return pieces

    def _end(self, close: str) -> list[Piece]:
        """The end of a call; `close` is part of the content where it was none."""
        if self._calls is None:
            return []
        pieces = _placed(self._content, self._calls.finish())
        if self._calls.failed:
            pieces += _placed(self._content, [Piece("content", close)])
        elif self._calls.num_calls > self._num_calls:
            self._content = Trimmed()  # what follows a call begins without white space
        self._num_calls = self._calls.num_calls
        self._calls = None
        return pieces


class Llama3JsonReader:
    """A message that is nothing but calls, or calls after `<|python_tag|>`."""

    def __init__(self) -> None:
        self._scanner = Scanner()
        self._content = Trimmed(leading=False)
        self._calls: _Calls | None = None
        self._begun = False

    def push(self, text: str) -> list[Piece]:
        self._scanner.push(text)
        if self._calls is None and not self._begun:
            held = self._scanner.held
            rest = held.lstrip()
            if not rest:
                return []
            self._begun = True
            if rest[0] in "{[":
                self._calls = _Calls(0, held[: len(held) - len(rest)], needs_arguments=True)
                self._scanner.held = rest
        pieces: list[Piece] = []
        if self._calls is None:
            before, marker = self._scanner.until(PYTHON_TAG)
            pieces.append(Piece("content", self._content.push(before)))
            if marker is None:
                return pieces
            self._calls = _Calls(0, PYTHON_TAG, needs_arguments=True)
        return pieces + _placed(self._content, self._calls.push(self._scanner.rest()))

    def finish(self) -> list[Piece]:
        if self._calls is None:
            pieces = [Piece("content", self._content.push(self._scanner.rest()))]
        else:
            pieces = _placed(self._content, self._calls.finish())
        if self._calls is None or not self._calls.num_calls:
            pieces.append(Piece("content", self._content.end()))
        return pieces


class MistralReader:
    """Calls after `[TOOL_CALLS]`, as an array or as a name with its arguments."""

    def __init__(self) -> None:
        self._scanner = Scanner()
        self._content = Trimmed(leading=False)
        self._state = self._in_content
        self._calls = _Calls(0)
        self._arguments = _Json()
        self._num_calls = 0

    def push(self, text: str) -> list[Piece]:
        self._scanner.push(text)
        pieces: list[Piece] = []
        while True:
            found, goes_on = self._state()
            pieces += found
            if not goes_on:
                return pieces

    def finish(self) -> list[Piece]:
        pieces: list[Piece] = []
        if self._state == self._in_array:
            pieces = self._in_array()[0] + _placed(self._content, self._calls.finish())
            self._num_calls = self._calls.num_calls
        elif self._state != self._in_arguments:
            rest = self._scanner.rest()
            if self._state != self._in_content:
                rest = MISTRAL_CALLS + rest
            pieces = [Piece("content", self._content.push(rest))]
        if not self._num_calls:  # after a call white space stands for nothing
            pieces.append(Piece("content", self._content.end()))
        return pieces

    def _in_content(self) -> tuple[list[Piece], bool]:
        before, marker = self._scanner.until(MISTRAL_CALLS)
        if marker is not None:
            self._state = self._after_marker
        return [Piece("content", self._content.push(before))], marker is not None

    def _after_marker(self) -> tuple[list[Piece], bool]:
        """What comes first tells the two forms apart."""
        first = self._scanner.held.lstrip()[:1]
        if not first:
            return [], False
        if first in "[{":
            self._calls = _Calls(self._num_calls, MISTRAL_CALLS)
            self._state = self._in_array
        else:
            self._state = self._in_name
        return [], True

    def _in_array(self) -> tuple[list[Piece], bool]:
        return _placed(self._content, self._calls.push(self._scanner.rest())), False

    def _in_name(self) -> tuple[list[Piece], bool]:
        """Up to the `{` of the arguments; an id that stands between is the model's own business."""
        held = self._scanner.held
        end = held.find("{")
        name = held[: end if end >= 0 else len(held)].strip().partition("[")[0].strip()
        if len(name) > MAX_NAME or (end >= 0 and not name):
            self._state = self._in_content
            return [Piece("content", self._content.push(MISTRAL_CALLS))], True
        if end < 0:
            return [], False
        self._scanner.held = held[end:]
        self._arguments = _Json()
        self._state = self._in_arguments
        self._num_calls += 1
        return [Piece("call", name, self._num_calls - 1)], True

    def _in_arguments(self) -> tuple[list[Piece], bool]:
        text = self._scanner.rest()
        position = 0
        while position < len(text):
            position = self._arguments.turn(text, position)
            if self._arguments.depth <= 0:
                self._state = self._in_content
                self._content = Trimmed()
                break
        self._scanner.held = text[position:]
        piece = Piece("arguments", text[:position], self._num_calls - 1)
        return [piece], self._state == self._in_content


class NamedReader:
    """A text that a grammar has made the arguments of one function."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._told = False

    def push(self, text: str) -> list[Piece]:
        if not text:
            return []
        begin = [] if self._told else [Piece("call", self._name)]
        self._told = True
        return [*begin, Piece("arguments", text)]

    def finish(self) -> list[Piece]:
        return []


class RequiredReader:
    """A text that a grammar has made an array of calls. One that is cut off before its name is told
    is nothing: no client could read the rest of it."""

    def __init__(self) -> None:
        self._calls = _Calls(0)

    def push(self, text: str) -> list[Piece]:
        return self._calls.push(text)

    def finish(self) -> list[Piece]:
        return [piece for piece in self._calls.finish() if piece.kind != "content"]


def _placed(content: Trimmed, pieces: list[Piece]) -> list[Piece]:
    """What turned out to be content waits for its place like the rest of it."""
    return [
        Piece("content", content.push(one.text)) if one.kind == "content" else one for one in pieces
    ]


def _loaded(text: str) -> object:
    """JSON as a value, with line ends in strings let through; None for what is none."""
    try:
        found: object = json.loads(text, strict=False)
    except (ValueError, RecursionError):
        return None
    return found


def _dumped(arguments: dict[str, object]) -> str:
    """As JSON, with characters as they are where UTF-8 has them."""
    try:
        text = json.dumps(arguments, ensure_ascii=False)
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate that was written as \\ud800
        return json.dumps(arguments)
    except (ValueError, RecursionError):
        return "{}"
    return text


def _name(found: object) -> str | None:
    """A function's name that can be sent."""
    if not isinstance(found, str) or not 1 <= len(found) <= MAX_NAME:
        return None
    return found.encode("utf-8", "replace").decode()
