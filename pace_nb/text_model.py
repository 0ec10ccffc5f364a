"""`TextModel`: a model that was opened, seen from the side of text.

Knows what turns a prompt into a `Submission`: the tokenizer, the end tokens, the sampling that the
model suggests, the context's length. `open_model` opens it together with its `Engine`. Does not
know when steps run, or what becomes of a submission. `LLM` and `AsyncLLM` stand on it.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from pace_nb.config import EngineConfig
from pace_nb.engine.completion import Completion, Submission
from pace_nb.engine.engine import Engine
from pace_nb.engine.pard import ParallelDrafter
from pace_nb.engine.request import Request
from pace_nb.engine.structured_output import GrammarCompiler, TokenGrammar
from pace_nb.errors import ConfigError, InvalidRequestError, ModelFormatError
from pace_nb.kv_cache import create_cache
from pace_nb.kv_cache.base import KVCacheConfig
from pace_nb.kv_cache.budget import cache_budget
from pace_nb.models import hub
from pace_nb.models.loader import Checkpoint
from pace_nb.models.registry import Model, load_model
from pace_nb.outputs import RequestMetrics
from pace_nb.prompts import PromptInput, PromptReader, last_tokens
from pace_nb.sampling_params import SamplingParams
from pace_nb.structured_outputs import StructuredOutputsParams
from pace_nb.tokenizer import Tokenizer, token_ids_field

# generation_config.json -> SamplingParams. Like vLLM, do_sample is not looked at.
GENERATION_DEFAULTS = {
    "repetition_penalty": "repetition_penalty",
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "max_new_tokens": "max_tokens",
}


class TextModel:
    """Makes submissions for one engine. May be called from any thread.

    Attributes:
        config: EngineConfig.
        directory: Where the model lies.
        tokenizer: None where it has none.
        prompts: PromptReader.
        eos_token_ids: Ids that end a text.
        max_model_len: Longest sequence, prompt and output together.
        kv_cache_arithmetic: How the size of the KV cache came about, in one line.
    """

    def __init__(
        self,
        config: EngineConfig,
        directory: Path,
        tokenizer: Tokenizer | None,
        eos_token_ids: frozenset[int],
        generation_config: Mapping[str, Any],
        kv_cache_arithmetic: str,
        engine: Engine,
    ) -> None:
        self.config = config
        self.directory = directory
        self.tokenizer = tokenizer
        self.prompts = PromptReader(tokenizer, directory)
        self.eos_token_ids = eos_token_ids
        self.max_model_len = engine.max_model_len
        self.kv_cache_arithmetic = kv_cache_arithmetic
        self._generation_config = generation_config
        self._grammars = None
        if tokenizer is not None:
            self._grammars = GrammarCompiler(tokenizer, engine.vocab_size, eos_token_ids)
        self._ids = itertools.count()

    def suggested_sampling(self) -> dict[str, Any]:
        """Fields of SamplingParams that the model's generation_config.json names."""
        return {
            name: self._generation_config[theirs]
            for theirs, name in GENERATION_DEFAULTS.items()
            if self._generation_config.get(theirs) is not None
        }

    def default_sampling_params(self) -> SamplingParams:
        """What the model suggests; vLLM's defaults for the rest."""
        try:
            return SamplingParams(**self.suggested_sampling())
        except InvalidRequestError as error:
            raise ModelFormatError(f"{self.directory}/generation_config.json: {error}") from error

    def submission(
        self,
        engine: Engine,
        prompt: PromptInput,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
    ) -> Submission:
        """A prompt's completions, checked against the engine and not yet running.

        params: None is `default_sampling_params`. request_id: how outputs call it; None is a
        number. Raises InvalidRequestError where it cannot be served.
        """
        params = self.default_sampling_params() if params is None else params
        if not isinstance(params, SamplingParams):
            raise InvalidRequestError(
                f"sampling_params is a {type(params).__name__}, expected SamplingParams"
            )
        prompt_token_ids = last_tokens(
            prompt.token_ids, params.truncate_prompt_tokens, self.max_model_len
        )
        room = max(1, self.max_model_len - len(prompt_token_ids))  # too long a prompt: see check
        number = str(next(self._ids))  # names it in the engine, whatever the caller calls it
        metrics = RequestMetrics(arrival_time=time.monotonic())  # of all n together
        grammar = self._grammar(params)
        bad_words = self.prompts.spell(params.bad_words)  # once for all n: it takes a while
        completions = []
        for index in range(params.n):
            own_grammar = None if grammar is None else grammar.copy()
            seed = None if params.seed is None else (params.seed + index) % 2**64
            own = replace(
                params,
                n=1,
                seed=seed,
                prompt_logprobs=params.prompt_logprobs if index == 0 else None,
                token_mask=params.token_mask if own_grammar is None else own_grammar,
            )
            request = Request(
                request_id=f"{number}-{index}" if params.n > 1 else number,
                prompt_token_ids=prompt_token_ids,
                params=own,
                max_tokens=room if params.max_tokens is None else min(params.max_tokens, room),
                metrics=metrics,
                eos_token_ids=self.eos_token_ids,
                grammar=own_grammar,
                bad_words_token_ids=bad_words,
                cache_salt=prompt.cache_salt,
                priority=priority,
            )
            engine.check(request)
            completions.append(Completion(index, request, self.tokenizer))
        return Submission(number if request_id is None else request_id, prompt.text, completions)

    def _grammar(self, params: SamplingParams) -> TokenGrammar | None:
        """That of the form which the text must have, where there is one."""
        form = params.structured_outputs
        if not isinstance(form, StructuredOutputsParams):
            return None
        if params.token_mask is not None:
            raise InvalidRequestError("structured_outputs is given, expected no token_mask then")
        if self._grammars is None:
            raise InvalidRequestError("structured_outputs needs a tokenizer, the model has none")
        return self._grammars.compile(form)

    def close(self) -> None:
        """End the process that renders chat templates, if one runs."""
        if self.tokenizer is not None:
            self.tokenizer.close()


def engine_config(owner: str, model: str | Path | None, options: Mapping[str, Any]) -> EngineConfig:
    """The config of what `owner` was given. ConfigError for an option that there is not."""
    known = [field.name for field in fields(EngineConfig)]
    for name in options:
        if name not in known:
            raise ConfigError(f"{owner} has no option {name!r}, expected {', '.join(known)}")
    return EngineConfig(model=model, **options)


def open_model(config: EngineConfig) -> tuple[TextModel, Engine]:
    """Find, read and pack a model, size its KV cache, and make its engine.

    Raises PaceError, of the kind that fits, when options, files or memory are not as they must be.
    """
    directory = hub.resolve(config.model, config.revision)
    with Checkpoint.open(directory) as checkpoint:
        loaded = load_model(checkpoint, config.storage_dtype)
        generation_config = checkpoint.generation_config
        eos_token_ids = _eos_token_ids(checkpoint, loaded.vocab_size)
    tokenizer = _open_tokenizer(config, directory)
    if tokenizer is not None:
        eos_token_ids = tokenizer.eos_token_ids

    max_model_len = loaded.max_position_embeddings
    if config.max_model_len is not None:
        if config.max_model_len > max_model_len:
            raise ConfigError(
                f"max_model_len is {config.max_model_len}, the model was made for at most "
                f"{max_model_len} (max_position_embeddings)"
            )
        max_model_len = config.max_model_len
    stored = loaded.kv_cache_config(config.storage_dtype)
    draft = _open_draft(config, directory, loaded.vocab_size)
    share = 1.0 if draft is None else _share(stored, draft.stored)
    budget = cache_budget(config, stored, max_model_len, share)
    cache, arithmetic = create_cache(stored, budget.cache), budget.arithmetic
    drafter = None
    if draft is not None:
        # Room for the masks as well, and never more than the target's tokens need.
        second = cache_budget(config, draft.stored, budget.cache.max_model_len, 1 - share)
        arithmetic += f"; of the draft model, {second.arithmetic}"
        drafter = ParallelDrafter(
            draft.model, create_cache(draft.stored, second.cache), config, draft.mask_token_id,
            loaded.vocab_size,
        )  # fmt: skip
    engine = Engine(loaded, cache, config, budget.cache.max_model_len, drafter)
    text = TextModel(
        config, directory, tokenizer, eos_token_ids, generation_config, arithmetic, engine
    )
    return text, engine


class _DraftModel(NamedTuple):
    """A draft model, what it caches, and its mask token."""

    model: Model
    stored: KVCacheConfig
    mask_token_id: int


def _open_draft(config: EngineConfig, target: Path, vocab_size: int) -> _DraftModel | None:
    """The draft model that the config asks for, beside a target of so many tokens.

    Raises ConfigError where it has no mask token or another vocabulary.
    """
    speculative = config.speculative_config
    if speculative is None or speculative.method != "pard":
        return None
    if speculative.model is not None:
        directory = hub.resolve(speculative.model)
    elif target == hub.DEMO_MODEL:
        directory = hub.DEMO_DRAFT
    else:
        raise ConfigError("speculative_config: method 'pard' needs a draft model, model is None")
    with Checkpoint.open(directory) as checkpoint:
        model = load_model(checkpoint, config.storage_dtype)
        mask_token_id = checkpoint.config.get("pard_token")
    if mask_token_id is None:
        mask_token_id = speculative.pard_token
    if mask_token_id is None:
        raise ConfigError(
            f"speculative_config: {directory}/config.json names no pard_token, the mask token that "
            "the draft was trained with: give pard_token"
        )
    if type(mask_token_id) is not int or not 0 <= mask_token_id < model.vocab_size:
        raise ConfigError(
            f"speculative_config: pard_token is {mask_token_id!r}, expected an integer from 0 to "
            f"{model.vocab_size - 1}, the draft model's vocabulary"
        )
    _expect_same_vocabulary(target, vocab_size, directory, model.vocab_size)
    return _DraftModel(model, model.kv_cache_config(config.storage_dtype), mask_token_id)


def _expect_same_vocabulary(target: Path, vocab_size: int, draft: Path, draft_size: int) -> None:
    """ConfigError where the two do not spell alike.

    Models of one family pad the same vocabulary to different sizes, so where both have a
    tokenizer, that says it; else the sizes.
    """
    both = [one / "tokenizer.json" for one in (target, draft)]
    if all(file.exists() for file in both):
        mine, theirs = (Tokenizer.from_directory(one).vocabulary for one in (target, draft))
        shared = [token for token in mine if token in theirs]
        differing = next((token for token in shared if mine[token] != theirs[token]), None)
        if differing is not None or 2 * len(shared) < max(len(mine), len(theirs)):
            told = f"{len(shared)} tokens of {len(mine)} and {len(theirs)} are the same"
            if differing is not None:
                told = f"{differing!r} is {mine[differing]} here and {theirs[differing]} there"
            raise ConfigError(f"speculative_config: {draft} has another vocabulary: {told}")
    elif vocab_size != draft_size:
        raise ConfigError(
            f"speculative_config: {draft} has a vocabulary of {draft_size} tokens, expected the "
            f"model's {vocab_size}"
        )


def _share(target: KVCacheConfig, draft: KVCacheConfig) -> float:
    """Of the memory for both caches the target's, so that they hold equally many tokens."""
    return target.bytes_per_unit / (target.bytes_per_unit + draft.bytes_per_unit)


def _eos_token_ids(checkpoint: Checkpoint, vocab_size: int) -> frozenset[int]:
    """End tokens as the configuration has them, for a model without tokenizer."""
    for name, values in (
        ("generation_config.json", checkpoint.generation_config),
        ("config.json", checkpoint.config),
    ):
        found = token_ids_field(checkpoint.directory / name, values, "eos_token_id", vocab_size)
        if found:
            return frozenset(found)
    return frozenset()


def _open_tokenizer(config: EngineConfig, directory: Path) -> Tokenizer | None:
    """None for a model without one; an option that names one must lead to one."""
    if config.tokenizer is not None:
        return Tokenizer.from_directory(hub.resolve(config.tokenizer, config.revision))
    has_one = any((directory / name).exists() for name in ("tokenizer.json", "tokenizer.model"))
    return Tokenizer.from_directory(directory) if has_one else None
