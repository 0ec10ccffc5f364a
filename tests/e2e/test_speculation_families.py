"""Greedy speculation gives the same tokens as none: every family, every cache, 1 and 16 requests.

The families are the golden checkpoints (test_golden.py), in BF16. A scripted drafter guesses what a
run without speculation said, any number of tokens from 1 to 33 in each step, and errs anywhere in
its block; so blocks of all lengths end at all places, across windows, chunks and the lengths at
which longrope changes its keys. Then each model is its own PARD draft, with a cache of its own.
"""

from __future__ import annotations

import os

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pace_nb.config import KV_CACHE_KINDS
from pace_nb.engine.speculative import Draft
from pace_nb.kernels import jit
from pace_nb.llm import LLM
from pace_nb.sampling_params import SamplingParams
from tests.e2e.test_golden import goldens

pytestmark = pytest.mark.skipif(jit.INTERPRETED, reason="minutes without compiled kernels")

LONG = bool(os.environ.get("PACE_NB_TEST_LONG"))
EXAMPLES = 60 if LONG else 3  # of each family and cache
MOST = 33
NUM_TOKENS = 40
LENGTHS = [1, 2, 3, 5, 8, 13, 15, 16, 17, 21, 30, 31, 34, 47, 60, 70]
PARAMS = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, detokenize=False)
OPTIONS = {"max_model_len": 128, "max_num_seqs": 16, "kv_cache_memory_bytes": 1 << 24}


class Foreseeing:
    """Guesses 1 to `most` tokens of `said[prompt]`, each wrong with probability 1 - right."""

    def __init__(self):
        self.said = {}

    def script(self, most, right, seed):
        self.most, self.right, self.random = most, right, np.random.default_rng(seed)
        self.tried = set()

    def propose(self, requests, limits):
        drafts = []
        for request, limit in zip(requests, limits, strict=True):
            said = self.said[tuple(request.prompt_token_ids)]
            most = min(limit, int(self.random.integers(1, self.most + 1)))
            coming = said[request.num_generated_tokens :][:most]
            wrong = self.random.random(len(coming)) >= self.right
            drafts.append(Draft([t ^ int(w) for t, w in zip(coming, wrong, strict=True)]))
            self.tried.add(len(coming))
        return drafts

    def forget(self, request):
        pass


def prompts_for(llm):
    random, vocab_size = np.random.default_rng(0), llm._engine.vocab_size
    return [random.integers(2, vocab_size - 2, length).tolist() for length in LENGTHS]


def said(llm, prompts):
    outputs = llm.generate([{"prompt_token_ids": one} for one in prompts], PARAMS, use_tqdm=False)
    llm._engine._cache.check()
    return [list(one.outputs[0].token_ids) for one in outputs]


@pytest.fixture(scope="module", params=goldens())
def plain(request):
    """A checkpoint, prompts, and what it says without speculation."""
    with LLM(request.param, **OPTIONS) as llm:
        prompts = prompts_for(llm)
        return request.param, prompts, said(llm, prompts)


@pytest.mark.parametrize("kind", KV_CACHE_KINDS)
def test_any_guesses_give_the_same(plain, kind):
    directory, prompts, expected = plain
    speculative = {"method": "ngram", "num_speculative_tokens": MOST, "adaptive": False}
    with LLM(directory, kv_cache=kind, speculative_config=speculative, **OPTIONS) as llm:
        drafter = llm._engine._speculation._drafter = Foreseeing()
        drafter.said = {tuple(p): one for p, one in zip(prompts, expected, strict=True)}

        @settings(
            max_examples=EXAMPLES, deadline=None, database=None, derandomize=not LONG,
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(
            most=st.integers(1, MOST),
            right=st.sampled_from([0.0, 0.6, 0.9, 1.0]),
            alone=st.none() | st.integers(0, len(LENGTHS) - 1),
            seed=st.integers(0, 2**32 - 1),
        )
        def any_schedule(most, right, alone, seed):
            drafter.script(most, right, seed)
            taken = slice(None) if alone is None else slice(alone, alone + 1)
            assert said(llm, prompts[taken]) == expected[taken]

        any_schedule()
        for most, right, taken in ((MOST, 0.9, slice(None)), (MOST, 1.0, slice(4, 5))):
            drafter.script(most, right, seed=most)
            assert said(llm, prompts[taken]) == expected[taken]
        assert llm.get_speculative_stats().num_accepted_tokens > 100


def test_a_model_as_its_own_draft(plain):
    directory, prompts, expected = plain
    speculative = {
        "method": "pard", "num_speculative_tokens": 5, "adaptive": False, "pard_token": 1,
        "model": str(directory),
    }  # fmt: skip
    with LLM(directory, speculative_config=speculative, **OPTIONS) as llm:
        assert said(llm, prompts) == expected
        # The first guess is the model's own next token, from a cache of its own.
        assert llm.get_speculative_stats().acceptance_rate_per_pos[0] > 0.95
