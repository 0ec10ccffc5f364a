"""`pace-nb bench`: vLLM's flags, its output lines and its JSON."""

from __future__ import annotations

import json

import pytest

from pace_nb.benchmarks import kernels, startup
from pace_nb.benchmarks.startup import Start
from pace_nb.cli.main import main

FAST = ["--kernels", "reference", "--max-model-len", "48"]


def test_latency(tmp_path, capsys):
    path = tmp_path / "latency.json"
    arguments = ["--input-len", "4", "--output-len", "2", "--batch-size", "2", "--num-iters", "3"]
    arguments += ["--num-iters-warmup", "0", "--output-json", str(path)]
    arguments += ["--plot", str(tmp_path / "x.svg")]
    assert main(["bench", "latency", *FAST, *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    result = json.loads(path.read_text())
    assert lines[0] == f"Avg latency: {result['avg_latency']} seconds"
    assert lines[-1] == f"99% percentile latency: {result['percentiles']['99']} seconds"
    assert len(result["latencies"]) == 3
    assert "demo: 2 x 4 tokens in, 2 out" in (tmp_path / "x.svg").read_text()


def test_throughput(tmp_path, capsys):
    path = tmp_path / "throughput.json"
    arguments = ["--input-len", "4", "--output-len", "3", "--num-prompts", "2", "--n", "2"]
    assert main(["bench", "throughput", *FAST, *arguments, "--output-json", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    result = json.loads(path.read_text())
    assert result["total_num_tokens"] == 2 * 4 + 2 * 2 * 3
    assert lines[0].startswith(f"Throughput: {result['requests_per_second']:.2f} requests/s, ")
    assert lines[1:] == ["Total num prompt tokens:  8", "Total num output tokens:  12"]


def test_startup(tmp_path, capsys, monkeypatch):
    calls = []

    def starts(options, phase, num):
        calls.append((phase, num, options["kernels"], options["max_model_len"]))
        return iter([Start(1.0, 2.0, 3e9)] * num)

    monkeypatch.setattr(startup, "starts", starts)
    path = tmp_path / "startup.json"
    arguments = ["--num-iters-cold", "2", "--num-iters-warm", "1", "--output-json", str(path)]
    assert main(["bench", "startup", *FAST, *arguments]) == 0
    assert calls == [(p, n, "reference", 48) for p, n in (("cold", 2), ("warm", 1), ("warm", 1))]
    assert "Avg time to first token: 2.00 seconds\nAvg peak RSS: 3.00 GB" in capsys.readouterr().out
    result = json.loads(path.read_text())
    assert result["cold_startup_times"] == [1.0, 1.0]
    assert result["avg_warm_first_token_time"] == 2.0


def test_kernels(tmp_path, capsys, monkeypatch):
    row = {"case": "gemm M=1", "value": 20.0, "unit": "GB/s", "limit": 40.0, "limit_unit": "GB/s",
           "share": 0.5, "flops_per_byte": 1.0}  # fmt: skip
    asked = []

    def rows(directory, dtype):
        asked.append((directory.name, dtype))
        return iter([row])

    monkeypatch.setattr(kernels, "rows", rows)
    path, plot = tmp_path / "kernels.json", tmp_path / "kernels.svg"
    assert main(["bench", "kernels", "--output-json", str(path), "--plot", str(plot)]) == 0
    assert "20 GB/s" in (out := capsys.readouterr().out) and "50.0%" in out
    assert json.loads(path.read_text())["rows"] == [row]
    assert "gemm M=1: 50%" in plot.read_text()
    assert asked[0][1] == "bfloat16"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["latency", "--batch-size", "0"], "--batch-size: expected an integer from 1, got '0'"),
        (["latency", "--input-len", "9999"], "together more than the longest sequence"),
        (["latency", "--output-json", "/nowhere/x.json"], "/nowhere/x.json: no such folder"),
        (["latency", "--plot", "/nowhere/x.png"], "/nowhere/x.png: no such folder"),
        (["kernels", "--plot", "x.nothing"], "x.nothing: expected a name that ends in one of"),
        (["kernels", "--kernels", "reference"], "expected --kernels numba"),
        (["kernels", "--threads", "100000"], "--threads"),
        (["nothing"], "invalid choice"),
        ([], "required: KIND"),
    ],
)
def test_what_cannot_be_measured_is_one_line(arguments, message, capsys):
    try:
        code = main(["bench", *arguments])
    except SystemExit as end:
        code = end.code
    assert code == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
