"""Definitions on answers whose times are known, and the keys that vLLM has."""

from __future__ import annotations

import asyncio

import pytest

from pace_nb.benchmarks import serve_result
from pace_nb.benchmarks.openai_client import Answer
from pace_nb.errors import PaceError

# What vllm 0.32's `bench serve --save-result --save-detailed` wrote of a run with --goodput,
# --max-concurrency and --percentile-metrics ttft,client_queue_time, after "max_concurrency".
VLLM_KEYS = """
duration completed failed total_input_tokens total_output_tokens request_throughput request_goodput
output_throughput total_token_throughput input_lens output_lens ttfts itls latencies start_times
queue_times generated_texts errors max_output_tokens_per_s max_concurrent_requests rtfx
mean_ttft_ms median_ttft_ms std_ttft_ms p50_ttft_ms p99_ttft_ms mean_client_queue_time_ms
median_client_queue_time_ms std_client_queue_time_ms p50_client_queue_time_ms
p99_client_queue_time_ms
""".split()


def answer(start, ttft, itl, tokens, **more):
    return Answer(
        10, start_time=100.0 + start, ttft=ttft, itl=itl, latency=ttft + sum(itl),
        output_tokens=tokens, generated_text="x", **more,
    )  # fmt: skip


ANSWERS = [
    answer(0.0, 0.5, [0.1, 0.3], 3),
    answer(0.2, 1.0, [0.6], 5, queue_time=0.25),  # two events, five tokens
    answer(1.5, 0.3, [], 1),
    Answer(10, start_time=101.0, error="503"),
]


def test_definitions():
    found = serve_result.result(
        ANSWERS, 4.0, metrics=("ttft", "tpot", "itl", "e2el"), percentiles=(50, 99.9)
    )
    assert (found["completed"], found["failed"]) == (3, 1)
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (30, 9)
    assert found["request_throughput"] == 0.75 and found["output_throughput"] == 2.25
    assert found["total_token_throughput"] == 39 / 4
    assert found["mean_ttft_ms"] == pytest.approx(600)
    assert found["median_ttft_ms"] == pytest.approx(500)
    assert found["mean_tpot_ms"] == pytest.approx(1000 * (0.4 / 2 + 0.6 / 4) / 2)  # no single token
    assert found["mean_itl_ms"] == pytest.approx(1000 / 3)
    assert found["mean_e2el_ms"] == pytest.approx(1000 * (0.9 + 1.6 + 0.3) / 3)
    assert found["p50_e2el_ms"] == pytest.approx(900)
    assert 1500 < found["p99.9_e2el_ms"] < 1600
    assert found["output_lens"] == [3, 5, 1, 0] and found["errors"] == ["", "", "", "503"]
    # events with tokens: 0.5 0.6 0.9 | 1.2 1.8 1.8 ; requests: seconds 0-0, 0-1, 1-1
    assert found["max_output_tokens_per_s"] == 3.0 and found["max_concurrent_requests"] == 2
    assert found["request_goodput"] is None


def test_goodput_wants_all_of_it():
    good = serve_result.result(ANSWERS, 4.0, goodput={"ttft": 600.0})["request_goodput"]
    assert good == 2 / 4
    limits = {"ttft": 600.0, "tpot": 100.0, "e2el": 1000.0}
    assert serve_result.result(ANSWERS, 4.0, goodput=limits)["request_goodput"] == 1 / 4


def test_keys_are_vllms():
    found = serve_result.result(
        ANSWERS, 4.0, metrics=("client_queue_time", "ttft"), percentiles=(50, 99),
        goodput={"ttft": 1.0}, max_concurrency=2,
    )  # fmt: skip
    assert list(found) == VLLM_KEYS
    assert found["mean_client_queue_time_ms"] == pytest.approx(250 / 3)
    names = ("e2el_including_client_queue", "client_queue_time")
    rated = serve_result.result(ANSWERS, 4.0, metrics=names, max_concurrency=2, request_rate=3.0)
    assert rated["mean_e2el_including_client_queue_ms"] == pytest.approx(1000 * 3.05 / 3)
    assert not [
        key
        for key in serve_result.result(ANSWERS, 4.0, metrics=names)
        if "queue_t" in key and "ms" in key
    ]


def test_nothing_succeeded():
    found = serve_result.result(ANSWERS[3:], 1.0)
    assert found["completed"] == 0 and found["mean_ttft_ms"] == found["p99_itl_ms"] == 0.0
    assert found["max_concurrent_requests"] == 0
    assert "Failed requests:                         1         " in serve_result.lines(found)


def test_the_summary_is_vllms():
    found = serve_result.result(ANSWERS, 4.0, percentiles=(99,), goodput={"ttft": 600.0})
    lines = serve_result.lines({**found, "max_concurrency": 8}, 10.0)
    assert lines[:6] == [
        "============ Serving Benchmark Result ============",
        "Successful requests:                     3         ",
        "Failed requests:                         1         ",
        "Maximum request concurrency:             8         ",
        "Request rate configured (RPS):           10.00     ",
        "Benchmark duration (s):                  4.00      ",
    ]
    assert "Output token throughput (tok/s):         2.25      " in lines
    assert "-----Time per Output Token (excl. 1st token)------" in lines
    assert "P99 TTFT (ms):                           990.00    " in lines
    assert lines[-1] == "=" * 50 and not [line for line in lines if "Speculative" in line]
    drafts = {
        "spec_decode_acceptance_rate": 50.0, "spec_decode_acceptance_length": 2.5,
        "spec_decode_num_drafts": 4, "spec_decode_draft_tokens": 12,
        "spec_decode_accepted_tokens": 6,
        "spec_decode_per_position_acceptance_rates": [0.75, 0.5, 0.25],
    }  # fmt: skip
    lines = serve_result.lines({**found, **drafts})
    assert "  Position 1:                            50.00     " in lines


class Client:
    def __init__(self, text):
        self.text = text

    async def get(self, path):
        assert path == "/metrics"
        if self.text is None:
            raise PaceError("404")
        return self.text.encode()


def read(text):
    return asyncio.run(serve_result.read_drafts(Client(text)))


COUNTERS = """
# HELP vllm:spec_decode_num_drafts_total x
vllm:spec_decode_num_drafts_total{engine="0",model_name="m"} 4.0
vllm:spec_decode_num_drafts_total{engine="1",model_name="m"} 2.0
vllm:spec_decode_num_draft_tokens_total{engine="0"} 20.0
vllm:spec_decode_num_accepted_tokens_total{engine="0"} 9.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",position="0"} 5.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="1",position="0"} 1.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",position="1"} 3.0
vllm:generation_tokens_total 7
"""


def test_drafts_are_read_off_the_servers_counters():
    assert read(None) is None and read("vllm:other_total 3\n") is None
    after = read(COUNTERS)
    assert after == serve_result.Drafts(6, 20, 9, {0: 6, 1: 3})
    assert read(COUNTERS.replace("vllm:", "pace_nb:")) == after
    before = serve_result.Drafts(2, 8, 3, {0: 2, 1: 1})
    assert serve_result.speculation(before, after) == {
        "spec_decode_acceptance_rate": 50.0,
        "spec_decode_acceptance_length": 1 + 6 / 4,
        "spec_decode_num_drafts": 4,
        "spec_decode_draft_tokens": 12,
        "spec_decode_accepted_tokens": 6,
        "spec_decode_per_position_acceptance_rates": [1.0, 0.5],
    }
    assert serve_result.speculation(after, after) == {}
    assert serve_result.speculation(None, after) == {}
