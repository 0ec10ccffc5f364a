"""The engine's loop, by hand on a socketpair: what it says to what, and that it keeps nothing."""

from __future__ import annotations

import ast
import socket

import pytest

from pace_nb.llm import LLM
from pace_nb.sampling_params import SamplingParams
from pace_nb.server import frames, wire
from pace_nb.server.engine_process import Connection, EngineLoop, _share

GREEDY = {"temperature": 0.0, "max_tokens": 4, "ignore_eos": True}


@pytest.fixture(scope="module")
def llm():
    with LLM(kernels="reference", max_num_batched_tokens=32) as llm:
        yield llm


class Wires:
    """A loop and the server's end of its socket."""

    def __init__(self, llm):
        self.llm = llm
        self.ours, self.theirs = socket.socketpair()
        self.connection = Connection(self.theirs)
        self.loop = EngineLoop(llm, self.connection)
        self._decoder = frames.Decoder()

    def close(self):
        self.ours.close()
        self.theirs.close()

    def tell(self, **message):
        self.ours.sendall(frames.encode(message))
        for received in self.connection.receive(wait=True):
            self.loop._obey(received)

    def add(self, name, ids, **params):
        self.tell(
            type="add", id=name, token_ids=ids, params={**GREEDY, **params},
            cache_salt=None, priority=0,
        )  # fmt: skip

    def said(self):
        self.ours.setblocking(False)
        messages = []
        try:
            while data := self.ours.recv(2**20):
                messages += self._decoder.push(data)
        except BlockingIOError:
            pass
        return messages

    def until_idle(self):
        steps = []
        while self.loop._submissions:
            steps.append(self.loop._step())
        return steps


@pytest.fixture
def wires(llm):
    made = Wires(llm)
    yield made
    made.close()
    load = llm.get_load()
    assert (load.num_running, load.num_waiting, load.kv_cache_usage) == (0, 0, 0.0)
    assert not made.loop._ids and not made.loop._progress and not made.loop._submissions
    llm._engine._cache.check()


def test_a_request_is_accepted_and_its_news_is_what_generate_gives(wires, llm):
    prompt = llm.get_tokenizer().encode("Once upon a time")
    wires.add("a", prompt, n=2, logprobs=1, prompt_logprobs=0)
    assert wires.said() == [{"type": "accepted", "id": "a"}]
    whole = None
    for step in wires.until_idle():
        for name, found in step["news"]:
            assert name == "a"
            piece = wire.output_from_json(found, "a", None, prompt)
            if whole is None:
                whole = piece
            else:
                whole.add(piece)
    params = SamplingParams(**GREEDY, n=2, logprobs=1, prompt_logprobs=0)
    (expected,) = llm.generate([prompt], params, use_tqdm=False)
    assert sorted(whole.outputs, key=lambda one: one.index) == expected.outputs
    assert whole.prompt_logprobs == expected.prompt_logprobs and whole.finished


def test_what_cannot_be_served_is_refused_by_name_and_harms_nobody(wires):
    wires.add("good", [5, 6])
    for name, ids, params in [
        ("long", [5] * 2000, {}),
        ("unknown", [10**6], {}),
        ("empty", [], {}),
        ("sampling", [5], {"temperature": -1}),
        ("field", [5], {"no_such_field": 1}),
    ]:
        wires.add(name, ids, **params)
    accepted, *refused = wires.said()
    assert accepted["type"] == "accepted"
    assert [one["id"] for one in refused] == ["long", "unknown", "empty", "sampling", "field"]
    assert [one["status"] for one in refused] == [400, 400, 400, 400, 500]
    assert "1023" in refused[0]["message"] and "temperature" in refused[3]["message"]
    assert refused[4]["message"] == "the request could not be read"  # the log has the rest
    news = [one for step in wires.until_idle() for one in step["news"]]
    assert news[-1][1]["outputs"][0]["finish_reason"] == "length"


def test_R1_an_abort_frees_everything_before_the_next_step(wires, llm):
    wires.add("a", [5] * 20, max_tokens=100)
    wires.add("b", [6] * 20, max_tokens=3)
    wires.loop._step()
    used = llm.get_load().kv_cache_usage
    wires.tell(type="abort", id="a")
    load = llm.get_load()
    assert load.num_running == 1 and load.kv_cache_usage < used
    wires.tell(type="abort", id="a")  # twice, and
    wires.tell(type="abort", id="never")  # what never was
    steps = wires.until_idle()
    assert {name for step in steps for name, _ in step["news"]} == {"b"}


def test_R3_an_abort_while_it_waits_or_is_half_way_through_its_prompt(wires, llm):
    wires.add("half", list(range(100)))
    wires.loop._step()
    assert llm.get_load().num_running == 1 and llm.get_load().kv_cache_usage > 0
    wires.add("waits", [5])
    wires.tell(type="abort", id="waits")
    wires.tell(type="abort", id="half")
    assert llm.get_load()[:3] == (0, 0, 0.0)


def test_progress_of_a_long_prompt(wires):
    wires.add("long", list(range(100)), max_tokens=1)
    told = [step["progress"].get("long") for step in wires.until_idle()]
    assert told == [[32, 100], [64, 100], [96, 100], None]


def test_state_and_load_are_told_with_each_step(wires, llm):
    wires.add("a", [5] * 10, max_tokens=2)
    first = wires.loop._step()
    assert first["type"] == "step" and first["seconds"] > 0
    assert first["load"]["num_running"] == 1 and first["load"]["num_step_tokens"] == 10
    assert 0 < first["load"]["kv_cache_usage"] < 1
    wires.until_idle()
    assert wires.loop._state()["load"]["num_running"] == 0


def test_the_end_of_the_socket_ends_the_loop(llm):
    wires = Wires(llm)
    wires.ours.close()
    with pytest.raises(EOFError):
        wires.loop.run()
    wires.close()


def test_S8_nothing_that_unpickles_or_forks_is_imported(repository):
    banned = {"pickle", "marshal", "shelve", "multiprocessing", "zmq", "msgpack", "concurrent"}
    for path in sorted((repository / "pace_nb" / "server").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            for name in names:
                allowed = name == "concurrent.futures.ThreadPoolExecutor"
                assert allowed or name.split(".")[0] not in banned, f"{path}: {name}"


def test_engines_that_load_together_share_the_memory(monkeypatch, tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"0" * 100)
    (tmp_path / "b.safetensors").write_bytes(b"0" * 100)
    monkeypatch.setattr("pace_nb.kv_cache.budget.available_memory", lambda: 2400)
    assert _share(tmp_path, 4) == 300  # three quarters of 2400 - 4 * 200, in four parts
    monkeypatch.setattr("pace_nb.kv_cache.budget.available_memory", lambda: 500)
    assert _share(tmp_path, 4) == 1  # which the budget refuses, with the numbers
