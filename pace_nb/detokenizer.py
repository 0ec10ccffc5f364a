"""Token ids back to text: all at once, one by one, or as they are generated.

Knows a tokenizer.json's decoder and UTF-8. Two ways. Nearly every language model's pieces stand for
bytes, each by itself (byte-level BPE; SentencePiece with byte fallback): then text is a stream of
bytes, and the only thing to wait for is the rest of a UTF-8 character. For any other decoder
(WordPiece, Metaspace, a regular expression) a window of the last tokens is decoded with and without
the new ones, and their difference is the new text.

Source: `tokenizers` `ByteLevel` and `ByteFallback` decoders; SentencePiece's rule that each byte
that is no part of a character becomes U+FFFD; the prefix and read offsets of text-generation-
inference and vLLM for the window.
"""

from __future__ import annotations

import codecs
import contextlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from tokenizers import Tokenizer as Backend

from pace_nb.errors import InvalidRequestError, ModelFormatError

WINDOW: Final = 6  # prompt tokens that a window begins with: enough for a character of bytes
HOLD_BACK: Final = 8  # tokens after which a window shows U+FFFD instead of waiting on
REPLACEMENT: Final = "\ufffd"


class Detokenizer:
    """The way back to text of one tokenizer.

    Args:
        backend: The `tokenizers` object.
        special_token_ids: What `skip_special_tokens` skips.
    """

    def __init__(self, backend: Backend, special_token_ids: Collection[int]) -> None:
        with library_errors("tokenizer.json"):
            decoder = json.loads(backend.decoder.__getstate__()) if backend.decoder else None
        self.special_token_ids = frozenset(special_token_ids)
        self._backend = backend
        self._pieces = _Pieces.of(decoder)
        self._bytes: dict[int, bytes] = {}

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of ids; bytes that are no character become U+FFFD.

        Raises:
            InvalidRequestError: an id that is no integer from 0.
        """
        if self._pieces is None:
            return self.decode_window(token_ids, skip_special_tokens)
        stream = self.stream((), skip_special_tokens)
        try:
            return stream.push(token_ids) + stream.flush()
        except TypeError:  # no list, or a list in it
            raise InvalidRequestError("the token ids are wrong, expected integers from 0") from None

    def token_bytes(self, token_id: int) -> bytes:
        """What a token stands for in the middle of a text: UTF-8, maybe a part of a character."""
        known = self._bytes.get(token_id)
        if known is None:
            piece = self._piece(token_id)
            if piece is None:
                return b""
            if self._pieces is not None:
                known = self._pieces.to_bytes(piece)
            else:
                known = self.decode_window([token_id], skip_special_tokens=False).encode()
            self._bytes[token_id] = known
        return known

    def stream(
        self, prompt_token_ids: Sequence[int], skip_special_tokens: bool
    ) -> ByteStream | Window:
        """Text of ids to come, after those of a prompt; see `tokenizer.IncrementalDecoder`."""
        if self._pieces is None:
            return Window(self, prompt_token_ids, skip_special_tokens)
        return ByteStream(self, self._pieces, prompt_token_ids, skip_special_tokens)

    def decode_window(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        """The library's own decoding of all ids at once."""
        try:
            with library_errors("tokenizer.json"):
                ids = list(token_ids)
                text: str = self._backend.decode(ids, skip_special_tokens=skip_special_tokens)
        except ModelFormatError as error:
            raise InvalidRequestError(f"the token ids cannot be decoded: {error}") from None
        return text

    def is_shown(self, token_id: int, skip_special_tokens: bool) -> bool:
        """False for ids that add no text: unknown ones, and special ones where they are skipped."""
        if skip_special_tokens and token_id in self.special_token_ids:
            return False
        return self._piece(token_id) is not None

    def _piece(self, token_id: int) -> str | None:
        """The vocabulary's entry; None for ids in its holes and beyond its end."""
        try:
            piece: str | None = self._backend.id_to_token(token_id)
        except (OverflowError, TypeError):
            raise InvalidRequestError(
                f"token id {str(token_id)[:40]!r} is wrong, expected an integer from 0"
            ) from None
        return piece


# ---- pieces that stand for bytes ----


def _one_per_byte(error: UnicodeError) -> tuple[str, int]:
    """SentencePiece's and ByteFallback's rule. (Python's and Rust's own merge neighbours.)"""
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return REPLACEMENT * (error.end - error.start), error.end


codecs.register_error("pace_nb.one_per_byte", _one_per_byte)


def _byte_of_character() -> dict[str, int]:
    """GPT-2's alphabet: printable bytes stand for themselves, the others for U+0100 and on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_OF_CHARACTER: Final = _byte_of_character()


class _Pieces(NamedTuple):
    """How vocabulary entries become bytes, each by itself.

    Attributes:
        replace: Pairs of what is replaced by what, in order; the metaspace by a space above all.
        byte_level: Entries are written in GPT-2's alphabet.
        byte_fallback: An entry `<0x0A>` is that byte.
        strip: This character, so many times at most, is dropped from the beginning of a text.
    """

    replace: tuple[tuple[str, str], ...] = ()
    byte_level: bool = False
    byte_fallback: bool = False
    strip: tuple[str, int] = ("", 0)

    @classmethod
    def of(cls, decoder: Mapping[str, Any] | None) -> _Pieces | None:
        """Read tokenizer.json's `decoder`; None where entries depend on their neighbours."""
        if decoder is None:
            return None
        found = cls()
        fused = False
        for step in decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]:
            kind = step["type"]
            if found.byte_level and kind != "Fuse":
                return None
            if kind == "Fuse":
                fused = True
            elif kind == "Strip" and fused and step["stop"] == 0 and found.strip == ("", 0):
                found = found._replace(strip=(step["content"], step["start"]))
            elif fused:
                return None
            elif kind == "ByteLevel" and not found.byte_fallback:
                found = found._replace(byte_level=True)
            elif kind == "ByteFallback":
                found = found._replace(byte_fallback=True)
            elif kind == "Replace" and step["pattern"].get("String") and not found.byte_fallback:
                pair = (step["pattern"]["String"], step["content"])
                found = found._replace(replace=(*found.replace, pair))
            else:
                return None
        return found

    @property
    def errors(self) -> str:
        """How Python is to decode bytes that are no character."""
        return "replace" if self.byte_level else "pace_nb.one_per_byte"

    def to_bytes(self, piece: str) -> bytes:
        for old, new in self.replace:
            piece = piece.replace(old, new)
        if self.byte_fallback and len(piece) == 6 and piece[:3] == "<0x" and piece[5] == ">":
            with contextlib.suppress(ValueError):
                return bytes.fromhex(piece[3:5])
        if self.byte_level:
            with contextlib.suppress(KeyError):  # an added token that is written in plain text
                return bytes([BYTE_OF_CHARACTER[character] for character in piece])
        return piece.encode()


class ByteStream:
    """Text from pieces that stand for bytes. Holds back at most three bytes."""

    def __init__(
        self, detokenizer: Detokenizer, pieces: _Pieces, prompt: Sequence[int], skip_special: bool
    ) -> None:
        self._detokenizer = detokenizer
        self._skip_special = skip_special
        self._errors = pieces.errors
        self._utf8 = codecs.getincrementaldecoder("utf-8")(pieces.errors)
        self._strip, self._strip_left = pieces.strip
        for token_id in prompt:
            if self._strip_left == 0:
                break
            self._at_beginning(self._of(token_id).decode("utf-8", "replace"))
        # The bytes of a character that the prompt's last tokens began.
        end = b""
        for token_id in reversed(prompt):
            end = self._of(token_id) + end
            if len(end) >= 4:
                break
        self._utf8.decode(end)
        self._unfinished: bytes = self._utf8.getstate()[0]
        self._since = b""  # what was generated before it was finished

    def push(self, token_ids: Sequence[int]) -> str:
        return self._take(b"".join(map(self._of, token_ids)))

    def flush(self) -> str:
        return self._take(b"", final=True)

    def _of(self, token_id: int) -> bytes:
        if self._skip_special and token_id in self._detokenizer.special_token_ids:
            return b""
        return self._detokenizer.token_bytes(token_id)

    def _take(self, data: bytes, final: bool = False) -> str:
        text = self._utf8.decode(data, final)
        if self._unfinished:
            self._since += data
            if not text:
                return ""
            if not _begins_with_character(self._unfinished + self._since):
                # It never became a character: its U+FFFD is the prompt's, not ours.
                text = text[len(self._unfinished.decode("utf-8", self._errors)) :]
            self._unfinished = b""
        return self._at_beginning(text) if self._strip_left else text

    def _at_beginning(self, text: str) -> str:
        """Drop what is stripped from the very beginning of a text."""
        while text and self._strip_left:
            if text[0] != self._strip:
                self._strip_left = 0
                break
            self._strip_left -= 1
            text = text[1:]
        return text


def _begins_with_character(data: bytes) -> bool:
    for length in range(1, 5):
        with contextlib.suppress(UnicodeDecodeError):
            return bool(data[:length].decode())
    return False


# ---- any other decoder ----


class Window:
    """Text from any decoder: that of the last tokens with the new ones, less that without."""

    def __init__(self, detokenizer: Detokenizer, prompt: Sequence[int], skip_special: bool) -> None:
        self._detokenizer = detokenizer
        self._skip_special = skip_special
        shown = [i for i in prompt[-4 * WINDOW :] if detokenizer.is_shown(i, skip_special)]
        self._context = shown[-WINDOW:]  # their text has been shown
        self._new: list[int] = []  # theirs has not

    def push(self, token_ids: Sequence[int]) -> str:
        return "".join(map(self._push_one, token_ids))

    def _push_one(self, token_id: int) -> str:
        if not self._detokenizer.is_shown(token_id, self._skip_special):
            return ""
        self._new.append(token_id)
        text = self._added_text()
        if not text or (text.endswith(REPLACEMENT) and len(self._new) < HOLD_BACK):
            return ""
        self._context, self._new = self._new, []
        return text

    def flush(self) -> str:
        text = self._added_text() if self._new else ""
        self._context, self._new = self._new or self._context, []
        return text

    def _added_text(self) -> str:
        before = self._detokenizer.decode_window(self._context, self._skip_special)
        after = self._detokenizer.decode_window(self._context + self._new, self._skip_special)
        if after.startswith(before):
            return after[len(before) :]
        pairs = zip(before, after, strict=False)
        same = next((i for i, (old, new) in enumerate(pairs) if old != new), len(after))
        return after[same:]


# ---- the library's errors ----


@contextlib.contextmanager
def library_errors(what: str | Path) -> Iterator[None]:
    """Whatever the Rust library raises, its panics (a BaseException) included, as one line."""
    try:
        yield
    except Exception as error:
        raise ModelFormatError(f"{what}: {str(error)[:300]}") from None
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ModelFormatError(f"{what}: {str(error)[:300]}") from None
