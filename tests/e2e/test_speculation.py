"""The bundled model says the same, to the bit, whoever guesses ahead of it."""

from __future__ import annotations

import asyncio
import re

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
    SamplingParams(temperature=0, max_tokens=40, stop=[" the", ". "], logprobs=1,
                   include_stop_str_in_output=True, min_tokens=6),
    SamplingParams(temperature=1.0, seed=7, n=3, max_tokens=25, min_p=0.02, logprobs=0),
    SamplingParams(temperature=0, max_tokens=30, frequency_penalty=0.6, presence_penalty=0.4,
                   bad_words=["fox", " red"], logit_bias={70: 2.0}),
    SamplingParams(temperature=0.9, seed=1, max_tokens=30, logprobs=1,
                   structured_outputs={"json": {"type": "object", "properties": {
                       "name": {"type": "string", "maxLength": 6}, "age": {"type": "integer"}},
                       "required": ["name", "age"], "additionalProperties": False}}),
    SamplingParams(temperature=0, max_tokens=30, structured_outputs={"regex": "(ab|cd){3,9}e"}),
]  # fmt: skip
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
            [(one.outputs, one.prompt_logprobs) for one in llm.generate(PROMPTS, params, False)]
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


def test_the_end_of_the_context():
    """K = 33 where there is room for 1, 2, .. tokens more, and for none beyond them."""
    with LLM(max_model_len=48, kv_cache_memory_bytes=1 << 22) as llm:
        ids = (llm.get_tokenizer().encode(PROMPTS[2]) * 9)[:47]
    answers = []
    for given in (None, {**LOOKUP, "num_speculative_tokens": 33, "adaptive": False}, {
        **OWN, "num_speculative_tokens": 33, "adaptive": False,
    }):  # fmt: skip
        with LLM(
            max_model_len=48, kv_cache_memory_bytes=1 << 22, max_num_seqs=2,
            speculative_config=given,
        ) as llm:  # fmt: skip
            params = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
            prompts = [{"prompt_token_ids": ids[:length]} for length in range(30, 48)]
            answers.append([one.outputs[0] for one in llm.generate(prompts, params, False)])
    assert answers[0] == answers[1] == answers[2]
    assert [len(one.token_ids) for one in answers[0]] == [48 - length for length in range(30, 48)]


def test_drawn_guesses_keep_to_what_was_asked():
    """With guesses that are drawn the tokens are others: what was asked still holds of them."""
    speculative = {**OWN, "num_speculative_tokens": 6, "draft_sample_method": "probabilistic"}
    wanted = SamplingParams(
        temperature=1.0, seed=3, n=4, max_tokens=40, logprobs=1, bad_words=["e"],
        structured_outputs={"regex": "[a-f]{12,20}!"},
    )  # fmt: skip
    stopped = SamplingParams(temperature=1.0, seed=3, n=4, max_tokens=11, stop=["o"])
    with LLM(max_model_len=128, kv_cache_memory_bytes=1 << 25, speculative_config=speculative) as m:
        drawn = [one for output in m.generate(PROMPTS, wanted, False) for one in output.outputs]
        texts = [one for output in m.generate(PROMPTS, stopped, False) for one in output.outputs]
        assert m.get_speculative_stats().num_accepted_tokens > 0
    for one in drawn:
        assert re.fullmatch("[a-f]{12,20}!", one.text)
        assert one.finish_reason == "stop" and len(one.logprobs) == len(one.token_ids)
    assert len({one.text for one in drawn}) == 12
    for one in texts:
        assert "o" not in one.text
        assert (
            len(one.token_ids) == 11 if one.finish_reason == "length" else len(one.token_ids) <= 11
        )


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

    assert asyncio.run(told()) == expected[0][0][0][0].token_ids
