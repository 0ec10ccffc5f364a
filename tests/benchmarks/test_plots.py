"""The roofline's arithmetic, and that each figure shows its rows."""

from __future__ import annotations

import builtins

import pytest

from pace_nb.benchmarks import plots
from pace_nb.errors import ConfigError


def row(case, value, limit, unit="GB/s", **more):
    return {"case": case, "value": value, "limit": limit, "unit": unit, "share": 0.5, **more}


ROWS = [
    row("M=1", 20.0, 40.0, flops_per_byte=1.0),
    row("M=8", 20.0, 45.0, flops_per_byte=8.0),
    row("M=1024", 400.0, 500.0, "GFLOP/s", flops_per_byte=300.0),
    row("no place", 1.0, 2.0),
]


def test_rates_become_gflops_by_their_intensity():
    assert plots.gflops(ROWS[1], "value") == 160.0
    assert plots.gflops(ROWS[2], "limit") == 500.0


def test_roofs_are_the_best_limits():
    assert plots.roofs(ROWS) == (45.0, 500.0)
    assert plots.roofs(ROWS[2:3]) == (None, 500.0)
    assert plots.roofs([]) == (None, None)


@pytest.mark.parametrize("rows", [ROWS, ROWS[:2], ROWS[2:]])
def test_a_roofline_names_the_rows_that_have_a_place(tmp_path, rows):
    path = tmp_path / "roof.svg"
    assert plots.roofline(rows, "a title", path)
    text = path.read_text()
    for one in rows:
        assert (f"<!-- {one['case']}: 50% -->" in text) == ("flops_per_byte" in one)
    assert "a title" in text


def test_no_roofline_without_intensities(tmp_path):
    path = tmp_path / "roof.svg"
    assert not plots.roofline(ROWS[3:], "x", path)
    assert not path.exists()


def test_shares_and_latencies_are_drawn(tmp_path):
    plots.shares(ROWS, "shares", tmp_path / "shares.svg")
    assert "no place" in (tmp_path / "shares.svg").read_text()
    plots.latencies([1.0, 3.0, 2.0], "latency", tmp_path / "latency.png")
    assert (tmp_path / "latency.png").read_bytes().startswith(b"\x89PNG")


def test_engines_are_relative_to_the_best_of_the_case(tmp_path):
    cases = [
        {"case": "decode", "unit": "tok/s", "median": {"pace_nb": 10.0, "other": 5.0}},
        {"case": "peak RSS", "unit": "GB", "median": {"other": 6.0}},
    ]
    plots.engines(cases, "peers", tmp_path / "peers.svg")
    text = (tmp_path / "peers.svg").read_text()
    assert "decode, tok/s" in text and "peak RSS, GB" in text and "pace_nb" in text


def test_an_unknown_ending_or_folder_is_refused(tmp_path):
    for path in (tmp_path / "x.nothing", tmp_path / "none" / "x.png"):
        with pytest.raises(ConfigError, match="the plot cannot be written"):
            plots.shares(ROWS, "x", path)


def test_without_matplotlib_the_extra_is_named(monkeypatch, tmp_path):
    real = builtins.__import__

    def refuse(name, *rest, **options):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ConfigError, match=r"pip install 'pace-nb\[bench\]'"):
        plots.shares(ROWS, "x", tmp_path / "x.png")


def test_serving_shows_what_succeeded(tmp_path):
    path = tmp_path / "serve.svg"
    result = {
        "errors": ["", "503", ""], "start_times": [50.0, 50.1, 51.5], "ttfts": [0.5, 0.0, 0.2],
        "itls": [[0.1, 0.2], [], []], "latencies": [0.8, 0.0, 0.2],
    }  # fmt: skip
    assert plots.serving(result, "two of three", path)
    text = path.read_text()
    for word in ("two of three", "TTFT", "ITL", "E2EL", "to the first token"):
        assert f"<!-- {word} -->" in text
    assert not plots.serving({**result, "errors": ["x"] * 3}, "none", tmp_path / "none.svg")
    assert not (tmp_path / "none.svg").exists()
