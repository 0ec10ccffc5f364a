"""Qwen2 against a dense NumPy model: biases of q, k and v, and which layers slide."""

from __future__ import annotations

import numpy as np
import pytest

from pace_nb.errors import ModelFormatError
from pace_nb.models.config_json import ConfigJson
from pace_nb.models.qwen2 import Qwen2Config
from pace_nb.models.registry import load_model

CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 50,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
}
SLIDING = {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}
VARIANTS = {
    "full attention": ({"sliding_window": 9, "max_window_layers": 0}, (0, 0, 0)),
    "sliding from layer 1": (SLIDING, (0, 9, 9)),
    "no layer reached": (SLIDING | {"max_window_layers": 3}, (0, 0, 0)),
    "layer_types": (
        SLIDING | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
        (9, 0, 9),
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


def test_the_window_matters(random_tensors, dense, ids):
    """Otherwise the test above would pass without one."""
    _, values = random_tensors(CONFIG)
    difference = dense(CONFIG, values, ids, (0, 9, 9)) - dense(CONFIG, values, ids)
    assert np.abs(difference).max() > 0.1


def read(changes):
    names = [f"tensor {i}" for i in range(20)]
    return Qwen2Config.from_json(ConfigJson(CONFIG | changes, names))


def test_window_fields():
    assert read({"use_sliding_window": True, "max_window_layers": 2}).windows == (0, 0, 4096)
    assert read(SLIDING | {"sliding_window": None}).windows == (0, 0, 0)
    for changes, message in (
        ({"layer_types": ["full_attention"] * 2}, "layer_types is .* a list of 3 strings"),
        ({"layer_types": ["chunked_attention"] * 3}, "is 'chunked_attention', expected"),
        ({"layer_types": [["full_attention"]] * 3}, r"is \['full_attention'\], expected"),
        ({"layer_types": ["sliding_attention"] * 3}, "sliding_window is None, expected a window"),
        (SLIDING | {"sliding_window": 0}, "sliding_window is 0"),
    ):
        with pytest.raises(ModelFormatError, match=message):
            read(changes)


def test_biases_are_required(memory_checkpoint, random_tensors):
    bits, _ = random_tensors(CONFIG)
    del bits["model.layers.1.self_attn.k_proj.bias"]
    with pytest.raises(ModelFormatError, match=r"layers\.1\.self_attn\.k_proj\.bias is missing"):
        load_model(memory_checkpoint(CONFIG, bits))
