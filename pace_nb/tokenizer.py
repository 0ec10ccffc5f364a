"""Text to token ids and back, the way the model's own tokenizer.json says.

Knows the files of a Hugging Face tokenizer and which tokens begin and end a text. The splitting and
merging is the `tokenizers` library's; conversations become text in `chat_template`, ids become text
in `detokenizer`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from pace_nb.chat_template import ChatTemplate, check_messages
from pace_nb.detokenizer import Detokenizer, library_errors
from pace_nb.disguise import Disguise, SpecialTokenFinder
from pace_nb.errors import InvalidRequestError, ModelFormatError, UnsupportedModelError

MAX_TOKENIZER_BYTES: Final = 256 * 2**20  # the largest in use have about 35 MB
MAX_CONFIG_BYTES: Final = 16 * 2**20
MAX_EOS_TOKENS: Final = 1024
NAMED_TOKENS: Final = tuple(
    f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
)


class ChatPrompt(NamedTuple):
    """A conversation as the model gets it: the text for people, the ids for the model."""

    text: str
    token_ids: list[int]


class Tokenizer:
    """The tokenizer of one model.

    Args:
        backend: The `tokenizers` object.
        special_tokens: Name -> text, such as `bos_token`; what chat templates may use.
        eos_token_ids: Ids that end a text.
        bos_token_id: The id that begins a text, where there is one.
        vocab_size: Rows of the model's embedding; no larger id is ever returned. None takes what
            the backend knows.
        add_bos, add_eos: Add these tokens where the backend's own post-processor does not.
        chat_template: None for a model without one.

    Attributes:
        eos_token_ids: frozenset of int.
        bos_token_id: int or None.
        vocab_size: int.
        special_tokens: dict, name -> text.
        special_token_ids: frozenset of int: what `skip_special_tokens` skips.
        chat_template: ChatTemplate; empty where the model has none.
        detokenizer: Detokenizer.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        special_tokens: Mapping[str, str] | None = None,
        eos_token_ids: Sequence[int] = (),
        bos_token_id: int | None = None,
        vocab_size: int | None = None,
        add_bos: bool = False,
        add_eos: bool = False,
        chat_template: ChatTemplate | None = None,
    ) -> None:
        special_tokens = special_tokens or {}
        with library_errors("the tokenizer"):
            backend.no_truncation()
            backend.no_padding()
            # A named token counts as special even where tokenizer.json forgot to say so.
            for text in special_tokens.values():
                if backend.token_to_id(text) is not None:
                    backend.add_special_tokens([AddedToken(text, special=True, normalized=False)])
            added = backend.get_added_tokens_decoder()
            if vocab_size is None:
                vocab_size = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
            alone = backend.encode("", add_special_tokens=True).ids
        self._backend = backend
        self.special_tokens = dict(special_tokens)
        self.vocab_size = vocab_size
        self.special_token_ids = frozenset(i for i, token in added.items() if token.special)
        self.eos_token_ids = frozenset(eos_token_ids)
        self.bos_token_id = bos_token_id
        self.chat_template = chat_template or ChatTemplate({}, special_tokens)
        bos = backend.token_to_id(special_tokens.get("bos_token", ""))
        eos = backend.token_to_id(special_tokens.get("eos_token", ""))
        self._twice = [bos, bos]
        self._before = [bos] if add_bos and bos is not None and alone[:1] != [bos] else []
        self._after = [eos] if add_eos and eos is not None and alone[-1:] != [eos] else []
        self.detokenizer = Detokenizer(backend, self.special_token_ids)
        self._finder = SpecialTokenFinder([added[i] for i in sorted(self.special_token_ids)])

    @classmethod
    def from_directory(cls, directory: str | os.PathLike[str]) -> Tokenizer:
        """Read tokenizer.json and what the files beside it say about special tokens.

        `generation_config.json` (else `config.json`) and the tokenizer's own `eos_token` together
        name the ids that end a text.

        Raises:
            ModelFormatError: a file is missing, too large, or says what cannot be.
            UnsupportedModelError: a tokenizer in another format only.
        """
        path = Path(directory)
        backend = _read_backend(path)
        tokenizer_config = _read_json(path / "tokenizer_config.json")
        config = _read_json(path / "config.json")
        if isinstance(config.get("text_config"), dict):
            config = {**config, **config["text_config"]}
        generation_config = _read_json(path / "generation_config.json")
        special = _special_tokens(_read_json(path / "special_tokens_map.json"), tokenizer_config)

        vocab_size = config.get("vocab_size")
        if vocab_size is not None:
            vocab_size = _id(path / "config.json", "vocab_size", vocab_size, 2**31 - 1)
        ending: list[int] = []
        for name, found in (("generation_config.json", generation_config), ("config.json", config)):
            ending = token_ids_field(path / name, found, "eos_token_id", vocab_size)
            if ending:
                break
        eos = backend.token_to_id(special.get("eos_token", ""))
        if eos is not None:
            ending.append(eos)
        bos = backend.token_to_id(special.get("bos_token", ""))
        if bos is None:
            ids = token_ids_field(path / "config.json", config, "bos_token_id", vocab_size)
            bos = next(iter(ids), None)
        return cls(
            backend,
            special_tokens=special,
            eos_token_ids=ending,
            bos_token_id=bos,
            vocab_size=vocab_size,
            add_bos=tokenizer_config.get("add_bos_token") is True,
            add_eos=tokenizer_config.get("add_eos_token") is True,
            chat_template=ChatTemplate.from_directory(path, tokenizer_config, special),
        )

    @property
    def vocabulary(self) -> dict[str, int]:
        """Token as the backend spells it -> id; those that were added are in it."""
        return self._backend.get_vocab(with_added_tokens=True)

    def close(self) -> None:
        """End the process that renders chat templates, if one runs."""
        self.chat_template.close()

    def to_json(self) -> str:
        """The whole tokenizer as tokenizer.json has it, for libraries that read that."""
        with library_errors("the tokenizer"):
            text: str = self._backend.to_str()
        return text

    # ---- text to ids ----

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The ids of a text.

        Args:
            text: Any; special tokens written out in it become those tokens.
            add_special_tokens: Also add what the model expects around a text, BOS above all; never
                a second BOS. False for the text of a chat template.

        Raises:
            InvalidRequestError: no text, lone surrogates, or a token outside the vocabulary.
        """
        if not isinstance(text, str):
            raise InvalidRequestError(f"the prompt is a {type(text).__name__}, expected text")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequestError(
                f"the prompt has a lone surrogate at character {error.start}, expected Unicode text"
            ) from None
        try:
            with library_errors("the tokenizer"):
                # A batch of one: unlike `encode` it lets other Python threads run meanwhile.
                (encoded,) = self._backend.encode_batch(
                    [text], add_special_tokens=add_special_tokens
                )
                ids: list[int] = encoded.ids
        except ModelFormatError as error:
            raise InvalidRequestError(f"the prompt cannot be encoded: {error}") from None
        if add_special_tokens:
            ids = self._before + ids + self._after
            if ids[:2] == self._twice:  # the text itself had begun with it
                del ids[0]
        largest = max(ids, default=0)
        if largest >= self.vocab_size:
            raise InvalidRequestError(
                f"the prompt holds the token {self._backend.id_to_token(largest)!r} with id "
                f"{largest}, expected ids below the model's vocabulary of {self.vocab_size}"
            )
        return ids

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        **options: Any,
    ) -> str:
        """The text of a conversation; see `ChatTemplate.render` for options and errors."""
        return self.chat_template.render(
            messages, add_generation_prompt=add_generation_prompt, **options
        )

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        *,
        special_tokens_in_content: bool = False,
        **options: Any,
    ) -> ChatPrompt:
        """The text and ids of a conversation, with no special token but those of the template.

        A special token that is written out in a message, as in "say <|im_end|>", is taken for the
        text that it is, so that nobody can end his turn and begin another's (CVE-2026-44222);
        `special_tokens_in_content` takes it for the token.

        Raises:
            InvalidRequestError: as `ChatTemplate.render` and `encode`.
        """
        disguise = Disguise(self._finder)
        if not special_tokens_in_content:
            messages = disguise.hide(check_messages(messages))
            for name in ("tools", "documents"):
                if options.get(name):
                    options[name] = disguise.hide(options[name])
        text = self.apply_chat_template(messages, add_generation_prompt, **options)
        ids: list[int] = []
        for piece in disguise.split(text):
            ids += self.encode(piece.text, add_special_tokens=False)
        return ChatPrompt(disguise.reveal(text), ids)

    # ---- ids to text ----

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of ids; bytes that are no character become U+FFFD, unknown ids nothing.

        Raises:
            InvalidRequestError: an id that is no integer from 0.
        """
        return self.detokenizer.decode(token_ids, skip_special_tokens)

    def token_bytes(self, token_id: int) -> bytes:
        """What a token stands for in the middle of a text: UTF-8, maybe a part of a character."""
        return self.detokenizer.token_bytes(token_id)

    def token_text(self, token_id: int) -> str:
        """`token_bytes` as text, for showing single tokens; U+FFFD for a part of a character."""
        return self.token_bytes(token_id).decode("utf-8", "replace")


class IncrementalDecoder:
    """Text of generated ids while they come.

    What `push` returned stays; it never holds a part of a character, and U+FFFD only for bytes that
    can become none. All texts together with `flush` are the text that the ids add to the prompt's:
    the space before a first word is kept where the prompt has text, and a character that the
    prompt's last ids began is shown whole where the first ids complete it.

    Args:
        tokenizer: The model's.
        prompt_token_ids: What comes before.
        skip_special_tokens: Leave special tokens out of the text.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_token_ids: Sequence[int] = (),
        skip_special_tokens: bool = True,
    ) -> None:
        self._stream = tokenizer.detokenizer.stream(prompt_token_ids, skip_special_tokens)

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that became certain with these ids; often empty."""
        return self._stream.push(token_ids)

    def flush(self) -> str:
        """What was held back, when no more ids will come."""
        return self._stream.flush()


# ---- files ----


def _read_backend(directory: Path) -> Backend:
    file = directory / "tokenizer.json"
    if not file.exists():
        for other in ("tokenizer.model", "tekken.json", "vocab.json", "vocab.txt"):
            if (directory / other).exists():
                raise UnsupportedModelError(
                    f"{directory}: has {other} but no tokenizer.json, expected one; transformers "
                    "writes it: AutoTokenizer.from_pretrained(...).save_pretrained(...)"
                )
        raise ModelFormatError(f"{file}: missing")
    content = _read_bytes(file, MAX_TOKENIZER_BYTES)
    with library_errors(file):
        return Backend.from_buffer(content)


def _read_bytes(file: Path, most: int) -> bytes:
    if not file.is_file():
        raise ModelFormatError(f"{file}: expected a regular file")
    size = file.stat().st_size
    if size > most:
        raise ModelFormatError(f"{file}: {size} bytes, expected at most {most}")
    return file.read_bytes()


def _read_json(file: Path) -> dict[str, Any]:
    """An object from a small JSON file; empty where there is no file."""
    if not file.exists():
        return {}
    try:
        found = json.loads(_read_bytes(file, MAX_CONFIG_BYTES))
    except (ValueError, RecursionError):
        raise ModelFormatError(f"{file}: expected valid JSON") from None
    if not isinstance(found, dict):
        raise ModelFormatError(f"{file}: expected a JSON object")
    return found


def _special_tokens(*files: Mapping[str, Any]) -> dict[str, str]:
    """`bos_token` and its kind, as text; later files win over earlier ones."""
    found: dict[str, str] = {}
    for file in files:
        extra = file.get("extra_special_tokens")
        named = {name: file[name] for name in NAMED_TOKENS if file.get(name) is not None}
        for name, token in {**(extra if isinstance(extra, dict) else {}), **named}.items():
            text = token.get("content") if isinstance(token, dict) else token
            if isinstance(text, str) and text:
                found[name] = text
    return found


def token_ids_field(
    file: Path, values: Mapping[str, Any], field: str, vocab_size: int | None
) -> list[int]:
    """`eos_token_id` or its like among a file's values: none, one, or a list of several.

    ModelFormatError, naming file and field, for what is no id below vocab_size.
    """
    found = values.get(field)
    if found is None:
        return []
    listed = found if isinstance(found, list) else [found]
    if len(listed) > MAX_EOS_TOKENS:
        raise ModelFormatError(
            f"{file}: {field} has {len(listed)} ids, expected at most {MAX_EOS_TOKENS}"
        )
    most = 2**31 - 1 if vocab_size is None else vocab_size - 1
    return [_id(file, field, entry, most) for entry in listed]


def _id(file: Path, what: str, value: object, most: int) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most:
        return value
    raise ModelFormatError(f"{file}: {what} is {str(value)[:40]!r}, expected 0 to {most}")
