"""`pace-nb list`: one line per snapshot of the cache."""

from __future__ import annotations

from pathlib import Path

import pytest

from pace_nb.cli.main import main
from pace_nb.models import hub


def cached(name, refs, nbytes):
    return hub.CachedModel(name, "0123456789abcdef", refs, Path("/cache") / name, nbytes, 0.0)


@pytest.fixture
def two_models(monkeypatch):
    models = [cached("a/tiny", ("main",), 5_000_000), cached("some/longer-name", (), 2_500_000_000)]
    monkeypatch.setattr(hub, "list_cached", lambda: models)


def test_a_line_per_snapshot(capsys, two_models):
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["a/tiny", "0.01", "GB", "main"]
    assert lines[1].split() == ["some/longer-name", "2.50", "GB", "0123456789ab"]


def test_paths_on_request(capsys, two_models):
    assert main(["list", "--paths"]) == 0
    assert capsys.readouterr().out.splitlines()[0].endswith("main  /cache/a/tiny")


def test_an_empty_cache_prints_nothing_to_standard_output(capsys, monkeypatch):
    monkeypatch.setattr(hub, "list_cached", list)
    assert main(["list"]) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "pace-nb pull" in captured.err
