"""Layers that see a part of a sequence: the same bits out of caches that keep that part only, and
the rest is really let go. The goldens of the families that have such layers, and the kernels."""

from __future__ import annotations

import numpy as np
import pytest

from pace_nb import LLM, SamplingParams
from pace_nb.kernels import jit

pytestmark = pytest.mark.skipif(jit.INTERPRETED, reason="minutes without compiled kernels")

FAMILIES = ["gemma3_linear", "gpt_oss_mxfp4", "llama4_maverick", "mistral_window", "qwen3_window"]
KINDS = [
    {"kv_cache": "slab", "block_size": 16},
    {"kv_cache": "slab", "block_size": 48},
    {"kv_cache": "paged", "enable_prefix_caching": False},
    {"kv_cache": "paged"},
    {"kv_cache": "paged", "block_size": 32},
]
PROMPTS = [[5 + (7 * i * i + 3 * i + shift) % 90 for i in range(n)] for n, shift in
           ((100, 0), (150, 0), (37, 1), (1, 2))]  # fmt: skip
PARAMS = SamplingParams(temperature=1.0, seed=3, max_tokens=30, ignore_eos=True, logprobs=1)
NAN = {"bfloat16": 0x7FC0, "float32": np.nan}


def open_llm(directory, dtype="float32", **options):
    """With a pool full of NaN: what is looked at and was not written shows."""
    llm = LLM(directory, dtype=dtype, kv_cache_memory_bytes=2**19, **options)
    cache = llm._engine._cache
    for index in range(llm._engine._runner._model.kv_cache_config(dtype).num_layers):
        for array in cache.layer(index):
            array.fill(NAN[dtype])
    return llm


def generate(llm):
    """What each prompt gives: twice, so that beginnings are found; all at once, then one by one."""
    prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    found = [llm.generate(prompts, PARAMS, use_tqdm=False)]
    found.append([llm.generate(prompt, PARAMS, use_tqdm=False)[0] for prompt in prompts])
    llm._engine._cache.check()
    first, second = (
        [(one.outputs[0].token_ids, one.outputs[0].logprobs) for one in outputs]
        for outputs in found
    )
    assert first == second
    return first


@pytest.mark.parametrize("family", FAMILIES)
def test_every_cache_gives_the_same_bits(repository, family):
    directory = repository / "tests" / "golden" / family
    with open_llm(directory, kv_cache="contiguous") as llm:
        expected = generate(llm)
        assert all(
            np.isfinite(next(iter(logprobs[0].values())).logprob) for _, logprobs in expected
        )
    for kind in KINDS:
        with open_llm(directory, **kind) as llm:
            assert any(group.group.reach for group in llm._engine._cache._groups)
            assert generate(llm) == expected, kind
    with open_llm(directory, max_num_batched_tokens=13, max_num_seqs=3) as llm:
        assert generate(llm) == expected
    with open_llm(directory, enable_chunked_prefill=False) as llm:
        assert generate(llm) == expected
        (output,) = llm.generate([{"prompt_token_ids": PROMPTS[1]}], PARAMS, use_tqdm=False)
        assert output.num_cached_tokens == 144


def test_bf16(repository):
    directory = repository / "tests" / "golden" / "gemma3_linear"
    with open_llm(directory, "bfloat16", kv_cache="contiguous") as llm:
        expected = generate(llm)
    with open_llm(directory, "bfloat16", max_num_batched_tokens=33) as llm:
        assert generate(llm) == expected


@pytest.mark.parametrize("kind", ["slab", "paged"])
def test_a_long_text_costs_a_window_no_more_than_the_window(repository, kind):
    """Gemma 3's layers, a window of 9: two or three blocks of 16 after 240 tokens, not 15."""
    directory = repository / "tests" / "golden" / "gemma3_linear"
    options = {"kv_cache": kind, "block_size": 16, "max_num_batched_tokens": 32}
    with open_llm(directory, **options) as llm:
        cache = llm._engine._cache
        everything, window = cache._groups
        assert (everything.group.reach, window.group.reach) == (0, 9)
        most = length = 0
        params = SamplingParams(temperature=0, max_tokens=140, ignore_eos=True)
        for output in llm.stream({"prompt_token_ids": PROMPTS[0]}, params):
            for table in window.tables.values():
                most = max(most, sum(block >= 0 for block in table))
            if not output.finished:
                used = sum(refs > 0 for refs in window._refs.values())
                assert used <= 2 or len(output.outputs[0].token_ids) < 2
            length = max([length, *map(len, everything.tables.values())])
        assert most <= 4 and length >= 14
        assert window.num_blocks * 16 < 32 * 256  # of max_num_seqs sequences of the whole length


def test_the_budget_counts_windows_by_window(repository):
    """The same memory holds more tokens, and the line says how."""
    directory = repository / "tests" / "golden" / "gemma3_linear"
    options = {"max_num_batched_tokens": 32, "max_num_seqs": 8, "kv_cache_memory_bytes": 2**18}
    with LLM(directory, kv_cache="contiguous", **options) as llm:
        whole = llm._engine._cache.num_total_tokens
    with LLM(directory, **options) as llm:
        assert llm._engine._cache.num_total_tokens > 1.2 * whole
        assert "(1 layers that see 9)" in llm.kv_cache_arithmetic
