"""Frames: JSON objects on a stream socket, each with its length before it. Never pickle.

    4 bytes, big-endian: length n of what follows      n bytes: one JSON object in UTF-8

Knows bytes. Does not know what messages mean. Both ends are ours and private to this user, so a
frame that breaks the rules is a defect and raises; the length is bounded all the same, so that a
damaged one cannot ask for all memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Final

Message = dict[str, Any]

HEADER: Final = 4
MAX_FRAME: Final = 2**28  # bytes; the largest: prompt_logprobs of a prompt of 131072 tokens


def encode(message: Message) -> bytes:
    """One message as a frame. ValueError beyond MAX_FRAME."""
    body = json.dumps(message, separators=(",", ":")).encode("ascii")  # lone surrogates as \\uXXXX
    if len(body) > MAX_FRAME:
        raise ValueError(f"a frame of {len(body)} bytes, expected at most {MAX_FRAME}")
    return len(body).to_bytes(HEADER, "big") + body


class Decoder:
    """Bytes as they come in, messages as they are complete."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def push(self, data: bytes) -> Iterator[Message]:
        """The messages that these bytes complete. ValueError for what is no frame."""
        self._buffer += data
        start = 0
        try:
            while len(self._buffer) - start >= HEADER:
                length = int.from_bytes(self._buffer[start : start + HEADER], "big")
                if length > MAX_FRAME:
                    raise ValueError(f"a frame of {length} bytes, expected at most {MAX_FRAME}")
                end = start + HEADER + length
                if len(self._buffer) < end:
                    break
                message = json.loads(self._buffer[start + HEADER : end])
                start = end
                if not isinstance(message, dict):
                    raise ValueError(
                        f"a frame holds a {type(message).__name__}, expected an object"
                    )
                yield message
        finally:
            del self._buffer[:start]
