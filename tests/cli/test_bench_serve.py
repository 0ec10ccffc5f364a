"""`pace-nb bench serve` against the real server, and the flags that people paste."""

from __future__ import annotations

import json

import pytest

from pace_nb.cli.main import main
from pace_nb.models import hub

FAST = ["--disable-tqdm", "--random-input-len", "12", "--random-output-len", "5"]


@pytest.fixture
def bench(server, capsys):
    """Runs it against the server; exit code and output."""

    def bench(*arguments):
        address = ["--host", server.host, "--port", str(server.port)]
        code = main(["bench", "serve", *address, *arguments])
        return code, capsys.readouterr().out

    return bench


def test_vllms_flags_give_vllms_json(bench, tmp_path):
    before = "--num-prompts 6 --max-concurrency 3 --request-rate 50 --burstiness 0.5 --seed 7"
    code, out = bench(
        *FAST, *before.split(), "--percentile-metrics", "ttft,tpot,itl,e2el,client_queue_time",
        "--metric-percentiles", "50,99", "--save-result", "--save-detailed", "--ignore-eos",
        "--result-dir", str(tmp_path / "new"), "--result-filename", "result.json",
        "--metadata", "machine=mine", "--goodput", "e2el:100000", "--plot", str(tmp_path / "p.svg"),
    )  # fmt: skip
    assert code == 0
    result = json.loads((tmp_path / "new" / "result.json").read_text())
    assert list(result)[:12] == [
        "date", "endpoint_type", "backend", "label", "model_id", "tokenizer_id", "num_prompts",
        "machine", "request_rate", "burstiness", "max_concurrency", "duration",
    ]  # fmt: skip
    assert (result["completed"], result["failed"]) == (6, 0)
    assert result["total_output_tokens"] == 30 and result["output_lens"] == [5] * 6
    assert result["total_input_tokens"] == sum(result["input_lens"])
    assert 60 <= sum(result["input_lens"]) <= 84  # 12 each, as far as the tokenizer allows
    assert result["request_goodput"] == result["request_throughput"] == 6 / result["duration"]
    starts = [start - result["start_times"][0] for start in result["start_times"]]
    assert starts == sorted(starts) and 0 < starts[-1] < 0.12 + 3
    assert all(0 < ttft < e2el for ttft, e2el in zip(result["ttfts"], result["latencies"]))  # noqa: B905
    assert result["p50_ttft_ms"] == result["median_ttft_ms"] > 0
    assert f"Request throughput (req/s):              {result['request_throughput']:<10.2f}" in out
    assert "Maximum request concurrency:             3" in out
    assert f"written to {tmp_path}/new/result.json" in out
    assert "pace-nb-demo: 6 requests, 50.0 per second" in (tmp_path / "p.svg").read_text()


def test_chats_and_appended_results(bench, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = [*FAST, "--backend", "openai-chat", "--num-prompts", "2", "--temperature", "0"]
    for _ in range(2):
        code, _ = bench(*arguments, "--append-result", "--result-filename", "all.jsonl")
        assert code == 0
    first, second = map(json.loads, (tmp_path / "all.jsonl").read_text().splitlines())
    assert first["completed"] == second["completed"] == 2
    assert first["request_rate"] == "inf" and "ttfts" not in first
    assert first["total_output_tokens"] == 10
    assert bench(*arguments, "--save-result", "--label", "mine", "--max-concurrency", "1")[0] == 0
    (file,) = tmp_path.glob("mine-infqps-concurrency1-pace-nb-demo-*.json")
    assert json.loads(file.read_text())["max_concurrency"] == 1


def test_a_trace_is_replayed_at_its_times(bench, tmp_path):
    path = tmp_path / "burst.csv"
    rows = [f"{time},GPT-4,{8 + i},4,0,x" for i, time in enumerate((3, 5, 5.1, 7))]
    path.write_text("Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n")
    path.write_text(path.read_text() + "\n".join(rows) + "\n")
    code, _ = bench(
        "--dataset-name", "burstgpt", "--dataset-path", str(path), "--num-prompts", "4",
        "--self-timed", "--request-rate", "10", "--disable-tqdm", "--save-detailed", "--ignore-eos",
        "--save-result", "--result-dir", str(tmp_path), "--result-filename", "r.json",
    )  # fmt: skip
    result = json.loads((tmp_path / "r.json").read_text())
    assert code == 0 and result["output_lens"] == [4] * 4
    starts = [start - result["start_times"][0] for start in result["start_times"]]
    assert starts == pytest.approx([0.0, 0.2, 0.21, 0.4], abs=0.1)  # 4 s of the trace in 0.4 s


def test_other_datasets_modes_and_warmups(bench, server, tmp_path):
    share = tmp_path / "share.json"
    turns = [{"value": "Tell me a story."}, {"value": "Once there was a cat."}]
    share.write_text(json.dumps([{"conversations": turns}]))
    count = 'http_requests_total{handler="/v1/completions",method="POST",status="200"}'
    before = server.metrics().get(count, 0)
    code, out = bench(
        "--dataset-name", "sharegpt", "--dataset-path", str(share), "--num-prompts", "2",
        "--output-len", "3", "--num-warmups", "3", "--mode", "stress", "--ready-check-timeout-sec",
        "5", "--disable-tqdm", "--tokenizer", str(hub.DEMO_MODEL),
    )  # fmt: skip
    assert code == 0 and "Successful requests:                     2 " in out
    assert "Request rate configured (RPS):           4.00" in out
    assert server.metrics()[count] - before == 2 + 3 + 1
    lines = tmp_path / "lines.jsonl"
    lines.write_text('{"prompt": "Hello.", "output_tokens": 2}\n')
    code, out = bench(
        "--dataset-name", "custom", "--dataset-path", str(lines), "--custom-output-len", "-1",
        "--num-prompts", "1", "--disable-tqdm", "--ignore-eos",
    )  # fmt: skip
    assert code == 0 and "Total generated tokens:                  2 " in out


def test_a_key_is_sent_and_never_shown(tight, capsys, monkeypatch, tmp_path):
    address = ["--base-url", f"http://{tight.host}:{tight.port}"]
    arguments = ["bench", "serve", *address, *FAST, "--num-prompts", "1"]
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert main(arguments) == 2
    assert "/v1/models: 401" in capsys.readouterr().err
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    saved = ["--save-result", "--result-dir", str(tmp_path), "--result-filename", "r"]
    assert main([*arguments, *saved]) == 0
    shown = capsys.readouterr()
    assert "secret" not in shown.out + shown.err + (tmp_path / "r").read_text()
    assert "Successful requests:                     1 " in shown.out


def test_what_a_server_guessed_is_in_the_report(drafting, capsys, tmp_path):
    arguments = ["--port", str(drafting.port), "--num-prompts", "2", "--temperature", "0"]
    saved = ["--save-result", "--result-dir", str(tmp_path), "--result-filename", "r"]
    assert main(["bench", "serve", *FAST[:-1], "40", *arguments, *saved]) == 0
    out, result = capsys.readouterr().out, json.loads((tmp_path / "r").read_text())
    assert result["spec_decode_num_drafts"] > 0
    rate = 100 * result["spec_decode_accepted_tokens"] / result["spec_decode_draft_tokens"]
    assert result["spec_decode_acceptance_rate"] == rate
    assert len(result["spec_decode_per_position_acceptance_rates"]) == 6
    assert f"Acceptance rate (%):                     {rate:<10.2f}" in out


def test_failures_are_counted_and_told(bench):
    code, out = bench(*FAST, "--num-prompts", "2", "--extra-body", '{"temperature": -1}')
    assert code == 1 and "Failed requests:                         2 " in out
    assert "2 requests failed; the first: 400 Bad Request: temperature" in out


def test_the_bar_counts_requests(server, capsys):
    address = ["--host", server.host, "--port", str(server.port)]
    assert main(["bench", "serve", *address, *FAST[1:], "--num-prompts", "2"]) == 0
    assert "2/2 [" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--base-url", "nowhere"], "expected an address such as"),
        (["--port", "1"], "http://127.0.0.1:1 cannot be reached"),
        (["--model", "m", "--tokenizer", "/no/such"], "no tokenizer for the prompts"),
        (["--dataset-name", "sharegpt"], "expected a --dataset-path"),
        (["--dataset-path", "x"], "--dataset-name random: expected no --dataset-path"),
        (["--self-timed"], "--self-timed: only with --dataset-name burstgpt"),
        (["--request-rate", "0"], "expected numbers above 0"),
        (["--percentile-metrics", "ttft,x"], "--percentile-metrics x: expected some of ttft,"),
        (["--metric-percentiles", "101"], "list of numbers from 0 to 100"),
        (["--goodput", "itl:3"], "NAME:MS with ttft, tpot or e2el"),
        (["--header", "x"], "--header 'x': expected KEY=VALUE"),
        (["--header", "a=b\r\nc: d"], "expected KEY=VALUE"),
        (["--num-prompts", "0"], "expected an integer from 1"),
        (["--max-concurrency", "0"], "expected an integer from 1"),
        (["--random-range-ratio", "1"], "--random-range-ratio"),
        (["--random-range-ratio", '{"input": 1}'], "--random-range-ratio"),
        (["--extra-body", "[]"], "expected a JSON object"),
    ],
)
def test_what_is_wrong_is_one_line(arguments, message, capsys):
    demo = [] if "--model" in arguments or "--port" in arguments else ["--model", "pace-nb-demo"]
    try:
        code = main(["bench", "serve", "--port", "1", *demo, *arguments])
    except SystemExit as end:
        code = end.code
    error = capsys.readouterr().err
    assert code == 2 and message in error and error.count("\n") == 1
