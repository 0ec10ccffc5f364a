"""Engines that die, hang, or never come up, in real processes."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time

import pytest

from pace_nb.errors import ApiError
from pace_nb.sampling_params import SamplingParams
from pace_nb.server.engine_client import EngineClient, EngineOptions, State
from pace_nb.server.limits import Limits
from pace_nb.server.mailbox import Mailbox


def gone(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    with open(f"/proc/{pid}/stat") as stat:  # a zombie that nobody has waited for
        return stat.read().rpartition(")")[2].split()[0] == "Z"


def test_R23_R24_R25_the_life_of_an_engine(start, waiting):
    """One server: its engine is killed while it streams, then hangs; then the server is killed."""
    server = start("--watchdog-timeout", "3").ready()
    (engine,) = server.engine_pids()

    connection, response = server.open_stream(max_tokens=1000, ignore_eos=True)
    assert response.status == 200 and response.read(6) == b"data: "
    os.kill(engine, signal.SIGKILL)
    events = response.read().decode().split("\n\n")
    assert json.loads(events[-3].removeprefix("data: "))["error"]["code"] == 503
    assert events[-2:] == ["data: [DONE]", ""]
    connection.close()
    assert server.get("/health").status == 503 and server.get("/health/live").status == 200
    refused = server.complete(max_tokens=1)
    assert refused.status == 503 and refused.headers["retry-after"] == "1"
    server.logged("engine 0 ended .SIGKILL., again in 0.5 s")

    waiting(lambda: server.get("/health").status == 200, 60, server.log)
    (again,) = server.engine_pids()
    assert again != engine and server.complete(max_tokens=2).status == 200
    assert server.metric("engine_deaths_total") == 1
    server.idle()

    os.kill(again, signal.SIGSTOP)  # hangs, as a kernel that never returns would
    connection = server.connection()
    connection.request(
        "POST", "/v1/completions", '{"prompt": "a"}', {"Content-Type": "application/json"}
    )
    waiting(lambda: server.get("/health").status == 503, 20, server.log)
    assert server.get("/health").error["message"] == "Engine stalled"
    assert server.metric("scheduler_stalls_total") >= 1
    os.kill(again, signal.SIGCONT)
    server.logged("engine 0 goes on")
    server.logged("most recent call first")  # SIGUSR1's stacks
    waiting(lambda: server.get("/health").status == 200, 10, server.log)
    assert connection.getresponse().status == 200  # late, and whole
    connection.close()

    server.process.kill()
    server.process.wait()
    waiting(lambda: gone(again), 5)


def test_R24_writing_the_stacks_does_no_harm(server):
    """Wherever the engine is: a handler that reads a stack half way into a call kills it."""
    (engine,) = server.engine_pids()
    connection, response = server.open_stream(max_tokens=900, ignore_eos=True)
    for _ in range(3000):
        os.kill(engine, signal.SIGUSR1)
        time.sleep(0.0003)
    events = response.read().decode().split("\n\n")
    connection.close()
    assert events[-2] == "data: [DONE]" and '"error"' not in events[-3]
    assert server.engine_pids() == [engine]
    server.logged("most recent call first")


class Silent:
    """An observer that remembers states."""

    def __init__(self):
        self.states = []

    def engine_state(self, engine, state):
        self.states.append(state)

    def engine_facts(self, engine, facts): ...
    def step(self, engine, message): ...
    def news(self, engine, ticket, found): ...
    def dropped(self, engine, ticket, reason):
        self.states.append(reason)


@pytest.fixture
def scripted(monkeypatch):
    """Engines whose process is a script of this test's."""

    def made(script, **limits):
        import socket
        import subprocess
        import sys

        def spawn(end: socket.socket):
            code = (
                "import socket, sys, json, time\n"
                "from pace_nb.server.frames import encode, Decoder\n"
                f"s = socket.socket(fileno={end.fileno()})\n"
                "say = lambda **m: s.sendall(encode(m))\n"
                "ready = lambda: say(type='ready', num_threads=1, num_compiled=0, kv_cache='',"
                " loading_seconds=0, kernel_seconds=0)\n"
                f"{script}\n"
            )
            return subprocess.Popen([sys.executable, "-c", code], pass_fds=[end.fileno()])

        monkeypatch.setattr("pace_nb.server.engine_client._spawn", spawn)
        monkeypatch.setattr("pace_nb.server.engine_client.FIRST_BACK_OFF", 0.01)
        observer = Silent()
        engine = EngineClient(0, EngineOptions(model="."), Limits(**limits), observer, lambda: None)
        return engine, observer

    return made


async def until(condition, seconds=20):
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


def submit(engine, mailbox):
    return engine.submit(
        mailbox, 0, None, [1, 2], SamplingParams(n=2),
        cache_salt=None, priority=0, arrival_time=time.monotonic(),
    )  # fmt: skip


def test_R23_an_engine_that_keeps_dying_is_given_up(scripted):
    async def main():
        engine, observer = scripted("ready(); sys.exit(3)", max_restarts=2)
        engine.start()
        await until(lambda: engine.state is State.FAILED)
        assert observer.states.count(State.READY) == 3  # the first life and two more
        assert observer.states.count(State.DOWN) == 2
        await engine.stop()

    asyncio.run(main())


def test_what_an_engine_refuses_to_load_is_not_tried_again(scripted):
    async def main():
        engine, observer = scripted("say(type='failed', message='no such dtype'); sys.exit(2)")
        engine.start()
        await until(lambda: engine.state is State.FAILED)
        assert engine.fatal == "no such dtype" and State.DOWN not in observer.states
        await engine.stop()

    asyncio.run(main())


def test_a_process_that_writes_nonsense_is_replaced(scripted):
    async def main():
        engine, _ = scripted(
            "ready(); s.sendall(b'\\0\\0\\0\\2{]'); time.sleep(60)", max_restarts=1
        )
        engine.start()
        await until(lambda: engine.state is State.FAILED)
        await engine.stop()

    asyncio.run(main())


def test_R23_requests_of_a_dead_engine_fail_and_are_forgotten(scripted):
    async def main():
        script = "ready(); d = Decoder()\nwhile not list(d.push(s.recv(99))): pass\ns.recv(999)"
        engine, observer = scripted(script, max_restarts=0)
        engine.start()
        await until(lambda: engine.ready)
        mailbox = Mailbox(1, 1000)
        ticket = submit(engine, mailbox)
        assert (engine.num_sequences, engine.num_waiting_tokens) == (2, 2)
        await asyncio.wait_for(mailbox.accepted.wait(), 20)
        assert mailbox.error.status == 503 and "try again" in str(mailbox.error)
        assert (engine.num_sequences, engine.num_waiting_tokens) == (0, 0)
        assert "error" in observer.states
        engine.abort(ticket)  # the request's own end comes later, and finds nothing
        assert engine.num_sequences == 0
        with pytest.raises(ApiError, match="not ready"):
            submit(engine, mailbox)
        await engine.stop()

    asyncio.run(main())


def test_R12_what_waits_too_long_is_refused(scripted):
    async def main():
        engine, observer = scripted("ready(); time.sleep(60)", queue_timeout=5.0)
        engine.start()
        await until(lambda: engine.ready)
        mailbox, begun = Mailbox(1, 1000), Mailbox(1, 1000)
        submit(engine, mailbox)
        submit(engine, begun).started = True
        engine.expire(time.monotonic() + 4)
        assert mailbox.error is None
        engine.expire(time.monotonic() + 6)
        assert mailbox.error.status == 503 and "waited for more than 5 s" in str(mailbox.error)
        assert begun.error is None and engine.num_sequences == 2
        assert observer.states[-1] == "abort"
        await engine.stop()

    asyncio.run(main())


def test_R25_only_an_engine_with_work_can_stall(scripted):
    async def main():
        engine, _ = scripted(
            "import signal; signal.signal(signal.SIGUSR1, lambda *_: say(type='step', load={}));"
            "ready()\nwhile True: time.sleep(60)",
            watchdog_timeout=10.0,
        )
        engine.start()
        await until(lambda: engine.ready)
        engine.watch(time.monotonic() + 1000)
        assert engine.state is State.READY  # idle, it has nothing to say
        submit(engine, Mailbox(1, 1000))
        engine.watch(time.monotonic() + 9)
        assert engine.state is State.READY
        engine.watch(time.monotonic() + 11)
        assert engine.state is State.STALLED and not engine.ready
        await until(lambda: engine.ready)  # the script answers the signal with a step
        await engine.stop()

    asyncio.run(main())


def test_a_stopped_engine_leaves_no_process(scripted):
    async def main():
        engine, _ = scripted("import signal; signal.signal(15, signal.SIG_IGN); time.sleep(60)")
        engine.start()
        await until(lambda: engine.pid is not None)
        pid = engine.pid
        start = time.monotonic()
        await engine.stop()
        assert gone(pid) and engine.pid is None and time.monotonic() - start < 5

    asyncio.run(main())
