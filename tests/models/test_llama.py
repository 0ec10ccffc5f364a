"""Llama against a dense NumPy model written from the formulas, in every variant of its config.

Agreement with transformers is tested by the goldens (tests/e2e/test_golden.py); here are the
variants that no golden has (biases, an odd head_dim, a head that is missing), and refusals.
"""

from __future__ import annotations

import numpy as np
import pytest

from pace_nb.errors import ModelFormatError, UnsupportedModelError
from pace_nb.kv_cache.base import KVCacheConfig
from pace_nb.models.config_json import ConfigJson
from pace_nb.models.llama import LlamaConfig, LlamaForCausalLM
from pace_nb.models.registry import load_model

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 50,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
VARIANTS = {
    "plain": {},
    "attention bias": {"attention_bias": True},
    "mlp bias": {"mlp_bias": True},
    "explicit head_dim": {"head_dim": 20},
    "as many kv heads": {"num_key_value_heads": 4},
    "one kv head, tied": {"num_key_value_heads": 1, "tie_word_embeddings": True},
    "other theta": {"rope_theta": 500.0},
    "gelu": {"hidden_act": "gelu_pytorch_tanh"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits(memory_checkpoint, random_tensors, dense, run, ids, variant):
    config = CONFIG | VARIANTS[variant]
    bits, values = random_tensors(config)
    checkpoint = memory_checkpoint(config, bits)
    expected = dense(config, values, ids)
    model = load_model(checkpoint, "float32")
    np.testing.assert_allclose(run(model, "float32", ids), expected, atol=2e-4)
    assert sorted(checkpoint.released) == sorted(bits)
    model = load_model(memory_checkpoint(config, bits), "bfloat16")
    difference = np.abs(run(model, "bfloat16", ids) - expected)
    assert difference.max() < 0.05 * np.abs(expected).max()
    assert difference.mean() < 0.01 * np.std(expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_chunks_give_the_same_bits(memory_checkpoint, random_tensors, run, ids, dtype):
    bits, _ = random_tensors(CONFIG)
    model = load_model(memory_checkpoint(CONFIG, bits), dtype)
    at_once = run(model, dtype, ids)
    for chunks in ([1] * 33, [7] * 4 + [5], [20, 1, 12]):
        np.testing.assert_array_equal(run(model, dtype, ids, chunks), at_once)


def test_a_missing_head_is_tied(memory_checkpoint, random_tensors, dense, run, ids):
    """A checkpoint without lm_head.weight, whatever its config says."""
    bits, values = random_tensors(CONFIG)
    del bits["lm_head.weight"], values["lm_head.weight"]
    model = load_model(memory_checkpoint(CONFIG, bits), "float32")
    expected = dense(CONFIG, values, ids)
    np.testing.assert_allclose(run(model, "float32", ids), expected, atol=2e-4)


def test_a_tied_config_ignores_a_saved_head(memory_checkpoint, random_tensors, dense, run, ids):
    """transformers ties and forgets the copy; so does the engine, rather than refuse it."""
    config = CONFIG | {"tie_word_embeddings": True}
    bits, values = random_tensors(CONFIG)
    model = load_model(memory_checkpoint(config, bits), "float32")
    del values["lm_head.weight"]
    expected = dense(config, values, ids)
    np.testing.assert_allclose(run(model, "float32", ids), expected, atol=2e-4)


def test_only_the_wanted_rows_get_logits(memory_checkpoint, random_tensors, run, ids):
    bits, _ = random_tensors(CONFIG)
    model = load_model(memory_checkpoint(CONFIG, bits), "float32")
    hidden = np.random.default_rng(2).standard_normal((9, 48)).astype(np.float32)
    kept = hidden.copy()
    all_rows = model.logits(hidden, np.arange(9, dtype=np.int32))
    some = model.logits(hidden, np.array([8, 2], np.int32))
    np.testing.assert_array_equal(some, all_rows[[8, 2]])
    np.testing.assert_array_equal(hidden, kept)
    assert model.logits(hidden, np.empty(0, np.int32)).shape == (0, 50)


def test_facts_for_the_engine(memory_checkpoint, random_tensors):
    config = CONFIG | VARIANTS["explicit head_dim"]
    bits, _ = random_tensors(config)
    model = load_model(memory_checkpoint(config, bits))
    assert (model.vocab_size, model.max_position_embeddings) == (50, 64)
    assert model.kv_cache_config("bfloat16") == KVCacheConfig(2, 2, 20, "bfloat16")


def test_old_exports_may_hold_frequencies(memory_checkpoint, random_tensors):
    bits, _ = random_tensors(CONFIG)
    bits["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(6, np.float32)
    load_model(memory_checkpoint(CONFIG, bits))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"num_attention_heads": 5}, r"hidden_size is 48, expected a multiple of .* \(5\)"),
        ({"num_key_value_heads": 3}, "num_key_value_heads is 3, expected a divisor"),
        ({"hidden_size": 2**31}, "hidden_size is 2147483648"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ({"num_hidden_layers": 3}, r"model\.layers\.2\.input_layernorm\.weight is missing"),
        ({"num_hidden_layers": 1}, r"model\.layers\.1\..* has no place .*\(9 such tensors\)"),
        ({"vocab_size": 51}, r"model\.embed_tokens\.weight has shape \[50, 48\].*\[51, 48\]"),
        ({"intermediate_size": 2**30}, r"gate_proj\.weight has shape \[40, 48\]"),
        ({"head_dim": 64}, r"q_proj\.weight has shape \[48, 48\].*\[256, 48\]"),
        ({"attention_bias": True}, r"q_proj\.bias is missing"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"rope_theta": -1.0}, "rope_theta is -1.0"),
        ({"max_position_embeddings": None}, "max_position_embeddings is missing"),
        ({"rope_scaling": "llama3"}, "rope_scaling is 'llama3', expected an object"),
        ({"rope_scaling": {"rope_type": "linear", "factor": -2}}, "rope_scaling: factor is -2"),
    ],
)
def test_a_config_that_cannot_be(memory_checkpoint, random_tensors, changes, message):
    bits, _ = random_tensors(CONFIG)
    with pytest.raises(ModelFormatError, match=message) as caught:
        load_model(memory_checkpoint(CONFIG | changes, bits))
    assert "\n" not in str(caught.value)


def test_a_bias_that_the_config_does_not_know_is_refused(memory_checkpoint, random_tensors):
    """Left out silently it would give a wrong model."""
    bits, _ = random_tensors(CONFIG | {"attention_bias": True})
    with pytest.raises(ModelFormatError, match=r"self_attn\.k_proj\.bias has no place"):
        load_model(memory_checkpoint(CONFIG, bits))


def test_unsupported_settings_name_the_supported():
    names = ["lm_head.weight", "model.norm.weight"]
    for changes, message in (
        ({"rope_scaling": {"type": "mrope"}}, "rope_type 'mrope' is not supported.*llama3"),
        ({"hidden_act": "mish"}, "activation 'mish' is not supported.*silu"),
    ):
        with pytest.raises(UnsupportedModelError, match=message):
            LlamaForCausalLM(LlamaConfig.from_json(ConfigJson(CONFIG | changes, names)))
