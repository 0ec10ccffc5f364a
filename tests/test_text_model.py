"""A prompt becomes a submission: its requests say what the engine needs to know."""

from __future__ import annotations

import pytest

from pace_nb.config import EngineConfig
from pace_nb.errors import ConfigError, InvalidRequestError, ModelFormatError
from pace_nb.prompts import PromptInput
from pace_nb.sampling_params import SamplingParams
from pace_nb.text_model import TextModel, engine_config, open_model

PROMPT = PromptInput("a", [5, 6, 7], "salt")


@pytest.fixture(scope="module")
def opened():
    text, engine = open_model(EngineConfig(kernels="reference", scheduling_policy="priority"))
    yield text, engine
    text.close()


def test_a_submission_has_a_request_for_each_completion(opened):
    text, engine = opened
    params = SamplingParams(n=2, seed=2**64 - 1, prompt_logprobs=1, bad_words=["cat"], max_tokens=9)
    submission = text.submission(engine, PROMPT, params, request_id="mine", priority=-2)
    first, second = (one.request for one in submission.completions)
    assert submission.request_id == "mine" and submission.output().request_id == "mine"
    assert (first.params.seed, second.params.seed) == (2**64 - 1, 0)
    assert (first.params.prompt_logprobs, second.params.prompt_logprobs) == (1, None)
    for request in (first, second):
        assert request.params.n == 1 and request.max_tokens == 9
        assert request.prompt_token_ids == [5, 6, 7] and request.cache_salt == "salt"
        assert request.bad_words_token_ids == text.prompts.spell(["cat"])
        assert request.eos_token_ids == text.tokenizer.eos_token_ids
        assert request.priority == -2
        assert request.metrics is first.metrics
    again = text.submission(engine, PROMPT, params)
    ids = {one.request.request_id for sub in (submission, again) for one in sub.completions}
    assert len(ids) == 4


def test_the_context_bounds_what_is_asked_for(opened):
    text, engine = opened
    for max_tokens in (None, 10**6):
        submission = text.submission(engine, PROMPT, SamplingParams(max_tokens=max_tokens))
        assert submission.completions[0].request.max_tokens == text.max_model_len - 3
    cut = SamplingParams(truncate_prompt_tokens=2)
    assert text.submission(engine, PROMPT, cut).completions[0].request.prompt_token_ids == [6, 7]


def test_the_model_suggests_how_to_sample(opened):
    text, engine = opened
    assert text.suggested_sampling() == {"temperature": 0.7, "top_p": 0.95}
    assert text.default_sampling_params() == SamplingParams(temperature=0.7, top_p=0.95)
    (one,) = text.submission(engine, PROMPT).completions
    assert one.request.params == text.default_sampling_params()
    broken = TextModel(text.config, text.directory, None, frozenset(), {"top_p": 7}, "", engine)
    with pytest.raises(ModelFormatError, match=r"generation_config\.json: top_p is 7"):
        broken.default_sampling_params()


def test_what_cannot_be_served_is_refused(opened):
    text, engine = opened
    with pytest.raises(InvalidRequestError, match="sampling_params is a dict"):
        text.submission(engine, PROMPT, {"n": 1})
    with pytest.raises(InvalidRequestError, match="maximum context length is 1024 tokens"):
        text.submission(engine, PromptInput(None, [5] * 1024, None), SamplingParams())


def test_options_are_those_of_the_config():
    config = engine_config("LLM", None, {"max_num_seqs": 3})
    assert config == EngineConfig(max_num_seqs=3)
    with pytest.raises(ConfigError, match="AsyncLLM has no option 'max_seqs', expected model, tok"):
        engine_config("AsyncLLM", None, {"max_seqs": 3})
