"""`DecoderLayer` and `CausalLM`: what Llama and the families built like it have in common.

Knows the order of operations in a layer and in the whole model, and the weight names around them.
Does not know what attention and MLP are inside, nor config.json: each family's own file does.

    residual = embed_tokens(token_ids)                          f32[T, E]
    each layer:  residual += self_attn(input_layernorm(residual))
                 residual += mlp(post_attention_layernorm(residual))
    logits = lm_head(norm(residual))                            f32[R, V], wanted rows only

Each addition is done by the norm that follows it (`delta` below), in one pass over the residual.
A family that orders anything otherwise (Gemma 3, Phi-1 and 2, OPT, GPT-J) has its own of both.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from pace_nb.batch import Batch
from pace_nb.kernels.rope import Rotation
from pace_nb.kv_cache.base import BatchKV, KVCacheConfig
from pace_nb.layers.attention import Sees, Step
from pace_nb.layers.embedding import Embedding
from pace_nb.layers.linear import Linear
from pace_nb.layers.module import Module
from pace_nb.layers.norm import RMSNorm
from pace_nb.layers.rope import RopeParameters, RotaryEmbedding
from pace_nb.layers.weights import Float32Array


class DecoderConfig(Protocol):
    """What is read here of a family's config; the names are those of config.json."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def num_hidden_layers(self) -> int: ...
    @property
    def num_key_value_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def max_position_embeddings(self) -> int: ...
    @property
    def rms_norm_eps(self) -> float: ...
    @property
    def tie_word_embeddings(self) -> bool: ...
    @property
    def rope(self) -> RopeParameters: ...


class DecoderLayer(Module):
    """Attention, then MLP, each on a normalized copy of the residual stream."""

    def __init__(self, config: DecoderConfig, self_attn: Module, mlp: Module) -> None:
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = self_attn
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = mlp

    def __call__(
        self, residual: Float32Array, delta: Float32Array | None, rotation: Rotation, step: Step
    ) -> Float32Array:
        """residual f32[T, E] is updated in place; delta is the MLP output of the layer before,
        still to be added. Returns this layer's own MLP output."""
        attended = self.self_attn(self.input_layernorm(residual, delta), rotation, step)
        output: Float32Array = self.mlp(self.post_attention_layernorm(residual, attended))
        return output


class CausalLM(Module):
    """`model(batch, kv)` -> hidden f32[T, E], `model.logits(hidden, rows)` -> f32[R, V].

    layers: one module per layer, called as `DecoderLayer` is. interleaved: neighbouring dims rotate
    together, not halves of a head.
    """

    def __init__(
        self, config: DecoderConfig, layers: list[Any], *, interleaved: bool = False
    ) -> None:
        self._config: Any = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = layers
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = (
            None if config.tie_word_embeddings else Linear(config.hidden_size, config.vocab_size)
        )
        self._rotary = RotaryEmbedding(config.rope, interleaved=interleaved)

    @property
    def vocab_size(self) -> int:
        """V."""
        return int(self._config.vocab_size)

    @property
    def max_position_embeddings(self) -> int:
        """The longest sequence the model was made for."""
        return int(self._config.max_position_embeddings)

    @property
    def switch_length(self) -> int | None:
        """A sequence that grows beyond it is computed anew: all its keys rotate otherwise."""
        length: int | None = self._config.rope.switch_length
        return length

    def kv_cache_config(self, dtype: str) -> KVCacheConfig:
        """What has to be cached for every token."""
        c = self._config
        sizes = c.num_hidden_layers, c.num_key_value_heads, c.head_dim
        return KVCacheConfig(*sizes, dtype, c.rope.by_length, *Sees.of(self.layers))

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
