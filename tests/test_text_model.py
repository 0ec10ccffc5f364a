"""A prompt becomes a submission: its requests say what the engine needs to know."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import save_file

from pace_nb.config import EngineConfig
from pace_nb.errors import ConfigError, InvalidRequestError, ModelFormatError
from pace_nb.models import hub
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


def test_S16_bad_words_are_spelled_once_for_all_completions_and_prompts(opened, monkeypatch):
    """128 of them take 0.1 s; with n = 128 they kept every other request waiting for 10 s."""
    text, engine = opened
    encoded = []
    encode = text.tokenizer.encode
    monkeypatch.setattr(
        text.tokenizer, "encode", lambda *given, **options: encoded.append(1) or encode(*given)
    )
    params = SamplingParams(n=5, bad_words=["cat", "dog"], max_tokens=2)
    one, two = (text.submission(engine, PROMPT, params) for _ in range(2))
    assert len(encoded) == 4  # two words, with and without a space
    assert one.completions[0].request.bad_words_token_ids == text.prompts.spell(["cat", "dog"])
    assert two.completions[4].request.bad_words_token_ids == text.prompts.spell(["cat", "dog"])
    assert text.prompts.spell(["dog"]) != text.prompts.spell(["cat", "dog"])


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


def draft_of(directory, **changed):
    """A copy of the bundled model's config and weights, to be a draft."""
    directory.mkdir()
    config = json.loads((hub.DEMO_MODEL / "config.json").read_text())
    changed = {name: value for name, value in {**config, **changed}.items() if value is not None}
    (directory / "config.json").write_text(json.dumps(changed))
    shutil.copy(hub.DEMO_MODEL / "model.safetensors", directory)
    return directory


def open_with(draft, **options):
    speculative = {"method": "pard", "num_speculative_tokens": 3, "model": str(draft), **options}
    return open_model(
        EngineConfig(kernels="reference", speculative_config=speculative,
                     kv_cache_memory_bytes=2_000_000)
    )  # fmt: skip


def test_a_draft_model_shares_the_memory_of_the_cache(tmp_path):
    alone, engine = open_model(EngineConfig(kernels="reference", kv_cache_memory_bytes=2_000_000))
    text, drafting = open_with(draft_of(tmp_path / "draft", pard_token=6))
    assert drafting.num_kv_tokens == engine.num_kv_tokens // 2 // 16 * 16
    assert "; of the draft model, KV cache: " in text.kv_cache_arithmetic
    assert drafting._speculation._drafter.cache.num_total_tokens == drafting.num_kv_tokens
    alone.close()
    text.close()


def test_the_mask_token_is_the_draft_s_else_the_option_s(tmp_path):
    draft = draft_of(tmp_path / "draft")
    with pytest.raises(ConfigError, match=r"config\.json names no pard_token"):
        open_with(draft)
    for mask, expected in ((draft, 9), (draft_of(tmp_path / "named", pard_token=6), 6)):
        text, engine = open_with(mask, pard_token=9)
        assert engine._speculation._drafter._mask_token_id == expected
        text.close()
    for bad in (1536, "6", True):
        with pytest.raises(ConfigError, match=r"pard_token is .*, expected an integer from 0 to"):
            open_with(draft_of(tmp_path / f"draft-{bad}", pard_token=bad))


def test_a_draft_of_another_vocabulary_is_refused(tmp_path):
    draft = draft_of(tmp_path / "draft", pard_token=6)
    tokenizer = json.loads((hub.DEMO_MODEL / "tokenizer.json").read_text())
    (draft / "tokenizer.json").write_text(json.dumps(tokenizer))
    open_with(draft)[0].close()  # the same
    vocabulary = tokenizer["model"]["vocab"]
    a, b = list(vocabulary)[700:702]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    (draft / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ConfigError, match=r"has another vocabulary: '.*' is 70[01] here and 70"):
        open_with(draft)


def test_a_draft_without_tokenizer_must_have_as_many_tokens(tmp_path):
    small = {
        "vocab_size": 1500, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 16, "pard_token": 6,
    }  # fmt: skip
    draft = draft_of(tmp_path / "draft", **small)
    square = {
        f"model.layers.0.{name}.weight": np.ones((16, 16), np.float32)
        for name in (
            "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
            "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
        )
    }  # fmt: skip
    norms = ("layers.0.input_layernorm", "layers.0.post_attention_layernorm", "norm")
    vectors = {f"model.{name}.weight": np.ones(16, np.float32) for name in norms}
    table = {"model.embed_tokens.weight": np.ones((1500, 16), np.float32)}
    save_file({**square, **vectors, **table}, draft / "model.safetensors")
    with pytest.raises(ConfigError, match="has a vocabulary of 1500 tokens, expected the model's"):
        open_with(draft)


def test_a_draft_model_must_be_named(tmp_path):
    target = draft_of(tmp_path / "target")
    with pytest.raises(ConfigError, match="needs a draft model, model is None"):
        open_model(EngineConfig(model=target, speculative_config={"method": "pard"}))
