"""A closed list of architectures: nothing in a checkpoint names code."""

from __future__ import annotations

import sys
from importlib import import_module

import numpy as np
import pytest

from pace_nb.errors import ModelFormatError, UnsupportedModelError
from pace_nb.models.registry import ARCHITECTURES, architecture, build_model, load_model

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 16,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_entry_leads_to_a_model_class(name):
    module = import_module(f"pace_nb.models.{ARCHITECTURES[name]}")
    model_class = getattr(module, name)
    assert hasattr(model_class.config_class, "from_json")
    assert isinstance(model_class.ignored_weights, tuple)


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Phi3", "Qwen2", "Qwen3"])
def test_longrope_is_named_to_the_engine(family):
    """Its keys cannot be shared, and are no longer right beyond the boundary."""
    longrope = {"type": "longrope", "short_factor": [1.0, 1.5], "long_factor": [2.0, 5.0]}
    config = LLAMA | {"architectures": [f"{family}ForCausalLM"], "head_dim": 4}
    for changes, by_length, switch_length in (
        ({}, False, None),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, True, None),
        ({"rope_scaling": longrope, "original_max_position_embeddings": 8}, True, 8),
    ):
        model = build_model(config | changes, ["model.norm.weight"])
        assert model.kv_cache_config("float32").keys_by_length == by_length
        assert model.switch_length == switch_length


@pytest.mark.parametrize(
    "listed", ["BertModel", "os.system", "pace_nb.models.llama.LlamaForCausalLM", "llama", ""]
)
def test_any_other_architecture_lists_the_supported(listed):
    with pytest.raises(UnsupportedModelError, match=r"is not supported, supported: .*Llama"):
        architecture({"architectures": [listed]})


@pytest.mark.parametrize("listed", [None, [], "LlamaForCausalLM", [3], {}])
def test_a_config_without_an_architecture(listed):
    with pytest.raises(ModelFormatError, match="architectures is missing or empty"):
        architecture({"architectures": listed})
    with pytest.raises(ModelFormatError, match="architectures is missing or empty"):
        architecture({})


@pytest.mark.parametrize(
    "quantization", [{"quant_method": "gptq", "bits": 4}, {}, "awq", {"quant_method": "x" * 999}]
)
def test_quantized_checkpoints_are_refused(quantization):
    with pytest.raises(UnsupportedModelError, match=r"quantization_config .*BF16") as caught:
        build_model(LLAMA | {"quantization_config": quantization}, [])
    assert len(str(caught.value)) < 200


def test_auto_map_is_ignored(tmp_path, monkeypatch, memory_checkpoint):
    """Custom code beside a checkpoint is not imported."""
    (tmp_path / "modeling_evil.py").write_text("raise RuntimeError('ran')")
    monkeypatch.syspath_prepend(str(tmp_path))
    config = LLAMA | {"auto_map": {"AutoModelForCausalLM": "modeling_evil.Evil"}}
    names = ["model.embed_tokens.weight"]
    assert build_model(config, names).vocab_size == 16
    assert "modeling_evil" not in sys.modules


def test_ignored_tensors_are_named_by_beginning_or_ending(memory_checkpoint, monkeypatch):
    """`vision_tower.` is a beginning, for it has a dot at its end; both are tied to their place."""
    names = ["lm_head.weight", "model.norm.weight"]
    model = build_model(LLAMA, names)
    monkeypatch.setattr(type(model), "ignored_weights", ("vision_tower.", ".inv_freq"))
    tensors = {name: np.zeros(shape, np.float32) for name, shape in model.tensors("")}
    ignored = {"vision_tower.a.weight": np.zeros(1), "model.layers.0.inv_freq": np.zeros(1)}
    load_model(memory_checkpoint(LLAMA, tensors | ignored), "float32")
    for name in ("model.vision_tower.weight", "model.inv_freq.weight"):
        with pytest.raises(ModelFormatError, match=f"tensor {name} has no place"):
            load_model(memory_checkpoint(LLAMA, tensors | {name: np.zeros(1)}))


def test_nothing_is_read_before_every_shape_has_been_compared(memory_checkpoint):
    """The last tensor is wrong: no other may have been touched."""

    class Untouchable(memory_checkpoint):
        def tensor(self, name, shape):
            raise AssertionError(f"{name} was read")

    shapes = dict(build_model(LLAMA, ["lm_head.weight"]).tensors(""))
    tensors = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    last = list(shapes)[-1]
    tensors[last] = np.zeros((3, 3), np.float32)
    with pytest.raises(ModelFormatError, match=f"tensor {last} has shape"):
        load_model(Untouchable(LLAMA, tensors))
