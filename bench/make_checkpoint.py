"""A checkpoint of a real model's shape with random BF16 weights, for measuring without a download.

    python -m bench.make_checkpoint llama-3.2-1b /tmp/llama-3.2-1b

Knows the config.json of a few published models. The weights mean nothing and the text is noise; the
bytes and FLOPs are those of the real model. The tokenizer is one word per token id.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from pace_nb.kernels.bf16 import from_f32
from pace_nb.models.registry import build_model

LLAMA_3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.2-1b": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": LLAMA_3,
        "tie_word_embeddings": True,
    },
    "llama-3.2-3b": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": LLAMA_3,
        "tie_word_embeddings": True,
    },
    "llama-3.1-8b": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": LLAMA_3 | {"factor": 8.0},
        "tie_word_embeddings": False,
    },
    "qwen2-1.5b": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": 151936,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
    },
    "gemma-3-1b": {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "vocab_size": 262144,
        "hidden_size": 1152,
        "intermediate_size": 6912,
        "num_hidden_layers": 26,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "sliding_window": 512,
        "sliding_window_pattern": 6,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0,
    },
    "opt-1.3b": {
        "architectures": ["OPTForCausalLM"],
        "model_type": "opt",
        "vocab_size": 50272,
        "hidden_size": 2048,
        "word_embed_proj_dim": 2048,
        "ffn_dim": 8192,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "max_position_embeddings": 2048,
        "do_layer_norm_before": True,
        "activation_function": "relu",
    },
    "phi-4-mini": {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "vocab_size": 200064,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 32,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "partial_rotary_factor": 0.75,
        "max_position_embeddings": 131072,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0] * 48,
            "long_factor": [1.0 + i / 4 for i in range(48)],
        },
        "sliding_window": 262144,
        "tie_word_embeddings": True,
    },
}
# A config may not name more layers than there are tensors, nor an untied head that is not there;
# here there is no file yet to look into.
ANY_NAMES = [*(str(i) for i in range(10_000)), "lm_head.weight"]
BLOCK = 1 << 22  # random numbers drawn once and repeated: their values do not matter


def tensors_of(name: str) -> list[tuple[str, tuple[int, ...]]]:
    """(name, shape) of every tensor of `name` of SHAPES."""
    return list(build_model(SHAPES[name], ANY_NAMES).tensors(""))


def blocks(shape: tuple[int, ...], rng: np.random.Generator) -> Iterator[bytes]:
    """BF16 bytes of a tensor: normal with the spread of a trained matrix, ones for vectors."""
    size = prod(shape)
    if len(shape) == 1:
        yield from_f32(np.ones(size, np.float32)).tobytes()
        return
    drawn = from_f32(rng.standard_normal(min(size, BLOCK), np.float32) * shape[1] ** -0.5)
    for start in range(0, size, BLOCK):
        yield drawn[: size - start].tobytes()


def write(name: str, directory: Path) -> None:
    """Write config.json, model.safetensors, tokenizer.json for `name` of SHAPES."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = tensors_of(name)
    header, end = {}, 0
    for tensor, shape in tensors:
        start, end = end, end + 2 * prod(shape)
        header[tensor] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    rng = np.random.default_rng(0)
    with open(directory / "model.safetensors", "wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        file.writelines(chain.from_iterable(blocks(shape, rng) for _, shape in tensors))
    (directory / "config.json").write_text(json.dumps(SHAPES[name], indent=1))
    words = {f"w{i}": i for i in range(1000)}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "w0"},
    }
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    print(f"{directory}: {end / 1e9:.2f} GB of weights in {len(tensors)} tensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=sorted(SHAPES))
    parser.add_argument("directory", type=Path)
    options = parser.parse_args()
    write(options.name, options.directory)


if __name__ == "__main__":
    main()
