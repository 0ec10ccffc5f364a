"""`PromptReader`: every form that a prompt comes in, as text and token ids.

Knows the forms (vLLM's), what may stand beside a prompt, and how one and many are told apart. Does
not know what becomes of a prompt, or how long it may be.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pace_nb.chat_template import check_variables
from pace_nb.errors import InvalidRequestError, ModelFormatError
from pace_nb.tokenizer import Tokenizer

Prompt = str | Sequence[int] | Mapping[str, Any]
"""Text; token ids; {"prompt": text}; or {"prompt_token_ids": ids}, with or without "prompt".

The last two may have a "cache_salt": the prompt shares its part of the KV cache only with prompts
of the same salt, so that nobody else can tell by the time an answer takes what was asked before.
"""

Messages = Sequence[Mapping[str, Any]]
"""A conversation: {"role": ..., "content": ...}, oldest first."""

PROMPT_KEYS = {"prompt", "prompt_token_ids", "cache_salt"}


class PromptInput(NamedTuple):
    """A prompt: its text, where it came as text, its token ids, and whom it shares them with."""

    text: str | None
    token_ids: list[int]
    cache_salt: str | None


class PromptReader:
    """Reads prompts for one model. May be called from any thread.

    tokenizer: None for a model that has none; directory: where it lies, for messages.
    """

    def __init__(self, tokenizer: Tokenizer | None, directory: Path) -> None:
        self._tokenizer = tokenizer
        self._directory = directory
        self._spelled: tuple[tuple[str, ...], list[list[int]]] = ((), [])

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's. ModelFormatError where it has none."""
        if self._tokenizer is None:
            raise ModelFormatError(f"{self._directory}: no tokenizer.json, expected one for text")
        return self._tokenizer

    def read(self, prompt: Prompt) -> PromptInput:
        """Any form of prompt. InvalidRequestError for what is none."""
        salt = None
        if isinstance(prompt, Mapping):
            unknown = sorted(str(key) for key in prompt.keys() - PROMPT_KEYS)
            if unknown or not prompt.keys() - {"cache_salt"}:
                raise InvalidRequestError(
                    f"a prompt has the keys {unknown}, expected 'prompt' or 'prompt_token_ids', "
                    "with or without 'cache_salt'"
                )
            salt = prompt.get("cache_salt")
            text = prompt.get("prompt")
            if text is not None and not isinstance(text, str):
                raise InvalidRequestError(f"prompt is a {type(text).__name__}, expected text")
            if prompt.get("prompt_token_ids") is not None:
                return PromptInput(text, as_token_ids(prompt["prompt_token_ids"]), salt)
            prompt = text or ""
        if isinstance(prompt, str):
            if self._tokenizer is None:
                raise InvalidRequestError(
                    f"the prompt is text, {self._directory} has no tokenizer: give token ids"
                )
            return PromptInput(prompt, self._tokenizer.encode(prompt), salt)
        return PromptInput(None, as_token_ids(prompt), salt)

    def read_chat(
        self,
        messages: Messages,
        add_generation_prompt: bool = True,
        cache_salt: str | None = None,
        *,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> PromptInput:
        """A conversation as its template writes it. options: those of `Tokenizer.encode_chat`.

        chat_template_kwargs: the template's own variables, under vLLM's name; they may stand among
        the options as well.
        """
        if not isinstance(chat_template_kwargs, Mapping | None):
            raise InvalidRequestError(
                f"chat_template_kwargs is a {type(chat_template_kwargs).__name__}, expected a "
                "mapping of names to values"
            )
        check_variables(chat_template_kwargs or {})
        options = {**(chat_template_kwargs or {}), **options}
        chat = self.tokenizer.encode_chat(messages, add_generation_prompt, **options)
        return PromptInput(chat.text, chat.token_ids, cache_salt)

    def spell(self, words: Iterable[str]) -> list[list[int]]:
        """Token ids of each word as it stands at the beginning of a text, and after a space.

        The last words are remembered: many prompts come with the same ones.
        """
        words = tuple(words)
        known, spelled = self._spelled
        if words != known:
            spelled = self._spell(words)
            self._spelled = words, spelled
        return spelled

    def _spell(self, words: Iterable[str]) -> list[list[int]]:
        spelled = [
            self.tokenizer.encode(space + word.lstrip(), add_special_tokens=False)
            for word in words
            for space in ("", " ")
        ]
        return [token_ids for token_ids in spelled if token_ids]


def last_tokens(token_ids: list[int], kept: int | None, max_model_len: int) -> list[int]:
    """What `SamplingParams.truncate_prompt_tokens` leaves of a prompt; -1: room for one new token.

    None leaves all of it.
    """
    if kept is None:
        return token_ids
    kept = max_model_len - 1 if kept == -1 else kept
    return token_ids[max(0, len(token_ids) - kept) :]


def as_prompts(prompts: Prompt | Sequence[Prompt]) -> Sequence[Prompt]:
    """One prompt as a list of one; a list as it is."""
    if isinstance(prompts, str | Mapping):
        return [prompts]
    if not isinstance(prompts, Sequence | np.ndarray) or getattr(prompts, "ndim", 1) == 0:
        raise InvalidRequestError(f"prompts is a {type(prompts).__name__}, expected a list")
    if len(prompts) and not isinstance(prompts[0], str | Mapping | Sequence | np.ndarray):
        return [prompts]  # type: ignore[list-item]  # token ids
    return prompts  # type: ignore[return-value]


def as_conversations(messages: Messages | Sequence[Messages]) -> Sequence[Messages]:
    """One conversation as a list of one; a list as it is."""
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise InvalidRequestError(
            f"messages is a {type(messages).__name__}, expected a list of role and content"
        )
    one = bool(messages) and isinstance(messages[0], Mapping)
    return [messages] if one else messages  # type: ignore[list-item,return-value]


def as_token_ids(found: Iterable[object]) -> list[int]:
    """Any integers, NumPy's too, as ints; whether the model knows them is the engine's to say."""
    if isinstance(found, bytes | str):
        raise InvalidRequestError(f"token ids are {type(found).__name__}, expected integers")
    try:
        return [operator.index(token_id) for token_id in found]  # type: ignore[arg-type]
    except TypeError as error:
        raise InvalidRequestError(f"a prompt of token ids holds something else: {error}") from None
