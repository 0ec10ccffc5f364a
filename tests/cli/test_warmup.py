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
