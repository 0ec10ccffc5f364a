"""`LLM`: text in, text out. It owns the tokenizer and the engine.

Knows calls: what runs until when, and what is given back. Does not know how prompts are read
(prompts.py), how models are opened (text_model.py), schedules, caches, arrays or HTTP. The names
are vLLM's.

    LLM.generate     prompts -> list[RequestOutput], in order, when all are done
    LLM.chat         conversations -> the same
    LLM.stream       one prompt -> RequestOutputs that hold what is new, as it comes
    LLM.stream_chat  one conversation -> the same
    LLM.forward      token ids -> logits, for experiments
    LLM.submit, step, withdraw   the same piece by piece, for who runs many and decides when

Everything is checked before anything runs: one prompt of many that cannot be served raises
InvalidRequestError, and none has run. What fails later, such as NaN logits, ends its own completion
with finish_reason "error" and the reason as stop_reason. However a call ends, by Ctrl-C too, its
requests are out of the engine and their cache is free.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from pace_nb.compile_ahead import CompileAhead
from pace_nb.engine.completion import Submission
from pace_nb.engine.engine import Engine, EngineLoad
from pace_nb.engine.speculative import SpeculativeStats
from pace_nb.engine.submissions import Submissions
from pace_nb.errors import InvalidRequestError, PaceError
from pace_nb.kernels import jit
from pace_nb.outputs import RequestOutput
from pace_nb.prompts import (
    Messages,
    Prompt,
    PromptInput,
    as_conversations,
    as_prompts,
    as_token_ids,
)
from pace_nb.sampling_params import SamplingParams
from pace_nb.text_model import engine_config, open_model
from pace_nb.tokenizer import Tokenizer

Sampling = SamplingParams | Sequence[SamplingParams] | None
"""For all prompts, one for each, or None for the model's own (`get_default_sampling_params`)."""

# Prompts whose first step holds one long, one short and one single-token sequence, and whose next
# steps decode several sequences at once: every kernel, with every type of argument.
WARM_UP_LENGTHS = (40, 3, 1)


class LLM:
    """A model ready to generate. A context manager; `close` lets its memory go.

    To be used by one thread; `AsyncLLM` may be called from any.

    Args:
        model: Local directory, hub name, or None for the bundled demo model.
        **options: Fields of `EngineConfig`.

    Attributes:
        config: EngineConfig.
        directory: Where the model lies.
        max_model_len: Longest sequence, prompt and output together.
        num_kv_tokens: Tokens that the KV cache holds, all requests together.
        kv_cache_arithmetic: How the size of the KV cache came about, in one line.

    Raises:
        PaceError: of the kind that fits, when options, files or memory are not as they must be.
    """

    def __init__(self, model: str | Path | None = None, **options: Any) -> None:
        self.config = engine_config("LLM", model, options)
        self._text, engine = open_model(self.config)
        self.directory = self._text.directory
        self.max_model_len = self._text.max_model_len
        self.num_kv_tokens = engine.num_kv_tokens
        self.kv_cache_arithmetic = self._text.kv_cache_arithmetic
        self._engine: Engine | None = engine
        self._submissions: Submissions | None = Submissions(engine)

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
        inputs = [self._text.prompts.read(prompt) for prompt in as_prompts(prompts)]
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
        """Answer one conversation or many. options: those of `Tokenizer.encode_chat`, and vLLM's
        chat_template_kwargs, variables of the template such as {"enable_thinking": False}.

        cache_salt: as in `Prompt`, of all of them.

        Raises InvalidRequestError before anything runs when one of them cannot be served.
        """
        inputs = [
            self._text.prompts.read_chat(one, add_generation_prompt, cache_salt, **options)
            for one in as_conversations(messages)
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
        return self._stream(self._submission(self._text.prompts.read(prompt), sampling_params))

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
        read = self._text.prompts.read_chat(messages, add_generation_prompt, cache_salt, **options)
        return self._stream(self._submission(read, sampling_params))

    def submit(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        priority: int = 0,
    ) -> Submission:
        """Begin to complete a prompt: `step` brings it forward, its `news` and `output` tell.

        priority: lower runs first, with `scheduling_policy="priority"`. Raises InvalidRequestError
        where it cannot be served. It is out of the engine when it has finished, or by `withdraw`.
        """
        read = self._text.prompts.read(prompt)
        submission = self._submission(read, sampling_params, priority)
        self._running().begin(submission)
        return submission

    def step(self) -> list[Submission]:
        """One step of the engine, with whatever it runs; returns the submissions that moved."""
        return self._running().step()

    def withdraw(self, submission: Submission) -> None:
        """Take what is left of a submission out of the engine; twice is once."""
        if self._submissions is not None:
            self._submissions.withdraw(submission)

    def warm_up(self) -> None:
        """Compile or load every kernel of the model: prefill, decode, one sequence and several."""
        longest = self.max_model_len - 2
        prompts = [[0] * max(1, min(length, longest)) for length in WARM_UP_LENGTHS]
        params = SamplingParams(max_tokens=2, ignore_eos=True, detokenize=False, seed=0, logprobs=1)
        wanted = self.config.kernels == "numba"
        with CompileAhead(self.config.storage_dtype) if wanted else nullcontext() as ahead:
            self.generate([[0]], replace(params, temperature=0.0, logprobs=None), use_tqdm=False)
            if ahead is not None:
                ahead.wait()
            self.generate(prompts, params, use_tqdm=False)

    def get_load(self) -> EngineLoad:
        """How busy the engine is."""
        return self._open_engine().load()

    def get_speculative_stats(self) -> SpeculativeStats | None:
        """What speculation did so far; None without a speculative_config."""
        return self._open_engine().speculative_stats

    def forward(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """Logits f32[T, V] of all T tokens of one sequence, with no BOS added.

        Raises InvalidRequestError for ids or a length that the model cannot take.
        """
        engine = self._open_engine()
        with jit.compile_progress():
            return engine.forward(as_token_ids(token_ids))

    def get_tokenizer(self) -> Tokenizer:
        """The model's tokenizer. ModelFormatError where it has none."""
        return self._text.prompts.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What the model's generation_config.json suggests; vLLM's defaults for the rest."""
        return self._text.default_sampling_params()

    def get_suggested_sampling(self) -> dict[str, Any]:
        """Only what generation_config.json names, as fields of SamplingParams."""
        return self._text.suggested_sampling()

    def close(self) -> None:
        """End what runs and let model and cache go. Twice is once."""
        if self._submissions is not None:
            self._submissions.clear()
        self._engine = self._submissions = None
        self._text.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    # ---- from prompts to outputs ----

    def _submission(
        self, read: PromptInput, params: SamplingParams | None, priority: int = 0
    ) -> Submission:
        return self._text.submission(self._open_engine(), read, params, priority=priority)

    def _run(
        self, inputs: Sequence[PromptInput], params: Sequence[SamplingParams | None], use_tqdm: bool
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
            for submission in submissions:
                self._running().begin(submission)
            yield
        finally:
            for submission in submissions:
                self.withdraw(submission)

    def _running(self) -> Submissions:
        if self._submissions is None:
            raise PaceError("this LLM is closed")
        return self._submissions

    def _open_engine(self) -> Engine:
        if self._engine is None:
            raise PaceError("this LLM is closed")
        return self._engine


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
