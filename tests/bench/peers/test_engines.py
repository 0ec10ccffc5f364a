"""A runner's process: asked, stopped, ended; what its end looks like from here."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from bench.peers import engines, install
from bench.peers.engines import Engine, Launch, machine_cpu_seconds
from bench.peers.protocol import Case

RUNNER = """
import sys
from bench.peers import protocol
answers = protocol.private_stdout()
print("a library says something")
def generate(prompts, output_len):
    if output_len == 9:
        sys.exit(1)
    return [min(output_len, 3)] * len(prompts)
protocol.serve(generate, 100, {"version": "fake"}, sys.stdin, answers)
"""


@pytest.fixture
def engine(tmp_path):
    with Engine("fake", Launch([sys.executable, "-c", RUNNER], {}), tmp_path / "log") as engine:
        yield engine


def state(engine):
    text = Path(f"/proc/{engine._process.pid}/status").read_text()
    return text.split("State:")[1].split()[0]


def test_asked_and_answered(engine, tmp_path):
    assert engine.facts == {"version": "fake"}
    assert 0 < engine.ask(Case(2, 3, 3)) < 1
    assert engine.ready_seconds > 0
    assert 1e6 < engine.peak_rss() < 1e9
    for _ in range(500):  # until it has used one tick of the clock
        if not engine.cpu_seconds():
            engine.ask(Case(2, 3, 3))
    assert 0 < engine.cpu_seconds() < 10
    assert engine.cpu_seconds() < machine_cpu_seconds()
    engine.close()
    assert "a library says something" in (tmp_path / "log").read_text()


def test_its_priority_is_what_was_asked(tmp_path):
    launch = Launch([sys.executable, "-c", RUNNER], {})
    with Engine("fake", launch, tmp_path / "log", nice=3) as engine:
        here = os.getpriority(os.PRIO_PROCESS, 0)
        assert os.getpriority(os.PRIO_PROCESS, engine._process.pid) == min(here + 3, 19)
        autogroup = Path(f"/proc/{engine._process.pid}/autogroup")
        assert not autogroup.exists() or autogroup.read_text().split()[-1] == "3"


def test_paused_it_uses_no_cpu(engine):
    engine.pause()
    while state(engine) != "T":
        pass
    engine.resume()
    assert engine.ask(Case(1, 1, 1)) > 0
    assert state(engine) != "T"


def test_closed_while_paused(engine):
    engine.pause()
    engine.close()
    assert engine._process.returncode == 0
    engine.close()  # twice is once


def test_a_wrong_answer_is_told(engine):
    with pytest.raises(RuntimeError, match=r"fake: .*generated \[3, 3\] tokens"):
        engine.ask(Case(2, 3, 4))


def test_an_end_is_told_with_the_log(engine, tmp_path):
    with pytest.raises(RuntimeError, match=r"fake ended; the last it said is in .*log"):
        engine.ask(Case(1, 1, 9))


def test_a_peer_that_is_not_installed_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"python -m bench\.peers\.install llama-cpp"):
        engines.launch("llama-cpp", tmp_path, tmp_path, tmp_path, [0])


@pytest.mark.parametrize("name", engines.NAMES)
def test_each_engine_gets_the_threads_and_its_weights(name, tmp_path):
    python = install.python_of(tmp_path, name)
    python.parent.mkdir(parents=True)
    python.touch()
    checkpoint, gguf = tmp_path / "weights", tmp_path / "weights.gguf"
    command, environment = engines.launch(name, checkpoint, gguf, tmp_path, [0, 3])
    assert str(gguf if name == "llama-cpp" else checkpoint) in command
    if name.startswith("vllm"):
        assert environment["VLLM_CPU_OMP_THREADS_BIND"] == "0,3"
        assert environment["LD_PRELOAD"].endswith(f"{name}/lib/libiomp5.so")
    else:
        assert command[-1] == "2"
