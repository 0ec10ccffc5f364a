"""GPT-J 6B and its kin (`GPTJForCausalLM`).

Knows the config.json fields, the order of operations in a layer and the weight names. Does not know
kernels, files or requests. What differs from Llama: attention and MLP both read one LayerNorm of
the residual (parallel residual); the MLP has no gate; only the first `rotary_dim` dims of a head
rotate, in pairs of neighbours (0, 1), (2, 3), ...; the MLP and the output head have biases, the
attention has none.

    residual = wte(token_ids)                                   f32[T, E]
    each layer:  x = ln_1(residual)
                 residual += attn(x) + mlp(x)
    logits = lm_head(ln_f(residual))                            f32[R, V], wanted rows only

The second addition is done by the norm that follows it (`delta` below), in one pass over the
residual.
Source: transformers 5.23, models/gptj.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from pace_nb.batch import Batch
from pace_nb.errors import ModelFormatError, UnsupportedModelError
from pace_nb.kernels.rope import Rotation
from pace_nb.kv_cache.base import BatchKV, KVCacheConfig
from pace_nb.layers.attention import Attention, Step
from pace_nb.layers.embedding import Embedding
from pace_nb.layers.linear import FusedLinear, Linear
from pace_nb.layers.mlp import MLP
from pace_nb.layers.module import Module, join
from pace_nb.layers.norm import LayerNorm
from pace_nb.layers.rope import RopeParameters, RotaryEmbedding
from pace_nb.layers.weights import Float32Array
from pace_nb.models.config_json import MAX_HEAD_DIM, ConfigJson


# ---- Config --------------------------------------------------------------------------------------
@dataclass(frozen=True)
class GPTJConfig:
    """Fields as in config.json, which has GPT-2's names; `head_dim` is n_embd / n_head."""

    vocab_size: int
    n_positions: int
    n_embd: int
    n_layer: int
    n_head: int
    n_inner: int
    head_dim: int
    rotary_dim: int
    activation_function: str
    layer_norm_epsilon: float

    @classmethod
    def from_json(cls, json: ConfigJson) -> GPTJConfig:
        """Read and validate. ModelFormatError or UnsupportedModelError naming the field."""
        if json.boolean("tie_word_embeddings", False):
            raise UnsupportedModelError(
                "config.json: tie_word_embeddings is true, which no GPT-J has, supported: false"
            )
        n_embd = json.integer("n_embd")
        n_head = json.integer("n_head")
        if n_embd % n_head or n_embd // n_head > MAX_HEAD_DIM:
            raise ModelFormatError(
                f"config.json: n_embd is {n_embd}, expected a multiple of n_head ({n_head})"
                f" and at most {MAX_HEAD_DIM} times as much"
            )
        rotary_dim = json.optional_integer("rotary_dim", missing=64)
        if rotary_dim is None or rotary_dim > n_embd // n_head:
            raise ModelFormatError(
                f"config.json: rotary_dim is {rotary_dim}, expected an integer up to"
                f" n_embd / n_head ({n_embd // n_head})"
            )
        return cls(
            vocab_size=json.integer("vocab_size"),
            n_positions=json.integer("n_positions"),
            n_embd=n_embd,
            n_layer=json.num_hidden_layers("n_layer"),
            n_head=n_head,
            n_inner=json.optional_integer("n_inner") or 4 * n_embd,
            head_dim=n_embd // n_head,
            rotary_dim=rotary_dim,
            activation_function=json.text("activation_function", "gelu_new"),
            layer_norm_epsilon=json.number("layer_norm_epsilon", 1e-5),
        )

    @property
    def rope(self) -> RopeParameters:
        """The base is not in config.json: 10000."""
        return RopeParameters(self.rotary_dim, self.n_positions)


# ---- Attention -----------------------------------------------------------------------------------
class GPTJAttention(Module):
    """out_proj(attend(rotate(q), rotate(k), v)); q, k and v are one packed weight."""

    def __init__(self, config: GPTJConfig, layer_index: int) -> None:
        size = config.n_embd
        self.qkv_proj = FusedLinear(size, {"q_proj": size, "k_proj": size, "v_proj": size})
        self._attend = Attention(layer_index, scale=config.head_dim**-0.5)
        self.out_proj = Linear(size, size)

    def __call__(self, x: NDArray[Any], rotation: Rotation, step: Step) -> Float32Array:
        """x storage[T, E] -> f32[T, E]."""
        return self.out_proj(self._attend(self.qkv_proj(x), step, rotation))


# ---- MLP -----------------------------------------------------------------------------------------
class GPTJMLP(MLP):
    """fc_out(act(fc_in(x)))."""

    def __init__(self, config: GPTJConfig) -> None:
        super().__init__(config.n_embd, config.n_inner, config.activation_function)

    def parts(self, name: str) -> Iterator[tuple[str, Module]]:
        """fc1 and fc2 under the names that the checkpoint has for them."""
        yield join(name, "fc_in"), self.fc1
        yield join(name, "fc_out"), self.fc2


# ---- DecoderLayer --------------------------------------------------------------------------------
class GPTJBlock(Module):
    """Attention and MLP of one normalized copy of the residual stream."""

    def __init__(self, config: GPTJConfig, layer_index: int) -> None:
        self.ln_1 = LayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.attn = GPTJAttention(config, layer_index)
        self.mlp = GPTJMLP(config)

    def __call__(
        self, residual: Float32Array, delta: Float32Array | None, rotation: Rotation, step: Step
    ) -> Float32Array:
        """residual f32[T, E] is updated in place; delta is what the layer before adds, still to be
        added. Returns what this layer adds."""
        x = self.ln_1(residual, delta)
        added = self.attn(x, rotation, step)
        return np.add(added, self.mlp(x), out=added)


# ---- ForCausalLM ---------------------------------------------------------------------------------
class GPTJForCausalLM(Module):
    """`model(batch, kv)` -> hidden f32[T, E], `model.logits(hidden, rows)` -> f32[R, V]."""

    config_class = GPTJConfig

    def __init__(self, config: GPTJConfig) -> None:
        self._config = config
        self.wte = Embedding(config.vocab_size, config.n_embd)
        self.h = [GPTJBlock(config, i) for i in range(config.n_layer)]
        self.ln_f = LayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.lm_head = Linear(config.n_embd, config.vocab_size, bias=True)
        self._rotary = RotaryEmbedding(config.rope, interleaved=True)

    @property
    def vocab_size(self) -> int:
        """V."""
        return self._config.vocab_size

    @property
    def max_position_embeddings(self) -> int:
        """The longest sequence the model was made for."""
        return self._config.n_positions

    def kv_cache_config(self, dtype: str) -> KVCacheConfig:
        """What has to be cached for every token."""
        c = self._config
        return KVCacheConfig(c.n_layer, c.n_head, c.head_dim, dtype)

    def __call__(self, batch: Batch, kv: BatchKV) -> Float32Array:
        """The residual stream after the last layer, f32[T, E]; `logits` applies the final norm."""
        step = Step(batch, kv)
        rotation = self._rotary(batch.positions, step.sequence_lens)
        residual = self.wte(batch.token_ids)
        delta: Float32Array | None = None
        for block in self.h:
            delta = block(residual, delta, rotation, step)
        return residual if delta is None else np.add(residual, delta, out=residual)

    def logits(self, hidden: Float32Array, rows: NDArray[np.int32]) -> Float32Array:
        """hidden f32[T, E], rows int32[R] -> f32[R, V]; nothing is computed for the other rows."""
        return self.lm_head(self.ln_f(hidden[rows]))

    # ---- weight names ----------------------------------------------------------------------------
    weight_names: ClassVar[Mapping[str, str]] = {
        "wte": "transformer.wte",
        "h": "transformer.h",
        "ln_f": "transformer.ln_f",
    }
    # Endings of tensors that may be there without being used: old exports saved the causal mask.
    ignored_weights: ClassVar[tuple[str, ...]] = (".attn.bias", ".attn.masked_bias")
