"""Which architectures there are, and how a checkpoint becomes a model: `load_model`.

Knows the closed list of architecture strings and the order of loading. Does not know files, dtypes
or any family's inside. Nothing in a checkpoint can name code: the list is closed, `auto_map` is
ignored, and a quantized checkpoint is refused instead of misread.

Loading never allocates from an unchecked size: config.json is validated, the model is built as
shells, the name and shape of every tensor are compared with the checkpoint, and only then are
weights packed, one tensor after another.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from importlib import import_module
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pace_nb.batch import Batch
from pace_nb.errors import ModelFormatError, UnsupportedModelError
from pace_nb.kv_cache.base import BatchKV, KVCacheConfig
from pace_nb.layers.weights import Float32Array, StorageDtype, TensorSource, Weights
from pace_nb.models.config_json import ConfigJson

# architecture string of config.json -> module in this package; the class has the architecture's
# name.
ARCHITECTURES = {
    "GPTJForCausalLM": "gptj",
    "GptOssForCausalLM": "gpt_oss",
    "Gemma3ForCausalLM": "gemma3",
    "Gemma3ForConditionalGeneration": "gemma3",
    "Llama4ForCausalLM": "llama4",
    "Llama4ForConditionalGeneration": "llama4",
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "OPTForCausalLM": "opt",
    "Phi3ForCausalLM": "phi3",
    "PhiForCausalLM": "phi",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}


class Model(Protocol):
    """What the engine sees of a model. One with longrope has `switch_length` as well, see there in
    engine/model_runner.py."""

    @property
    def vocab_size(self) -> int:
        """V: logits per row; token ids are below it."""

    @property
    def max_position_embeddings(self) -> int:
        """The longest sequence the model was made for."""

    def kv_cache_config(self, dtype: str) -> KVCacheConfig:
        """What has to be cached for every token."""

    def __call__(self, batch: Batch, kv: BatchKV) -> Float32Array:
        """hidden f32[T, E] of the batch's tokens; writes their keys and values."""

    def logits(self, hidden: Float32Array, rows: NDArray[np.int32]) -> Float32Array:
        """f32[R, V] for rows int32[R] of hidden."""


class CheckpointSource(TensorSource, Protocol):
    """What is needed of `models/loader.py:Checkpoint`."""

    @property
    def config(self) -> Mapping[str, Any]:
        """The parsed config.json."""


def architecture(config: Mapping[str, Any]) -> str:
    """`architectures[0]`. UnsupportedModelError, listing what is supported, for any other."""
    listed = config.get("architectures")
    supported = ", ".join(sorted(ARCHITECTURES))
    if not isinstance(listed, list) or not listed or not isinstance(listed[0], str):
        raise ModelFormatError(
            f"config.json: architectures is missing or empty, expected one of {supported}"
        )
    name: str = listed[0]
    if name not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"architecture {name[:80]!r} is not supported, supported: {supported}"
        )
    return name


def build_model(config: Mapping[str, Any], tensor_names: Collection[str]) -> Any:
    """The model as shells, from config.json and the checkpoint's tensor names; reads no weight."""
    name = architecture(config)
    module = import_module(f"pace_nb.models.{ARCHITECTURES[name]}")
    model_class = getattr(module, name)
    _refuse_quantization(config, getattr(model_class, "quantization_methods", ()))
    return model_class(model_class.config_class.from_json(ConfigJson(config, tensor_names)))


def _refuse_quantization(config: Mapping[str, Any], methods: tuple[str, ...]) -> None:
    """UnsupportedModelError for a quantized checkpoint, unless its family reads that method."""
    quantization = config.get("quantization_config")
    if quantization is None:
        return
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if method not in methods:
        raise UnsupportedModelError(
            f"quantization_config (quant_method {str(method)[:40]!r}) is not supported here,"
            f" supported: {''.join(f'{name}, ' for name in methods)}unquantized BF16, F16 and F32"
            " weights"
        )


def load_model(checkpoint: CheckpointSource, dtype: StorageDtype = "bfloat16") -> Model:
    """Build the model that the checkpoint's config.json describes and pack its weights.

    dtype: what weights, GEMM inputs and the KV cache are stored as; layers/weights.py says how each
    kind of checkpoint is converted. Raises ModelFormatError naming the tensor or field,
    UnsupportedModelError naming what is supported.
    """
    weights = Weights(checkpoint, dtype)
    model = build_model(checkpoint.config, checkpoint.names())
    model.check(weights)
    _refuse_unknown(model, checkpoint)
    model.load(weights)
    return model  # type: ignore[no-any-return]


def _refuse_unknown(model: Any, checkpoint: CheckpointSource) -> None:
    """ModelFormatError for a tensor that nothing would read: a bias left out is a wrong model."""
    known = {name for name, _ in model.tensors("")}
    # A pattern with a dot at its end is a beginning (`vision_tower.`), any other an ending.
    beginnings = tuple(part for part in model.ignored_weights if part.endswith("."))
    endings = tuple(part for part in model.ignored_weights if not part.endswith("."))
    unknown = sorted(
        name
        for name in checkpoint.names()
        if name not in known and not name.startswith(beginnings) and not name.endswith(endings)
    )
    if unknown:
        raise ModelFormatError(
            f"tensor {unknown[0]} has no place in the model that config.json describes"
            f" ({len(unknown)} such tensors); check num_hidden_layers and the bias fields"
        )
