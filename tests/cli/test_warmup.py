"""`pace-nb warmup` leaves nothing to compile."""

from __future__ import annotations

import pytest

from pace_nb import LLM, SamplingParams
from pace_nb.cli.main import main
from pace_nb.kernels import jit


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_nothing_is_compiled_afterwards(dtype):
    with LLM(dtype=dtype) as llm:
        llm.warm_up()
        compiled = jit.num_compiled()
        prompts = ["a", "Once upon a time there was " * 12, "b c"]
        llm.generate(prompts, SamplingParams(max_tokens=4, logprobs=2), use_tqdm=False)
        llm.generate(prompts[0], SamplingParams(max_tokens=4, temperature=0), use_tqdm=False)
        for ways in (
            {"prompt_logprobs": 2, "temperature": 0},
            {"n": 2, "top_k": 5, "top_p": 0.9, "min_p": 0.1, "seed": 1},
            {"repetition_penalty": 1.2, "presence_penalty": 1.0, "frequency_penalty": 0.5},
            {"logit_bias": {5: 1.0}, "min_tokens": 2, "bad_words": ["the"]},
            {"allowed_token_ids": [5, 6], "logprobs": 0},
        ):
            llm.generate(prompts, SamplingParams(max_tokens=4, **ways), use_tqdm=False)
        llm.forward(list(range(70)))
        assert jit.num_compiled() == compiled


def test_a_context_shorter_than_its_prompts():
    with LLM(kernels="reference", max_model_len=3) as llm:
        llm.warm_up()


def test_it_says_what_it_did(capsys):
    assert main(["warmup", "--kernels", "reference"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("kernels ready in ") and first.endswith("0 of them compiled now")
    assert second == f"kept: {jit.cache_state()}"
