"""Mistral 7B, Nemo, Small and Sarvam-M (`MistralForCausalLM`).

Knows the config.json fields, the order of operations in a layer and the weight names. Does not know
kernels, files or requests. What differs from Llama: every layer sees a sliding window, 4096 where
config.json does not name it and none where it is null; no biases.

    residual = embed_tokens(token_ids)                          f32[T, E]
    each layer:  residual += self_attn(input_layernorm(residual))
                 residual += mlp(post_attention_layernorm(residual))
    logits = lm_head(norm(residual))                            f32[R, V], wanted rows only

The order of operations is that of `layers/decoder.py`, which adds in the norm that follows.
Source: transformers 5.19, models/mistral.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from pace_nb.kernels.rope import Rotation
from pace_nb.layers.attention import Attention, Step
from pace_nb.layers.decoder import CausalLM, DecoderLayer
from pace_nb.layers.linear import FusedLinear, Linear
from pace_nb.layers.mlp import GatedMLP
from pace_nb.layers.module import Module
from pace_nb.layers.rope import RopeParameters
from pace_nb.layers.weights import Float32Array
from pace_nb.models.config_json import ConfigJson


# ---- Config --------------------------------------------------------------------------------------
@dataclass(frozen=True)
class MistralConfig:
    """Fields as in config.json; the rotary settings, which have two spellings there, are `rope`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    hidden_act: str
    max_position_embeddings: int
    rms_norm_eps: float
    sliding_window: int | None
    tie_word_embeddings: bool
    rope: RopeParameters

    @classmethod
    def from_json(cls, json: ConfigJson) -> MistralConfig:
        """Read and validate. ModelFormatError or UnsupportedModelError naming the field."""
        hidden_size = json.integer("hidden_size")
        num_heads = json.integer("num_attention_heads")
        head_dim = json.head_dim(hidden_size, num_heads)
        return cls(
            vocab_size=json.integer("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=json.integer("intermediate_size"),
            num_hidden_layers=json.num_hidden_layers(),
            num_attention_heads=num_heads,
            num_key_value_heads=json.num_key_value_heads(num_heads),
            head_dim=head_dim,
            hidden_act=json.text("hidden_act", "silu"),
            max_position_embeddings=json.integer("max_position_embeddings"),
            rms_norm_eps=json.number("rms_norm_eps", 1e-6),
            sliding_window=json.optional_integer("sliding_window", missing=4096),
            tie_word_embeddings=json.tie_word_embeddings(False),
            rope=json.rope_parameters(head_dim),
        )


# ---- Attention -----------------------------------------------------------------------------------
class MistralAttention(Module):
    """o_proj(attend(rotate(q), rotate(k), v)); q, k and v are one packed weight."""

    def __init__(self, config: MistralConfig, layer_index: int) -> None:
        query_size = config.num_attention_heads * config.head_dim
        key_size = config.num_key_value_heads * config.head_dim
        self.qkv_proj = FusedLinear(
            config.hidden_size,
            {"q_proj": query_size, "k_proj": key_size, "v_proj": key_size},
        )
        self._attend = Attention(
            layer_index, scale=config.head_dim**-0.5, window=config.sliding_window or 0
        )
        self.o_proj = Linear(query_size, config.hidden_size)

    def __call__(self, x: NDArray[Any], rotation: Rotation, step: Step) -> Float32Array:
        """x storage[T, E] -> f32[T, E]."""
        return self.o_proj(self._attend(self.qkv_proj(x), step, rotation))


# ---- MLP -----------------------------------------------------------------------------------------
class MistralMLP(GatedMLP):
    """down_proj(act(gate_proj(x)) * up_proj(x))."""

    def __init__(self, config: MistralConfig) -> None:
        super().__init__(config.hidden_size, config.intermediate_size, config.hidden_act)


# ---- DecoderLayer --------------------------------------------------------------------------------
class MistralDecoderLayer(DecoderLayer):
    """Attention, then MLP, each on a normalized copy of the residual stream."""

    def __init__(self, config: MistralConfig, layer_index: int) -> None:
        super().__init__(config, MistralAttention(config, layer_index), MistralMLP(config))


# ---- ForCausalLM ---------------------------------------------------------------------------------
class MistralForCausalLM(CausalLM):
    """`model(batch, kv)` -> hidden f32[T, E], `model.logits(hidden, rows)` -> f32[R, V].

    Weight names: those of `layers/decoder.py`.
    """

    config_class = MistralConfig

    def __init__(self, config: MistralConfig) -> None:
        layers = [MistralDecoderLayer(config, i) for i in range(config.num_hidden_layers)]
        super().__init__(config, layers)
