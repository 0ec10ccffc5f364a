"""Phi-1, 1.5 and 2 (`PhiForCausalLM`).

Knows the config.json fields, the order of operations in a layer and the weight names. Does not know
files or requests, nor of the kernels more than `layer_norm`. What differs from Llama: attention and
MLP both read one LayerNorm of the residual (parallel residual); the MLP has no gate; only part of a
head rotates; every projection has a bias, the output head too; queries and keys may be normalized
per head (`qk_layernorm`).

    residual = embed_tokens(token_ids)                          f32[T, E]
    each layer:  x = input_layernorm(residual)
                 residual += self_attn(x) + mlp(x)
    logits = lm_head(final_layernorm(residual))                 f32[R, V], wanted rows only

The second addition is done by the norm that follows it (`delta` below), in one pass over the
residual.
Source: transformers 5.23, models/phi.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from pace_nb.batch import Batch
from pace_nb.errors import UnsupportedModelError
from pace_nb.kernels import norm
from pace_nb.kernels.rope import Rotation
from pace_nb.kv_cache.base import BatchKV, KVCacheConfig
from pace_nb.layers.attention import Attention, Step
from pace_nb.layers.embedding import Embedding
from pace_nb.layers.linear import FusedLinear, Linear
from pace_nb.layers.mlp import MLP
from pace_nb.layers.module import Module
from pace_nb.layers.norm import LayerNorm
from pace_nb.layers.rope import RopeParameters, RotaryEmbedding
from pace_nb.layers.weights import Float32Array
from pace_nb.models.config_json import ConfigJson


# ---- Config --------------------------------------------------------------------------------------
@dataclass(frozen=True)
class PhiConfig:
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
    layer_norm_eps: float
    qk_layernorm: bool
    rope: RopeParameters

    @classmethod
    def from_json(cls, json: ConfigJson) -> PhiConfig:
        """Read and validate. ModelFormatError or UnsupportedModelError naming the field."""
        json = json.with_defaults({"partial_rotary_factor": 0.5})
        if json.boolean("tie_word_embeddings", False):
            raise UnsupportedModelError(
                "config.json: tie_word_embeddings is true, which no Phi has, supported: false"
            )
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
            hidden_act=json.text("hidden_act", "gelu_new"),
            max_position_embeddings=json.integer("max_position_embeddings"),
            layer_norm_eps=json.number("layer_norm_eps", 1e-5),
            qk_layernorm=json.boolean("qk_layernorm", False),
            rope=json.rope_parameters(head_dim),
        )


# ---- Norm of heads -------------------------------------------------------------------------------
class PhiHeadLayerNorm(LayerNorm):
    """LayerNorm over the D values of every head, between projection and rotation; stays float32."""

    def of_heads(self, heads: Float32Array) -> Float32Array:
        """f32[T, H, D] (a view of a fused projection) -> f32[T, H, D], its own array."""
        rows = heads.reshape(-1, self.size)
        return norm.layer_norm(rows, self._weight, self._bias, self.eps).reshape(heads.shape)


# ---- Attention -----------------------------------------------------------------------------------
class PhiAttention(Module):
    """dense(attend(rotate(q), rotate(k), v)); q, k and v are one packed weight."""

    def __init__(self, config: PhiConfig, layer_index: int) -> None:
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
        self.q_layernorm = self.k_layernorm = None
        if config.qk_layernorm:
            self.q_layernorm = PhiHeadLayerNorm(config.head_dim, config.layer_norm_eps)
            self.k_layernorm = PhiHeadLayerNorm(config.head_dim, config.layer_norm_eps)
        self._attend = Attention(layer_index, scale=config.head_dim**-0.5)
        self.dense = Linear(query_size, config.hidden_size, bias=True)

    def __call__(self, x: NDArray[Any], rotation: Rotation, step: Step) -> Float32Array:
        """x storage[T, E] -> f32[T, E]."""
        qkv = self.qkv_proj(x)
        if self.q_layernorm is not None and self.k_layernorm is not None:
            heads = qkv.reshape(len(x), -1, self._head_dim)  # a view: qkv is what is normalized
            keys, values = self._num_heads, self._num_heads + self._num_kv_heads  # their first
            heads[:, :keys] = self.q_layernorm.of_heads(heads[:, :keys])
            heads[:, keys:values] = self.k_layernorm.of_heads(heads[:, keys:values])
        return self.dense(self._attend(qkv, step, rotation))


# ---- MLP -----------------------------------------------------------------------------------------
class PhiMLP(MLP):
    """fc2(act(fc1(x)))."""

    def __init__(self, config: PhiConfig) -> None:
        super().__init__(config.hidden_size, config.intermediate_size, config.hidden_act)


# ---- DecoderLayer --------------------------------------------------------------------------------
class PhiDecoderLayer(Module):
    """Attention and MLP of one normalized copy of the residual stream."""

    def __init__(self, config: PhiConfig, layer_index: int) -> None:
        self.input_layernorm = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.self_attn = PhiAttention(config, layer_index)
        self.mlp = PhiMLP(config)

    def __call__(
        self, residual: Float32Array, delta: Float32Array | None, rotation: Rotation, step: Step
    ) -> Float32Array:
        """residual f32[T, E] is updated in place; delta is what the layer before adds, still to be
        added. Returns what this layer adds."""
        x = self.input_layernorm(residual, delta)
        added = self.self_attn(x, rotation, step)
        return np.add(added, self.mlp(x), out=added)


# ---- ForCausalLM ---------------------------------------------------------------------------------
class PhiForCausalLM(Module):
    """`model(batch, kv)` -> hidden f32[T, E], `model.logits(hidden, rows)` -> f32[R, V]."""

    config_class = PhiConfig

    def __init__(self, config: PhiConfig) -> None:
        self._config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = [PhiDecoderLayer(config, i) for i in range(config.num_hidden_layers)]
        self.final_layernorm = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=True)
        self._rotary = RotaryEmbedding(config.rope)

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
        return KVCacheConfig(
            c.num_hidden_layers, c.num_key_value_heads, c.head_dim, dtype, c.rope.by_length
        )

    def __call__(self, batch: Batch, kv: BatchKV) -> Float32Array:
        """The residual stream after the last layer, f32[T, E]; `logits` applies the final norm."""
        step = Step(batch, kv)
        rotation = self._rotary(batch.positions, step.sequence_lens)
        residual = self.embed_tokens(batch.token_ids)
        delta: Float32Array | None = None
        for layer in self.layers:
            delta = layer(residual, delta, rotation, step)
        return residual if delta is None else np.add(residual, delta, out=residual)

    def logits(self, hidden: Float32Array, rows: NDArray[np.int32]) -> Float32Array:
        """hidden f32[T, E], rows int32[R] -> f32[R, V]; nothing is computed for the other rows."""
        return self.lm_head(self.final_layernorm(hidden[rows]))

    # ---- weight names ----------------------------------------------------------------------------
    weight_names: ClassVar[Mapping[str, str]] = {
        "embed_tokens": "model.embed_tokens",
        "layers": "model.layers",
        "final_layernorm": "model.final_layernorm",
    }
    # Ending of tensors that may be there without being used: frequencies that old exports saved.
    ignored_weights: ClassVar[tuple[str, ...]] = (".rotary_emb.inv_freq",)
