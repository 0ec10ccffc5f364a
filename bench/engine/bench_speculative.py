"""What speculation gains: tokens per second against acceptance, and what rows of verification cost.

    python -m bench.engine.bench_speculative --model /tmp/checkpoints/llama-3.2-1b
    python -m bench.engine.bench_speculative --demo

With `--model`, a checkpoint of random weights: nobody can guess what it says, so a scripted drafter
knows (it was told by a run without speculation) and errs on purpose, each guess with probability
1 - acceptance. It costs nothing, so this is what verification allows, not what a draft would give.
With `--demo`, the bundled model and its PARD draft, on beginnings of stories (notebooks/demo_model/
continuations.py, a seed that training did not use, none of them among those it did): the whole
price is paid.

`rows`: seconds of a step of one request with 1 and with 13 rows, alternating.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench import timing
from bench.engine.bench_offline import row
from pace_nb import LLM, SamplingParams
from pace_nb.engine.request import Request
from pace_nb.engine.speculative import Draft
from pace_nb.kernels import jit

K = 12
ROUNDS = 3
ACCEPTANCES = (0.5, 0.8, 1.0)
ROOT = Path(__file__).resolve().parents[2]
HELD_BACK_SEED = 999


class Foreseeing:
    """Guesses what the requests said last time, wrong with probability 1 - acceptance."""

    def __init__(self) -> None:
        self.futures: dict[tuple[int, ...], list[int]] = {}  # by prompt
        self.acceptance = 1.0
        self._random = np.random.default_rng(0)

    def propose(self, requests: Sequence[Request], limits: Sequence[int]) -> list[Draft]:
        """See `speculative.Drafter`."""
        drafts = []
        for request, limit in zip(requests, limits, strict=True):
            done = request.num_generated_tokens
            coming = self.futures.get(tuple(request.prompt_token_ids), [])[done : done + limit]
            held = self._random.random(len(coming)) < self.acceptance
            drafts.append(
                Draft(
                    [one if ok else (one + 1) % 999 for one, ok in zip(coming, held, strict=True)]
                )
            )
        return drafts

    def forget(self, request: Request) -> None:
        """Nothing is kept."""


def timed(llm: LLM, prompts: list[list[int]], num_tokens: int) -> tuple[float, list[list[int]]]:
    """Seconds after the first step, and what was said."""
    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    running = [llm.submit({"prompt_token_ids": one}, params) for one in prompts]
    llm.step()
    begun = time.perf_counter()
    while not all(one.finished for one in running):
        llm.step()
    return time.perf_counter() - begun, [one.output().outputs[0].token_ids for one in running]


def scripted(directory: Path, batches: Sequence[int], num_tokens: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    random, drafter = np.random.default_rng(1), Foreseeing()
    speculative = {"method": "ngram", "num_speculative_tokens": K, "adaptive": False}
    with LLM(
        directory, max_model_len=256, max_num_seqs=max(batches), speculative_config=speculative
    ) as llm:
        llm.warm_up()
        speculation = llm._open_engine()._speculation
        assert_drafting(speculation)
        speculation._drafter = drafter
        for batch in batches:
            prompts = [random.integers(0, 999, 16).tolist() for _ in range(batch)]
            drafter.futures = {}
            _, said = timed(llm, prompts, num_tokens)
            futures = {tuple(p): tokens for p, tokens in zip(prompts, said, strict=True)}
            plain_rates: list[float] = []
            rates: dict[float, list[float]] = {acceptance: [] for acceptance in ACCEPTANCES}
            for _ in range(ROUNDS):
                drafter.futures = {}
                plain_rates.append(batch * (num_tokens - 1) / timed(llm, prompts, num_tokens)[0])
                drafter.futures = futures
                for drafter.acceptance in ACCEPTANCES:
                    took, again = timed(llm, prompts, num_tokens)
                    if again != said:
                        raise RuntimeError("speculation changed what was said")
                    rates[drafter.acceptance].append(batch * (num_tokens - 1) / took)
            for acceptance, found in rates.items():
                ratios = [one / plain for one, plain in zip(found, plain_rates, strict=True)]
                case = f"K={K} acceptance {acceptance} batch {batch}"
                rows.append(row(case, found, plain_rates, ratios))
                print(rows[-1], flush=True)
            if batch == 1:
                rows.append(cost_of_rows(llm, drafter, prompts, futures))
                print(rows[-1], flush=True)
    return rows


def cost_of_rows(
    llm: LLM, drafter: Foreseeing, prompts: list[list[int]], futures: dict[tuple[int, ...], Any]
) -> dict[str, Any]:
    """Milliseconds of a step of 13 rows beside one of 1 row, of one request."""
    ones, many, ratios = [], [], []
    for _ in range(3):
        drafter.futures = {}
        one = timed(llm, prompts, 9)[0] / 8
        drafter.futures, drafter.acceptance = futures, 1.0
        block = timed(llm, prompts, 1 + 2 * (K + 1))[0] / 2
        ones.append(1e3 * one)
        many.append(1e3 * block)
        ratios.append(block / one)
    found = row(f"{K + 1} rows beside 1", many, ones, ratios)
    return {**found, "unit": "ms/step", "limit_unit": "ms/step", "best": min(many)}


def demo(num_prompts: int, num_tokens: int) -> list[dict[str, Any]]:
    sys.path.insert(0, str(ROOT / "notebooks" / "demo_model"))
    from continuations import beginnings, trained_on

    drawn, known, texts = beginnings(HELD_BACK_SEED), trained_on(), []
    while len(texts) < num_prompts:
        text = next(drawn)
        if text not in known and text not in texts:
            texts.append(text)
    rows, said = [], {}
    for batch in (1, 4, 16):
        taken = texts[: max(num_prompts // 2, batch)] if batch == 1 else texts
        rates: dict[bool, list[float]] = {False: [], True: []}
        for guessing in (False, True):
            speculative = {"method": "pard", "num_speculative_tokens": 8, "adaptive": False}
            with LLM(
                max_model_len=512, max_num_seqs=batch, kv_cache_memory_bytes=1 << 26,
                speculative_config=speculative if guessing else None,
            ) as llm:  # fmt: skip
                tokenizer = llm.get_tokenizer()
                prompts = [
                    {"prompt_token_ids": tokenizer.encode(one, add_special_tokens=False)}
                    for one in taken
                ]
                params = SamplingParams(temperature=0, max_tokens=num_tokens)
                llm.generate(prompts[:batch], params, use_tqdm=False)  # compiles
                begun = time.perf_counter()
                outputs = llm.generate(prompts, params, use_tqdm=False)
                took = time.perf_counter() - begun
                tokens = [one.outputs[0].token_ids for one in outputs]
                rates[guessing].append(sum(map(len, tokens)) / took)
                if said.setdefault(batch, tokens) != tokens:
                    raise RuntimeError("speculation changed what was said")
                stats = llm.get_speculative_stats()
        assert_drafting(stats)
        ratios = [a / b for a, b in zip(rates[True], rates[False], strict=True)]
        found = row(f"demo pair, K=8, batch {batch}", rates[True], rates[False], ratios)
        found["mean_acceptance_length"] = round(stats.mean_acceptance_length, 3)
        found["acceptance_rate_per_pos"] = [round(one, 3) for one in stats.acceptance_rate_per_pos]
        print(found, flush=True)
        rows.append(found)
    return rows


def assert_drafting(found: object) -> None:
    if found is None:
        raise RuntimeError("speculation is off")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    option = parser.add_argument
    option("--model", type=Path, help="a checkpoint of random weights, see bench.make_checkpoint")
    option("--batches", type=int, nargs="+", default=[1, 4, 16])
    option("--tokens", type=int, default=40)
    option("--demo", action="store_true")
    option("--prompts", type=int, default=48)
    options = parser.parse_args()
    before = timing.preemptions()
    for name, rows in (
        ("speculative_demo", demo(options.prompts, 120) if options.demo else []),
        (
            f"speculative_{options.model.name}" if options.model else "",
            scripted(options.model, options.batches, options.tokens) if options.model else [],
        ),
    ):
        if rows:
            timing.record(name, jit.num_threads(), rows, timing.preemptions() - before)


if __name__ == "__main__":
    main()
