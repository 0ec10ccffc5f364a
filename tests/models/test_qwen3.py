"""Qwen3 against a dense NumPy model: normalized heads, its head_dim, and which layers slide."""

from __future__ import annotations

import numpy as np
import pytest

from pace_nb.models.config_json import ConfigJson
from pace_nb.models.qwen3 import Qwen3Config
from pace_nb.models.registry import load_model

CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 50,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 20,
    "max_position_embeddings": 64,
    "rms_norm_eps": 0.01,
}
VARIANTS = {
    "plain": ({}, None),
    "attention bias, tied": ({"attention_bias": True, "tie_word_embeddings": True}, None),
    "sliding": (
        {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
        (0, 9, 9),
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits(memory_checkpoint, random_tensors, dense, run, ids, variant):
    changes, windows = VARIANTS[variant]
    config = CONFIG | changes
    bits, values = random_tensors(config)
    expected = dense(config, values, ids, windows)
    model = load_model(memory_checkpoint(config, bits), "float32")
    found = run(model, "float32", ids)
    np.testing.assert_allclose(found, expected, atol=2e-4)
    np.testing.assert_array_equal(run(model, "float32", ids, [7] * 4 + [1] * 5), found)


def test_the_norms_matter(random_tensors, dense, ids):
    """Otherwise the test above would pass without them."""
    _, values = random_tensors(CONFIG)
    without = {name: w for name, w in values.items() if "q_norm" not in name}
    assert np.abs(dense(CONFIG, values, ids) - dense(CONFIG, without, ids)).max() > 0.1


def test_head_dim_is_128_where_it_is_not_given():
    """Not hidden_size / num_attention_heads, as in the families before it."""
    fields = {name: value for name, value in CONFIG.items() if name != "head_dim"}
    config = Qwen3Config.from_json(ConfigJson(fields, [f"tensor {i}" for i in range(20)]))
    assert config.head_dim == 128 and config.rope.rotary_dim == 128
