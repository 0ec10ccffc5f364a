"""Latency of a batch and throughput of many requests, as `vllm bench` defines and reports them.

Knows `LLM`, random prompts and vLLM's JSON keys. Does not know arguments or terminals.

    latency      seconds of generate() for one batch of prompts that arrive together, repeated
    throughput   all prompts at once; (prompt + generated tokens) / seconds until the last is done

Source: vllm/benchmarks/latency.py and throughput.py of vLLM 0.32. The prompts are token ids below
10 000 drawn at random, tokens are sampled at temperature 1, and the end token is ignored.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from pace_nb.errors import ConfigError
from pace_nb.llm import LLM
from pace_nb.sampling_params import SamplingParams

PERCENTAGES = (10, 25, 50, 75, 90, 99)
LARGEST_TOKEN_ID = 10_000

Ticks = Callable[[Iterable[int]], Iterable[int]]
"""Hands on what it is given; a progress bar, for one."""


def random_prompts(llm: LLM, num: int, length: int, seed: int) -> list[list[int]]:
    """`num` prompts of `length` token ids."""
    most = min(LARGEST_TOKEN_ID, llm.forward([0]).shape[1])
    drawn = np.random.default_rng(seed).integers(0, most, (num, length))
    return [[int(token) for token in prompt] for prompt in drawn]


def sampling(output_len: int, n: int, detokenize: bool) -> SamplingParams:
    """vLLM's parameters for both."""
    return SamplingParams(
        n=n,
        temperature=1.0,
        top_p=1.0,
        seed=0,
        ignore_eos=True,
        max_tokens=output_len,
        detokenize=detokenize,
    )


def check_lengths(llm: LLM, input_len: int, output_len: int) -> None:
    """ConfigError where the model cannot take so many tokens."""
    if input_len + output_len > llm.max_model_len:
        raise ConfigError(
            f"--input-len {input_len} and --output-len {output_len}: together more than the "
            f"longest sequence, {llm.max_model_len} tokens"
        )


def latency(
    llm: LLM,
    *,
    input_len: int,
    output_len: int,
    batch_size: int,
    n: int = 1,
    num_iters_warmup: int,
    num_iters: int,
    detokenize: bool = True,
    seed: int = 0,
    ticks: Ticks = iter,
) -> list[float]:
    """Seconds of each of `num_iters` iterations, after `num_iters_warmup` that do not count."""
    check_lengths(llm, input_len, output_len)
    prompts = random_prompts(llm, batch_size, input_len, seed)
    params = sampling(output_len, n, detokenize)

    def seconds() -> float:
        start = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        return time.perf_counter() - start

    return [seconds() for _ in ticks(range(num_iters_warmup + num_iters))][num_iters_warmup:]


def latency_result(model_id: str, latencies: list[float]) -> dict[str, Any]:
    """vLLM's JSON."""
    percentiles = np.percentile(latencies, PERCENTAGES).tolist()
    return {
        "model_id": model_id,
        "avg_latency": float(np.mean(latencies)),
        "latencies": latencies,
        "percentiles": dict(zip(map(str, PERCENTAGES), percentiles, strict=True)),
    }


def throughput(
    llm: LLM,
    *,
    input_len: int,
    output_len: int,
    num_prompts: int,
    n: int = 1,
    num_warmups: int = 0,
    detokenize: bool = True,
    seed: int = 0,
) -> tuple[float, int, int]:
    """Seconds, prompt tokens and generated tokens of `num_prompts` requests that arrive at once."""
    check_lengths(llm, input_len, output_len)
    prompts = random_prompts(llm, num_warmups + num_prompts, input_len, seed)
    params = sampling(output_len, n, detokenize)
    if num_warmups:
        llm.generate(prompts[:num_warmups], params, use_tqdm=False)
    start = time.perf_counter()
    outputs = llm.generate(prompts[num_warmups:], params, use_tqdm=False)
    elapsed = time.perf_counter() - start
    generated = sum(len(one.token_ids) for output in outputs for one in output.outputs)
    return elapsed, num_prompts * input_len, generated


def throughput_result(
    model_id: str, num_prompts: int, elapsed: float, prompt_tokens: int, output_tokens: int
) -> dict[str, Any]:
    """vLLM's JSON."""
    total = prompt_tokens + output_tokens
    return {
        "model_id": model_id,
        "elapsed_time": elapsed,
        "num_requests": num_prompts,
        "total_num_tokens": total,
        "requests_per_second": num_prompts / elapsed,
        "tokens_per_second": total / elapsed,
    }
