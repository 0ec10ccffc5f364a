"""A model with longrope served in chunks, with neighbours, preempted, and past its boundary.

The golden has its boundary at 60 tokens: up to there all positions of a sequence rotate with the
short factors, beyond it with the long ones. Whatever way a sequence is cut into steps must not
show, and each token must be what follows from all tokens before it, as a forward pass over them has
it. transformers' `generate` does the same: it drops its cache at the boundary.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from pace_nb import LLM, SamplingParams
from pace_nb.engine.scheduler import Scheduler

DIRECTORY = Path(__file__).resolve().parents[1] / "golden" / "phi3_longrope"
BOUNDARY = 60
PARAMS = SamplingParams(
    temperature=0, max_tokens=12, ignore_eos=True, logprobs=3, prompt_logprobs=2
)


@pytest.fixture(scope="module")
def prompts():
    """Beyond the boundary; at it; reaching it while generating; staying before it."""
    with np.load(DIRECTORY / "golden.npz") as arrays:
        ids = arrays["ids_130"].tolist()
    return [ids[:length] for length in (75, BOUNDARY + 1, BOUNDARY, 55, 20)]


def generate(prompts, **options):
    """(token ids, logprobs, prompt logprobs) of each prompt, to the bit."""
    with LLM(DIRECTORY, **options) as llm:
        outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], PARAMS, use_tqdm=False)
    return [
        (one.outputs[0].token_ids, one.outputs[0].logprobs, one.prompt_logprobs) for one in outputs
    ]


@pytest.fixture(scope="module")
def alone(prompts):
    """Each prompt by itself, at once."""
    return [generate([prompt])[0] for prompt in prompts]


def test_the_boundary_is_what_this_file_says():
    config = json.loads((DIRECTORY / "config.json").read_text())
    assert config["original_max_position_embeddings"] == BOUNDARY


@pytest.mark.parametrize("budget", [5, 7, 64])
@pytest.mark.parametrize("kv_cache", ["contiguous", "slab", "paged"])
def test_chunks_give_the_bits_of_the_whole(prompts, alone, budget, kv_cache):
    found = generate(prompts, max_num_batched_tokens=budget, max_num_seqs=5, kv_cache=kv_cache)
    assert found == alone


def test_preemption_changes_nothing(prompts, alone, monkeypatch):
    """A cache of 6 units of 16 tokens, where a sequence that has passed the boundary gives way."""
    lengths = []
    preempt = Scheduler._preempt
    monkeypatch.setattr(
        Scheduler, "_preempt", lambda self, r: (lengths.append(r.num_tokens), preempt(self, r))
    )
    bytes_per_token = 2 * 2 * 16 * 2  # layers, keys and values, one head of 16 dims, BF16
    options = {"max_model_len": 96, "kv_cache_memory_bytes": 96 * bytes_per_token}
    assert generate(prompts[::-1], **options) == alone[::-1]
    assert max(lengths) > BOUNDARY


def test_each_token_follows_from_all_before_it(prompts, alone):
    """Also after the boundary was passed while generating: what was cached is computed anew."""
    with LLM(DIRECTORY) as llm:
        for prompt, (token_ids, logprobs, _) in zip(prompts, alone, strict=True):
            for n, (token_id, reported) in enumerate(zip(token_ids, logprobs, strict=True)):
                logits = llm.forward([*prompt, *token_ids[:n]])[-1].astype(np.float64)
                assert token_id == logits.argmax(), (len(prompt), n)
                expected = logits[token_id] - np.log(np.exp(logits).sum())
                assert reported[token_id].logprob == pytest.approx(expected, abs=1e-5)


def test_the_two_sets_of_factors_would_be_told_apart(prompts):
    """One token more, and the logits of all positions are others."""
    with LLM(DIRECTORY) as llm:
        longer = llm.forward(prompts[1])
        difference = np.abs(longer[:-1] - llm.forward(prompts[2]))
    assert difference[1:].max(axis=1).min() > 1e-3
    assert difference.max() > 0.1
