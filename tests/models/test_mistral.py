"""Mistral against a dense NumPy model: a window in every layer, an explicit head_dim."""

from __future__ import annotations

import numpy as np
import pytest

from pace_nb.errors import ModelFormatError
from pace_nb.models.config_json import ConfigJson
from pace_nb.models.mistral import MistralConfig
from pace_nb.models.registry import load_model

CONFIG = {
    "architectures": ["MistralForCausalLM"],
    "vocab_size": 50,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "sliding_window": 9,
}


@pytest.mark.parametrize(
    "changes", [{}, {"head_dim": 20}, {"sliding_window": None}, {"sliding_window": 1}], ids=str
)
def test_logits(memory_checkpoint, random_tensors, dense, run, ids, changes):
    config = CONFIG | changes
    bits, values = random_tensors(config)
    expected = dense(config, values, ids, [config["sliding_window"]] * 2)
    model = load_model(memory_checkpoint(config, bits), "float32")
    found = run(model, "float32", ids)
    np.testing.assert_allclose(found, expected, atol=2e-4)
    np.testing.assert_array_equal(run(model, "float32", ids, [7] * 4 + [1] * 5), found)


def test_the_window_matters(random_tensors, dense, ids):
    """Otherwise the test above would pass without one."""
    _, values = random_tensors(CONFIG)
    difference = dense(CONFIG, values, ids, (9, 9)) - dense(CONFIG, values, ids)
    assert np.abs(difference).max() > 0.1


def test_the_window_is_4096_where_absent_and_none_where_null():
    def window(fields):
        names = [f"tensor {i}" for i in range(20)]
        return MistralConfig.from_json(ConfigJson(fields, names)).sliding_window

    absent = {name: value for name, value in CONFIG.items() if name != "sliding_window"}
    assert window(absent) == 4096
    assert window(CONFIG | {"sliding_window": None}) is None
    with pytest.raises(ModelFormatError, match="sliding_window is -1"):
        window(CONFIG | {"sliding_window": -1})
