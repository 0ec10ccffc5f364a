"""The same bits in any company, with the compiled kernels and the bundled model.

Tokens, log-probabilities and those of the prompt: of a request alone; among 1, 7, 31 and 63 others
that come before and after it; with small budgets; in every cache; with a beginning that was
computed before; preempted; and with 1, 2 and 3 threads.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from pace_nb.kernels import jit
from pace_nb.llm import LLM
from pace_nb.sampling_params import SamplingParams

pytestmark = pytest.mark.skipif(jit.INTERPRETED, reason="minutes without compiled kernels")

TEXT = [5 + (11 * i * i + 5 * i) % 400 for i in range(120)]
SUBJECTS = [
    (TEXT[:1], {"temperature": 0.0}),
    (TEXT[:17], {"temperature": 1.0, "seed": 5, "top_k": 50, "prompt_logprobs": 1}),
    (TEXT[:70], {"temperature": 0.7, "seed": 6, "top_p": 0.9, "presence_penalty": 0.5}),
    (TEXT, {"temperature": 0.0, "prompt_logprobs": 2, "repetition_penalty": 1.2}),
]
COMPANY = (1, 7, 31, 63)
OPTIONS = {
    "paged": {},
    "slab": {"kv_cache": "slab"},
    "contiguous": {"kv_cache": "contiguous"},
    "not shared": {"enable_prefix_caching": False},
    "small budget": {"max_num_batched_tokens": 67},
    "short chunks": {"long_prefill_token_threshold": 13},
    "whole prompts": {"enable_chunked_prefill": False},
    "tight": {"kv_cache_memory_bytes": 20 * 16 * 1536},
}


def subject(number):
    ids, params = SUBJECTS[number]
    return ids, SamplingParams(max_tokens=10, ignore_eos=True, logprobs=2, **params)


def neighbours(num, seed):
    """Others: half of them begin as the subjects do, and all differ in what they ask for."""
    rng = np.random.default_rng(seed)
    for number in range(num):
        ids = rng.integers(5, 400, rng.integers(1, 40)).tolist()
        if number % 2:
            ids = TEXT[: rng.integers(1, 100)] + ids
        params = SamplingParams(
            max_tokens=int(rng.integers(1, 14)),
            temperature=float(rng.choice([0.0, 1.0])),
            seed=number,
            logprobs=None if number % 3 else 1,
            ignore_eos=bool(number % 2),
        )
        yield ids, params


def seen(submission):
    """Everything there is to see, to the bit."""
    output = submission.output()
    (one,) = output.outputs
    assert one.finish_reason == "length"
    entries = [*one.logprobs, *(output.prompt_logprobs or [])]
    bits = [
        None if e is None else [(i, float(p.logprob).hex(), p.rank) for i, p in e.items()]
        for e in entries
    ]
    return one.token_ids, bits


def in_company(llm, numbers, num, seed):
    """The subjects, each seen, among `num` others: a third come before, a third while they run."""
    others = list(neighbours(num, seed))
    third = len(others) // 3
    submissions = [llm.submit(*other) for other in others[:third]]
    for _ in range(2):
        llm.step()
    subjects = [llm.submit(*subject(number)) for number in numbers]
    submissions += subjects + [llm.submit(*other) for other in others[third : 2 * third]]
    llm.step()
    for other in others[2 * third :]:
        submissions.append(llm.submit(*other))
        llm.step()
    while not all(one.finished for one in submissions):
        llm.step()
        llm._engine._cache.check()
    preemptions = sum(one.request.num_preemptions for sub in submissions for one in sub.completions)
    return [seen(one) for one in subjects], preemptions


@pytest.fixture(scope="module")
def alone():
    """What each subject gets by itself in an engine that has seen nothing."""
    found = []
    for number in range(len(SUBJECTS)):
        with LLM(enable_prefix_caching=False, kv_cache_memory_bytes=2**21) as llm:
            found += in_company(llm, [number], 0, 0)[0]
    return found


@pytest.mark.parametrize("name", OPTIONS)
def test_company_changes_no_bit(alone, name):
    options = {"max_num_seqs": 64, "kv_cache_memory_bytes": 2**22, **OPTIONS[name]}
    preempted = 0
    with LLM(**options) as llm:
        for num in COMPANY:
            results, preemptions = in_company(llm, range(len(SUBJECTS)), num, seed=num)
            assert results == alone, f"{name}, among {num}"
            preempted += preemptions
        cache = llm._engine._cache
        assert cache.num_free_tokens == cache.num_total_tokens
    assert preempted > 0 or name != "tight"


SCRIPT = """
import json
from tests.e2e.test_company import SUBJECTS, digest, in_company
from pace_nb.kernels import jit
from pace_nb.llm import LLM
with LLM(max_num_seqs=64, kv_cache_memory_bytes=2**22) as llm:
    results, _ = in_company(llm, range(len(SUBJECTS)), 31, seed=31)
print(json.dumps([jit.num_threads(), digest(results)]))
"""


def digest(results):
    return hashlib.sha256(json.dumps(results).encode()).hexdigest()


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_threads_change_no_bit(alone, repository, num_threads):
    """Each number in a process of its own: a pool cannot grow."""
    variables = {**os.environ, "PYTHONPATH": str(repository), "NUMBA_NUM_THREADS": str(num_threads)}
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=variables, capture_output=True, text=True, check=True
    )
    assert json.loads(result.stdout) == [num_threads, digest(alone)]
