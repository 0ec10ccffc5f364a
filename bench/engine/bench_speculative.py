"""What speculation gains: tokens per second against acceptance, and what rows of verification cost.

    python -m bench.make_checkpoint llama-3.2-1b /tmp/ck/llama-3.2-1b
    python -m bench.engine.bench_speculative --model /tmp/ck/llama-3.2-1b --batches 1
    python -m bench.engine.bench_speculative --model /tmp/ck/llama-3.2-1b --batches 16 --adaptive
    python -m bench.engine.bench_speculative --model /tmp/ck/llama-3.2-1b --rows
    python -m bench.engine.bench_speculative --demo

Each adds its rows to `bench/results/speculative.json` and takes about a minute.

With `--model`, a checkpoint of random weights: nobody can guess what it says, so a scripted drafter
knows (it was told by a run without speculation) and errs on purpose, each guess with probability
1 - acceptance. It costs nothing, so this is what verification allows, not what a draft would give.
All guesses are K = 12, or what pays (`--adaptive`). Rounds go on for `--seconds`: plain decode and
each acceptance once in every round, so that a slow minute is everybody's.

With `--rows`: milliseconds of a step of one request with 1, 2, .. rows, in turns.

With `--demo`, the bundled model and its PARD draft, on beginnings of stories (notebooks/demo_model/
continuations.py, a seed that training did not use, none of them among those it did): the whole
price is paid.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bench import timing
from bench.engine.bench_offline import row
from pace_nb import LLM, SamplingParams
from pace_nb.engine.draft_lengths import DraftLengths
from pace_nb.engine.request import Request
from pace_nb.engine.speculative import Draft, SpeculativeStats
from pace_nb.kernels import jit

K = 12
ACCEPTANCES = (0.0, 0.5, 0.8, 1.0)
SHOWN = 0.8  # the acceptance whose rate is the row's; those of the others are its `curve`
ROWS = (1, 2, 4, 7, 13, 25)
LEARNING = 12  # steps in which the adaptive K finds its place, before any that is timed
PAUSED = 3.0  # times the median: in a step that took longer the process stood still
DEMO_K, DEMO_ROUNDS, DEMO_TOKENS = 8, 2, 120
ROOT = Path(__file__).resolve().parents[2]
HELD_BACK_SEED = 999


class Foreseeing:
    """Guesses what the requests said last time; each guess holds with probability `acceptance`.

    How many of a block hold is not left to chance, which would need thousands of blocks for a rate:
    u goes evenly over (0, 1), and n guesses hold where a^(n+1) < u <= a^n, as by chance.
    """

    def __init__(self) -> None:
        self.futures: dict[tuple[int, ...], list[int]] = {}  # by prompt; none: no guesses
        self.acceptance = 1.0
        self.most = K
        self._blocks = count()

    def propose(self, requests: Sequence[Request], limits: Sequence[int]) -> list[Draft]:
        """See `speculative.Drafter`."""
        drafts = []
        for request, limit in zip(requests, limits, strict=True):
            done = request.num_generated_tokens
            coming = self.futures.get(tuple(request.prompt_token_ids), [])[done:]
            guess = coming[: min(limit, self.most)]
            held = self._held()
            if held < len(guess):
                guess[held] = (guess[held] + 1) % 999
            drafts.append(Draft(guess))
        return drafts

    def forget(self, request: Request) -> None:
        """Nothing is kept."""

    def _held(self) -> int:
        """How many guesses of the next block hold, if there are so many."""
        if self.acceptance <= 0:
            return 0
        u = ((next(self._blocks) + 0.5) * 0.6180339887498949) % 1  # evenly, in a scattered order
        return 10**9 if self.acceptance >= 1 else int(math.log(u) / math.log(self.acceptance))


class Run(NamedTuple):
    """One timed run: seconds, steps, and what each request said, its first token included."""

    seconds: float
    num_steps: int
    said: list[list[int]]

    @property
    def num_tokens(self) -> int:
        """Those that were timed: all but each request's first."""
        return sum(len(one) - 1 for one in self.said)

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.num_tokens / self.seconds


class Bench:
    """A model with the scripted drafter: opened once, for all cases."""

    def __init__(self, llm: LLM) -> None:
        speculation = llm._open_engine()._speculation
        if speculation is None:
            raise RuntimeError("speculation is off")
        self.llm = llm
        self.drafter = speculation._drafter = Foreseeing()
        self._speculation = speculation

    def adapt(self, wanted: bool) -> None:
        """K as it pays, with nothing learned yet, or fixed."""
        self._speculation._lengths = DraftLengths() if wanted else None

    @property
    def stats(self) -> SpeculativeStats:
        """What became of all guesses so far; a copy."""
        return copy.deepcopy(self._speculation.stats)

    def run(
        self, prompts: Sequence[list[int]], num_steps: int, known: int, untimed: int = 0
    ) -> Run:
        """Decode for so many steps after the prompts and `untimed` steps more, or until a request
        comes to the end of the `known` tokens. Requests never come to their own."""
        params = SamplingParams(
            temperature=0, max_tokens=known + K + 1, ignore_eos=True, detokenize=False
        )
        running = [self.llm.submit({"prompt_token_ids": one}, params) for one in prompts]
        requests = [one.completions[0].request for one in running]
        try:
            while not all(request.num_generated_tokens for request in requests):
                self.llm.step()
            for _ in range(untimed):
                self.llm.step()
            first = [request.num_generated_tokens - 1 for request in requests]
            took: list[float] = []
            while (
                len(took) < num_steps
                and max(request.num_generated_tokens for request in requests) + K < known
            ):
                begun = time.perf_counter()
                self.llm.step()
                took.append(time.perf_counter() - begun)
            said = [request.generated_token_ids for request in requests]
        finally:
            for one in running:
                self.llm.withdraw(one)
        for prompt, tokens in zip(prompts, said, strict=True):
            future = self.drafter.futures.get(tuple(prompt), tokens)
            if tokens != future[: len(tokens)]:
                raise RuntimeError("speculation changed what was said")
        usual = float(np.median(took))
        seconds = sum(usual if one > PAUSED * usual else one for one in took)
        return Run(
            seconds, len(took), [one[start:] for one, start in zip(said, first, strict=True)]
        )

    def foresee(self, prompts: Sequence[list[int]], known: int) -> Run:
        """What the prompts' requests will say, told to the drafter; a plain run."""
        self.drafter.futures = {}
        found = self.run(prompts, known, known + K)
        self.drafter.futures = {tuple(p): one for p, one in zip(prompts, found.said, strict=True)}
        return found

    @contextmanager
    def silent(self) -> Iterator[None]:
        """The drafter guesses nothing."""
        futures, self.drafter.futures = self.drafter.futures, {}
        try:
            yield
        finally:
            self.drafter.futures = futures


def opened(directory: Path, batch: int, context: int, most: int) -> LLM:
    return LLM(
        directory,
        max_model_len=context + 512,
        max_num_seqs=batch,
        kv_cache_memory_bytes=1 << 30,
        speculative_config={
            "method": "ngram",
            "num_speculative_tokens": most,
            "adaptive": False,
        },
    )


def curve(
    bench: Bench, name: str, batch: int, context: int, adaptive: bool, seconds: float
) -> dict[str, Any]:
    """Tokens/s beside those of plain decode, by acceptance."""
    num_steps = max(8, 32 // math.isqrt(batch))
    known = min(num_steps, 14) * (K + 1) + (LEARNING * (K + 1) if adaptive else 0) + K
    random, drafter = np.random.default_rng(batch), bench.drafter
    prompts = [random.integers(0, 999, context).tolist() for _ in range(batch)]
    bench.adapt(False)
    bench.run(prompts, 2, 99)  # compiles
    bench.foresee(prompts, known)
    plain: list[float] = []
    rates: dict[float, list[float]] = {acceptance: [] for acceptance in ACCEPTANCES}
    lengths: dict[float, list[float]] = {acceptance: [] for acceptance in ACCEPTANCES}
    guesses: dict[float, list[float]] = {acceptance: [] for acceptance in ACCEPTANCES}
    begun = time.perf_counter()
    while not plain or time.perf_counter() - begun < seconds:
        bench.adapt(False)
        with bench.silent():
            plain.append(bench.run(prompts, num_steps, known).rate)
        for drafter.acceptance in ACCEPTANCES:
            bench.adapt(adaptive)
            before = bench.stats
            found = bench.run(prompts, num_steps, known, LEARNING if adaptive else 0)
            after = bench.stats
            rates[drafter.acceptance].append(found.rate)
            lengths[drafter.acceptance].append(found.num_tokens / found.num_steps / batch)
            guesses[drafter.acceptance].append(
                (after.num_draft_tokens - before.num_draft_tokens)
                / batch / (found.num_steps + (LEARNING if adaptive else 0))
            )  # fmt: skip
        print({a: round(r[-1] / plain[-1], 2) for a, r in rates.items()}, flush=True)
    ratios = {
        acceptance: [one / base for one, base in zip(found, plain, strict=True)]
        for acceptance, found in rates.items()
    }
    kind = "adaptive" if adaptive else f"K={K}"
    found = row(
        f"{name} batch {batch}, {kind}, acceptance {SHOWN}", rates[SHOWN], plain, ratios[SHOWN]
    )
    return found | {
        "batch": batch,
        "adaptive": adaptive,
        "curve": [
            {
                "acceptance": acceptance,
                "speedup": round(float(np.median(ratios[acceptance])), 3),
                "tokens_per_step": round(float(np.mean(lengths[acceptance])), 3),
                "guesses_per_step": round(float(np.mean(guesses[acceptance])), 2),
            }
            for acceptance in ACCEPTANCES
        ],
    }


def cost_of_rows(bench: Bench, name: str, context: int, seconds: float) -> list[dict[str, Any]]:
    """Milliseconds of a step of one request by its rows, beside those of a step of one row."""
    prompts = [np.random.default_rng(1).integers(0, 999, context).tolist()]
    num_steps, drafter = 6, bench.drafter
    bench.adapt(False)
    bench.run(prompts, 2, 99)  # compiles
    known = 3 * max(ROWS)
    bench.foresee(prompts, known)
    drafter.acceptance = 0.0  # each step is one token on: its rows see what the others see
    found: dict[int, list[float]] = {num: [] for num in ROWS}
    begun = time.perf_counter()
    while not found[1] or time.perf_counter() - begun < seconds:
        for num in ROWS:
            drafter.most = num - 1
            timed = bench.run(prompts, num_steps, known)
            found[num].append(1e3 * timed.seconds / timed.num_steps)
    drafter.most = K
    rows = []
    for num in ROWS[1:]:
        ratios = [many / one for many, one in zip(found[num], found[1], strict=True)]
        one = row(f"{name}, {num} rows beside 1, context {context}", found[num], found[1], ratios)
        rows.append(one | {"unit": "ms/step", "limit_unit": "ms/step", "best": min(found[num])})
    return rows


def demo(num_prompts: int) -> list[dict[str, Any]]:
    """The bundled pair: what it gains and how much of it is accepted."""
    sys.path.insert(0, str(ROOT / "notebooks" / "demo_model"))
    from continuations import beginnings, trained_on

    drawn, known, texts = beginnings(HELD_BACK_SEED), trained_on(), []
    while len(texts) < num_prompts:
        text = next(drawn)
        if text not in known and text not in texts:
            texts.append(text)
    rows = []
    fixed = {"method": "pard", "num_speculative_tokens": DEMO_K, "adaptive": False}
    kinds = {"plain": None, f"K={DEMO_K}": fixed, "adaptive": fixed | {"adaptive": True}}
    for batch in (1, 4, 16):
        with ExitStack() as stack:
            llms = {
                kind: stack.enter_context(
                    LLM(
                        max_model_len=512,
                        max_num_seqs=batch,
                        kv_cache_memory_bytes=1 << 26,
                        enable_prefix_caching=False,  # rounds repeat their prompts
                        speculative_config=given,
                    )
                )
                for kind, given in kinds.items()
            }
            encode = llms["plain"].get_tokenizer().encode
            prompts = [{"prompt_token_ids": encode(one, add_special_tokens=False)} for one in texts]
            params = SamplingParams(temperature=0, max_tokens=DEMO_TOKENS)
            rates: dict[str, list[float]] = {kind: [] for kind in llms}
            said: list[Any] = []
            for number in range(1 + DEMO_ROUNDS):
                for kind, llm in llms.items():
                    begun = time.perf_counter()
                    outputs = llm.generate(prompts, params, use_tqdm=False)
                    took = time.perf_counter() - begun
                    tokens = [one.outputs[0].token_ids for one in outputs]
                    if number:  # the first compiles
                        rates[kind].append(sum(map(len, tokens)) / took)
                    said = said or tokens
                    if tokens != said:
                        raise RuntimeError("speculation changed what was said")
            for kind, llm in llms.items():
                stats = llm.get_speculative_stats()
                if stats is None:
                    continue
                ratios = [a / b for a, b in zip(rates[kind], rates["plain"], strict=True)]
                found = row(f"demo pair batch {batch}, {kind}", rates[kind], rates["plain"], ratios)
                rows.append(
                    found
                    | {
                        "mean_acceptance_length": round(stats.mean_acceptance_length, 3),
                        "acceptance_rate_per_pos": [
                            round(one, 3) for one in stats.acceptance_rate_per_pos
                        ],
                        "num_drafts": stats.num_drafts,
                        "num_steps_off": stats.num_steps_off,
                    }
                )
                print(rows[-1], flush=True)
    return rows


def record(rows: list[dict[str, Any]], preempted: int) -> None:
    """Write the rows into the result file, beside those of other cases."""
    path = timing.RESULTS / "speculative.json"
    kept: list[dict[str, Any]] = []
    if path.exists():
        old = json.loads(path.read_text())
        new = {one["case"] for one in rows}
        kept = [one for one in old["rows"] if one["case"] not in new]
        preempted += old["preempted"] if kept else 0
    order = sorted(kept + rows, key=lambda one: (one["case"].startswith("demo"), one["case"]))
    timing.record("speculative", jit.num_threads(), order, preempted)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    option = parser.add_argument
    option("--model", type=Path, help="a checkpoint of random weights, see bench.make_checkpoint")
    option("--batches", type=int, nargs="+", default=[1])
    option("--context", type=int, default=16, help="tokens of each prompt")
    option("--adaptive", action="store_true", help="as many guesses as pay, not K")
    option("--rows", action="store_true", help="what rows of one request cost, and nothing else")
    option("--seconds", type=float, default=50, help="for the rounds of each case")
    option("--demo", action="store_true", help="the bundled model and its draft")
    option("--prompts", type=int, default=24, help="of --demo")
    options = parser.parse_args()
    if not options.demo and options.model is None:
        parser.error("expected --model DIRECTORY or --demo")
    before = timing.preemptions()
    if options.demo:
        rows = demo(options.prompts)
    else:
        name = options.model.name
        batch, most = (1, max(ROWS) - 1) if options.rows else (max(options.batches), K)
        with opened(options.model, batch, options.context, most) as llm:
            bench = Bench(llm)
            if options.rows:
                rows = cost_of_rows(bench, name, options.context, options.seconds)
            else:
                rows = [
                    curve(bench, name, one, options.context, options.adaptive, options.seconds)
                    for one in options.batches
                ]
    record(rows, timing.preemptions() - before)


if __name__ == "__main__":
    main()
