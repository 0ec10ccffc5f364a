"""Gemma 3 (`Gemma3ForCausalLM`), also the text part of `Gemma3ForConditionalGeneration`.

Knows the config.json fields, the order of operations in a layer and the weight names. Does not know
files, requests or images, nor of the kernels more than BF16 rounding. What differs from Llama:
norms scale by 1 + w, there are four in a layer, and queries and keys are normalized per head; most
layers see a sliding window and rotate with a base of their own; scores are scaled by
`query_pre_attn_scalar`, embeddings by sqrt(E).

    residual = embed_tokens(token_ids) * sqrt(E)                f32[T, E]
    each layer:  residual += post_attention_layernorm(self_attn(input_layernorm(residual)))
                 residual += post_feedforward_layernorm(mlp(pre_feedforward_layernorm(residual)))
    logits = embed_tokens.project(norm(residual))               f32[R, V], wanted rows only

A layer's second and fourth norm and the addition are done by the norm that follows (`delta` below).
The published model runs in BF16 and rounds sqrt(E) to it (62.0 for 3840, not 61.97): with dtype
"bfloat16" so does this file, in float32 it does not, as transformers.
Source: transformers 5.23, models/gemma3.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from pace_nb.batch import Batch
from pace_nb.errors import UnsupportedModelError
from pace_nb.kernels import bf16
from pace_nb.kernels.rope import Rotation
from pace_nb.kv_cache.base import BatchKV, KVCacheConfig
from pace_nb.layers.attention import Attention, Sees, Step
from pace_nb.layers.embedding import Embedding
from pace_nb.layers.linear import FusedLinear, Linear
from pace_nb.layers.mlp import GatedMLP
from pace_nb.layers.module import Module, join
from pace_nb.layers.norm import Normed, RMSNorm, head_norms
from pace_nb.layers.rope import RopeParameters, RotaryEmbedding
from pace_nb.layers.weights import Float32Array, Weights
from pace_nb.models.config_json import ConfigJson

# Published text_configs name only what differs from these (transformers 5.23, Gemma3TextConfig).
DEFAULTS = {
    "vocab_size": 262_208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131_072,
}
# Where the text model's tensors are: text-only files, published multimodal ones, newer exports.
PREFIXES = ("model", "language_model.model", "model.language_model")


# ---- Config --------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Gemma3Config:
    """Fields as in config.json or its text_config. `windows` says per layer how many positions it
    sees (0 = all, a global layer), from sliding_window and layer_types or sliding_window_pattern;
    `rope` and `local_rope` are the rotary settings of global and sliding layers; `prefix` is where
    in the checkpoint the tensors are."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    hidden_activation: str
    max_position_embeddings: int
    rms_norm_eps: float
    query_pre_attn_scalar: float
    attention_bias: bool
    windows: tuple[int, ...]
    rope: RopeParameters
    local_rope: RopeParameters
    prefix: str

    @classmethod
    def from_json(cls, json: ConfigJson) -> Gemma3Config:
        """Read and validate. ModelFormatError or UnsupportedModelError naming the field."""
        text = json.section("text_config") if json.has("text_config") else json
        text = text.with_defaults(DEFAULTS)
        for part in (json, text):
            if not part.boolean("tie_word_embeddings", True):
                raise _unsupported("tie_word_embeddings", "false", "true")
        for field in ("final_logit_softcapping", "attn_logit_softcapping"):
            if text.has(field):
                raise _unsupported(field, "set", "null")
        if text.boolean("use_bidirectional_attention", False):
            raise _unsupported("use_bidirectional_attention", "true", "false")
        num_heads = text.integer("num_attention_heads")
        head_dim = text.head_dim(text.integer("hidden_size"), num_heads)
        num_layers = text.num_hidden_layers()
        return cls(
            vocab_size=text.integer("vocab_size"),
            hidden_size=text.integer("hidden_size"),
            intermediate_size=text.integer("intermediate_size"),
            num_hidden_layers=num_layers,
            num_attention_heads=num_heads,
            num_key_value_heads=text.num_key_value_heads(num_heads),
            head_dim=head_dim,
            hidden_activation=text.text("hidden_activation", "gelu_pytorch_tanh"),
            max_position_embeddings=text.integer("max_position_embeddings"),
            rms_norm_eps=text.number("rms_norm_eps", 1e-6),
            query_pre_attn_scalar=text.number("query_pre_attn_scalar", 256.0),
            attention_bias=text.boolean("attention_bias", False),
            windows=_windows(text, num_layers),
            rope=text.rope_parameters(head_dim, default_theta=1e6, layer_type="full_attention"),
            local_rope=_local_rope(text, head_dim),
            prefix=next((p for p in PREFIXES if json.has_tensor(f"{p}.norm.weight")), PREFIXES[0]),
        )


def _windows(text: ConfigJson, num_layers: int) -> tuple[int, ...]:
    """Per layer, from `layer_types`, else every `sliding_window_pattern`-th layer is global."""
    window = text.optional_integer("sliding_window", missing=4096)
    if text.has("layer_types"):
        return text.layer_windows(num_layers, window, first_sliding=0)
    pattern = text.integer("sliding_window_pattern", 6)
    return tuple(
        text.integer("sliding_window", window) if i % pattern else 0
        for i in range(1, num_layers + 1)
    )


def _local_rope(text: ConfigJson, head_dim: int) -> RopeParameters:
    """The sliding layers' settings: a base of their own, never scaled."""
    nested = text.section("rope_parameters").section("sliding_attention")
    rope_type = nested.text("rope_type", "default")
    if rope_type != "default":
        raise _unsupported("rope_type of sliding_attention", repr(rope_type), "'default'")
    theta = nested.number("rope_theta", text.number("rope_local_base_freq", 1e4))
    return RopeParameters(head_dim, text.integer("max_position_embeddings"), theta)


def _unsupported(field: str, found: str, supported: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"config.json: {field} is {found}, which no Gemma 3 has, supported: {supported}"
    )


# ---- Norm ----------------------------------------------------------------------------------------
class Gemma3RMSNorm(RMSNorm):
    """x / sqrt(mean(x^2) + eps) * (1 + weight); the 1 is added once, in float32."""

    def load(self, weights: Weights, name: str = "") -> None:
        super().load(weights, name)
        self.weight += np.float32(1.0)


# ---- Attention -----------------------------------------------------------------------------------
class Gemma3Attention(Module):
    """o_proj(attend(rotate(norm(q)), rotate(norm(k)), v)); q, k and v are one packed weight."""

    def __init__(self, config: Gemma3Config, layer_index: int) -> None:
        query_size = config.num_attention_heads * config.head_dim
        key_size = config.num_key_value_heads * config.head_dim
        self.qkv_proj = FusedLinear(
            config.hidden_size,
            {"q_proj": query_size, "k_proj": key_size, "v_proj": key_size},
            bias=config.attention_bias,
        )
        self.q_norm = Gemma3RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = Gemma3RMSNorm(config.head_dim, config.rms_norm_eps)
        scale, window = config.query_pre_attn_scalar**-0.5, config.windows[layer_index]
        self._attend = Attention(layer_index, scale=scale, window=window)
        self.o_proj = Linear(query_size, config.hidden_size, bias=config.attention_bias)

    def __call__(self, x: NDArray[Any], rotation: Rotation, step: Step) -> Float32Array:
        """x storage[T, E] -> f32[T, E]."""
        norms = head_norms(self.q_norm, self.k_norm)
        return self.o_proj(self._attend(self.qkv_proj(x), step, rotation, norms=norms))


# ---- MLP -----------------------------------------------------------------------------------------
class Gemma3MLP(GatedMLP):
    """down_proj(act(gate_proj(x)) * up_proj(x))."""

    def __init__(self, config: Gemma3Config) -> None:
        super().__init__(config.hidden_size, config.intermediate_size, config.hidden_activation)


# ---- DecoderLayer --------------------------------------------------------------------------------
class Gemma3DecoderLayer(Module):
    """Attention, then MLP, each between a norm of its input and a norm of its output."""

    def __init__(self, config: Gemma3Config, layer_index: int) -> None:
        size, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = Gemma3RMSNorm(size, eps)
        self.self_attn = Gemma3Attention(config, layer_index)
        self.post_attention_layernorm = Gemma3RMSNorm(size, eps)
        self.pre_feedforward_layernorm = Gemma3RMSNorm(size, eps)
        self.mlp = Gemma3MLP(config)
        self.post_feedforward_layernorm = Gemma3RMSNorm(size, eps)

    def __call__(
        self, residual: Float32Array, delta: Normed | None, rotation: Rotation, step: Step
    ) -> Normed:
        """residual f32[T, E] is updated in place; delta is the MLP output of the layer before,
        still to be normalized and added. Returns this layer's own."""
        attended = self.self_attn(self.input_layernorm(residual, delta), rotation, step)
        delta = Normed(attended, self.post_attention_layernorm)
        x = self.pre_feedforward_layernorm(residual, delta)
        return Normed(self.mlp(x), self.post_feedforward_layernorm)


# ---- ForCausalLM ---------------------------------------------------------------------------------
class Gemma3ForCausalLM(Module):
    """`model(batch, kv)` -> hidden f32[T, E], `model.logits(hidden, rows)` -> f32[R, V]."""

    config_class = Gemma3Config

    def __init__(self, config: Gemma3Config) -> None:
        self._config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = [Gemma3DecoderLayer(config, i) for i in range(config.num_hidden_layers)]
        self.norm = Gemma3RMSNorm(config.hidden_size, config.rms_norm_eps)
        self._rotary = RotaryEmbedding(config.rope)
        self._local_rotary = RotaryEmbedding(config.local_rope)
        self._embed_scale: np.float32

    @property
    def vocab_size(self) -> int:
        """V."""
        return self._config.vocab_size

    @property
    def max_position_embeddings(self) -> int:
        """The longest sequence the model was made for."""
        return self._config.max_position_embeddings

    def kv_cache_config(self, dtype: str) -> KVCacheConfig:
        """What has to be cached for every token."""
        c = self._config
        sizes = c.num_hidden_layers, c.num_key_value_heads, c.head_dim
        return KVCacheConfig(*sizes, dtype, c.rope.by_length, *Sees.of(self.layers))

    def load(self, weights: Weights, name: str = "") -> None:
        super().load(weights, name)
        scale = np.array([self._config.hidden_size**0.5], np.float32)
        if weights.dtype == "bfloat16":
            scale = bf16.to_f32(bf16.from_f32(scale))
        self._embed_scale = scale[0]

    def __call__(self, batch: Batch, kv: BatchKV) -> Float32Array:
        """The residual stream after the last layer, f32[T, E]; `logits` applies the final norm."""
        step = Step(batch, kv)
        rotation = self._rotary(batch.positions, step.sequence_lens)
        local_rotation = self._local_rotary(batch.positions, step.sequence_lens)
        residual = self.embed_tokens(batch.token_ids)
        residual *= self._embed_scale
        delta: Normed | None = None
        for layer, window in zip(self.layers, self._config.windows, strict=True):
            delta = layer(residual, delta, local_rotation if window else rotation, step)
        return residual if delta is None else np.add(residual, delta.value(), out=residual)

    def logits(self, hidden: Float32Array, rows: NDArray[np.int32]) -> Float32Array:
        """hidden f32[T, E], rows int32[R] -> f32[R, V]; nothing is computed for the other rows."""
        return self.embed_tokens.project(self.norm(hidden[rows]))

    # ---- weight names ----------------------------------------------------------------------------
    def parts(self, name: str) -> Iterator[tuple[str, Module]]:
        """All parts are under the prefix that the checkpoint uses."""
        return super().parts(join(name, self._config.prefix))

    # The copy of the tied head, and what belongs to images (beginnings have a dot at the end).
    ignored_weights: ClassVar[tuple[str, ...]] = (
        "lm_head.weight",
        "vision_tower.",
        "multi_modal_projector.",
        "model.vision_tower.",
        "model.multi_modal_projector.",
    )


class Gemma3ForConditionalGeneration(Gemma3ForCausalLM):
    """The text part of the multimodal models: the same, found in `text_config`."""
