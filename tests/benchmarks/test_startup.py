"""A start is measured from outside; cold starts get a cache of their own, warm ones the user's."""

from __future__ import annotations

import pytest

from pace_nb.benchmarks import startup
from pace_nb.benchmarks.startup import Start
from pace_nb.errors import PaceError


def test_a_process_is_started_and_timed():
    found = startup.start({"kernels": "reference", "max_model_len": 32})
    assert 0 < found.startup < found.first_token < 60
    assert 3e7 < found.peak_rss < 3e9


def test_a_start_that_fails_says_why():
    with pytest.raises(PaceError, match=r"ended with 1: .*no-such-model"):
        startup.start({"model": "/no-such-model"})


def test_each_cold_start_has_an_empty_cache(monkeypatch):
    caches = []

    def start(options, cache=None):
        caches.append(cache)
        assert cache is None or (cache.is_dir() and not list(cache.iterdir()))
        return Start(1.0, 2.0, 3.0)

    monkeypatch.setattr(startup, "start", start)
    assert list(startup.starts({}, "cold", 2)) == [Start(1.0, 2.0, 3.0)] * 2
    assert len(set(caches)) == 2
    assert not any(cache.exists() for cache in caches)
    list(startup.starts({}, "warm", 1))
    assert caches[2] is None


def test_results_have_vllms_keys():
    result = startup.result("warm", [Start(1.0, 2.0, 10.0), Start(3.0, 4.0, 30.0)])
    assert result["avg_warm_startup_time"] == 2.0
    assert result["warm_startup_times"] == [1.0, 3.0]
    assert result["warm_startup_percentiles"]["50"] == 2.0
    assert result["avg_warm_first_token_time"] == 3.0
    assert result["avg_warm_peak_rss"] == 20.0
