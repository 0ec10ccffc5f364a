"""`TextOutput`: writes generated text to standard output, piece by piece.

Generated text is whatever a model makes of whatever it was given. On a terminal, control characters
other than newline and tab are shown as visible signs, since a terminal would obey them (move the
cursor, change the title, answer as if typed). Into a pipe or a file the text goes unchanged. A
character that the output's encoding lacks becomes a question mark instead of an error.
"""

from __future__ import annotations

import io
import sys
from typing import TextIO

# U+2400 and on picture the C0 controls; the C1 controls (0x80 to 0x9f) have no pictures.
_VISIBLE = {code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in "\n\t"}
_VISIBLE |= {0x7F: "\u2421"} | dict.fromkeys(range(128, 160), "�")
# Bidirectional overrides reorder what was printed before them.
_VISIBLE |= dict.fromkeys([*range(0x202A, 0x202F), *range(0x2066, 0x206A)], "\ufffd")


class TextOutput:
    """Where text goes. `stream` is standard output unless a test gives another."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = sys.stdout if stream is None else stream
        self._terminal = self._stream.isatty()
        self._last = "\n"
        if isinstance(self._stream, io.TextIOWrapper):
            self._stream.reconfigure(errors="replace")

    def write(self, text: str) -> None:
        """Write and flush: a reader of the pipe sees each token when it comes."""
        if text:
            self._stream.write(text.translate(_VISIBLE) if self._terminal else text)
            self._stream.flush()
            self._last = text[-1]

    def end_line(self) -> None:
        """A newline, unless the text ended with one."""
        if self._last != "\n":
            self.write("\n")
