"""Qwen 2, 2.5 and DeepSeek-R1-Distill-Qwen (`Qwen2ForCausalLM`).

Knows the config.json fields, the order of operations in a layer and the weight names. Does not know
kernels, files or requests. What differs from Llama: q, k and v have biases and o_proj has none;
layers from `max_window_layers` on see a sliding window where `use_sliding_window` is set.

    residual = embed_tokens(token_ids)                          f32[T, E]
    each layer:  residual += self_attn(input_layernorm(residual))
                 residual += mlp(post_attention_layernorm(residual))
    logits = lm_head(norm(residual))                            f32[R, V], wanted rows only

Each addition is done by the norm that follows it (`delta` below), in one pass over the residual.
Source: transformers 5.19, models/qwen2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from pace_nb.batch import Batch
from pace_nb.kv_cache.base import BatchKV, KVCacheConfig
from pace_nb.layers.attention import Attention, Step
from pace_nb.layers.embedding import Embedding
from pace_nb.layers.linear import FusedLinear, Linear
from pace_nb.layers.mlp import GatedMLP
from pace_nb.layers.module import Module
from pace_nb.layers.norm import RMSNorm
from pace_nb.layers.rope import RopeParameters, RotaryEmbedding, Rotation
from pace_nb.layers.weights import Float32Array
from pace_nb.models.config_json import ConfigJson


# ---- Config --------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Qwen2Config:
    """Fields as in config.json. `windows` says per layer how many positions it sees (0 = all), from
    use_sliding_window, sliding_window, max_window_layers and layer_types; `rope` is the rotary
    settings, which have two spellings."""

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
    tie_word_embeddings: bool
    windows: tuple[int, ...]
    rope: RopeParameters

    @classmethod
    def from_json(cls, json: ConfigJson) -> Qwen2Config:
        """Read and validate. ModelFormatError or UnsupportedModelError naming the field."""
        hidden_size = json.integer("hidden_size")
        num_heads = json.integer("num_attention_heads")
        head_dim = json.head_dim(hidden_size, num_heads)
        num_layers = json.num_hidden_layers()
        window = json.optional_integer("sliding_window", missing=4096)
        if not json.boolean("use_sliding_window", False):
            window = None
        first_sliding = json.integer("max_window_layers", 28, minimum=0)
        return cls(
            vocab_size=json.integer("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=json.integer("intermediate_size"),
            num_hidden_layers=num_layers,
            num_attention_heads=num_heads,
            num_key_value_heads=json.num_key_value_heads(num_heads),
            head_dim=head_dim,
            hidden_act=json.text("hidden_act", "silu"),
            max_position_embeddings=json.integer("max_position_embeddings"),
            rms_norm_eps=json.number("rms_norm_eps", 1e-6),
            tie_word_embeddings=json.tie_word_embeddings(False),
            windows=json.layer_windows(num_layers, window, first_sliding),
            rope=json.rope_parameters(head_dim),
        )


# ---- Attention -----------------------------------------------------------------------------------
class Qwen2Attention(Module):
    """o_proj(attend(rotate(q), rotate(k), v)); q, k and v are one packed weight."""

    def __init__(self, config: Qwen2Config, layer_index: int) -> None:
        self._head_dim = config.head_dim
        self._num_heads = config.num_attention_heads
        self._num_kv_heads = config.num_key_value_heads
        query_size = config.num_attention_heads * config.head_dim
        key_size = config.num_key_value_heads * config.head_dim
        self.qkv_proj = FusedLinear(
            config.hidden_size,
            {"q_proj": query_size, "k_proj": key_size, "v_proj": key_size},
            bias=True,
        )
        self._attend = Attention(
            layer_index, scale=config.head_dim**-0.5, window=config.windows[layer_index]
        )
        self.o_proj = Linear(query_size, config.hidden_size)

    def __call__(self, x: NDArray[Any], rotation: Rotation, step: Step) -> Float32Array:
        """x storage[T, E] -> f32[T, E]."""
        heads = self.qkv_proj(x).reshape(len(x), -1, self._head_dim)
        keys, values = self._num_heads, self._num_heads + self._num_kv_heads  # first head of each
        q, k, v = heads[:, :keys], heads[:, keys:values], heads[:, values:]
        return self.o_proj(self._attend(q, k, v, step, rotation))


# ---- MLP -----------------------------------------------------------------------------------------
class Qwen2MLP(GatedMLP):
    """down_proj(act(gate_proj(x)) * up_proj(x))."""

    def __init__(self, config: Qwen2Config) -> None:
        super().__init__(config.hidden_size, config.intermediate_size, config.hidden_act)


# ---- DecoderLayer --------------------------------------------------------------------------------
class Qwen2DecoderLayer(Module):
    """Attention, then MLP, each on a normalized copy of the residual stream."""

    def __init__(self, config: Qwen2Config, layer_index: int) -> None:
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Qwen2Attention(config, layer_index)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = Qwen2MLP(config)

    def __call__(
        self, residual: Float32Array, delta: Float32Array | None, rotation: Rotation, step: Step
    ) -> Float32Array:
        """residual f32[T, E] is updated in place; delta is the MLP output of the layer before,
        still to be added. Returns this layer's own MLP output."""
        delta = self.self_attn(self.input_layernorm(residual, delta), rotation, step)
        return self.mlp(self.post_attention_layernorm(residual, delta))


# ---- ForCausalLM ---------------------------------------------------------------------------------
class Qwen2ForCausalLM(Module):
    """`model(batch, kv)` -> hidden f32[T, E], `model.logits(hidden, rows)` -> f32[R, V]."""

    config_class = Qwen2Config

    def __init__(self, config: Qwen2Config) -> None:
        self._config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = [Qwen2DecoderLayer(config, i) for i in range(config.num_hidden_layers)]
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = (
            None if config.tie_word_embeddings else Linear(config.hidden_size, config.vocab_size)
        )
        self._rotary = RotaryEmbedding(config.rope)

    @property
    def vocab_size(self) -> int:
        """V."""
        return self._config.vocab_size

    @property
    def max_position_embeddings(self) -> int:
        """The longest sequence the model was made for."""
        return self._config.max_position_embeddings

    @property
    def switch_length(self) -> int | None:
        """A sequence that grows beyond it is computed anew: all its keys rotate otherwise."""
        return self._config.rope.switch_length

    def kv_cache_config(self, dtype: str) -> KVCacheConfig:
        """What has to be cached for every token."""
        c = self._config
        return KVCacheConfig(
            c.num_hidden_layers, c.num_key_value_heads, c.head_dim, dtype, c.rope.by_length
        )

    def __call__(self, batch: Batch, kv: BatchKV) -> Float32Array:
        """The residual stream after the last layer, f32[T, E]; `logits` applies the final norm."""
        step = Step.of(batch, kv)
        rotation = self._rotary(batch.positions, step.sequence_lens)
        residual = self.embed_tokens(batch.token_ids)
        delta: Float32Array | None = None
        for layer in self.layers:
            delta = layer(residual, delta, rotation, step)
        return residual if delta is None else np.add(residual, delta, out=residual)

    def logits(self, hidden: Float32Array, rows: NDArray[np.int32]) -> Float32Array:
        """hidden f32[T, E], rows int32[R] -> f32[R, V]; nothing is computed for the other rows."""
        x = self.norm(hidden[rows])
        return self.embed_tokens.project(x) if self.lm_head is None else self.lm_head(x)

    # ---- weight names ----------------------------------------------------------------------------
    weight_names: ClassVar[Mapping[str, str]] = {
        "embed_tokens": "model.embed_tokens",
        "layers": "model.layers",
        "norm": "model.norm",
    }
    # Endings of tensors that may be there without being used: frequencies that old exports saved,
    # and the copy of a tied head.
    ignored_weights: ClassVar[tuple[str, ...]] = (".rotary_emb.inv_freq", "lm_head.weight")
