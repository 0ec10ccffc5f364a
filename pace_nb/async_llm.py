"""`AsyncLLM`: many conversations at once from asyncio, each an async iterator of outputs.

Knows asyncio: iterators, cancelling, and how news gets from the engine's thread into the event
loop. Does not know schedules, caches, arrays or HTTP. The names are vLLM's.

    async with AsyncLLM(model) as llm:
        async for output in llm.generate("Once upon a time", params, "request-0"):
            print(output.outputs[0].text)

An iterator that is closed or cancelled, or whose reader went away, ends its request: its room in
the cache is free before the engine's next step. A reader that is slower than the engine finds what
came meanwhile as one output; nothing is kept for it but that one.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

from pace_nb.engine.completion import Submission
from pace_nb.engine.engine import Engine
from pace_nb.engine.engine_thread import MAX_UNFINISHED, EngineThread
from pace_nb.errors import EngineClosedError
from pace_nb.outputs import RequestOutput
from pace_nb.prompts import Messages, Prompt, PromptInput
from pace_nb.sampling_params import RequestOutputKind, SamplingParams
from pace_nb.text_model import TextModel, engine_config, open_model
from pace_nb.tokenizer import Tokenizer


class AsyncLLM:
    """A model that serves many requests at once. `close` ends its thread and lets memory go.

    Args:
        model: Local directory, hub name, or None for the bundled demo model.
        max_unfinished: Completions that may wait or run; `generate` raises EngineBusyError beyond.
        **options: Fields of `EngineConfig`.

    Attributes:
        config: EngineConfig.
        directory: Where the model lies.
        max_model_len: Longest sequence, prompt and output together.
        kv_cache_arithmetic: How the size of the KV cache came about, in one line.

    Returns when the model is loaded. Raises PaceError, of the kind that fits, when options, files
    or memory are not as they must be.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        max_unfinished: int = MAX_UNFINISHED,
        **options: Any,
    ) -> None:
        self.config = engine_config("AsyncLLM", model, options)
        opened: list[tuple[TextModel, Engine]] = []

        def open_engine() -> Engine:
            opened.append(open_model(self.config))
            return opened[0][1]

        self._thread = EngineThread(open_engine, max_unfinished)
        self._text, engine = opened.pop()
        self._engine: Engine | None = engine  # to be asked only what every thread may ask
        self.directory = self._text.directory
        self.max_model_len = self._text.max_model_len
        self.kv_cache_arithmetic = self._text.kv_cache_arithmetic

    def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Complete one prompt; yields outputs of the kind that `sampling_params.output_kind` says.

        The last one has `finished` set; after `abort` its finish_reason is "abort". request_id:
        unique among unfinished ones; None makes one up. priority: lower runs first, with
        `scheduling_policy="priority"`.

        Raises InvalidRequestError for what cannot be served, EngineBusyError where too many wait,
        EngineClosedError after `close`; all with the first output that is asked for.
        """
        return self._outputs(
            lambda: self._text.prompts.read(prompt), sampling_params, request_id, priority
        )

    def chat(
        self,
        messages: Messages,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        add_generation_prompt: bool = True,
        cache_salt: str | None = None,
        **options: Any,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Answer one conversation, as `generate` does.

        cache_salt: as in `Prompt`. options: as in `LLM.chat`.
        """
        return self._outputs(
            lambda: self._text.prompts.read_chat(
                messages, add_generation_prompt, cache_salt, **options
            ),
            sampling_params,
            request_id,
            priority,
        )

    async def abort(self, request_id: str | Iterable[str]) -> None:
        """End a request, or several; their iterators get a last output. Unknown ids: nothing."""
        for one in [request_id] if isinstance(request_id, str) else request_id:
            self._thread.abort(one)

    def get_tokenizer(self) -> Tokenizer:
        """The model's tokenizer. ModelFormatError where it has none."""
        return self._text.prompts.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What the model's generation_config.json suggests; vLLM's defaults for the rest."""
        return self._text.default_sampling_params()

    @property
    def is_running(self) -> bool:
        """Whether it takes requests."""
        return self._thread.is_open

    def close(self, *, drain: bool = False) -> None:
        """End what runs (drain: after it has finished) and let model and cache go. Twice is once.

        Blocks; from a coroutine that others wait beside, use `await asyncio.to_thread(llm.close)`.
        """
        self._thread.close(drain=drain)
        self._engine = None
        self._text.close()

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await asyncio.to_thread(self.close)

    async def _outputs(
        self,
        read: Callable[[], PromptInput],
        params: SamplingParams | None,
        request_id: str | None,
        priority: int,
    ) -> AsyncGenerator[RequestOutput, None]:
        def submission() -> Submission:
            if self._engine is None:
                raise EngineClosedError("this AsyncLLM is closed")
            return self._text.submission(
                self._engine, read(), params, request_id=request_id, priority=priority
            )

        asked = await asyncio.to_thread(submission)  # a long prompt takes a while to tokenize
        kind = asked.completions[0].request.params.output_kind
        mailbox = _Mailbox(asyncio.get_running_loop())
        self._thread.submit(asked, mailbox.put)
        finished = False
        so_far: RequestOutput | None = None
        try:
            while not finished:
                news = await mailbox.get()
                finished = news.finished
                if kind is RequestOutputKind.DELTA:
                    yield news
                    continue
                if so_far is None:
                    so_far = news
                else:
                    so_far.add(news)
                if finished or kind is RequestOutputKind.CUMULATIVE:
                    yield so_far.copy()
        finally:
            if not finished:
                self._thread.abort(asked.request_id)


class _Mailbox:
    """One piece of news from the engine's thread to a coroutine. What comes before it was taken is
    added to it."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._lock = threading.Lock()
        self._news: RequestOutput | None = None
        self._there = asyncio.Event()

    def put(self, news: RequestOutput) -> None:
        """From the engine's thread. RuntimeError where the loop is closed."""
        with self._lock:
            if self._news is not None:
                self._news.add(news)
                return
            self._news = news
        self._loop.call_soon_threadsafe(self._there.set)

    async def get(self) -> RequestOutput:
        """What has come since the last call; waits until something has."""
        while True:
            await self._there.wait()
            with self._lock:
                news, self._news = self._news, None
                self._there.clear()
            if news is not None:
                return news
