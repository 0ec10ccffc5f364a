"""`MessageFormat`: how one model writes its messages, and what follows from it for a request.

Knows which readers there are (their names are vLLM's), which of them a model's chat template asks
for, and how they stand one behind the other: reasoning first, then tool calls in the content. Does
not know response bodies.

    reasoning  qwen3          <think> ... </think>, where prompt or message open it
               deepseek_r1    the same, open from the beginning
               openai_gptoss  channels
    tools      hermes, llama3_json, mistral, openai (channels)
"""

from __future__ import annotations

import secrets
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Final

from pace_nb.errors import ConfigError
from pace_nb.openai_api.harmony import CHANNEL, FINAL, HarmonyReader
from pace_nb.openai_api.message_pieces import MessageReader, Piece, PlainReader, joined
from pace_nb.openai_api.reasoning import CLOSE, OPEN, ThinkReader
from pace_nb.openai_api.request_body import ChatBody
from pace_nb.openai_api.tool_calls import (
    HERMES_OPEN,
    MISTRAL_CALLS,
    PYTHON_TAG,
    HermesReader,
    Llama3JsonReader,
    MistralReader,
    NamedReader,
    RequiredReader,
)
from pace_nb.sampling_params import SamplingParams
from pace_nb.structured_outputs import StructuredOutputsParams

REASONING: Final = ("deepseek_r1", "qwen3", "openai_gptoss")
TOOLS: Final[Mapping[str, Callable[[], MessageReader]]] = {
    "hermes": HermesReader,
    "llama3_json": Llama3JsonReader,
    "mistral": MistralReader,
}
HARMONY: Final = ("openai_gptoss", "openai")
ALPHANUMERIC: Final = string.ascii_letters + string.digits


@dataclass(frozen=True)
class MessageFormat:
    """Names of readers. None: there is no reasoning, or no call, to be read.

    Raises:
        ConfigError: a name that there is not.
    """

    reasoning: str | None = None
    tools: str | None = None

    def __post_init__(self) -> None:
        _check("reasoning_parser", self.reasoning, REASONING)
        _check("tool_call_parser", self.tools, (*TOOLS, "openai"))

    @classmethod
    def of_templates(cls, templates: Mapping[str, str]) -> MessageFormat:
        """What a model's chat templates ask for."""
        text = "\n".join(templates.values())
        if CHANNEL in text:
            return cls(*HARMONY)
        tools = None
        if MISTRAL_CALLS in text:
            tools = "mistral"
        elif HERMES_OPEN in text and "<function=" not in text:  # Qwen3-Coder writes XML there
            tools = "hermes"
        elif PYTHON_TAG in text or "Environment: ipython" in text:
            tools = "llama3_json"
        return cls("qwen3" if CLOSE in text else None, tools)

    @classmethod
    def chosen(
        cls, reasoning: str, tools: str, templates: Mapping[str, str] | None = None
    ) -> MessageFormat:
        """By names, of which "auto" is what the templates ask for, and "none" nothing."""
        found = cls.of_templates(templates or {})
        names = {"auto": found.reasoning, "none": None}, {"auto": found.tools, "none": None}
        return cls(names[0].get(reasoning, reasoning), names[1].get(tools, tools))

    @property
    def is_harmony(self) -> bool:
        """The model writes channels, which one reader reads whole."""
        return "openai_gptoss" == self.reasoning or "openai" == self.tools

    def reader(self, body: ChatBody, prompt: str | None) -> MessageReader:
        """For one answer to this body. prompt: its text, as the template wrote it."""
        calls: MessageReader | None = None
        if isinstance(body.tool_choice, Mapping):
            calls = NamedReader(body.tool_choice["function"]["name"])
        elif body.tool_choice == "required":
            calls = RequiredReader()
        elif self.is_harmony:
            return _Selected(HarmonyReader(), body)
        elif body.tool_choice == "auto" and body.tools and self.tools is not None:
            calls = TOOLS[self.tools]()
        first: MessageReader = PlainReader()
        if self.is_harmony:
            first = HarmonyReader()
        elif self.reasoning is not None:
            first = ThinkReader(prompt or "", always=self.reasoning == "deepseek_r1")
        elif calls is None:
            return first
        return _Selected(_Chain(first, calls) if calls is not None else first, body)

    def params(self, body: ChatBody, prompt: str) -> SamplingParams:
        """How to sample for this body: with the special tokens that readers look for, and with
        the form that its answer must have after the reasoning."""
        params = body.params
        calls = body.tool_choice == "auto" and bool(body.tools) and self.tools is not None
        if self.is_harmony or calls:
            params = replace(params, skip_special_tokens=False)
        form = params.structured_outputs
        if isinstance(form, StructuredOutputsParams):
            start, end = self._reasoning_markers(prompt.rstrip())
            form = replace(form, reasoning_start=start, reasoning_end=end)
            params = replace(params, structured_outputs=form)
        return params

    def _reasoning_markers(self, prompt: str) -> tuple[str | None, str | None]:
        """What may begin reasoning after this prompt, and what ends it."""
        if self.is_harmony:
            return None, FINAL
        if self.reasoning is None or prompt.endswith(CLOSE):
            return None, None
        return None if self.reasoning == "deepseek_r1" or prompt.endswith(OPEN) else OPEN, CLOSE

    def call_id(self) -> str:
        """A new id for a tool call. Mistral's templates want nine letters and digits."""
        if self.tools == "mistral":
            return "".join(secrets.choice(ALPHANUMERIC) for _ in range(9))
        return f"call_{secrets.token_hex(12)}"


class _Chain:
    """What one reader takes for content is read by the next."""

    def __init__(self, first: MessageReader, second: MessageReader) -> None:
        self._first = first
        self._second = second

    def push(self, text: str) -> list[Piece]:
        return self._through(self._first.push(text))

    def finish(self) -> list[Piece]:
        return self._through(self._first.finish()) + self._second.finish()

    def _through(self, pieces: list[Piece]) -> list[Piece]:
        told: list[Piece] = []
        for piece in pieces:
            told += self._second.push(piece.text) if piece.kind == "content" else [piece]
        return told


class _Selected:
    """A reader without what the body does not want: reasoning, more than one call."""

    def __init__(self, reader: MessageReader, body: ChatBody) -> None:
        self._reader = reader
        self._body = body

    def push(self, text: str) -> list[Piece]:
        return self._select(self._reader.push(text))

    def finish(self) -> list[Piece]:
        return self._select(self._reader.finish())

    def _select(self, pieces: list[Piece]) -> list[Piece]:
        return [
            piece
            for piece in joined(pieces)
            if not (piece.kind == "reasoning" and not self._body.include_reasoning)
            and not (piece.index > 0 and not self._body.parallel_tool_calls)
        ]


def _check(name: str, value: str | None, known: tuple[str, ...]) -> None:
    if value is not None and value not in known:
        raise ConfigError(f"{name} is {value!r}, expected {', '.join(known)}, auto or none")


PLAIN: Final = MessageFormat()
