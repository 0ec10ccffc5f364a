"""`LLM`: text in, text out. It owns the tokenizer and the engine.

Knows prompts in all the forms they come in, conversations, completions and their text. Does not
know schedules, caches, arrays or HTTP. The names are vLLM's.

    LLM.generate     prompts -> list[RequestOutput], in order, when all are done
    LLM.chat         conversations -> the same
    LLM.stream       one prompt -> RequestOutputs that hold what is new, as it comes
    LLM.stream_chat  one conversation -> the same
    LLM.forward      token ids -> logits, for experiments
    LLM.submit, step, withdraw   the same piece by piece, for who runs many and decides when

Everything is checked before anything runs: one prompt of many that cannot be served raises
InvalidRequestError, and none has run. What fails later, such as NaN logits, ends its own completion
with finish_reason "error" and the reason as stop_reason. However a call ends, by Ctrl-C too, its
requests are out of the engine and their cache is free. Not thread-safe.
"""

from __future__ import annotations

import itertools
import operator
import time
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from pace_nb.config import EngineConfig
from pace_nb.engine.completion import Completion, Submission
from pace_nb.engine.engine import Engine, EngineLoad
from pace_nb.engine.request import Request
from pace_nb.errors import ConfigError, InvalidRequestError, ModelFormatError, PaceError
from pace_nb.kernels import jit
from pace_nb.kv_cache import create_cache
from pace_nb.kv_cache.budget import cache_budget
from pace_nb.models import hub
from pace_nb.models.loader import Checkpoint
from pace_nb.models.registry import load_model
from pace_nb.outputs import RequestMetrics, RequestOutput
from pace_nb.sampling_params import SamplingParams
from pace_nb.tokenizer import Tokenizer, token_ids_field

Prompt = str | Sequence[int] | Mapping[str, Any]
"""Text; token ids; {"prompt": text}; or {"prompt_token_ids": ids}, with or without "prompt".

The last two may have a "cache_salt": the prompt shares its part of the KV cache only with prompts
of the same salt, so that nobody else can tell by the time an answer takes what was asked before.
"""

Messages = Sequence[Mapping[str, Any]]
"""A conversation: {"role": ..., "content": ...}, oldest first."""

Sampling = SamplingParams | Sequence[SamplingParams] | None
"""For all prompts, one for each, or None for the model's own (`get_default_sampling_params`)."""

PROMPT_KEYS = {"prompt", "prompt_token_ids", "cache_salt"}

# generation_config.json -> SamplingParams. Like vLLM, do_sample is not looked at.
GENERATION_DEFAULTS = {
    "repetition_penalty": "repetition_penalty",
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "max_new_tokens": "max_tokens",
}


class LLM:
    """A model ready to generate. A context manager; `close` lets its memory go.

    Args:
        model: Local directory, hub name, or None for the bundled demo model.
        **options: Fields of `EngineConfig`.

    Attributes:
        config: EngineConfig.
        directory: Where the model lies.
        max_model_len: Longest sequence, prompt and output together.
        kv_cache_arithmetic: How the size of the KV cache came about, in one line.

    Raises:
        PaceError: of the kind that fits, when options, files or memory are not as they must be.
    """

    def __init__(self, model: str | Path | None = None, **options: Any) -> None:
        known = [field.name for field in fields(EngineConfig)]
        for name in options:
            if name not in known:
                raise ConfigError(f"LLM has no option {name!r}, expected {', '.join(known)}")
        self.config = config = EngineConfig(model=model, **options)
        self.directory = hub.resolve(config.model, config.revision)
        with Checkpoint.open(self.directory) as checkpoint:
            loaded = load_model(checkpoint, config.storage_dtype)
            self._generation_config = checkpoint.generation_config
            eos_token_ids = _eos_token_ids(checkpoint, loaded.vocab_size)
        self._tokenizer = _open_tokenizer(config, self.directory)
        self._eos_token_ids = (
            eos_token_ids if self._tokenizer is None else self._tokenizer.eos_token_ids
        )

        max_model_len = loaded.max_position_embeddings
        if config.max_model_len is not None:
            if config.max_model_len > max_model_len:
                raise ConfigError(
                    f"max_model_len is {config.max_model_len}, the model was made for at most "
                    f"{max_model_len} (max_position_embeddings)"
                )
            max_model_len = config.max_model_len
        stored = loaded.kv_cache_config(config.storage_dtype)
        budget = cache_budget(config, stored, max_model_len)
        self.kv_cache_arithmetic = budget.arithmetic
        self.max_model_len = budget.cache.max_model_len
        self._engine: Engine | None = Engine(
            loaded, create_cache(stored, budget.cache), config, self.max_model_len
        )
        self._running: dict[str, tuple[Submission, Completion]] = {}  # unfinished, by request id
        self._ids = itertools.count()

    # ---- what it is for ----

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: Sampling = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Complete one prompt or many; returns when all are done, in the order of the prompts.

        Raises InvalidRequestError before anything runs when one of them cannot be served.
        """
        listed = _listed(prompts)
        inputs = [self._read(prompt) for prompt in listed]
        return self._run(inputs, _one_each(sampling_params, len(inputs)), use_tqdm)

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: Sampling = None,
        use_tqdm: bool = True,
        *,
        add_generation_prompt: bool = True,
        cache_salt: str | None = None,
        **options: Any,
    ) -> list[RequestOutput]:
        """Answer one conversation or many. options: those of `Tokenizer.encode_chat`.

        cache_salt: as in `Prompt`, of all of them.

        Raises InvalidRequestError before anything runs when one of them cannot be served.
        """
        if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
            raise InvalidRequestError(
                f"messages is a {type(messages).__name__}, expected a list of role and content"
            )
        one = bool(messages) and isinstance(messages[0], Mapping)
        conversations: Any = [messages] if one else messages
        inputs = [
            self._read_chat(conversation, add_generation_prompt, cache_salt, options)
            for conversation in conversations
        ]
        return self._run(inputs, _one_each(sampling_params, len(inputs)), use_tqdm)

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None
    ) -> Generator[RequestOutput, None, None]:
        """Complete one prompt; yields what is new in `outputs`, as it comes.

        The texts of one index, in order, are its whole text; the same holds for token_ids and
        logprobs. Closing the generator ends the request. Raises InvalidRequestError at once, not
        when the first output is asked for.
        """
        return self._stream(self._submission(self._read(prompt), sampling_params))

    def stream_chat(
        self,
        messages: Messages,
        sampling_params: SamplingParams | None = None,
        *,
        add_generation_prompt: bool = True,
        cache_salt: str | None = None,
        **options: Any,
    ) -> Generator[RequestOutput, None, None]:
        """Answer one conversation, as `stream` does. The rest is as in `chat`."""
        read = self._read_chat(messages, add_generation_prompt, cache_salt, options)
        return self._stream(self._submission(read, sampling_params))

    def submit(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Submission:
        """Begin to complete a prompt: `step` brings it forward, its `news` and `output` tell.

        Raises InvalidRequestError where it cannot be served. It is out of the engine when it has
        finished, or by `withdraw`.
        """
        submission = self._submission(self._read(prompt), sampling_params)
        try:
            self._begin([submission])
        except BaseException:
            self.withdraw(submission)
            raise
        return submission

    def step(self) -> list[Submission]:
        """One step of the engine, with whatever it runs; returns the submissions that moved."""
        engine = self._open_engine()
        with jit.compile_progress():
            progress = engine.step()
        moved: dict[int, Submission] = {}
        for request, new_token_ids in progress:
            submission, completion = self._running[request.request_id]
            completion.take(new_token_ids)
            if completion.finish_reason is not None:
                engine.abort(request.request_id)  # where a stop string ended it, it still runs
                del self._running[request.request_id]
            moved[id(submission)] = submission
        return list(moved.values())

    def withdraw(self, submission: Submission) -> None:
        """Take what is left of a submission out of the engine; twice is once."""
        for completion in submission.completions:
            if self._running.pop(completion.request.request_id, None) is not None:
                self._open_engine().abort(completion.request.request_id)

    def get_load(self) -> EngineLoad:
        """How busy the engine is."""
        return self._open_engine().load()

    def forward(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """Logits f32[T, V] of all T tokens of one sequence, with no BOS added.

        Raises InvalidRequestError for ids or a length that the model cannot take.
        """
        engine = self._open_engine()
        with jit.compile_progress():
            return engine.forward(_token_ids(token_ids))

    def get_tokenizer(self) -> Tokenizer:
        """The model's tokenizer. ModelFormatError where it has none."""
        if self._tokenizer is None:
            raise ModelFormatError(f"{self.directory}: no tokenizer.json, expected one for text")
        return self._tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What the model's generation_config.json suggests; vLLM's defaults for the rest."""
        suggested = {
            name: self._generation_config[theirs]
            for theirs, name in GENERATION_DEFAULTS.items()
            if self._generation_config.get(theirs) is not None
        }
        try:
            return SamplingParams(**suggested)
        except InvalidRequestError as error:
            raise ModelFormatError(f"{self.directory}/generation_config.json: {error}") from error

    def close(self) -> None:
        """End what runs and let model and cache go. Twice is once."""
        for request_id in list(self._running):
            self._open_engine().abort(request_id)
        self._running.clear()
        self._engine = None
        if self._tokenizer is not None:
            self._tokenizer.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    # ---- from prompts to requests ----

    def _read(self, prompt: Prompt) -> _Input:
        """Any form of prompt as text, where there is text, and token ids."""
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
                return _Input(text, _token_ids(prompt["prompt_token_ids"]), salt)
            prompt = text or ""
        if isinstance(prompt, str):
            if self._tokenizer is None:
                raise InvalidRequestError(
                    f"the prompt is text, {self.directory} has no tokenizer: give token ids"
                )
            return _Input(prompt, self._tokenizer.encode(prompt), salt)
        return _Input(None, _token_ids(prompt), salt)

    def _read_chat(
        self,
        messages: Messages,
        add_generation_prompt: bool,
        cache_salt: str | None,
        options: Mapping[str, Any],
    ) -> _Input:
        chat = self.get_tokenizer().encode_chat(messages, add_generation_prompt, **options)
        return _Input(chat.text, chat.token_ids, cache_salt)

    def _submission(self, read: _Input, params: SamplingParams | None) -> Submission:
        """A prompt's completions, checked and not yet running."""
        engine = self._open_engine()
        params = self.get_default_sampling_params() if params is None else params
        if not isinstance(params, SamplingParams):
            raise InvalidRequestError(
                f"sampling_params is a {type(params).__name__}, expected SamplingParams"
            )
        prompt_token_ids = read.token_ids
        kept = params.truncate_prompt_tokens
        if kept is not None:  # -1: leave room for one new token
            kept = self.max_model_len - 1 if kept == -1 else kept
            prompt_token_ids = prompt_token_ids[max(0, len(prompt_token_ids) - kept) :]
        room = max(1, self.max_model_len - len(prompt_token_ids))  # too long a prompt: see check
        request_id = str(next(self._ids))
        metrics = RequestMetrics(arrival_time=time.monotonic())  # of all n together
        completions = []
        for index in range(params.n):
            seed = None if params.seed is None else (params.seed + index) % 2**64
            own = replace(
                params,
                n=1,
                seed=seed,
                prompt_logprobs=params.prompt_logprobs if index == 0 else None,
            )
            request = Request(
                request_id=f"{request_id}-{index}" if params.n > 1 else request_id,
                prompt_token_ids=prompt_token_ids,
                params=own,
                max_tokens=room if params.max_tokens is None else min(params.max_tokens, room),
                metrics=metrics,
                eos_token_ids=self._eos_token_ids,
                bad_words_token_ids=self._bad_words_token_ids(params.bad_words),
                cache_salt=read.cache_salt,
            )
            engine.check(request)
            completions.append(Completion(index, request, self._tokenizer))
        return Submission(request_id, read.text, completions)

    def _bad_words_token_ids(self, words: Iterable[str]) -> list[list[int]]:
        """Each word as it is spelled at the beginning of a text, and after a space."""
        spelled = [
            self.get_tokenizer().encode(space + word.lstrip(), add_special_tokens=False)
            for word in words
            for space in ("", " ")
        ]
        return [token_ids for token_ids in spelled if token_ids]

    # ---- from requests to outputs ----

    def _run(
        self, inputs: Sequence[_Input], params: Sequence[SamplingParams | None], use_tqdm: bool
    ) -> list[RequestOutput]:
        submissions = [self._submission(*pair) for pair in zip(inputs, params, strict=True)]
        running = list(submissions)
        with (
            self._serving(submissions),
            # miniters=0: the rates move while the number of finished prompts does not.
            tqdm(total=len(running), desc="prompts", disable=not use_tqdm, miniters=0) as bar,
        ):
            started = time.monotonic()
            while running:
                self.step()
                still_running = [one for one in running if not one.finished]
                bar.set_postfix_str(_rates(submissions, started), refresh=False)
                bar.update(len(running) - len(still_running))
                running = still_running
        return [submission.output() for submission in submissions]

    def _stream(self, submission: Submission) -> Generator[RequestOutput, None, None]:
        with self._serving([submission]):
            while True:  # other calls step the engine, too, so there may be news before any step
                news = submission.news()
                if news is not None:
                    yield news
                elif submission.finished:
                    return
                else:
                    self.step()

    @contextmanager
    def _serving(self, submissions: Sequence[Submission]) -> Iterator[None]:
        """Inside the block the submissions run; however it is left, they are out of the engine."""
        try:
            self._begin(submissions)
            yield
        finally:
            for submission in submissions:
                self.withdraw(submission)

    def _begin(self, submissions: Sequence[Submission]) -> None:
        engine = self._open_engine()
        for submission in submissions:
            for completion in submission.completions:
                self._running[completion.request.request_id] = submission, completion
                engine.add(completion.request)

    def _open_engine(self) -> Engine:
        if self._engine is None:
            raise PaceError("this LLM is closed")
        return self._engine


class _Input(NamedTuple):
    """A prompt: its text, where it came as text, its token ids, and whom it shares them with."""

    text: str | None
    token_ids: list[int]
    cache_salt: str | None


def _listed(prompts: Prompt | Sequence[Prompt]) -> Sequence[Prompt]:
    """One prompt as a list of one; a list as it is."""
    if isinstance(prompts, str | Mapping):
        return [prompts]
    if not isinstance(prompts, Sequence | np.ndarray) or getattr(prompts, "ndim", 1) == 0:
        raise InvalidRequestError(f"prompts is a {type(prompts).__name__}, expected a list")
    if len(prompts) and not isinstance(prompts[0], str | Mapping | Sequence | np.ndarray):
        return [prompts]  # type: ignore[list-item]  # token ids
    return prompts  # type: ignore[return-value]


def _one_each(params: Sampling, num: int) -> Sequence[SamplingParams | None]:
    """Sampling parameters for each of `num` prompts."""
    if params is None or isinstance(params, SamplingParams):
        return [params] * num
    if isinstance(params, str | bytes) or not isinstance(params, Sequence):
        raise InvalidRequestError(
            f"sampling_params is a {type(params).__name__}, expected SamplingParams or a list of "
            "them"
        )
    if len(params) != num:
        raise InvalidRequestError(f"{len(params)} sampling_params for {num} prompts")
    return params


def _token_ids(found: Iterable[object]) -> list[int]:
    """Any integers, NumPy's too, as ints; whether the model knows them is the engine's to say."""
    if isinstance(found, bytes | str):
        raise InvalidRequestError(f"token ids are {type(found).__name__}, expected integers")
    try:
        return [operator.index(token_id) for token_id in found]  # type: ignore[arg-type]
    except TypeError as error:
        raise InvalidRequestError(f"a prompt of token ids holds something else: {error}") from None


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


def _rates(submissions: Sequence[Submission], started: float) -> str:
    """Tokens per second so far, of the prompts that have begun and of what was generated."""
    seconds = max(time.monotonic() - started, 1e-9)
    num_prompt = num_new = 0
    for submission in submissions:
        for completion in submission.completions:
            num_new += len(completion.token_ids)
        if submission.completions[0].token_ids:
            num_prompt += len(submission.completions[0].request.prompt_token_ids)
    return f"in {num_prompt / seconds:.1f} tokens/s, out {num_new / seconds:.1f} tokens/s"
