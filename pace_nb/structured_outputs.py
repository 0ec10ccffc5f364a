"""`StructuredOutputsParams`: the form that a text must have, as the user gave it, within bounds.

Knows the kinds of forms (vLLM's names), and how large each may be. Does not know grammars, tokens
or how a model is kept to a form: engine/structured_output.py does. It is plain data and goes
through JSON unchanged (`to_json`, `of`).

The bounds keep the work of one request small, together with llguidance's own limits: what is
refused here is refused before any grammar is built (docs/reliability.md, S23).
"""

from __future__ import annotations

import json as json_library
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Final, NoReturn

from pace_nb.errors import InvalidRequestError

MAX_BYTES: Final = 64 * 2**10  # of a schema as JSON, of a grammar, of all choices together
MAX_REGEX: Final = 16 * 2**10
MAX_NESTING: Final = 32  # of objects and lists: 16 schemas, each among the "properties" of the last
MAX_OBJECTS: Final = 1024
MAX_CHOICES: Final = 1024  # of a list in a schema, too: an enum
MAX_MARKER: Final = 256  # characters
KINDS: Final = ("json", "regex", "choice", "grammar", "json_object")


@dataclass(frozen=True, kw_only=True, slots=True)
class StructuredOutputsParams:
    """One kind of form, and how it is kept to.

    Attributes:
        json: A JSON schema, as an object or as its text.
        regex: A regular expression that the whole text matches (Rust's syntax, no look-around).
        choice: The text is one of these.
        grammar: A context-free grammar, in Lark's or in GBNF syntax.
        json_object: True: any JSON object.
        disable_any_whitespace: JSON on one line without spaces.
        whitespace_pattern: A regular expression of the white space between JSON's tokens; None is
            a space, or a line end and at most 20 spaces.
        reasoning_end: The form holds only after this text, such as `</think>`.
        reasoning_start: With it: reasoning may be left out. If the first token is not this one, the
            form holds from there.

    Raises:
        InvalidRequestError: in one line, where it is not exactly one kind, or too much.
    """

    json: str | Mapping[str, Any] | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool = False
    whitespace_pattern: str | None = None
    reasoning_start: str | None = None
    reasoning_end: str | None = None

    def __post_init__(self) -> None:
        if self.json_object is not None and not isinstance(self.json_object, bool):
            _refuse("json_object", "true or false")
        given = [kind for kind in KINDS if getattr(self, kind) not in (None, False)]
        if len(given) != 1:
            found = " and ".join(given) or "nothing"
            raise InvalidRequestError(
                f"structured_outputs has {found}, expected one of {', '.join(KINDS)}"
            )
        if self.json is not None:
            object.__setattr__(self, "json", _schema(self.json))
        if self.choice is not None:
            object.__setattr__(self, "choice", _choices(self.choice))
        _text("regex", self.regex, MAX_REGEX)
        _text("grammar", self.grammar, MAX_BYTES)
        _text("whitespace_pattern", self.whitespace_pattern, MAX_MARKER)
        _text("reasoning_start", self.reasoning_start, MAX_MARKER)
        _text("reasoning_end", self.reasoning_end, MAX_MARKER)
        if not isinstance(self.disable_any_whitespace, bool):
            _refuse("disable_any_whitespace", "true or false")
        if self.reasoning_start is not None and self.reasoning_end is None:
            _refuse("reasoning_start", "reasoning_end beside it")

    @classmethod
    def of(cls, found: object) -> StructuredOutputsParams:
        """From an object of its fields; itself as it is. InvalidRequestError for all else."""
        if isinstance(found, StructuredOutputsParams):
            return found
        known = [field.name for field in fields(cls)]
        if not isinstance(found, Mapping):
            raise InvalidRequestError(
                f"structured_outputs is a {type(found).__name__}, expected an object"
            )
        for name in found:
            if name not in known:
                raise InvalidRequestError(
                    f"structured_outputs has {ascii(name)[:60]}, expected {', '.join(KINDS)}"
                )
        return cls(**{name: value for name, value in found.items() if value is not None})

    def to_json(self) -> dict[str, Any]:
        """The fields that are given, as plain data."""
        return {
            field.name: value
            for field in fields(self)
            if (value := getattr(self, field.name)) not in (None, False)
        }


def _schema(found: object) -> Mapping[str, Any]:
    if isinstance(found, str):
        _text("json", found, MAX_BYTES)
        try:
            found = json_library.loads(found)
        except (ValueError, RecursionError):
            _refuse("json", "a JSON schema, the text is no JSON")
    if not isinstance(found, Mapping):
        _refuse("json", "a JSON schema, as an object or as text")
    num_objects = 0
    level: list[Any] = [found]
    for _ in range(MAX_NESTING):
        num_objects += sum(isinstance(value, Mapping) for value in level)
        if num_objects > MAX_OBJECTS:
            _refuse("json", f"a schema of at most {MAX_OBJECTS} objects")
        if any(isinstance(value, list) and len(value) > MAX_CHOICES for value in level):
            _refuse("json", f"at most {MAX_CHOICES} values in a list, such as an enum")
        level = [
            item
            for value in level
            if isinstance(value, Mapping | list)
            for item in (value.values() if isinstance(value, Mapping) else value)
        ]
    if any(isinstance(value, Mapping | list) for value in level):
        _refuse("json", f"a schema nested at most {MAX_NESTING} levels deep")
    try:
        size = len(json_library.dumps(found, allow_nan=False))
    except (TypeError, ValueError):
        _refuse("json", "a schema of JSON's values")
    if size > MAX_BYTES:
        _refuse("json", f"a schema of at most {MAX_BYTES} bytes")
    return found


def _choices(found: object) -> tuple[str, ...]:
    if not isinstance(found, list | tuple) or not 1 <= len(found) <= MAX_CHOICES:
        _refuse("choice", f"a list of 1 to {MAX_CHOICES} texts")
    for one in found:
        if not isinstance(one, str) or not one:
            _refuse("choice", "texts of at least one character")
        _text("choice", one, MAX_BYTES)
    if sum(map(len, found)) > MAX_BYTES:
        _refuse("choice", f"at most {MAX_BYTES} characters together")
    return tuple(dict.fromkeys(found))


def _text(name: str, found: object, most: int) -> None:
    if found is None:
        return
    if not isinstance(found, str) or not 1 <= len(found) <= most:
        _refuse(name, f"text of 1 to {most} characters")
    try:
        found.encode()
    except UnicodeEncodeError:
        _refuse(name, "text without lone surrogates")


def _refuse(name: str, expected: str) -> NoReturn:
    raise InvalidRequestError(f"structured_outputs: {name} is wrong, expected {expected}")
