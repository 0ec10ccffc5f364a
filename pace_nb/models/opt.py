"""OPT, 125M to 66B (`OPTForCausalLM`).

Knows the config.json fields, the order of operations in a layer and the weight names. Does not know
files or requests, nor of the kernels more than `layer_norm` and rounding. What differs from Llama:
positions are learned and added to the embeddings; LayerNorm with bias, without any weights where
`layer_norm_elementwise_affine` is false; one MLP without a gate; biases, unless `enable_bias` is
false. The head is tied.

    residual = embed_tokens(token_ids) + embed_positions(positions + 2)           f32[T, E]
    each layer:  residual += self_attn(self_attn_layer_norm(residual))
                 residual += fc2(act(fc1(final_layer_norm(residual))))
    logits = lm_head(final_layer_norm(residual))                f32[R, V], wanted rows only

Each addition is done by the norm that follows it (`delta` below), in one pass over the residual.

OPT-350M is another model: it normalizes after the addition (`do_layer_norm_before` false), so that
the residual stream itself is normalized, and has no norm at the end,

    each layer:  residual = self_attn_layer_norm(residual + self_attn(residual))
                 residual = final_layer_norm(residual + fc2(act(fc1(residual))))

and its embeddings are half as wide as the stream (`word_embed_proj_dim`): `project_in` widens what
is embedded, `project_out` narrows what the head reads. The two settings are independent here.
Source: transformers 5.23, models/opt.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from pace_nb.batch import Batch
from pace_nb.errors import InvalidRequestError
from pace_nb.kernels import bf16, norm
from pace_nb.kv_cache.base import BatchKV, KVCacheConfig
from pace_nb.layers.attention import Attention, Step
from pace_nb.layers.embedding import Embedding
from pace_nb.layers.linear import FusedLinear, Linear
from pace_nb.layers.mlp import MLP
from pace_nb.layers.module import Module, Shape, join
from pace_nb.layers.norm import LayerNorm
from pace_nb.layers.weights import Float32Array, Weights
from pace_nb.models.config_json import ConfigJson

OFFSET = 2  # rows of the position table before that of position 0
EPS = 1e-5  # not in config.json
# Where the tensors are: in files that transformers writes, in the first published ones.
PREFIXES = ("model.decoder", "decoder")


# ---- Config --------------------------------------------------------------------------------------
@dataclass(frozen=True)
class OPTConfig:
    """Fields as in config.json. `final_layer_norm`: whether there is a norm before the head, from
    do_layer_norm_before and _remove_final_layer_norm; `prefix` is where in the checkpoint the
    tensors are."""

    vocab_size: int
    hidden_size: int
    word_embed_proj_dim: int
    ffn_dim: int
    num_hidden_layers: int
    num_attention_heads: int
    head_dim: int
    activation_function: str
    max_position_embeddings: int
    do_layer_norm_before: bool
    final_layer_norm: bool
    layer_norm_elementwise_affine: bool
    enable_bias: bool
    tie_word_embeddings: bool
    prefix: str

    @classmethod
    def from_json(cls, json: ConfigJson) -> OPTConfig:
        """Read and validate. ModelFormatError or UnsupportedModelError naming the field."""
        hidden_size = json.integer("hidden_size")
        num_heads = json.integer("num_attention_heads")
        norm_before = json.boolean("do_layer_norm_before", True)
        tensor = "embed_tokens.weight"
        return cls(
            vocab_size=json.integer("vocab_size"),
            hidden_size=hidden_size,
            word_embed_proj_dim=json.integer("word_embed_proj_dim", hidden_size),
            ffn_dim=json.integer("ffn_dim"),
            num_hidden_layers=json.num_hidden_layers(),
            num_attention_heads=num_heads,
            head_dim=json.head_dim(hidden_size, num_heads),
            activation_function=json.text("activation_function", "relu"),
            max_position_embeddings=json.integer("max_position_embeddings"),
            do_layer_norm_before=norm_before,
            final_layer_norm=norm_before and not json.boolean("_remove_final_layer_norm", False),
            layer_norm_elementwise_affine=json.boolean("layer_norm_elementwise_affine", True),
            enable_bias=json.boolean("enable_bias", True),
            tie_word_embeddings=json.tie_word_embeddings(True),
            prefix=next((p for p in PREFIXES if json.has_tensor(f"{p}.{tensor}")), PREFIXES[0]),
        )


# ---- Positions -----------------------------------------------------------------------------------
class OPTLearnedPositionalEmbedding(Embedding):
    """weight[P + 2, E]: position p has row p + 2, of P = `max_position_embeddings` positions."""

    def __init__(self, num_positions: int, size: int) -> None:
        super().__init__(num_positions + OFFSET, size)

    def __call__(self, positions: NDArray[np.int32]) -> Float32Array:
        """int32[T] -> f32[T, E]. InvalidRequestError beyond the last; `max_model_len`, which never
        exceeds `max_position_embeddings`, keeps requests from getting there."""
        if len(positions) and int(positions.max()) >= self.num_embeddings - OFFSET:
            raise InvalidRequestError(
                f"position {int(positions.max())} is beyond the last that the model has learned,"
                f" {self.num_embeddings - OFFSET - 1}"
            )
        return super().__call__(positions + np.int32(OFFSET))


# ---- Norm ----------------------------------------------------------------------------------------
class OPTLayerNorm(LayerNorm):
    """LayerNorm, with or without weights, that can also normalize the residual stream itself."""

    def __init__(self, config: OPTConfig) -> None:
        super().__init__(config.hidden_size, EPS)
        self._affine = config.layer_norm_elementwise_affine

    def tensors(self, name: str) -> Iterator[tuple[str, Shape]]:
        return super().tensors(name) if self._affine else iter(())

    def load(self, weights: Weights, name: str = "") -> None:
        if self._affine:
            super().load(weights, name)
        else:
            self._weight = np.ones(self.size, np.float32)
            self._dtype = weights.storage_dtype

    def replace(self, residual: Float32Array, delta: Float32Array) -> NDArray[Any]:
        """residual = norm(residual + delta) in place, f32[T, E]; returned in storage dtype too."""
        residual[...] = norm.add_layer_norm(delta, residual, self._weight, self._bias, self.eps)
        return stored(residual, self._dtype)


def stored(x: Float32Array, dtype: np.dtype[Any]) -> NDArray[Any]:
    """x as the input of a GEMM: rounded to BF16 where that is what the engine stores."""
    return bf16.from_f32(x) if dtype == np.uint16 else x


# ---- Attention -----------------------------------------------------------------------------------
class OPTAttention(Module):
    """out_proj(attend(q, k, v)); q, k and v are one packed weight, nothing rotates."""

    def __init__(self, config: OPTConfig, layer_index: int) -> None:
        size = config.num_attention_heads * config.head_dim
        self.qkv_proj = FusedLinear(
            config.hidden_size,
            {"q_proj": size, "k_proj": size, "v_proj": size},
            bias=config.enable_bias,
        )
        self._attend = Attention(layer_index, scale=config.head_dim**-0.5)
        self.out_proj = Linear(size, config.hidden_size, bias=config.enable_bias)

    def __call__(self, x: NDArray[Any], step: Step) -> Float32Array:
        """x storage[T, E] -> f32[T, E]."""
        return self.out_proj(self._attend(self.qkv_proj(x), step, None))


# ---- MLP -----------------------------------------------------------------------------------------
class OPTMLP(MLP):
    """fc2(act(fc1(x)))."""

    def __init__(self, config: OPTConfig) -> None:
        super().__init__(
            config.hidden_size,
            config.ffn_dim,
            config.activation_function,
            bias=config.enable_bias,
        )

    def parts(self, name: str) -> Iterator[tuple[str, Module]]:
        """In the checkpoint fc1 and fc2 are the layer's own, beside its norms."""
        return super().parts(name.rpartition(".")[0])


# ---- DecoderLayer --------------------------------------------------------------------------------
class OPTDecoderLayer(Module):
    """Attention, then MLP, each with its norm before or after."""

    def __init__(self, config: OPTConfig, layer_index: int) -> None:
        self._norm_before = config.do_layer_norm_before
        self.self_attn = OPTAttention(config, layer_index)
        self.self_attn_layer_norm = OPTLayerNorm(config)
        self.mlp = OPTMLP(config)
        self.final_layer_norm = OPTLayerNorm(config)
        self._dtype: np.dtype[Any]

    def load(self, weights: Weights, name: str = "") -> None:
        super().load(weights, name)
        self._dtype = weights.storage_dtype

    def __call__(
        self, residual: Float32Array, delta: Float32Array | None, step: Step
    ) -> Float32Array | None:
        """residual f32[T, E] is updated in place; delta is the MLP output of the layer before,
        still to be added. Returns this layer's own, or None where it is in the residual."""
        if self._norm_before:
            delta = self.self_attn(self.self_attn_layer_norm(residual, delta), step)
            return self.mlp(self.final_layer_norm(residual, delta))
        attended = self.self_attn(stored(residual, self._dtype), step)
        x = self.self_attn_layer_norm.replace(residual, attended)
        self.final_layer_norm.replace(residual, self.mlp(x))
        return None


# ---- ForCausalLM ---------------------------------------------------------------------------------
class OPTForCausalLM(Module):
    """`model(batch, kv)` -> hidden f32[T, E], `model.logits(hidden, rows)` -> f32[R, V]."""

    config_class = OPTConfig

    def __init__(self, config: OPTConfig) -> None:
        self._config = config
        size, narrow = config.hidden_size, config.word_embed_proj_dim
        self.embed_tokens = Embedding(config.vocab_size, narrow)
        self.embed_positions = OPTLearnedPositionalEmbedding(config.max_position_embeddings, size)
        self.project_in = None if narrow == size else Linear(narrow, size)
        self.layers = [OPTDecoderLayer(config, i) for i in range(config.num_hidden_layers)]
        self.final_layer_norm = OPTLayerNorm(config) if config.final_layer_norm else None
        self.project_out = None if narrow == size else Linear(size, narrow)
        self.lm_head = None if config.tie_word_embeddings else Linear(narrow, config.vocab_size)
        self._dtype: np.dtype[Any]

    def load(self, weights: Weights, name: str = "") -> None:
        super().load(weights, name)
        self._dtype = weights.storage_dtype

    @property
    def vocab_size(self) -> int:
        """V."""
        return self._config.vocab_size

    @property
    def max_position_embeddings(self) -> int:
        """The longest sequence there are positions for."""
        return self._config.max_position_embeddings

    def kv_cache_config(self, dtype: str) -> KVCacheConfig:
        """What has to be cached for every token."""
        c = self._config
        return KVCacheConfig(c.num_hidden_layers, c.num_attention_heads, c.head_dim, dtype)

    def __call__(self, batch: Batch, kv: BatchKV) -> Float32Array:
        """The residual stream after the last layer, f32[T, E]; `logits` applies the final norm."""
        step = Step(batch, kv)
        residual = self.embed_tokens(batch.token_ids)
        if self.project_in is not None:
            residual = self.project_in(stored(residual, self._dtype))
        residual += self.embed_positions(batch.positions)
        delta: Float32Array | None = None
        for layer in self.layers:
            delta = layer(residual, delta, step)
        return residual if delta is None else np.add(residual, delta, out=residual)

    def logits(self, hidden: Float32Array, rows: NDArray[np.int32]) -> Float32Array:
        """hidden f32[T, E], rows int32[R] -> f32[R, V]; nothing is computed for the other rows."""
        if self.final_layer_norm is not None:
            x = self.final_layer_norm(hidden[rows])
        else:
            x = stored(hidden[rows], self._dtype)
        if self.project_out is not None:
            x = stored(self.project_out(x), self._dtype)
        return self.embed_tokens.project(x) if self.lm_head is None else self.lm_head(x)

    # ---- weight names ----------------------------------------------------------------------------
    def parts(self, name: str) -> Iterator[tuple[str, Module]]:
        """All but the head are under the prefix that the checkpoint uses."""
        for part_name, part in super().parts(name):
            below = "" if part is self.lm_head else self._config.prefix
            yield join(below, part_name), part

    # The copy of a tied head.
    ignored_weights: ClassVar[tuple[str, ...]] = ("lm_head.weight",)
