"""The arithmetic of a row: rates, the share, and FLOPs per byte, with a clock that is known."""

from __future__ import annotations

import numpy as np
import pytest

from pace_nb.benchmarks import limits, timing
from pace_nb.benchmarks.timing import Timed
from pace_nb.kernels.limits import Probe


@pytest.fixture
def half_as_fast(monkeypatch):
    """The probe takes 1 s for its amount, the run 2 s."""

    def interleave(runs, rounds=11, cold=False):
        for run in runs.values():
            run()
        seconds = {"run": 2.0}
        return {n: Timed(s, s, [s] * rounds) for n in runs for s in [seconds.get(n, 1.0)]}

    monkeypatch.setattr(timing, "interleave", interleave)


def test_a_row_holds_the_run_against_the_probe(half_as_fast):
    ran = []
    probe = Probe(lambda: ran.append("probe"), 8e9)
    row = limits.row("x", lambda: ran.append("run"), 4e9, probe, "GB/s", 3)
    assert ran == ["run", "probe"]
    assert (row["value"], row["limit"]) == (2.0, 8.0)
    assert row["share"] == pytest.approx(0.25), "4 GB would take the probe half a second of two"
    assert (row["best"], row["limit_best"]) == (2.0, 8.0)
    assert "flops_per_byte" not in row


def test_units_and_intensities(half_as_fast):
    buffer = np.ones(1 << 12, np.float32)
    row = limits.against_peak("x", lambda: None, 6e9, rounds=3, moved=2e9)
    assert (row["unit"], row["value"], row["flops_per_byte"]) == ("GFLOP/s", 3.0, 3.0)
    row = limits.against_read("x", lambda: None, 2e9, buffer, 3, flops=4e9)
    assert (row["unit"], row["value"], row["flops_per_byte"]) == ("GB/s", 1.0, 2.0)
    row = limits.against_copy("x", lambda: None, 2e9, 3, flops=1e9)
    assert (row["unit"], row["value"], row["flops_per_byte"]) == ("GB/s", 1.0, 0.5)
    assert "flops_per_byte" not in limits.against_peak("x", lambda: None, 6e9, rounds=3)


def test_the_better_reading_pattern_is_the_limit(monkeypatch):
    seconds = {"0": 3.0, "1": 1.0, "run": 2.0, "limit": 1.0}
    used = []

    def interleave(runs, rounds=11, cold=False):
        used.append(runs)
        return {n: Timed(seconds[n], seconds[n], [seconds[n]]) for n in runs}

    probes = [Probe(lambda: 0, 1e9), Probe(lambda: 1, 1e9)]
    monkeypatch.setattr(timing, "interleave", interleave)
    monkeypatch.setattr(limits, "read_probes", lambda buffer: probes)
    limits.against_read("x", lambda: None, 1e9, np.ones(4, np.float32), 1)
    assert used[1]["limit"]() == 1, "the second pattern took a third of the time of the first"
