"""`ThinkReader`: `<think>` reasoning `</think>`, then the answer.

Knows how DeepSeek-R1, Qwen3 and their like mark what they think. Does not know tool calls: what
comes after `</think>` is content, for another reader to look at.

White space around the reasoning, and before the answer after it, is dropped. A message that is cut
before `</think>` is all reasoning.

Source: vLLM `vllm/reasoning/` (deepseek_r1, qwen3).
"""

from __future__ import annotations

from typing import Final

from pace_nb.openai_api.message_pieces import Piece, Scanner, Trimmed

OPEN: Final = "<think>"
CLOSE: Final = "</think>"


class ThinkReader:
    """Splits reasoning from content.

    Args:
        prompt: The text before the message. Templates open or close the reasoning there, too.
        always: The message is reasoning from its first character, marked or not, unless the prompt
            has closed it (vLLM's deepseek_r1); else only where prompt or message open it (qwen3).
    """

    def __init__(self, prompt: str = "", *, always: bool = False) -> None:
        before = prompt.rstrip()
        self._inside = before.endswith(OPEN) or (always and not before.endswith(CLOSE))
        self._begun = before.endswith(CLOSE)  # past the place where the message may open it
        self._scanner = Scanner()
        self._reasoning = Trimmed()
        self._content: Trimmed | None = None  # after reasoning: without its leading white space

    def push(self, text: str) -> list[Piece]:
        self._scanner.push(text)
        if not self._begun and not self._begin():
            return []
        if not self._inside:
            return [self._as_content(self._scanner.rest())]
        before, marker = self._scanner.until(CLOSE)
        pieces = [Piece("reasoning", self._reasoning.push(before))]
        if marker is not None:
            self._inside = False
            self._content = Trimmed()
            pieces.append(self._as_content(self._scanner.rest()))
        return pieces

    def finish(self) -> list[Piece]:
        rest = self._scanner.rest()
        if self._inside:
            return [Piece("reasoning", self._reasoning.push(rest))]
        space = "" if self._content is None else self._content.end()
        return [self._as_content(rest), Piece("content", space)]

    def _begin(self) -> bool:
        """Look for `<think>` at the very beginning; False while it may still come."""
        text = self._scanner.held.lstrip()
        if text.startswith(OPEN):
            self._scanner.held = text[len(OPEN) :]
            self._inside = True
        elif OPEN.startswith(text):
            return False
        self._begun = True
        return True

    def _as_content(self, text: str) -> Piece:
        if self._content is not None:
            text = self._content.push(text)
        return Piece("content", text)
