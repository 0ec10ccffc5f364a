"""`EngineClient`: one engine's process, as the server sees it. Starts it, feeds it, outlives it.

Knows the process, its socket, what was given to it, and how to tell dead from busy. Does not know
HTTP. Everything here runs in the event loop's thread.

    starting --ready--> ready <--> stalled         a step longer than watchdog_timeout, and its end
        \\________________|____________/
                   the process ends: its requests fail, at once
                          |
                        down --back-off--> starting      at most max_restarts within an hour,
                          |                              then:
                        failed
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Final, Protocol

from pace_nb.errors import ApiError, PaceError
from pace_nb.sampling_params import SamplingParams
from pace_nb.server import frames, wire
from pace_nb.server.frames import Message
from pace_nb.server.limits import Limits
from pace_nb.server.mailbox import Mailbox, Progress

_log = logging.getLogger(__name__)

RECEIVE: Final = 2**18  # bytes read at a time
HOUR: Final = 3600.0
FIRST_BACK_OFF: Final = 0.5  # seconds; twice as much each time
LONGEST_BACK_OFF: Final = 60.0


class State(Enum):
    """Of an engine: see the module's picture."""

    STARTING = "starting"
    READY = "ready"
    STALLED = "stalled"
    DOWN = "down"
    FAILED = "failed"


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """What an engine's process needs to know.

    Attributes:
        model: Local directory.
        options: Fields of `EngineConfig` but the model.
        cpus: To be pinned to; None leaves that as it is.
        num_engines: That share the machine's memory.
        log_level, log_format: As in `logs.set_up`.
    """

    model: Path
    options: dict[str, Any] = field(default_factory=dict)
    cpus: list[int] | None = None
    num_engines: int = 1
    log_level: str = "WARNING"
    log_format: str = "text"


@dataclass(eq=False)
class Ticket:
    """A prompt that was given to an engine.

    Attributes:
        mailbox, prompt_index: Where its news goes.
        num_sequences: n.
        arrival_time: Of its HTTP request, `time.monotonic()`.
        submit_time: When the engine got it.
        started: Its first step has begun.
        begun: News has come.
        num_generated: Tokens of all its sequences so far.
        num_finished: Sequences that have ended.
    """

    request_id: str
    mailbox: Mailbox
    prompt_index: int
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    num_sequences: int
    arrival_time: float
    submit_time: float
    started: bool = False
    begun: bool = False
    num_generated: int = 0
    num_finished: int = 0


class Observer(Protocol):
    """Who is told what engines do: `metrics.py`."""

    def engine_state(self, engine: int, state: State) -> None: ...
    def engine_facts(self, engine: int, facts: dict[str, Any]) -> None: ...
    def step(self, engine: int, message: Message) -> None: ...
    def news(self, engine: int, ticket: Ticket, found: dict[str, Any]) -> None: ...
    def dropped(self, engine: int, ticket: Ticket, reason: str) -> None: ...


class EngineClient:
    """One engine.

    Args:
        index: Its number.
        options: What to start.
        limits: Of restarts and silence.
        observer: Who is told.
        on_change: Called after each change of state.

    Attributes:
        state: Where it is.
        facts: What the process said when it was ready.
        load: What it said last: EngineLoad's fields.
        fatal: Why it never came up, where the model or an option is wrong.
        num_sequences: That it has and has not finished.
        num_waiting_tokens: Of prompts that it has not begun.
    """

    def __init__(
        self,
        index: int,
        options: EngineOptions,
        limits: Limits,
        observer: Observer,
        on_change: Callable[[], None],
    ) -> None:
        self.index = index
        self.state = State.STARTING
        self.facts: dict[str, Any] = {}
        self.load: dict[str, Any] = {}
        self.fatal: str | None = None
        self.num_sequences = 0
        self.num_waiting_tokens = 0
        self._options = options
        self._limits = limits
        self._observer = observer
        self._on_change = on_change
        self._process: subprocess.Popen[bytes] | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._tickets: dict[str, Ticket] = {}
        self._ids = itertools.count()
        self._last_heard = time.monotonic()
        self._stopping = False
        self._task: asyncio.Task[None] | None = None

    @property
    def ready(self) -> bool:
        """It takes requests."""
        return self.state is State.READY

    @property
    def pid(self) -> int | None:
        """Of its process."""
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        """Start the process and watch over it, until `stop`."""
        self._task = asyncio.create_task(self._supervise(), name=f"engine {self.index}")

    async def stop(self) -> None:
        """End the process, and whatever it has."""
        self._stopping = True
        if self._writer is not None:
            self._writer.close()  # it sees the end of the socket and goes
        if self._task is not None:
            with contextlib.suppress(TimeoutError, asyncio.CancelledError):
                async with asyncio.timeout(1):
                    await asyncio.shield(self._task)
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        await self._reap()

    # ---- requests ----

    def submit(
        self,
        mailbox: Mailbox,
        prompt_index: int,
        prompt: str | None,
        prompt_token_ids: list[int],
        params: SamplingParams,
        *,
        cache_salt: str | None,
        priority: int,
        arrival_time: float,
    ) -> Ticket:
        """Give the engine a prompt; its news goes to the mailbox."""
        if not self.ready or self._writer is None:
            raise ApiError("the engine is not ready", status=503)
        ticket = Ticket(
            request_id=str(next(self._ids)),
            mailbox=mailbox,
            prompt_index=prompt_index,
            prompt=prompt,
            prompt_token_ids=prompt_token_ids,
            params=params,
            num_sequences=params.n,
            arrival_time=arrival_time,
            submit_time=time.monotonic(),
        )
        if not self._tickets:
            self._last_heard = ticket.submit_time  # until now it had nothing to say
        self._tickets[ticket.request_id] = ticket
        self.num_sequences += ticket.num_sequences
        self.num_waiting_tokens += len(prompt_token_ids)
        self._send(
            {
                "type": "add",
                "id": ticket.request_id,
                "token_ids": prompt_token_ids,
                "params": wire.params_to_json(params),
                "cache_salt": cache_salt,
                "priority": priority,
            }
        )
        return ticket

    def abort(self, ticket: Ticket) -> None:
        """End a request; one that has ended already, or of a process that is gone, is fine."""
        if self._remove(ticket):
            self._observer.dropped(self.index, ticket, "abort")
            self._send({"type": "abort", "id": ticket.request_id})

    def expire(self, now: float) -> None:
        """Fail what has waited longer than `queue_timeout` for its first step."""
        for ticket in list(self._tickets.values()):
            if not ticket.started and now - ticket.submit_time > self._limits.queue_timeout:
                self.abort(ticket)
                ticket.mailbox.fail(
                    ApiError(
                        f"the request waited for more than {self._limits.queue_timeout:g} s",
                        status=503,
                    )
                )

    def watch(self, now: float) -> None:
        """Tell a stalled step by the silence."""
        silent = now - self._last_heard
        busy = bool(self._tickets)
        if self.state is State.READY and busy and silent > self._limits.watchdog_timeout:
            _log.error("engine %d: a step has taken %.0f s, stacks follow", self.index, silent)
            if self._process is not None:
                self._process.send_signal(signal.SIGUSR1)  # every stack, on standard error
            self._change(State.STALLED)

    # ---- the process ----

    async def _supervise(self) -> None:
        deaths: deque[float] = deque()
        while not self._stopping:
            self._change(State.STARTING)
            try:
                await self._live()
            except OSError as error:
                _log.error("engine %d: %s", self.index, error)
            exit_code = await self._reap()
            self._drop_all()
            if self._stopping:
                return
            if self.fatal is not None and not self.facts:
                self._change(State.FAILED)
                return
            now = time.monotonic()
            while deaths and now - deaths[0] > HOUR:
                deaths.popleft()
            deaths.append(now)
            if len(deaths) > self._limits.max_restarts:
                _log.error(
                    "engine %d ended (%s) %d times within an hour: given up",
                    self.index, _cause(exit_code), len(deaths),
                )  # fmt: skip
                self._change(State.FAILED)
                return
            delay = min(FIRST_BACK_OFF * 2 ** (len(deaths) - 1), LONGEST_BACK_OFF)
            _log.error(
                "engine %d ended (%s), again in %.1f s", self.index, _cause(exit_code), delay
            )
            self._change(State.DOWN)
            await asyncio.sleep(delay)

    async def _live(self) -> None:
        """One life of the process: start it and read what it says, until it is gone."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs:
            self._process = _spawn(theirs)
        reader, self._writer = await asyncio.open_unix_connection(sock=ours)
        try:
            self._send(
                {
                    "type": "start",
                    "model": str(self._options.model),
                    "options": {**self._options.options, **self._memory()},
                    "num_engines": self._options.num_engines,
                    "cpus": self._options.cpus,
                    "log_level": self._options.log_level,
                    "log_format": self._options.log_format,
                }
            )
            decoder = frames.Decoder()
            while data := await reader.read(RECEIVE):
                self._last_heard = time.monotonic()
                for message in decoder.push(data):
                    self._hear(message)
        except (ConnectionError, ValueError) as error:
            _log.error("engine %d: %s", self.index, error)
        finally:
            self._writer.close()
            self._writer = None

    def _memory(self) -> dict[str, int]:
        """The KV cache of an engine's first life, for those that follow: what is free now says
        nothing while its neighbours are using theirs."""
        if self._options.num_engines == 1 or not self.facts:
            return {}
        return {"kv_cache_memory_bytes": self.facts["kv_cache_memory_bytes"]}

    async def _reap(self) -> int | None:
        """Make sure that the process is gone; its exit code."""
        process, self._process = self._process, None
        if process is None:
            return None
        try:  # it may be on its way out
            return await asyncio.to_thread(process.wait, 0.5)
        except subprocess.TimeoutExpired:
            process.kill()
            return await asyncio.to_thread(process.wait)

    def _hear(self, message: Message) -> None:
        kind = message["type"]
        if kind == "step":
            if self.state is State.STALLED:
                _log.warning("engine %d goes on", self.index)
                self._change(State.READY)
            self.load = message["load"]
            for request_id, (num_computed, num_tokens) in message.get("progress", {}).items():
                self._tell_progress(request_id, Progress(num_computed, num_tokens))
            for request_id, found in message.get("news", ()):
                self._tell_news(request_id, found)
            self._observer.step(self.index, message)
        elif kind == "accepted":
            ticket = self._tickets.get(message["id"])
            if ticket is not None:
                ticket.mailbox.accept()
        elif kind == "refused":
            ticket = self._tickets.get(message["id"])
            if ticket is not None:
                self._remove(ticket)
                ticket.mailbox.fail(ApiError(message["message"], status=message["status"]))
        elif kind == "ready":
            self.facts = message
            _log.info(
                "engine %d: %d threads; model in %.1f s, kernels in %.1f s (%d compiled); %s",
                self.index, message["num_threads"], message["loading_seconds"],
                message["kernel_seconds"], message["num_compiled"], message["kv_cache"],
            )  # fmt: skip
            self._observer.engine_facts(self.index, message)
            self._change(State.READY)
        elif kind == "failed":
            self.fatal = message["message"]
            _log.error("engine %d: %s", self.index, self.fatal)
        elif kind == "loading":
            _log.info("engine %d: the model is loaded, kernels follow", self.index)
        else:
            raise ValueError(f"a message of type {kind!r}")

    def _tell_progress(self, request_id: str, progress: Progress) -> None:
        ticket = self._tickets.get(request_id)
        if ticket is not None:
            self._begin(ticket)
            ticket.mailbox.progress[ticket.prompt_index] = progress

    def _tell_news(self, request_id: str, found: dict[str, Any]) -> None:
        ticket = self._tickets.get(request_id)
        if ticket is None:  # given up while the news was on its way
            return
        self._begin(ticket)
        if found["finished"]:
            self._remove(ticket)
        self._observer.news(self.index, ticket, found)
        ticket.begun = True
        output = wire.output_from_json(found, request_id, ticket.prompt, ticket.prompt_token_ids)
        ticket.mailbox.put(ticket.prompt_index, output)
        if ticket.mailbox.error is not None:
            self.abort(ticket)

    def _begin(self, ticket: Ticket) -> None:
        if not ticket.started:
            ticket.started = True
            self.num_waiting_tokens -= len(ticket.prompt_token_ids)

    def _remove(self, ticket: Ticket) -> bool:
        """Forget a ticket; False where that is done already."""
        if self._tickets.pop(ticket.request_id, None) is None:
            return False
        self._begin(ticket)
        self.num_sequences -= ticket.num_sequences
        return True

    def _drop_all(self) -> None:
        """The process is gone: its requests fail."""
        for ticket in list(self._tickets.values()):
            self._remove(ticket)
            self._observer.dropped(self.index, ticket, "error")
            ticket.mailbox.fail(ApiError("the engine stopped, please try again", status=503))
        self.load = {}

    def _send(self, message: Message) -> None:
        if self._writer is not None:
            self._writer.write(frames.encode(message))

    def _change(self, state: State) -> None:
        if state is not self.state:
            _log.info("engine %d: %s", self.index, state.value)
            self.state = state
        self._observer.engine_state(self.index, state)
        self._on_change()


def _spawn(end: socket.socket) -> subprocess.Popen[bytes]:
    """A fresh interpreter (never a fork: OpenMP does not survive one) that has the socket."""
    package = Path(__file__).resolve().parents[2]  # where a checkout that is not installed lies
    code = (
        f"import sys; sys.path.append({str(package)!r}); "
        f"from pace_nb.server.engine_process import main; sys.exit(main({end.fileno()}))"
    )
    try:
        return subprocess.Popen(  # noqa: S603 (our interpreter, our code)
            [sys.executable, "-P", "-c", code],
            stdin=subprocess.DEVNULL,
            pass_fds=[end.fileno()],
            start_new_session=True,  # Ctrl-C is for the server
        )
    except OSError as error:
        raise PaceError(f"the engine's process cannot be started: {error}") from error


def _cause(exit_code: int | None) -> str:
    """Why a process ended, in words."""
    if exit_code is not None and exit_code < 0:
        with contextlib.suppress(ValueError):
            return signal.Signals(-exit_code).name
    return f"exit code {exit_code}"
