"""`HarmonyReader`: gpt-oss' messages, each with a channel and maybe a recipient.

    <|channel|>analysis<|message|>...<|end|>                                    reasoning
    <|start|>assistant<|channel|>final<|message|>...<|return|>                  content
    <|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>{...}<|call|>

Knows this format. The text must have its special tokens in it. The recipient may stand before the
channel as well as after it. What goes to no tool and is not analysis is content.

Source: the harmony format's description, https://github.com/openai/harmony (docs/format.md).
"""

from __future__ import annotations

from typing import Final

from pace_nb.openai_api.message_pieces import Kind, Piece, Scanner

CHANNEL: Final = "<|channel|>"
MESSAGE: Final = "<|message|>"
START: Final = "<|start|>"
ENDS: Final = ("<|end|>", "<|return|>", "<|call|>")
FINAL: Final = "<|channel|>final<|message|>"
FUNCTIONS: Final = "functions."
NO_TOOL: Final = frozenset({"", "all", "assistant", "user"})


class HarmonyReader:
    """Reads messages that follow `<|start|>assistant`."""

    def __init__(self) -> None:
        self._scanner = Scanner()
        self._in_header = True
        self._header: list[str] = []
        self._kind: Kind = "content"
        self._told: set[Kind] = set()  # kinds that have text: the next message begins a new line
        self._between = False  # this message's first text is to be set off
        self._num_calls = 0

    def push(self, text: str) -> list[Piece]:
        self._scanner.push(text)
        pieces: list[Piece] = []
        while True:
            if self._in_header:
                before, marker = self._scanner.until(MESSAGE, START, *ENDS)
                self._header.append(before)
                if marker is None:
                    return pieces
                if marker == MESSAGE:
                    pieces += self._begin()
                else:  # no header, as another one follows
                    pieces += self._stray("".join(self._header))
                    self._header.clear()
            else:
                before, marker = self._scanner.until(START, CHANNEL, *ENDS)
                pieces += self._body(before)
                if marker is None:
                    return pieces
                self._in_header = True
                self._header = [CHANNEL] if marker == CHANNEL else []

    def finish(self) -> list[Piece]:
        rest = self._scanner.rest()
        if not self._in_header:
            return self._body(rest)
        return self._stray("".join(self._header) + rest)

    def _begin(self) -> list[Piece]:
        """The header is complete."""
        header = "".join(self._header)
        self._header.clear()
        self._in_header = False
        channel = header.partition(CHANNEL)[2].lstrip()
        recipient = header.partition("to=")[2].partition("<|")[0].split()[:1]
        to = recipient[0] if recipient else ""
        if to not in NO_TOOL:
            self._kind = "arguments"
            self._num_calls += 1
            return [Piece("call", to.removeprefix(FUNCTIONS), self._num_calls - 1)]
        self._kind = "reasoning" if channel.startswith("analysis") else "content"
        self._between = self._kind in self._told
        return []

    def _stray(self, header: str) -> list[Piece]:
        """Text outside of any message: content, unless it is what a header looks like."""
        if CHANNEL in header or not header.strip() or "assistant".startswith(header.strip()):
            return []
        return [Piece("content", header)]

    def _body(self, text: str) -> list[Piece]:
        if not text:
            return []
        if self._kind == "arguments":
            return [Piece("arguments", text, self._num_calls - 1)]
        self._told.add(self._kind)
        if self._between:
            text = "\n" + text
            self._between = False
        return [Piece(self._kind, text)]
