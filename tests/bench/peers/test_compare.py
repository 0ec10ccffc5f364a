"""Definitions, ratios and the order of rounds, with engines whose times are known."""

from __future__ import annotations

import itertools
import json
from contextlib import contextmanager

import pytest

from bench.peers import compare
from bench.peers.compare import compared, decode, interleave, merged, prefill, throughput
from bench.peers.protocol import Case


class Scripted:
    """Takes 1 ms per prompt token and `step` seconds for every step after the first."""

    def __init__(self, name="", step=0.1, log=None):
        self.name, self.step, self.log = name, step, [] if log is None else log
        self.cases, self.busy = [], 0.0

    def cpu_seconds(self):
        return 0.0

    def ask(self, case):
        self.log.append(self.name)
        self.cases.append(case)
        return 0.001 * case.batch * case.input_len + self.step * (case.output_len - 1)

    def resume(self):
        self.log.append(f"{self.name} goes on")

    def pause(self):
        self.log.append(f"{self.name} stops")


def test_prefill_is_length_over_time_to_first_token():
    engine = Scripted()
    assert prefill(128).measure(engine, 5) == pytest.approx(1000)
    assert engine.cases == [Case(1, 128, 1, 5)]


@pytest.mark.parametrize("batch", [1, 8])
def test_decode_leaves_the_first_token_out(batch):
    engine = Scripted(step=0.25)
    assert decode(batch).measure(engine, 2) == pytest.approx(batch / 0.25)
    assert engine.cases == [Case(batch, 16, 1, 2), Case(batch, 16, 25, 3)]


def test_decode_is_asked_again_where_one_token_took_longer():
    class Disturbed(Scripted):
        def ask(self, case):
            return super().ask(case) + (9.0 if len(self.cases) == 1 else 0.0)

    engine = Disturbed(step=0.25)
    assert decode(1).measure(engine, 2) == pytest.approx(4)
    assert len(engine.cases) == 4
    backwards = Scripted(step=-1.0)
    with pytest.raises(RuntimeError, match="decode batch 1: the machine is too busy"):
        decode(1).measure(backwards, 2)


def test_throughput_counts_prompt_and_output():
    seconds = 0.001 * 4 * 10 + 0.1 * 4
    assert throughput(4, 10, 5).measure(Scripted(), 1) == pytest.approx(4 * 15 / seconds)


@pytest.fixture
def others(monkeypatch):
    """What others use in each turn, in CPUs; a turn takes one second."""
    shares, state = [], {"used": 0.0, "reads": 0}
    now = itertools.count()

    def machine():
        state["reads"] += 1
        if state["reads"] % 2 == 0 and shares:
            state["used"] += shares.pop(0)
        return state["used"]

    monkeypatch.setattr(compare.engines, "machine_cpu_seconds", machine)
    monkeypatch.setattr(compare.time, "perf_counter", lambda: next(now))
    return shares


def test_engines_take_turns_and_only_one_runs(others):
    log = []
    running = {name: Scripted(name, step, log) for name, step in (("a", 0.1), ("b", 0.2))}

    @contextmanager
    def round_of():
        log.append("quiet")
        yield
        log.append("busy")

    done = interleave(running, prefill(10), 2, itertools.count(), round_of)
    turn = [f"{n} goes on|{n}|{n}|{n} stops".split("|") for n in "ab"]
    assert log == ["quiet", *turn[0], *turn[1], "busy"] * 3, "one unmeasured round and two"
    assert [list(turns) for turns in done] == [["a", "b"]] * 2
    seeds = [case.seed for engine in running.values() for case in engine.cases]
    assert len(set(seeds)) > len(seeds) // 2, "prompts are new in every turn"


def rounds_of(disturbed, rounds, others):
    """The disturbances of the rounds that count, and how many were done."""
    others += disturbed
    engine = Scripted()
    done = interleave({"a": engine}, prefill(10), rounds, itertools.count())
    asked = sum(case.input_len == 10 for case in engine.cases)
    return [round(turns["a"].disturbed, 3) for turns in done], asked


def test_a_disturbed_round_is_done_again(others):
    found = rounds_of([0.9, 0.01, 0.5, 0.02], 2, others)
    assert found == ([0.01, 0.02], 4), "the first is unmeasured, the third does not count"


def test_after_a_while_the_least_disturbed_rounds_count(others):
    disturbed = [0.0, 0.9, 0.3, 0.8, 0.2, 0.7, 0.6]
    assert rounds_of(disturbed, 2, others) == ([0.3, 0.2], 7)


def test_ratios_are_taken_within_a_round():
    rounds = {"pace_nb": [10.0, 40.0, 30.0], "slow": [5.0, 10.0, 10.0], "fast": [10.0, 20.0, 60.0]}
    row = compared("decode batch 1", "tok/s", rounds)
    assert row["median"] == {"pace_nb": 30, "slow": 10, "fast": 20}
    assert row["ratio"] == {"slow": 3.0, "fast": 1.0, "best peer": 1.0}
    assert row["ratio_of_bests"] == {"slow": 4.0, "fast": 40 / 60, "best peer": 40 / 60}


def test_the_best_peer_may_change_from_round_to_round():
    row = compared("x", "tok/s", {"pace_nb": [6.0] * 3, "a": [1.0, 3.0, 2.0], "b": [2.0, 1.0, 3.0]})
    assert row["ratio"]["best peer"] == 2.0  # 6/2, 6/3, 6/3


@pytest.mark.parametrize("unit", ["s", "GB"])
def test_less_is_better_for_seconds_and_memory(unit):
    row = compared("peak RSS", unit, {"pace_nb": [2.0, 2.0], "a": [6.0, 4.0], "b": [8.0, 8.0]})
    assert row["best"] == {"pace_nb": 2.0, "a": 4.0, "b": 8.0}
    assert row["ratio"] == {"a": 2.5, "b": 4.0, "best peer": 2.5}


@pytest.mark.parametrize("rounds", [{"a": [1.0]}, {"pace_nb": [1.0]}])
def test_no_ratio_without_two_sides(rounds):
    assert "ratio" not in compared("x", "tok/s", rounds)


def test_a_run_replaces_only_what_it_measured():
    def result(**cases):
        rows = [{"case": case.replace("_", " "), "median": m} for case, m in cases.items()]
        return {"engines": {"a": {}}, "cases": rows}

    old = result(peak_RSS=1, decode_batch_1=2)
    new = {**result(decode_batch_1=3, prefill_128=4), "engines": {"b": {}}}
    both = merged(old, new)
    found = [(row["case"], row["median"]) for row in both["cases"]]
    assert found == [("prefill 128", 4), ("decode batch 1", 3), ("peak RSS", 1)]
    assert both["engines"] == {"a": {}, "b": {}}
    assert merged(None, new) == new


def test_record_keeps_the_cases_of_earlier_runs(tmp_path, capsys):
    path = tmp_path / "peers.json"
    for case in ("decode batch 1", "decode batch 8"):
        row = compared(case, "tok/s", {"pace_nb": [2.0], "a": [1.0]})
        compare.record(path, "tiny", {"engines": {}, "cases": [row]}, [0, 1])
    content = json.loads(path.read_text())
    assert [row["case"] for row in content["cases"]] == ["decode batch 1", "decode batch 8"]
    assert content["machine"]["threads"] == 2
    assert "a 2.00" in capsys.readouterr().out
    compare.record(path, "another", {"engines": {}, "cases": [row]}, [0])
    assert [row["case"] for row in json.loads(path.read_text())["cases"]] == ["decode batch 8"]
