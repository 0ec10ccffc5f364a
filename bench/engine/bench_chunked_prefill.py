"""What a long prompt does to the requests that are running: their time between tokens.

    python -m bench.engine.bench_chunked_prefill llama-3.2-1b --checkpoints /tmp/checkpoints

8 requests decode; a prompt of 4096 tokens comes in and is computed in pieces of at most --pieces
tokens a step (`long_prefill_token_threshold`), beside one token of each of the 8. A row holds the
median time between tokens without it against the one while it is computed: a share of 50 % is twice
the time. `slowest` is the longest step of all, `prompt_tokens_per_second` what the prompt got.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np

from bench import timing
from bench.make_checkpoint import SHAPES, write
from pace_nb import LLM, SamplingParams
from pace_nb.kernels import jit

RUNNING = 8
PROMPT = 4096
ALONE = 24  # steps without the prompt


def measure(directory: Path, piece: int) -> dict[str, Any]:
    rng = np.random.default_rng(0)

    def prompt(length: int) -> list[int]:
        return [int(t) for t in rng.integers(0, 999, length)]

    params = SamplingParams(max_tokens=PROMPT, temperature=0, ignore_eos=True, detokenize=False)
    with LLM(
        directory,
        max_model_len=2 * PROMPT,
        max_num_seqs=RUNNING + 1,
        long_prefill_token_threshold=piece,
    ) as llm:

        def step() -> float:
            begin = time.perf_counter()
            llm.step()
            return time.perf_counter() - begin

        llm.generate([prompt(piece)], SamplingParams(max_tokens=2), use_tqdm=False)  # compiles
        for _ in range(RUNNING):
            llm.submit(prompt(16), params)
        for _ in range(4):
            step()
        alone = [step() for _ in range(ALONE)]
        long = llm.submit(prompt(PROMPT), params)
        meanwhile = []
        while not long.completions[0].request.num_generated_tokens:
            meanwhile.append(step())
    before, during = float(np.median(alone)), float(np.median(meanwhile))
    return {
        "case": f"{RUNNING} running, pieces of {piece}",
        "value": 1e3 * during,
        "unit": "ms",
        "limit": 1e3 * before,
        "limit_unit": "ms",
        "share": before / during,
        "slowest": 1e3 * max(meanwhile),
        "prompt_tokens_per_second": PROMPT / sum(meanwhile),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=sorted(SHAPES))
    parser.add_argument("--checkpoints", type=Path, required=True)
    parser.add_argument("--pieces", type=int, nargs="+", default=[32])
    options = parser.parse_args()
    directory = options.checkpoints / options.name
    if not (directory / "model.safetensors").exists():
        write(options.name, directory)
    before = timing.preemptions()
    rows = [measure(directory, piece) for piece in options.pieces]
    record = timing.preemptions() - before
    timing.record(f"chunked_prefill_{options.name}", jit.num_threads(), rows, record)


if __name__ == "__main__":
    main()
