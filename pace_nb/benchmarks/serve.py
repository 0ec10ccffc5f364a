"""Serving measured from a client's side, as `vllm bench serve` defines and reports it.

Knows what is sent, when, and how much at a time. Does not know where prompts come from
(datasets.py), HTTP (openai_client.py), what is made of the answers (serve_result.py) or arguments.

Arrivals: with a rate, the intervals are drawn from a gamma distribution of shape `burstiness` (1 is
a Poisson process, less is burstier, more is more even) and scaled so that the last request is due
at number / rate; without one everything is sent at once. A trace brings its own times.

Source: vllm/benchmarks/serve.py of vLLM 0.32.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np

from pace_nb.benchmarks.datasets import Sample
from pace_nb.benchmarks.openai_client import Answer, OpenAIClient
from pace_nb.errors import ConfigError, PaceError

READY_INTERVAL: Final = 5.0  # seconds between two tries while the server starts

# Called with each sample: the path, and the body to send there.
Question = Callable[[Sample], tuple[str, dict[str, Any]]]


class Mode(NamedTuple):
    """A name for a way to load a server; what the command line gives goes before it.

    request_rate is per second.
    """

    request_rate: float
    burstiness: float
    max_concurrency: int | None
    text: str


MODES: Final = {
    "realistic": Mode(1.0, 1.0, None, "requests arrive by chance, one each second"),
    "stress": Mode(4.0, 0.25, None, "four each second, in bursts: most intervals are short"),
    "throughput": Mode(math.inf, 1.0, None, "all at once"),
}


def question(
    kind: str,
    model: str,
    *,
    path: str,
    ignore_eos: bool,
    logprobs: int | None,
    extra_body: Mapping[str, Any],
) -> Question:
    """What vLLM's client sends. kind: "openai" (or "vllm") for completions, or "openai-chat"."""

    def body(sample: Sample) -> dict[str, Any]:
        if kind == "openai-chat":
            content = [{"type": "text", "text": sample.prompt}]
            return {
                "model": model,
                "messages": [{"role": "user", "content": content}],
                "max_completion_tokens": sample.output_len,
            }
        return {
            "model": model,
            "prompt": sample.prompt,
            "repetition_penalty": 1.0,
            "max_tokens": sample.output_len,
            "logprobs": logprobs,
        }

    more = {
        "stream": True,
        "stream_options": {"include_usage": True},
        **({"ignore_eos": True} if ignore_eos else {}),
        **extra_body,
    }
    return lambda sample: (path, {**body(sample), **more})


def arrival_times(num: int, request_rate: float, burstiness: float, seed: int) -> list[float]:
    """Seconds after the start at which each of `num` requests is due, vLLM's for the same seed.

    ConfigError for a rate or a burstiness that is not positive.
    """
    if not request_rate > 0 or not burstiness > 0:
        raise ConfigError(
            f"--request-rate {request_rate:g} and --burstiness {burstiness:g}: expected numbers "
            "above 0"
        )
    if math.isinf(request_rate):
        return [0.0] * num
    if math.isinf(burstiness):
        intervals = np.full(num, 1.0 / request_rate)
    else:
        scale = 1.0 / (request_rate * burstiness)
        intervals = np.random.RandomState(seed).gamma(burstiness, scale, num)
    times = np.cumsum(intervals)
    found: list[float] = (times * (num / request_rate / times[-1])).tolist()
    return found


def trace_times(samples: Sequence[Sample], request_rate: float) -> list[float]:
    """A trace's own times; with a rate, stretched so that this is their mean rate."""
    last = samples[-1].time
    stretch = 1.0 if math.isinf(request_rate) or not last else len(samples) / request_rate / last
    return [sample.time * stretch for sample in samples]


async def aligned(client: OpenAIClient, model: str, samples: list[Sample]) -> list[Sample]:
    """The samples, cut to their lengths by the server's own tokenizer where it counts otherwise.

    As they are where the server does not tell (no /tokenize).
    """

    async def tokens_of(sample: Sample) -> list[int]:
        body = {"model": model, "prompt": sample.prompt, "add_special_tokens": False}
        found: list[int] = (await client.post("/tokenize", body))["tokens"]
        return found

    async def cut(sample: Sample) -> Sample:
        ids = (await tokens_of(sample))[: sample.prompt_len]
        found = await client.post("/detokenize", {"model": model, "tokens": ids})
        return sample._replace(prompt=found["prompt"])

    try:
        if len(await tokens_of(samples[0])) == samples[0].prompt_len:
            return samples
        return [await cut(sample) for sample in samples]
    except (PaceError, ValueError, LookupError, TypeError):
        return samples


async def wait_until_ready(
    client: OpenAIClient, ask: Question, sample: Sample, timeout: float
) -> None:
    """Ask until an answer comes. PaceError with the last complaint after `timeout` seconds."""
    end = time.monotonic() + timeout
    while True:
        answer = await client.ask(*ask(sample), sample.prompt_len, "ready")
        if answer.success:
            return
        if time.monotonic() + READY_INTERVAL > end:
            raise PaceError(
                f"{client.base_url} gave no good answer in {timeout:g} s: {answer.error}"
            )
        await asyncio.sleep(READY_INTERVAL)


async def run(
    client: OpenAIClient,
    ask: Question,
    samples: Sequence[Sample],
    times: Sequence[float],
    *,
    max_concurrency: int | None = None,
    request_id_prefix: str = "bench-",
    on_done: Callable[[], object] = lambda: None,
) -> tuple[list[Answer], float]:
    """Send each sample when it is due, at most so many at a time; the answers, and the duration.

    on_done: called after each answer.
    """
    gate = asyncio.Semaphore(max_concurrency or len(samples))

    async def answered(index: int, sample: Sample) -> Answer:
        arrival = time.perf_counter()
        async with gate:
            path, body = ask(sample)
            answer = await client.ask(path, body, sample.prompt_len, f"{request_id_prefix}{index}")
        answer.queue_time = answer.start_time - arrival
        on_done()
        return answer

    start = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        tasks = []
        for index, (sample, due) in enumerate(zip(samples, times, strict=True)):
            wait = start + due - time.perf_counter()
            if wait > 0:
                await asyncio.sleep(wait)
            tasks.append(group.create_task(answered(index, sample)))
    duration = time.perf_counter() - start
    return [task.result() for task in tasks], duration
