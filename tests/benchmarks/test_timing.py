"""Rounds are interleaved, the first does not count, and a share is taken within a round."""

from __future__ import annotations

import pytest

from pace_nb.benchmarks import timing
from pace_nb.benchmarks.timing import Timed


def test_runs_take_turns_and_the_first_round_does_not_count(monkeypatch):
    clock, log = [0.0], []

    def run(name, seconds):
        def body():
            log.append(name)
            clock[0] += seconds.pop(0)

        return body

    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    runs = {"a": run("a", [9.0, 1.0, 3.0, 2.0]), "b": run("b", [9.0, 5.0, 4.0, 6.0])}
    found = timing.interleave(runs, 3)
    assert log == ["a", "b"] * 4
    assert found["a"] == Timed(1.0, 2.0, [1.0, 3.0, 2.0])
    assert found["b"] == Timed(4.0, 5.0, [5.0, 4.0, 6.0])


def test_a_share_is_the_median_of_the_rounds_ratios():
    limit, measured = Timed(1, 2, [1.0, 2.0, 4.0]), Timed(2, 4, [2.0, 4.0, 4.0])
    assert timing.share(limit, measured) == 0.5
    assert timing.share(limit, measured, scale=2) == 1.0


def test_the_machine_is_named():
    facts = timing.machine(3)
    assert facts["threads"] == 3
    assert facts["cpu"] and facts["kernel"]
    assert timing.preemptions() >= 0


def test_cold_runs_find_other_memory_in_the_caches(monkeypatch):
    sums = []

    class Scrub:
        def sum(self):
            sums.append(1)

    monkeypatch.setattr(timing.np, "ones", lambda *_: Scrub())
    timing.interleave({"a": lambda: None, "b": lambda: None}, 2, cold=True)
    assert len(sums) == 6
    timing.interleave({"a": lambda: None}, 2)
    assert len(sums) == 6
    with pytest.raises(ZeroDivisionError):
        timing.interleave({"a": lambda: 1 / 0}, 1)
