"""The same bits out of every KV cache, with the compiled kernels and the bundled model.

Every kind and block size, beginnings shared and not, prompts in one piece and in several, one after
the other and all at once; the pool is full of NaN before anything is stored.
"""

from __future__ import annotations

import numpy as np
import pytest

from pace_nb.kernels import jit
from pace_nb.llm import LLM
from pace_nb.sampling_params import SamplingParams

pytestmark = pytest.mark.skipif(jit.INTERPRETED, reason="minutes without compiled kernels")

NAN = 0x7FC0  # in BF16
TEXT = [5 + (7 * i * i + 3 * i) % 400 for i in range(150)]
PROMPTS = {  # and how many of its tokens are in a cache that has seen those above it
    "miss": (TEXT[:70], 0),
    "hit": (TEXT[:70], 64),
    "longer": (TEXT, 64),
    "partial": (TEXT[:45] + TEXT[:30], 32),
    "at a boundary": (TEXT[:144], 128),
    "other": (TEXT[1:60], 0),
}
PARAMS = [
    SamplingParams(temperature=t, seed=3, max_tokens=12, ignore_eos=True, logprobs=2)
    for t in (0.0, 1.0)
]
KINDS = [
    {"kv_cache": "contiguous"},
    {"kv_cache": "slab"},
    {"kv_cache": "slab", "block_size": 48},
    {"kv_cache": "paged", "enable_prefix_caching": False},
    {"kv_cache": "paged", "block_size": 64},
    {"kv_cache": "paged"},
]
CHUNKS = [{}, {"max_num_batched_tokens": 33, "max_num_seqs": 4}]


def open_llm(**options):
    llm = LLM(kv_cache_memory_bytes=2**20, **options)
    cache = llm._engine._cache
    for index in range(llm._engine._runner._model.kv_cache_config("bfloat16").num_layers):
        for array in cache.layer(index):
            array.fill(NAN)
    return llm


def generate(llm, prompts, params):
    outputs = llm.generate(list(prompts), params, use_tqdm=False)
    llm._engine._cache.check()
    return outputs


def seen(output):
    return output.outputs[0].token_ids, output.outputs[0].logprobs


@pytest.fixture(scope="module")
def alone():
    """What each prompt gives by itself in a contiguous cache that has seen nothing."""
    found = {}
    with open_llm(kv_cache="contiguous") as llm:
        for prompt, _ in PROMPTS.values():
            for params in PARAMS:
                (output,) = generate(llm, [prompt], params)
                assert np.isfinite(output.outputs[0].cumulative_logprob)
                found[tuple(prompt), params.temperature] = seen(output)
    return found


@pytest.mark.parametrize("chunks", CHUNKS, ids=["whole", "chunks"])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(map(str, kind.values())))
def test_every_cache_gives_the_same_bits(alone, kind, chunks):
    with open_llm(**kind, **chunks) as llm:
        for params in PARAMS:
            for prompt, _ in PROMPTS.values():
                (output,) = generate(llm, [prompt], params)
                assert seen(output) == alone[tuple(prompt), params.temperature]
            outputs = generate(llm, [prompt for prompt, _ in PROMPTS.values()], params)
            for output in outputs:
                expected = alone[tuple(output.prompt_token_ids), params.temperature]
                assert seen(output) == expected


def test_what_was_computed_is_found(alone):
    with open_llm(kv_cache="paged") as llm:
        for name, (prompt, cached) in PROMPTS.items():
            (output,) = generate(llm, [prompt], PARAMS[0])
            assert output.num_cached_tokens == cached, name
            assert seen(output) == alone[tuple(prompt), 0.0]


def test_n_completions_share_their_prompt(alone):
    params = SamplingParams(
        n=3, temperature=1.0, seed=3, max_tokens=12, ignore_eos=True, logprobs=2
    )
    with open_llm(kv_cache="paged") as llm:
        (output,) = generate(llm, [TEXT], params)
        assert seen(output) == alone[tuple(TEXT), 1.0]
        texts = {tuple(completion.token_ids) for completion in output.outputs}
        assert len(texts) == 3
        for completion in output.outputs[1:]:
            again = SamplingParams(
                temperature=1.0, seed=3 + completion.index, max_tokens=12, ignore_eos=True,
                logprobs=2,
            )  # fmt: skip
            (single,) = generate(llm, [TEXT], again)
            assert seen(single) == (completion.token_ids, completion.logprobs)
            assert single.num_cached_tokens == 144
