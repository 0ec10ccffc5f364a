"""`Service`: what the routes of one server share: engines, tokenizer, metrics, what is under way.

Knows the whole of the server's process and its life: starting, serving, draining, gone. Does not
know HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Final, TypeVar

from pace_nb.errors import ApiError, PaceError
from pace_nb.openai_api.message_format import PLAIN, MessageFormat
from pace_nb.server.engine_client import EngineClient, EngineOptions, State
from pace_nb.server.mailbox import Mailbox
from pace_nb.server.metrics import Metrics
from pace_nb.server.router import Router
from pace_nb.server.settings import Settings
from pace_nb.server.topology import assign_cpus
from pace_nb.server.turns import Turns
from pace_nb.tokenizer import Tokenizer

TICK: Final = 1.0  # seconds between looks at what has taken too long
READER_THREADS: Final = 2  # that turn text into tokens

Result = TypeVar("Result")


class Service:
    """One server's engines and what stands around them.

    Args:
        settings: Of the server.
        engine: What to start, once for each engine; its CPUs are set here.
        max_num_seqs: Of one engine.

    Attributes:
        router, metrics, turns: As in their modules.
        created: Unix seconds of the start.
        message_format: How the model writes reasoning and tool calls.
        draining: No new requests are taken.
        failed: Set when no engine is left that could come back.
    """

    def __init__(self, settings: Settings, engine: EngineOptions, max_num_seqs: int) -> None:
        self.settings = settings
        self.model_directory = engine.model
        self.created = int(time.time())
        self.draining = False
        self.failed = asyncio.Event()
        num_engines = settings.data_parallel_size
        shares: list[list[int] | None] = [None]
        if num_engines > 1:
            shares = [*assign_cpus(num_engines)]
        self.metrics = Metrics(
            settings.metrics_prefix,
            settings.served_model_names[0],
            num_engines,
            lambda index: self.router.engines[index].pid,
        )
        seed = int(engine.options.get("seed", 0))
        engines = [
            EngineClient(
                index,
                replace(
                    engine,
                    cpus=cpus,
                    num_engines=num_engines,
                    options={**engine.options, "seed": seed + index},
                ),
                settings.limits,
                self.metrics,
                self._engine_changed,
            )
            for index, cpus in enumerate(shares)
        ]
        self.router = Router(engines, max_num_seqs, settings.limits)
        self.message_format = PLAIN
        self._tokenizer: Tokenizer | None = None
        self._readers = ThreadPoolExecutor(READER_THREADS, thread_name_prefix="reader")
        self.turns = Turns()
        self._mailboxes: set[Mailbox] = set()
        self._ticking: asyncio.Task[None] | None = None

    # ---- life ----

    async def start(self) -> None:
        """Begin to load; `ready` tells when that is done. PaceError for a tokenizer that is not
        there."""
        self._tokenizer = await self.in_reader(Tokenizer.from_directory, self.model_directory)
        self.message_format = MessageFormat.chosen(
            self.settings.reasoning_parser,
            self.settings.tool_call_parser,
            self._tokenizer.chat_template.templates,
        )
        for engine in self.router.engines:
            engine.start()
        self._ticking = asyncio.create_task(self._tick(), name="tick")

    async def stop(self) -> None:
        """End all engines."""
        if self._ticking is not None:
            self._ticking.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._ticking
        await asyncio.gather(*(engine.stop() for engine in self.router.engines))
        self._readers.shutdown(wait=False, cancel_futures=True)
        if self._tokenizer is not None:
            self._tokenizer.close()

    def fail_all(self, reason: str) -> None:
        """End every request that is under way with an error."""
        for mailbox in list(self._mailboxes):
            mailbox.fail(ApiError(reason, status=503))

    @property
    def ready(self) -> bool:
        """Requests are taken."""
        return not self.draining and bool(self.router.ready)

    @property
    def status(self) -> str:
        """Why it is not ready, in a few words; "ok" where it is."""
        if self.draining:
            return "Shutting down"
        if self.router.ready:
            return "ok"
        states = {engine.state for engine in self.router.engines}
        if State.STALLED in states:
            return "Engine stalled"
        first_time = all(not engine.facts for engine in self.router.engines)
        return "Loading model" if State.STARTING in states and first_time else "Engine down"

    @property
    def fatal(self) -> str | None:
        """Why no engine ever came up, where the model or an option is wrong."""
        return next((one.fatal for one in self.router.engines if one.fatal is not None), None)

    # ---- the model ----

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's. PaceError before `start` has read it."""
        if self._tokenizer is None:
            raise PaceError("the tokenizer is not loaded")
        return self._tokenizer

    @property
    def max_model_len(self) -> int | None:
        """Longest prompt and output together; None before an engine has said so."""
        return next(
            (int(one.facts["max_model_len"]) for one in self.router.engines if one.facts), None
        )

    @property
    def default_params(self) -> dict[str, object]:
        """What the model's generation_config.json suggests, as fields of SamplingParams."""
        return next((one.facts["default_params"] for one in self.router.engines if one.facts), {})

    async def in_reader(self, work: Callable[..., Result], *arguments: object) -> Result:
        """Run something slow, such as reading a long prompt, beside the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._readers, work, *arguments)

    # ---- requests ----

    def open_mailbox(self, num_prompts: int) -> Mailbox:
        """For a generation that begins; `close_mailbox` must follow."""
        most = self.settings.limits.max_mailbox_bytes
        mailbox = Mailbox(num_prompts, most, self.turns.call_soon)
        self._mailboxes.add(mailbox)
        return mailbox

    def close_mailbox(self, mailbox: Mailbox) -> None:
        """The generation has ended; twice is once."""
        self._mailboxes.discard(mailbox)

    @property
    def num_requests(self) -> int:
        """Generations under way."""
        return len(self._mailboxes)

    def _engine_changed(self) -> None:
        if all(engine.state is State.FAILED for engine in self.router.engines):
            self.failed.set()

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK)
            now = time.monotonic()
            for engine in self.router.engines:
                engine.watch(now)
                engine.expire(now)
