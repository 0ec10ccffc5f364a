"""The engine's own process: one thread reads the socket, steps the engine, and writes what came.

Knows `LLM`, frames, and the signals of a child. Does not know HTTP, keys or clients. It is started
by `engine_client.py`, which holds the other end of the socket.

Nothing here waits for a client: the server reads all that is written at once. Between two steps
the socket is read, so a request that is given up is out, and its cache free, before the next step.
Kernels are entered from one thread, always, and that is the one that speaks, so nothing is said
during a step; the server tells by the silence that a step has stalled. A second thread waits for
SIGUSR1 and then writes every stack to standard error: a kernel leaves it the interpreter.

    to the engine     {"type": "start", ...}    options, once
                      {"type": "add", "id", "token_ids", "params", "cache_salt", "priority"}
                      {"type": "abort", "id"}
    from the engine   {"type": "ready", ...}    or {"type": "failed", "message"}, and the end
                      {"type": "accepted", "id"}   or {"type": "refused", "id", "message", "status"}
                      {"type": "step", "news", "progress", "load", ...}

An exception that is no request's fault ends the process, and the server starts another.
"""

from __future__ import annotations

import ctypes
import faulthandler
import logging
import os
import select
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pace_nb.errors import InvalidRequestError, PaceError
from pace_nb.server import frames, logs, wire
from pace_nb.server.frames import Message

if TYPE_CHECKING:
    from pace_nb.engine.completion import Submission
    from pace_nb.llm import LLM

_log = logging.getLogger(__name__)

RECEIVE: Final = 2**18  # bytes read at a time
EXIT_FAILED: Final = 2  # the model or an option is wrong: another try would fail as well
PR_SET_PDEATHSIG: Final = 1  # prctl(2)


class Connection:
    """The engine's end of the socket, blocking."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        self._decoder = frames.Decoder()

    def receive(self, *, wait: bool) -> list[Message]:
        """The messages that have come; with `wait`, at least one. EOFError: the server is gone."""
        messages: list[Message] = []
        while True:
            block = wait and not messages
            readable, _, _ = select.select([self._socket], [], [], None if block else 0)
            if not readable:
                return messages
            data = self._socket.recv(RECEIVE)
            if not data:
                raise EOFError
            messages += self._decoder.push(data)

    def send(self, message: Message) -> None:
        """Write one message. EOFError: the server is gone."""
        try:
            self._socket.sendall(frames.encode(message))
        except (BrokenPipeError, ConnectionResetError) as error:
            raise EOFError from error


class EngineLoop:
    """Steps one `LLM` for as long as anything runs, and waits for messages when nothing does."""

    def __init__(self, llm: LLM, connection: Connection) -> None:
        self._llm = llm
        self._connection = connection
        self._submissions: dict[str, Submission] = {}  # unfinished, by the server's id
        self._ids: dict[Submission, str] = {}
        self._silent: set[str] = set()  # those whose prompt_logprobs were not told
        self._progress: dict[str, list[int]] = {}  # of those without a token; what was told last

    def run(self) -> None:
        """Until the server is gone (EOFError)."""
        while True:
            for message in self._connection.receive(wait=not self._submissions):
                self._obey(message)
            if self._submissions:
                self._connection.send(self._step())
            else:
                self._connection.send(self._state())

    def _obey(self, message: Message) -> None:
        if message["type"] == "add":
            self._add(message["id"], message)
        elif message["type"] == "abort":
            submission = self._submissions.get(message["id"])
            if submission is not None:
                self._llm.withdraw(submission)
                self._forget(submission)
        else:
            raise ValueError(f"a message of type {message['type']!r}, expected add or abort")

    def _add(self, request_id: str, message: Message) -> None:
        try:
            prompt: dict[str, Any] = {"prompt_token_ids": message["token_ids"]}
            if message["cache_salt"] is not None:
                prompt["cache_salt"] = message["cache_salt"]
            params = wire.params_from_json(message["params"])
            submission = self._llm.submit(prompt, params, priority=message["priority"])
        except Exception as error:  # whatever it is, it is this request's
            known = isinstance(error, PaceError)
            if not known:
                _log.exception("request %s failed while it was accepted", request_id)
            self._connection.send(
                {
                    "type": "refused",
                    "id": request_id,
                    "message": str(error) if known else "the request could not be read",
                    "status": 400 if isinstance(error, InvalidRequestError) else 500,
                }
            )
            return
        self._submissions[request_id] = submission
        self._ids[submission] = request_id
        self._progress[request_id] = [-1, -1]
        self._silent.add(request_id)
        self._connection.send({"type": "accepted", "id": request_id})

    def _step(self) -> Message:
        """One step, and all there is to tell about it."""
        start = time.perf_counter()
        moved = self._llm.step()
        seconds = time.perf_counter() - start
        news = []
        for submission in moved:
            output = submission.news()
            if output is None:
                continue
            request_id = self._ids[submission]
            # With the first completion's first tokens: by then the prompt is through.
            first = request_id in self._silent and any(one.index == 0 for one in output.outputs)
            if first:
                self._silent.discard(request_id)
            found = wire.output_to_json(output, first=first)
            if any(one.token_ids for one in output.outputs):
                self._progress.pop(request_id, None)
            if output.finished:
                found["num_preemptions"] = sum(
                    one.request.num_preemptions for one in submission.completions
                )
                self._forget(submission)
            news.append([request_id, found])
        return {
            **self._state(),
            "news": news,
            "progress": self._new_progress(),
            "seconds": seconds,
        }

    def _state(self) -> Message:
        from pace_nb.kernels import jit

        state: Message = {
            "type": "step",
            "load": self._llm.get_load()._asdict(),
            "num_compiled": jit.num_compiled(),
        }
        stats = self._llm.get_speculative_stats()
        if stats is not None:
            state["drafts"] = [
                stats.num_drafts,
                stats.num_draft_tokens,
                stats.num_accepted_tokens,
                *stats.num_accepted_tokens_per_pos,
            ]
        return state

    def _new_progress(self) -> dict[str, list[int]]:
        """[computed, all] tokens of prompts that run, where that has changed."""
        changed = {}
        for request_id, told in self._progress.items():
            request = self._submissions[request_id].completions[0].request
            now = [min(request.num_computed_tokens, request.num_prompt_tokens),
                   request.num_prompt_tokens]  # fmt: skip
            if now != told and request.metrics.first_scheduled_time is not None:
                changed[request_id] = self._progress[request_id] = now
        return changed

    def _forget(self, submission: Submission) -> None:
        request_id = self._ids.pop(submission)
        del self._submissions[request_id]
        self._progress.pop(request_id, None)
        self._silent.discard(request_id)


def main(descriptor: int) -> int:
    """Serve over the socket with this descriptor; the exit code."""
    _be_a_child()
    with socket.socket(fileno=descriptor) as end:
        connection = Connection(end)
        try:
            (start,) = connection.receive(wait=True)
            try:
                llm = _open(start, connection)
            except PaceError as error:
                connection.send({"type": "failed", "message": str(error)})
                return EXIT_FAILED
            with llm:
                EngineLoop(llm, connection).run()
        except EOFError:  # the server is gone, and so are all clients
            pass
    return 0


def _open(start: Message, connection: Connection) -> LLM:
    """The model, loaded, with every kernel compiled, and the server told."""
    logs.set_up(start["log_level"], start["log_format"])
    if start["cpus"] is not None:
        os.sched_setaffinity(0, start["cpus"])  # before Numba counts them
    from pace_nb.kernels import jit
    from pace_nb.llm import LLM

    begin = time.perf_counter()
    options = {**start["options"]}
    if start["num_engines"] > 1 and options.get("kv_cache_memory_bytes") is None:
        options["kv_cache_memory_bytes"] = _share(Path(start["model"]), start["num_engines"])
    llm = LLM(start["model"], **options)
    llm.get_default_sampling_params()  # refused here and not with each request
    loaded = time.perf_counter()
    connection.send({"type": "loading", "stage": "kernels"})
    llm.warm_up()
    ready = time.perf_counter()
    stats = llm.get_speculative_stats()
    connection.send(
        {
            "type": "ready",
            "max_model_len": llm.max_model_len,
            "num_kv_tokens": llm.num_kv_tokens,
            "kv_cache": llm.kv_cache_arithmetic,
            "kv_cache_memory_bytes": options.get("kv_cache_memory_bytes"),
            "default_params": llm.get_suggested_sampling(),
            "num_threads": jit.num_threads(),
            "num_compiled": jit.num_compiled(),
            "num_spec_tokens": 0 if stats is None else stats.num_spec_tokens,
            "loading_seconds": loaded - begin,
            "kernel_seconds": ready - loaded,
            "cache_config": {
                "block_size": llm.config.block_size,
                "cache_dtype": llm.config.storage_dtype,
                "enable_prefix_caching": llm.config.prefix_caching,
                "kv_cache": llm.config.kv_cache,
            },
        }
    )
    return llm


def _share(model: Path, num_engines: int) -> int:
    """Bytes for the KV cache of one of several engines that load at the same time.

    As for a single one (kv_cache/budget.py), but what is available has not been taken by the
    others yet: so much less their weights, in equal parts.
    """
    from pace_nb.kv_cache.budget import POOL_SHARE, available_memory

    weights = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    rest = available_memory() - num_engines * weights
    return max(1, int(POOL_SHARE * rest / num_engines))


def _be_a_child() -> None:
    """Signals are the server's to obey; when it is gone, so is this process, whatever it does."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    faulthandler.enable()
    # Not faulthandler.register: its handler reads the stack of a thread that it has interrupted
    # anywhere, and where that is half way into a call the engine dies of it (CPython 3.11).
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    threading.Thread(target=_write_stacks, name="stacks", daemon=True).start()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _write_stacks() -> None:
    """Every stack, on standard error, at each SIGUSR1."""
    while True:
        signal.sigwait({signal.SIGUSR1})
        faulthandler.dump_traceback()
