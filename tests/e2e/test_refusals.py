"""What a user sees who runs `pace-nb` on a model that is not supported: one line, exit code 2.

Each is a golden checkpoint with one thing in its config.json, or one number in its weights, that
this engine cannot do. The line names that thing and what there is instead.
"""

from __future__ import annotations

import json
import shutil
import struct

import pytest

from pace_nb.cli.main import main
from pace_nb.models.registry import ARCHITECTURES

FAMILIES = "GPTJForCausalLM, Gemma3ForCausalLM, "
ROPE_TYPES = "supported: default, linear, dynamic, llama3, yarn, longrope"
ACTIVATIONS = "supported: gelu, gelu_fast, gelu_new, gelu_pytorch_tanh, relu, silu, swish"
FLOATS = "unquantized BF16, F16 and F32 weights"
LLAMA = "llama_gqa_tied_llama3rope"
CASES = [
    (LLAMA, {"architectures": ["MambaForCausalLM"]}, ("'MambaForCausalLM'", FAMILIES)),
    (LLAMA, {"architectures": []}, ("architectures is missing or empty", FAMILIES)),
    (LLAMA, {"rope_parameters": {"rope_type": "magic"}}, ("rope_type 'magic'", ROPE_TYPES)),
    (LLAMA, {"rope_parameters": None, "rope_scaling": {"type": "magic"}}, ("'magic'", ROPE_TYPES)),
    (LLAMA, {"hidden_act": "mish"}, ("activation 'mish'", ACTIVATIONS)),
    (LLAMA, {"quantization_config": {"quant_method": "gptq"}}, ("'gptq'", FLOATS)),
    ("gpt_oss_mxfp4", {"quantization_config": {"quant_method": "awq"}}, ("'awq'", "mxfp4", FLOATS)),
    ("gpt_oss_mxfp4", {"hidden_act": "mish"}, ("hidden_act 'mish'", "supported: 'silu'")),
    ("gemma3_linear", {"hidden_activation": "mish"}, ("activation 'mish'", ACTIVATIONS)),
    ("llama4_maverick", {"hidden_act": "mish"}, ("activation 'mish'", ACTIVATIONS)),
    ("mistral_window", {"hidden_act": "mish"}, ("activation 'mish'", ACTIVATIONS)),
    ("opt_350m", {"activation_function": "mish"}, ("activation 'mish'", ACTIVATIONS)),
    ("phi2", {"hidden_act": "mish"}, ("activation 'mish'", ACTIVATIONS)),
    ("phi3_longrope", {"rope_parameters": {"rope_type": "magic"}}, ("'magic'", ROPE_TYPES)),
    ("qwen3_window", {"rope_parameters": {"rope_type": "magic"}}, ("'magic'", ROPE_TYPES)),
]


@pytest.fixture
def golden(repository, tmp_path):
    """golden(name, changes): a copy of a golden checkpoint with another config.json."""

    def copy(name, changes):
        directory = tmp_path / name
        shutil.copytree(repository / "tests" / "golden" / name, directory)
        path = directory / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        return directory

    return copy


def refused(capsys, directory):
    """The one line that the model is refused with."""
    arguments = ["-m", str(directory), "--kernels", "reference", "-n", "1", "w1"]
    code = main(["generate", *arguments])
    captured = capsys.readouterr()
    assert (code, captured.out) == (2, "")
    assert captured.err.startswith("pace-nb: error: ") and captured.err.count("\n") == 1
    assert str(directory) in captured.err
    return captured.err


@pytest.mark.parametrize(("name", "changes", "expected"), CASES)
def test_what_is_not_supported_is_named(capsys, golden, name, changes, expected):
    line = refused(capsys, golden(name, changes))
    assert all(part in line for part in expected), line


def test_every_architecture_is_named_to_who_asks_for_another(capsys, golden):
    line = refused(capsys, golden(LLAMA, {"architectures": ["MambaForCausalLM"]}))
    assert line.strip().endswith(", ".join(sorted(ARCHITECTURES)))


@pytest.mark.parametrize("number", [0x7FC0, 0x7F80, 0xFF80], ids=["nan", "inf", "-inf"])
@pytest.mark.parametrize(
    "tensor",
    [
        "model.embed_tokens.weight",
        "model.norm.weight",
        "model.layers.1.mlp.up_proj.weight",
        "lm_head.weight",
    ],
)
def test_weights_that_are_not_finite_are_named(capsys, golden, tensor, number):
    directory = golden("llama_mha_untied", {})
    path = directory / "model.safetensors"
    content = bytearray(path.read_bytes())
    start = 8 + struct.unpack("<Q", content[:8])[0]
    last = start + json.loads(content[8:start])[tensor]["data_offsets"][1]
    content[last - 2 : last] = struct.pack("<H", number)
    path.write_bytes(content)
    line = refused(capsys, directory)
    assert f"tensor {tensor} holds " in line and "expected finite numbers" in line
