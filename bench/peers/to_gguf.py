"""A GGUF file of BF16 tensors from a Llama checkpoint, for llama.cpp.

    python -m bench.peers.to_gguf /tmp/ck/llama-3.2-1b /tmp/ck/llama-3.2-1b.gguf

Knows the GGUF container (version 3) and llama.cpp's names for the tensors and settings of the
`llama` architecture. Writes no tokenizer ("none"): the comparison feeds token ids. The same numbers
as in the checkpoint: matrices stay BF16 to the bit, vectors become F32, the rows of q and k are put
in the order that llama.cpp rotates them in (its RoPE pairs neighbours, Hugging Face's halves).

    magic "GGUF", version, number of tensors, number of settings
    settings   name, type, value
    tensors    name, number of dimensions, dimensions (innermost first), type, offset in the data
    data       each tensor at a multiple of 32

Source: github.com/ggml-org/ggml/blob/master/docs/gguf.md; conversion/llama.py of llama.cpp.
"""

from __future__ import annotations

import argparse
import math
import struct
from collections.abc import Callable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pace_nb.kernels.bf16 import widen
from pace_nb.models.loader import Checkpoint

Array = NDArray[Any]
ALIGNMENT = 32
UINT32, FLOAT32, STRING = 4, 6, 8  # gguf_metadata_value_type
F32, BF16 = 0, 30  # ggml_type
MOSTLY_BF16 = 32  # llama_ftype
# Hugging Face's names within a layer -> llama.cpp's.
LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


class Tensor(NamedTuple):
    """name and shape as NumPy has it; `read` gives uint16 (BF16 bits) or float32."""

    name: str
    shape: tuple[int, ...]
    type: int
    read: Callable[[], Array]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * (4 if self.type == F32 else 2)


def string(text: str) -> bytes:
    """Length and UTF-8."""
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def setting(name: str, value: int | float | str) -> bytes:
    """One key-value pair: an int as uint32, a float as float32, text as a string."""
    if isinstance(value, str):
        return string(name) + struct.pack("<I", STRING) + string(value)
    if isinstance(value, float):
        return string(name) + struct.pack("<If", FLOAT32, value)
    return string(name) + struct.pack("<II", UINT32, value)


def padding(position: int) -> bytes:
    """Zeros up to the next multiple of ALIGNMENT."""
    return bytes(-position % ALIGNMENT)


def write_gguf(
    file: BinaryIO, settings: Mapping[str, int | float | str], tensors: list[Tensor]
) -> None:
    """The container. Tensors are read one after the other, so one is in memory at a time."""
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(settings))
    head += b"".join(setting(name, value) for name, value in settings.items())
    offset = 0
    for tensor in tensors:
        dimensions = tensor.shape[::-1]
        head += string(tensor.name) + struct.pack("<I", len(dimensions))
        head += struct.pack(f"<{len(dimensions)}Q", *dimensions)
        head += struct.pack("<IQ", tensor.type, offset)
        offset += tensor.nbytes + len(padding(tensor.nbytes))
    file.write(head + padding(len(head)))
    for tensor in tensors:
        data = np.ascontiguousarray(tensor.read()).tobytes()
        if len(data) != tensor.nbytes:
            raise ValueError(f"{tensor.name}: {len(data)} bytes, expected {tensor.nbytes}")
        file.write(data + padding(len(data)))


def rotate_neighbours(weight: Array, num_heads: int) -> Array:
    """Rows of a q or k projection [heads * D, E]: (i, i + D/2) of a head become (2i, 2i + 1)."""
    rows, columns = weight.shape
    halves = weight.reshape(num_heads, 2, rows // num_heads // 2, columns)
    return halves.swapaxes(1, 2).reshape(rows, columns)


def rope_divisors(config: Mapping[str, Any], dim: int) -> Array | None:
    """f32[dim / 2] by which llama.cpp divides the angular frequencies; None where it need not."""
    scaling = config.get("rope_scaling")
    if not scaling:
        return None
    if scaling.get("rope_type") != "llama3":
        raise ValueError(f"rope_scaling {scaling}: only llama3 is converted")
    frequencies = config["rope_theta"] ** (-np.arange(0, dim, 2) / dim)
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high, factor = (scaling[k] for k in ("low_freq_factor", "high_freq_factor", "factor"))
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return np.asarray(1 / ((1 - kept) / factor + kept), np.float32)


def settings_of(config: Mapping[str, Any], name: str) -> dict[str, int | float | str]:
    """llama.cpp's settings from a config.json."""
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    return {
        "general.architecture": "llama",
        "general.name": name,
        "general.file_type": MOSTLY_BF16,
        "llama.vocab_size": config["vocab_size"],
        "llama.context_length": config["max_position_embeddings"],
        "llama.embedding_length": config["hidden_size"],
        "llama.block_count": config["num_hidden_layers"],
        "llama.feed_forward_length": config["intermediate_size"],
        "llama.attention.head_count": heads,
        "llama.attention.head_count_kv": config.get("num_key_value_heads", heads),
        "llama.attention.key_length": head_dim,
        "llama.attention.value_length": head_dim,
        "llama.attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "llama.rope.dimension_count": head_dim,
        "llama.rope.freq_base": float(config["rope_theta"]),
        "tokenizer.ggml.model": "none",
    }


def tensors_of(checkpoint: Checkpoint) -> Iterator[Tensor]:
    """Every tensor of the file, in llama.cpp's names."""
    config = checkpoint.config
    settings = settings_of(config, "")
    heads = {"attn_q": "head_count", "attn_k": "head_count_kv"}

    def tensor(theirs: str, ours: str) -> Tensor:
        shape = checkpoint.shape(ours)
        if len(shape) == 1:
            return Tensor(
                theirs, shape, F32, lambda: widen(checkpoint.tensor(ours, shape)).astype(np.float32)
            )
        kind = theirs.split(".")[-2]
        if kind not in heads:
            return Tensor(theirs, shape, BF16, lambda: checkpoint.tensor(ours, shape, ("BF16",)))
        num_heads = int(settings[f"llama.attention.{heads[kind]}"])
        return Tensor(
            theirs,
            shape,
            BF16,
            lambda: rotate_neighbours(checkpoint.tensor(ours, shape, ("BF16",)), num_heads),
        )

    yield tensor("token_embd.weight", "model.embed_tokens.weight")
    yield tensor("output_norm.weight", "model.norm.weight")
    if "lm_head.weight" in checkpoint.names():
        yield tensor("output.weight", "lm_head.weight")
    dim = int(settings["llama.rope.dimension_count"])
    divisors = rope_divisors(config, dim)
    if divisors is not None:
        yield Tensor("rope_freqs.weight", divisors.shape, F32, lambda: divisors)
    for layer in range(config["num_hidden_layers"]):
        for ours, theirs in LAYER_NAMES.items():
            yield tensor(f"blk.{layer}.{theirs}.weight", f"model.layers.{layer}.{ours}.weight")


def convert(directory: Path, path: Path) -> None:
    """Write `path` from the checkpoint in `directory`; ValueError where it is no plain Llama."""
    with Checkpoint.open(directory) as checkpoint:
        if checkpoint.config.get("architectures") != ["LlamaForCausalLM"]:
            raise ValueError(f"{directory}: only LlamaForCausalLM is converted")
        tensors = list(tensors_of(checkpoint))
        with open(path, "wb") as file:
            write_gguf(file, settings_of(checkpoint.config, directory.name), tensors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("path", type=Path)
    options = parser.parse_args()
    convert(options.directory, options.path)
    print(f"{options.path}: {options.path.stat().st_size / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
