"""Microseconds per step that are not the model: scheduling, the batch, the cache's books, sampling.

    python -m bench.engine.bench_overhead [--profile]

32 requests decode greedily side by side. A step of the engine is timed, and within it the model's
two calls (hidden states, logits); what is left is the overhead. `null` is a model that computes
nothing, so its steps are overhead only; `demo` is the bundled model, whose kernels leave the caches
full of other things. --profile prints where the null model's steps spend their time (cProfile makes
every Python call dearer, so its total is not the figure).
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from bench import timing
from pace_nb import LLM, SamplingParams
from pace_nb.config import CacheConfig, EngineConfig
from pace_nb.engine.engine import Engine
from pace_nb.engine.request import Request
from pace_nb.kernels import jit
from pace_nb.kv_cache import create_cache
from pace_nb.kv_cache.base import KVCacheConfig
from pace_nb.outputs import RequestMetrics

BATCH, STEPS, ROUNDS, CONTEXT = 32, 60, 7, 512
LIMIT = 150e-6  # seconds per step that the project allows itself


class NullModel:
    """Logits that are there already: token 7 is the largest."""

    vocab_size, max_position_embeddings = 4096, 4096

    def __init__(self) -> None:
        self._hidden = np.zeros((4096, 8), np.float32)
        self._logits = np.zeros((BATCH, self.vocab_size), np.float32)
        self._logits[:, 7] = 1

    def kv_cache_config(self, dtype: str) -> KVCacheConfig:
        return KVCacheConfig(num_layers=1, num_kv_heads=1, head_dim=2, dtype=dtype)

    def __call__(self, batch: Any, kv: Any) -> Any:
        return self._hidden[: batch.num_tokens]

    def logits(self, hidden: Any, rows: Any) -> Any:
        return self._logits[: len(rows)]


def null_engine() -> Engine:
    config = EngineConfig(max_num_seqs=BATCH)
    model = NullModel()
    sizes = CacheConfig("paged", BATCH * CONTEXT, CONTEXT, 16, True)
    return Engine(model, create_cache(model.kv_cache_config("float32"), sizes), config, CONTEXT)


def requests(vocab_size: int) -> list[Request]:
    """Prompts of 16 tokens without common beginnings, ahead of more tokens than will be made."""
    rng = np.random.default_rng(0)
    params = SamplingParams(temperature=0, max_tokens=CONTEXT, ignore_eos=True)
    return [
        Request(
            request_id=str(i),
            prompt_token_ids=rng.integers(0, vocab_size, 16).tolist(),
            params=params,
            max_tokens=CONTEXT - 16,
            metrics=RequestMetrics(arrival_time=0.0),
        )
        for i in range(BATCH)
    ]


class Stopwatch:
    """Adds up the seconds spent in a function."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self.seconds = 0.0

    def __call__(self, *args: Any) -> Any:
        start = time.perf_counter()
        result = self._function(*args)
        self.seconds += time.perf_counter() - start
        return result


def measure(engine: Engine) -> list[float]:
    """Seconds per step that are not the model's, of each of some hundred steps."""
    runner = engine._runner
    model = runner._model
    hidden, logits = Stopwatch(model.__call__), Stopwatch(model.logits)
    overheads = []

    class Timed:
        vocab_size = model.vocab_size
        switch_length = getattr(model, "switch_length", None)

        def __call__(self, *args: Any) -> Any:
            return hidden(*args)

        def logits(self, *args: Any) -> Any:
            return logits(*args)

    runner._model = Timed()  # type: ignore[assignment]
    for request in requests(engine.vocab_size):
        engine.add(request)
    for _ in range(5):  # the prompts, and what runs for the first time
        engine.step()
    for _ in range(STEPS * ROUNDS):
        hidden.seconds = logits.seconds = 0.0
        start = time.perf_counter()
        engine.step()
        overheads.append(time.perf_counter() - start - hidden.seconds - logits.seconds)
    runner._model = model
    for request_id in list(engine._requests):
        engine.abort(request_id)
    return overheads


def row(case: str, overheads: list[float]) -> dict[str, Any]:
    per_step = statistics.median(overheads)
    return {
        "case": case,
        "value": per_step * 1e6,
        "unit": "us/step",
        "limit": LIMIT * 1e6,
        "limit_unit": "us/step",
        "share": LIMIT / per_step,
        "best": min(overheads) * 1e6,
    }


def profile() -> None:
    engine = null_engine()
    for request in requests(engine.vocab_size):
        engine.add(request)
    for _ in range(5):
        engine.step()
    profiler = cProfile.Profile()
    profiler.enable()
    for _ in range(STEPS * ROUNDS):
        engine.step()
    profiler.disable()
    pstats.Stats(profiler).sort_stats("tottime").print_stats(25)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profile", action="store_true")
    if parser.parse_args().profile:
        profile()
        return
    before = timing.preemptions()
    rows = [row(f"null model, {BATCH} greedy requests", measure(null_engine()))]
    with LLM(max_model_len=CONTEXT, max_num_seqs=BATCH) as llm:
        rows.append(row(f"demo model, {BATCH} greedy requests", measure(llm._open_engine())))
    timing.record("overhead", jit.num_threads(), rows, timing.preemptions() - before)


if __name__ == "__main__":
    main()
