"""The bundled model says the same, to the bit, whoever guesses ahead of it."""

from __future__ import annotations

import asyncio

import pytest

from pace_nb.async_llm import AsyncLLM
from pace_nb.llm import LLM
from pace_nb.models import hub
from pace_nb.sampling_params import SamplingParams

PROMPTS = [
    "Once upon a time there was a red fox named Tom.",
    "Say: red blue green red blue green red blue",
    "Mia has a blue ball. Tom has a red kite. Mia",
]
ASKED = [
    SamplingParams(temperature=0, max_tokens=40),
    SamplingParams(temperature=0, max_tokens=30, logprobs=2, prompt_logprobs=1),
    SamplingParams(temperature=0.8, top_p=0.9, seed=3, max_tokens=30, repetition_penalty=1.1),
    SamplingParams(temperature=0, max_tokens=40, stop=["a"], n=1),
]
LOOKUP = {"method": "prompt_lookup", "prompt_lookup_max": 3, "prompt_lookup_min": 1}
# The model as its own draft: its first guess of a block is right, those from masks seldom are.
OWN = {"method": "pard", "model": str(hub.DEMO_MODEL), "pard_token": 6}
CACHES = [
    {"kv_cache": "contiguous"},
    {"kv_cache": "slab", "block_size": 32},
    {"kv_cache": "paged"},
]


def said(**options):
    with LLM(max_model_len=128, kv_cache_memory_bytes=1 << 25, **options) as llm:
        found = [
            [(one.outputs[0], one.prompt_logprobs) for one in llm.generate(PROMPTS, params, False)]
            for params in ASKED
        ]
        return found, llm.get_speculative_stats()


@pytest.fixture(scope="module")
def expected():
    found, stats = said()
    assert stats is None
    return found


@pytest.mark.parametrize("cache", CACHES, ids=lambda cache: cache["kv_cache"])
@pytest.mark.parametrize(("method", "num_tokens"), [(LOOKUP, 20), (OWN, 9)])
def test_the_same_is_said(expected, cache, method, num_tokens):
    speculative = {**method, "num_speculative_tokens": num_tokens, "adaptive": False}
    found, stats = said(**cache, speculative_config=speculative)
    assert found == expected
    assert stats.num_accepted_tokens > 0
    if method is OWN:
        assert stats.acceptance_rate_per_pos[0] > 0.6  # 1 where the request is greedy


def test_the_bundled_draft():
    """Beginnings of stories as a person might write them, which are harder to guess after than
    those of the corpus; notebooks/demo_model/README.md has the figures of both."""
    openings = [
        "Once upon a time there was a small owl named Pippa who lived near a pond.",
        "One day a brave mouse found a yellow hat under the old tree.",
        "Ben had a green boat. He wanted to",
    ]
    params = SamplingParams(temperature=0, max_tokens=80)
    answers = []
    speculative = {"method": "pard", "num_speculative_tokens": 8, "adaptive": False}
    for given in (None, speculative):
        with LLM(max_model_len=256, kv_cache_memory_bytes=1 << 25, speculative_config=given) as llm:
            answers.append([one.outputs[0] for one in llm.generate(openings, params, False)])
            stats = llm.get_speculative_stats()
    assert answers[0] == answers[1]
    assert stats.mean_acceptance_length >= 2.5


def test_one_at_a_time(expected):
    speculative = {**LOOKUP, "num_speculative_tokens": 5}
    assert said(max_num_seqs=1, speculative_config=speculative)[0] == expected


def test_async_llm_takes_the_same_config(expected):
    async def told():
        llm = AsyncLLM(
            max_model_len=128, kv_cache_memory_bytes=1 << 25,
            speculative_config={**OWN, "num_speculative_tokens": 4},
        )  # fmt: skip
        try:
            async for output in llm.generate(PROMPTS[0], ASKED[0]):
                last = output
            return last.outputs[0].token_ids
        finally:
            llm.close()

    assert asyncio.run(told()) == expected[0][0][0].token_ids
