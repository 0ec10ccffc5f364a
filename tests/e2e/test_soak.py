"""Many requests of every kind, a tenth of them given up: memory stays flat, every block comes back.

`make test-long` sends 10,000 through the bundled model, the default suite 150.
"""

from __future__ import annotations

import gc
import os
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from pace_nb.errors import InvalidRequestError
from pace_nb.kernels import jit
from pace_nb.llm import LLM
from pace_nb.sampling_params import SamplingParams

pytestmark = pytest.mark.skipif(jit.INTERPRETED, reason="minutes without compiled kernels")

LONG = bool(os.environ.get("PACE_NB_TEST_LONG"))
NUM_REQUESTS = 10_000 if LONG else 150
KV_BLOCKS = 64 if LONG else 40  # little: it evicts and preempts
NUM_RUNNING = 48  # that wait or run at a time
MOST_GROWTH = 8 * 2**20  # bytes; a leak of one list of tokens per request would be 20 MB


def anonymous_bytes():
    """RssAnon of this process: the weights are mapped from a file and do not count."""
    gc.collect()
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return None


def requests(rng):
    """Prompts and parameters without end; one in twenty cannot be served."""
    number = 0
    beginnings = [rng.integers(5, 400, 80).tolist() for _ in range(5)]
    while True:
        number += 1
        ids = rng.integers(5, 400, rng.integers(1, 120)).tolist()
        if rng.random() < 0.5:
            ids = beginnings[rng.integers(5)][: rng.integers(1, 81)] + ids[:20]
        params = {"max_tokens": int(rng.integers(1, 32)), "temperature": float(rng.integers(2))}
        if number % 3 == 0:
            params |= {"logprobs": 2, "top_p": 0.9, "seed": number}
        if number % 5 == 0:
            params |= {"prompt_logprobs": 1, "presence_penalty": 0.5}
        if number % 7 == 0:
            params |= {"n": 3, "stop": ["the", " a"], "temperature": 1.0}
        if number % 11 == 0:
            params |= {"bad_words": ["and"], "logit_bias": {7: 2.0}, "min_tokens": 1}
        prompt = {"prompt_token_ids": ids}
        if number % 4 == 0:
            prompt["cache_salt"] = f"tenant {number % 3}"
        if number % 20 == 0:
            prompt["prompt_token_ids"] = [10**6]
        yield prompt, SamplingParams(**params)


def test_memory_stays_flat_and_every_block_comes_back():
    rng = np.random.default_rng(0)
    stream = requests(rng)
    fates: Counter[str] = Counter()
    with LLM(kv_cache_memory_bytes=KV_BLOCKS * 16 * 1536) as llm:
        serve(llm, stream, NUM_REQUESTS // 3, rng, fates)  # all is compiled and allocated once
        before = anonymous_bytes()
        serve(llm, stream, NUM_REQUESTS - NUM_REQUESTS // 3, rng, fates)
        after = anonymous_bytes()

    assert fates["answered"] + fates["aborted"] + fates["refused"] == NUM_REQUESTS
    assert fates["refused"] == NUM_REQUESTS // 20
    assert 0.05 * NUM_REQUESTS < fates["aborted"] < 0.15 * NUM_REQUESTS
    assert fates["preempted"] and fates["cached"]
    seen = f"anonymous memory {before / 2**20:.1f} MiB, then {after / 2**20:.1f}: {dict(fates)}"
    assert after - before < MOST_GROWTH, seen
    sys.stderr.write(f"{seen}\n")


def serve(llm, stream, num, rng, fates):
    """Send so many, keep NUM_RUNNING under way, give up a tenth; nothing is left at the end."""
    running = {}  # submission -> the step in which it is given up, if it is
    sent = step = 0
    while sent < num or running:
        while sent < num and len(running) < NUM_RUNNING:
            sent += 1
            doomed = rng.random() < 0.1
            try:
                submission = llm.submit(*next(stream))
            except InvalidRequestError:
                fates["refused"] += 1
            else:
                running[submission] = step + int(rng.integers(8)) if doomed else None
        llm.step()
        step += 1
        for submission, last_step in list(running.items()):
            if submission.finished or step == last_step:
                del running[submission]
                fates["answered" if submission.finished else "aborted"] += 1
                llm.withdraw(submission)
                count(submission, fates)
    cache, scheduler = llm._engine._cache, llm._engine._scheduler
    cache.check()
    assert cache.num_free_tokens == cache.num_total_tokens
    assert not llm._submissions and llm._engine.num_unfinished == 0
    assert not scheduler.waiting and not scheduler.running


def count(submission, fates):
    output = submission.output()
    fates["cached"] += output.num_cached_tokens > 0
    fates["preempted"] += any(one.request.num_preemptions for one in submission.completions)
    for one in output.outputs if submission.finished else ():
        assert one.finish_reason in ("stop", "length") and one.token_ids
