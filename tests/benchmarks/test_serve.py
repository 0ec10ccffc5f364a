"""When requests are sent, what is sent, and that the right number is under way."""

from __future__ import annotations

import asyncio
import math

import numpy as np
import pytest

from pace_nb.benchmarks import serve
from pace_nb.benchmarks.datasets import Sample
from pace_nb.benchmarks.openai_client import Answer
from pace_nb.errors import ConfigError, PaceError

SAMPLES = [Sample(f"p{i}", 3, 5 + i, 2.0 * i) for i in range(4)]
# `get_request` of vllm 0.32, request_rate 10, burstiness 1, seed 0, 20 requests: seconds.
VLLM_TIMES = [
    0.107, 0.187, 0.254, 0.302, 0.392, 0.442, 0.633, 0.918, 0.959, 1.095, 1.160, 1.232, 1.456,
]  # fmt: skip


class Client:
    """Answers after `seconds`, and counts how many wait at a time."""

    base_url = "http://x"

    def __init__(self, seconds=0.02, errors=()):
        self.seconds, self.errors = seconds, list(errors)
        self.asked, self.num_waiting, self.most = [], 0, 0

    async def ask(self, path, body, prompt_len, request_id):
        answer = Answer(prompt_len, start_time=asyncio.get_running_loop().time())
        self.asked.append((path, body, request_id))
        self.num_waiting += 1
        self.most = max(self.most, self.num_waiting)
        await asyncio.sleep(self.seconds)
        self.num_waiting -= 1
        answer.error = self.errors.pop(0) if self.errors else ""
        return answer


def test_arrivals_are_vllms():
    times = serve.arrival_times(20, 10.0, 1.0, 0)
    assert np.array(times[1:14]) - times[0] == pytest.approx(VLLM_TIMES, abs=0.002)
    assert times[-1] == pytest.approx(2.0)  # scaled: the last is due at number / rate


@pytest.mark.parametrize("burstiness, spread", [(0.25, 2.0), (1.0, 1.0), (4.0, 0.5)])
def test_burstiness_is_the_shape_of_the_intervals(burstiness, spread):
    """A gamma distribution of shape b has a standard deviation of mean / sqrt(b)."""
    times = serve.arrival_times(20000, 5.0, burstiness, 1)
    intervals = np.diff([0.0, *times])
    assert intervals.mean() == pytest.approx(0.2)
    assert intervals.std() / intervals.mean() == pytest.approx(spread, rel=0.05)


def test_no_rate_is_all_at_once_and_an_infinite_burstiness_is_a_metronome():
    assert serve.arrival_times(3, math.inf, 1.0, 0) == [0.0] * 3
    assert serve.arrival_times(3, 2.0, math.inf, 0) == pytest.approx([0.5, 1.0, 1.5])
    for rate, burstiness in [(0, 1), (-1, 1), (1, 0), (math.nan, 1), (1, math.nan)]:
        with pytest.raises(ConfigError, match="expected numbers above 0"):
            serve.arrival_times(3, rate, burstiness, 0)


def test_a_trace_has_its_own_times_or_is_stretched():
    assert serve.trace_times(SAMPLES, math.inf) == [0.0, 2.0, 4.0, 6.0]
    assert serve.trace_times(SAMPLES, 2.0)[-1] == pytest.approx(4 / 2.0)
    assert serve.trace_times(SAMPLES[:1], 2.0) == [0.0]


def test_modes_differ_as_they_say():
    modes = serve.MODES
    assert modes["realistic"].burstiness == 1.0 and modes["realistic"].request_rate < math.inf
    assert modes["stress"].burstiness < 1.0
    assert modes["stress"].request_rate > modes["realistic"].request_rate
    assert math.isinf(modes["throughput"].request_rate)


def test_bodies_are_vllms():
    options = {"ignore_eos": True, "logprobs": None, "extra_body": {"temperature": 0.0}}
    path, body = serve.question("openai", "m", path="/v1/completions", **options)(SAMPLES[1])
    assert (path, body) == ("/v1/completions", {
        "model": "m", "prompt": "p1", "repetition_penalty": 1.0, "max_tokens": 6, "logprobs": None,
        "stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True,
        "temperature": 0.0,
    })  # fmt: skip
    options = {"ignore_eos": False, "logprobs": None, "extra_body": {}}
    path, body = serve.question("openai-chat", "m", path="/v1/chat/completions", **options)(
        SAMPLES[0]
    )
    assert body == {
        "model": "m", "messages": [{"role": "user", "content": [{"type": "text", "text": "p0"}]}],
        "max_completion_tokens": 5, "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip


def ask(sample):
    return "/p", {"prompt": sample.prompt}


def test_each_is_sent_when_it_is_due():
    client, done = Client(), []
    times = [0.0, 0.1, 0.1, 0.25]
    answers, duration = asyncio.run(
        serve.run(client, ask, SAMPLES, times, on_done=lambda: done.append(1))
    )
    starts = [one.start_time - answers[0].start_time for one in answers]
    assert starts == pytest.approx(times, abs=0.05) and starts[3] >= 0.24
    assert 0.27 <= duration < 0.5 and len(done) == 4 and client.most == 2
    assert [one[2] for one in client.asked] == [f"bench-{i}" for i in range(4)]


def test_no_more_at_a_time_than_asked_for():
    client = Client(0.05)
    answers, duration = asyncio.run(
        serve.run(client, ask, SAMPLES, [0.0] * 4, max_concurrency=2, request_id_prefix="x")
    )
    assert client.most == 2 and duration >= 0.1
    assert [one[1]["prompt"] for one in client.asked] == ["p0", "p1", "p2", "p3"]
    waited = [one.start_time - answers[0].start_time for one in answers]
    assert waited[3] >= 0.04


def test_waiting_for_a_server(monkeypatch):
    monkeypatch.setattr(serve, "READY_INTERVAL", 0.01)
    client = Client(0.0, ["loading", "loading"])
    asyncio.run(serve.wait_until_ready(client, ask, SAMPLES[0], 5.0))
    assert len(client.asked) == 3
    with pytest.raises(PaceError, match=r"no good answer in 0\.05 s: down"):
        asyncio.run(serve.wait_until_ready(Client(0.0, ["down"] * 99), ask, SAMPLES[0], 0.05))


class Tokens:
    """A server whose tokens are words."""

    def __init__(self, there=True):
        self.there = there

    async def post(self, path, body):
        if not self.there:
            raise PaceError("404")
        if path == "/tokenize":
            assert body["add_special_tokens"] is False
            return {"tokens": body["prompt"].split()}
        return {"prompt": " ".join(body["tokens"])}


def test_prompts_are_cut_where_the_server_counts_otherwise():
    samples = [Sample("a b c d", 3, 1), Sample("a b", 3, 1)]
    cut = asyncio.run(serve.aligned(Tokens(), "m", samples))
    assert [one.prompt for one in cut] == ["a b c", "a b"]
    same = [Sample("a b c", 3, 1), Sample("a b c d", 3, 1)]
    assert asyncio.run(serve.aligned(Tokens(), "m", same)) == same  # the first one tells
    assert asyncio.run(serve.aligned(Tokens(False), "m", samples)) == samples
