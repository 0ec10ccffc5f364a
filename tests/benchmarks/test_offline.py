"""vLLM's definitions and keys; what is asked of the engine."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from pace_nb import LLM
from pace_nb.benchmarks import offline
from pace_nb.errors import ConfigError


class Recorded:
    """Stands for an LLM: counts what it is asked, and knows how long that took."""

    max_model_len = 100

    def __init__(self, clock):
        self.clock, self.calls = clock, []

    def forward(self, token_ids):
        return np.zeros((len(token_ids), 50), np.float32)

    def generate(self, prompts, params, use_tqdm):
        self.calls.append((len(prompts), params))
        self.clock[0] += 0.5 * len(self.calls)
        tokens = [0] * params.max_tokens
        completions = [SimpleNamespace(token_ids=tokens)] * params.n
        return [SimpleNamespace(outputs=completions) for _ in prompts]


@pytest.fixture
def recorded(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(offline.time, "perf_counter", lambda: clock[0])
    return Recorded(clock)


def test_latency_leaves_the_warmup_out(recorded):
    found = offline.latency(
        recorded, input_len=8, output_len=4, batch_size=3, num_iters_warmup=2, num_iters=3
    )
    assert found == [1.5, 2.0, 2.5]
    assert [num for num, _ in recorded.calls] == [3] * 5
    params = recorded.calls[0][1]
    assert (params.max_tokens, params.ignore_eos, params.temperature) == (4, True, 1.0)


def test_latency_has_vllms_keys():
    result = offline.latency_result("m", [1.0, 2.0, 3.0])
    assert set(result) == {"model_id", "avg_latency", "latencies", "percentiles"}
    assert result["avg_latency"] == 2.0
    assert list(result["percentiles"]) == ["10", "25", "50", "75", "90", "99"]
    assert result["percentiles"]["50"] == 2.0


def test_throughput_counts_prompts_and_every_completion(recorded):
    elapsed, prompt_tokens, output_tokens = offline.throughput(
        recorded, input_len=10, output_len=5, num_prompts=4, n=2, num_warmups=1, detokenize=False
    )
    assert [num for num, _ in recorded.calls] == [1, 4]
    assert (elapsed, prompt_tokens, output_tokens) == (1.0, 40, 40)
    assert not recorded.calls[1][1].detokenize
    result = offline.throughput_result("m", 4, 2.0, prompt_tokens, output_tokens)
    assert result == {
        "model_id": "m",
        "elapsed_time": 2.0,
        "num_requests": 4,
        "total_num_tokens": 80,
        "requests_per_second": 2.0,
        "tokens_per_second": 40.0,
    }


def test_prompts_are_of_the_vocabulary_and_by_seed(recorded):
    prompts = offline.random_prompts(recorded, 3, 40, 7)
    assert [len(prompt) for prompt in prompts] == [40] * 3
    assert 0 <= min(map(min, prompts)) and max(map(max, prompts)) < 50
    assert prompts == offline.random_prompts(recorded, 3, 40, 7)
    assert prompts != offline.random_prompts(recorded, 3, 40, 8)


@pytest.mark.parametrize("measure", [offline.latency, offline.throughput])
def test_too_many_tokens_are_refused_before_anything_runs(recorded, measure):
    own = {
        offline.latency: {"batch_size": 1, "num_iters_warmup": 0, "num_iters": 1},
        offline.throughput: {"num_prompts": 1},
    }[measure]
    with pytest.raises(ConfigError, match=r"--input-len 90 and --output-len 11: .* 100 tokens"):
        measure(recorded, input_len=90, output_len=11, **own)
    assert not recorded.calls


def test_on_the_bundled_model():
    with LLM(kernels="reference", max_model_len=32) as llm:
        _, prompt_tokens, output_tokens = offline.throughput(
            llm, input_len=4, output_len=2, num_prompts=2
        )
    assert (prompt_tokens, output_tokens) == (8, 4)
