"""A whole server that cannot start says why in one line, and with which code."""

from __future__ import annotations

import gc
import shutil
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest

import pace_nb
from pace_nb.server import run
from pace_nb.server.settings import Settings
from tests.servers import READY_SECONDS, Server


def fails(server):
    code = server.process.wait(60)
    return code, server.log().strip().splitlines()[-1]


def test_the_collector_leaves_what_lives_for_ever(monkeypatch):
    found = []

    class Service:
        fatal = None

        def __init__(self, *options): ...
        async def start(self): ...

    class HttpServer:
        exit_code = 0

        def __init__(self, app, service): ...
        async def serve(self, sockets):
            found.append(gc.get_freeze_count())

    monkeypatch.setattr(run, "Service", Service)
    monkeypatch.setattr(run, "HttpServer", HttpServer)
    monkeypatch.setattr(run, "create_app", lambda service: None)
    monkeypatch.setattr(run.logs, "set_up", lambda *options: None)
    before = gc.get_freeze_count()
    try:
        assert run.run(Settings(port=0), SimpleNamespace(), 1, "ERROR", "text") == 0
    finally:
        gc.unfreeze()
    assert found[0] > before + 10_000


def test_an_address_that_is_taken(start):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, line = fails(start("--port", str(port)))
    assert code == 2
    assert line == (
        f"pace-nb: error: cannot listen on 127.0.0.1 port {port}: Address already in use; "
        "--port N takes another one"
    )


def test_what_the_engine_refuses_is_the_servers_last_word(start):
    server = start("--max-model-len", "5000")
    code, line = fails(server)
    assert code == 2 and "Traceback" not in server.log()
    assert line.startswith("pace-nb: error: max_model_len is 5000")


def test_a_model_without_a_tokenizer(start, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(pace_nb.__path__[0] + "/demo", model)
    (model / "tokenizer.json").unlink()
    code, line = fails(start(str(model)))
    assert code == 2 and "tokenizer.json: missing" in line


def test_an_engine_that_dies_for_good_ends_the_server(start, waiting):
    import os
    import signal

    server = start("--max-engine-restarts", "0").ready()
    os.kill(server.engine_pids()[0], signal.SIGKILL)
    assert server.process.wait(30) == 1
    assert "given up" in server.log() and "Traceback" not in server.log()


def test_the_log_can_be_json(start):
    import json

    server = start("--log-format", "json").listening()
    lines = [json.loads(line) for line in server.log().splitlines()]
    assert any("serves pace-nb-demo (this machine only, no API key)" in x["message"] for x in lines)
    assert pytest.approx(lines[0]["time"], abs=3600) == __import__("time").time()


def test_R35_no_home_a_full_disk_for_the_log_and_a_locale_without_letters(waiting):
    """What it cannot write it leaves; what it answers does not hang on where it runs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"HOME": "/nonexistent", "LC_ALL": "C", "LANG": "C", "TZ": "nowhere/at/all"}
    server = Server(Path("/dev/full"), "--port", str(port), environment=place)
    server.port = port
    server.log = lambda: "(a full disk)"
    try:
        waiting(lambda: server.get("/health").status == 200, READY_SECONDS)
        answer = server.complete("Él dijo: 猫", max_tokens=3, echo=True)
        assert answer.json()["choices"][0]["text"].startswith("Él dijo: 猫")
        assert server.complete(max_tokens=-1).status == 400
    finally:
        assert server.stop() == 0
