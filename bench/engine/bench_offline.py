"""Latency of the whole engine on a model's shape, beside the rooflines of the same process.

    python -m bench.engine.bench_offline llama-3.2-1b qwen2-1.5b --checkpoints /tmp/checkpoints

Decode, batch 1 and 8: tokens/s against bytes of weights / DRAM read rate of the largest weight.
Prefill, 128 and 1024 tokens: tokens/s against the weights' FLOPs (the head's for one row only) /
register peak. vLLM's definitions: decode counts generated tokens after the first, prefill the time
to the first token. Start-up is loading, with the kernels' machine code in the cache.
"""

from __future__ import annotations

import argparse
import resource
import time
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from bench import timing
from bench.make_checkpoint import SHAPES, tensors_of, write
from pace_nb import LLM, SamplingParams
from pace_nb.kernels import jit, limits

ROUNDS = 5
DECODED = 24


def weights_of(name: str) -> tuple[int, int]:
    """Parameters that every token multiplies with, and those of the head, which only wanted rows
    do; an embedding alone is read by row."""
    matrices = {tensor: prod(shape) for tensor, shape in tensors_of(name) if len(shape) > 1}
    embeddings = {tensor: size for tensor, size in matrices.items() if "embed" in tensor}
    head = matrices.get("lm_head.weight", max(embeddings.values()))
    rest = sum(matrices.values()) - sum(embeddings.values()) - matrices.get("lm_head.weight", 0)
    return rest, head


def seconds(llm: LLM, prompts: list[list[int]], num_tokens: int) -> float:
    params = SamplingParams(max_tokens=num_tokens, temperature=0, ignore_eos=True)
    start = time.perf_counter()
    llm.generate(prompts, params, use_tqdm=False)
    return time.perf_counter() - start


def measure(name: str, directory: Path) -> list[dict[str, Any]]:
    if not (directory / "model.safetensors").exists():
        write(name, directory)
    rng = np.random.default_rng(0)
    start = time.perf_counter()
    rows = []
    with LLM(directory, max_model_len=1100, max_num_seqs=8) as llm:
        loaded = time.perf_counter() - start
        per_token, head = weights_of(name)
        num_weights = per_token + head
        buffer = np.ones(1 << 27, np.float32)  # 512 MiB

        def prompt(length: int) -> list[int]:
            return [int(t) for t in rng.integers(0, 999, length)]

        for length in (16, 128, 1024):  # compiles, and touches every page
            seconds(llm, [prompt(length)], 2)
        for batch in (1, 8):
            shares, rates, reads = [], [], []
            prompts = [prompt(16) for _ in range(batch)]
            for _ in range(ROUNDS):
                read = limits.dram_read_rate(buffer, repeats=2)
                step = (seconds(llm, prompts, DECODED + 1) - seconds(llm, prompts, 1)) / DECODED
                rates.append(batch / step)
                reads.append(batch * read / (2 * num_weights))
                shares.append(2 * num_weights / step / read)
            rows.append(row(f"{name} decode batch {batch}", rates, reads, shares))
        for length in (128, 1024):
            shares, rates, peaks = [], [], []
            for _ in range(ROUNDS):
                peak = limits.flop_peak()
                took, flops = seconds(llm, [prompt(length)], 1), 2 * (per_token * length + head)
                rates.append(length / took)
                peaks.append(length * peak / flops)
                shares.append(flops / took / peak)
            rows.append(row(f"{name} prefill {length}", rates, peaks, shares))
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"{name}: loaded in {loaded:.1f} s, peak RSS {memory:.2f} GB")
    return rows


def row(
    case: str, rates: list[float], roofline: list[float], shares: list[float]
) -> dict[str, Any]:
    """Tokens per second of the rounds, what they are held against, and their shares of it."""
    return {
        "case": case,
        "value": float(np.median(rates)),
        "unit": "tok/s",
        "limit": float(np.median(roofline)),
        "limit_unit": "tok/s",
        "share": float(np.median(shares)),
        "best": max(rates),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="+", choices=sorted(SHAPES))
    parser.add_argument(
        "--checkpoints", type=Path, required=True, help="a folder with some GB free"
    )
    options = parser.parse_args()
    for name in options.names:
        before = timing.preemptions()
        rows = measure(name, options.checkpoints / name)
        record = timing.preemptions() - before
        timing.record(f"offline_{name}", jit.num_threads(), rows, record)


if __name__ == "__main__":
    main()
