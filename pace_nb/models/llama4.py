"""Llama 4 (`Llama4ForCausalLM`), also the text part of `Llama4ForConditionalGeneration`.

Knows the config.json fields, the order of operations in a layer and the weight names. Does not know
kernels, files, requests or images. What differs from Llama: three layers of four rotate
neighbouring dims, normalize queries and keys afterwards, and see only their own chunk of positions;
every fourth does not rotate, sees everything, and sharpens its queries with the position; the
feed-forward half of every, or every other, layer is a shared expert plus routed ones.

    residual = embed_tokens(token_ids)                          f32[T, E]
    each layer:  residual += self_attn(input_layernorm(residual))
                 residual += feed_forward(post_attention_layernorm(residual))
    mixture(x) = shared_expert(x) + sum over the best experts e of expert[e](sigmoid(logit[e]) * x)
    logits = lm_head(norm(residual))                            f32[R, V], wanted rows only

Each addition is done by the norm that follows it (`delta` below), in one pass over the residual.
Source: transformers 5.19, models/llama4; temperature: Nakanishi 2025 (arXiv:2501.19399).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from pace_nb.errors import ModelFormatError
from pace_nb.kernels import activation, rope
from pace_nb.kernels.rope import Rotation
from pace_nb.layers.attention import Attention, Step
from pace_nb.layers.decoder import CausalLM
from pace_nb.layers.linear import FusedLinear, Linear
from pace_nb.layers.mlp import GatedMLP, activation_kind
from pace_nb.layers.module import Module, join
from pace_nb.layers.moe import Experts, sigmoid, top_experts
from pace_nb.layers.norm import HeadL2Norm, RMSNorm
from pace_nb.layers.rope import RopeParameters
from pace_nb.layers.weights import Float32Array
from pace_nb.models.config_json import ConfigJson


# ---- Config --------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Llama4Config:
    """Fields as in config.json or its text_config. Per layer: `rope_layers` says whether it rotates
    (from no_rope_layers, where 1 means that it does), `chunks` in which chunk of positions it sees
    (0 = all, from attention_chunk_size and layer_types), `moe_layers` whether it is a mixture.
    `rope` is the rotary settings; `prefix` is where in the checkpoint the tensors are."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    intermediate_size_mlp: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    hidden_act: str
    num_local_experts: int
    num_experts_per_tok: int
    max_position_embeddings: int
    rms_norm_eps: float
    attention_bias: bool
    tie_word_embeddings: bool
    use_qk_norm: bool
    attn_temperature_tuning: bool
    floor_scale: float
    attn_scale: float
    rope_layers: tuple[bool, ...]
    chunks: tuple[int, ...]
    moe_layers: tuple[bool, ...]
    rope: RopeParameters
    prefix: str

    @classmethod
    def from_json(cls, json: ConfigJson) -> Llama4Config:
        """Read and validate. ModelFormatError or UnsupportedModelError naming the field."""
        text = json.section("text_config") if json.has("text_config") else json
        prefix = "" if json.has_tensor("model.norm.weight") else "language_model"
        num_heads = text.integer("num_attention_heads")
        head_dim = text.integer("head_dim", 128, maximum=512)
        num_layers = text.num_hidden_layers()
        rope_layers = _rope_layers(text, num_layers)
        num_experts = text.integer("num_local_experts")
        return cls(
            vocab_size=text.integer("vocab_size"),
            hidden_size=text.integer("hidden_size"),
            intermediate_size=text.integer("intermediate_size"),
            intermediate_size_mlp=text.integer("intermediate_size_mlp", 16384),
            num_hidden_layers=num_layers,
            num_attention_heads=num_heads,
            num_key_value_heads=text.num_key_value_heads(num_heads),
            head_dim=head_dim,
            hidden_act=text.text("hidden_act", "silu"),
            num_local_experts=num_experts,
            num_experts_per_tok=text.integer("num_experts_per_tok", 1, maximum=num_experts),
            max_position_embeddings=text.integer("max_position_embeddings"),
            rms_norm_eps=text.number("rms_norm_eps", 1e-5),
            attention_bias=text.boolean("attention_bias", False),
            tie_word_embeddings=text.tie_word_embeddings(False, join(prefix, "lm_head.weight")),
            use_qk_norm=text.boolean("use_qk_norm", True),
            attn_temperature_tuning=text.boolean("attn_temperature_tuning", True),
            floor_scale=text.number("floor_scale", 8192.0),
            attn_scale=text.number("attn_scale", 0.1),
            rope_layers=rope_layers,
            chunks=_chunks(text, rope_layers),
            moe_layers=_moe_layers(text, num_layers),
            rope=text.rope_parameters(head_dim, default_theta=500000.0),
            prefix=prefix,
        )


def _rope_layers(text: ConfigJson, num_layers: int) -> tuple[bool, ...]:
    """From `no_rope_layers`, whose 1 means rope, else all but every 4th layer."""
    listed = text.integers("no_rope_layers")
    if not listed:
        interval = text.integer("no_rope_layer_interval", 4)
        return tuple((i + 1) % interval != 0 for i in range(num_layers))
    if len(listed) < num_layers:
        raise ModelFormatError(
            f"config.json: no_rope_layers has {len(listed)} numbers, expected {num_layers}"
        )
    return tuple(value != 0 for value in listed[:num_layers])


def _chunks(text: ConfigJson, rope_layers: tuple[bool, ...]) -> tuple[int, ...]:
    """Layers that rotate are chunked, where `layer_types` does not say otherwise."""
    chunk = text.optional_integer("attention_chunk_size", missing=8192)
    if text.has("layer_types"):
        return text.layer_windows(
            len(rope_layers), chunk, 0, kind="chunked_attention", size="attention_chunk_size"
        )
    return tuple((chunk or 0) if rotates else 0 for rotates in rope_layers)


def _moe_layers(text: ConfigJson, num_layers: int) -> tuple[bool, ...]:
    """From `moe_layers`, layer numbers, else every `interleave_moe_layer_step`-th layer."""
    if text.has("moe_layers"):
        return tuple(i in text.integers("moe_layers") for i in range(num_layers))
    step = text.integer("interleave_moe_layer_step", 1)
    return tuple((i + 1) % step == 0 for i in range(num_layers))


# ---- Attention -----------------------------------------------------------------------------------
class Llama4Attention(Module):
    """o_proj(attend(q, k, v)), q and k rotated and normalized or, in a layer that does not rotate,
    q times log(1 + floor((position + 1) / floor_scale)) * attn_scale + 1."""

    def __init__(self, config: Llama4Config, layer_index: int) -> None:
        self._config = config
        self._rotates = config.rope_layers[layer_index]
        query_size = config.num_attention_heads * config.head_dim
        key_size = config.num_key_value_heads * config.head_dim
        self.qkv_proj = FusedLinear(
            config.hidden_size,
            {"q_proj": query_size, "k_proj": key_size, "v_proj": key_size},
            bias=config.attention_bias,
        )
        self._qk_norm = HeadL2Norm(config.rms_norm_eps)
        self._attend = Attention(
            layer_index, scale=config.head_dim**-0.5, chunk=config.chunks[layer_index]
        )
        self.o_proj = Linear(query_size, config.hidden_size, bias=config.attention_bias)

    def __call__(self, x: NDArray[Any], rotation: Rotation, step: Step) -> Float32Array:
        """x storage[T, E] -> f32[T, E]."""
        qkv = self.qkv_proj(x)
        heads = qkv.reshape(len(x), -1, self._config.head_dim)  # a view: qkv is what changes
        keys = self._config.num_attention_heads  # the first of them, after the query heads
        values = keys + self._config.num_key_value_heads
        if self._rotates:
            cos, sin, rows, interleaved = rotation
            q_and_k = rope.rope(heads[:, :values], rows, cos, sin, interleaved=interleaved)
            heads[:, :values] = self._qk_norm(q_and_k) if self._config.use_qk_norm else q_and_k
        elif self._config.attn_temperature_tuning:
            steps = np.floor((step.batch.positions + 1.0) / self._config.floor_scale)
            scale = np.log1p(steps) * self._config.attn_scale + 1.0
            heads[:, :keys] *= scale.astype(np.float32)[:, None, None]
        return self.o_proj(self._attend(qkv, step, rotation=None))


# ---- MLP -----------------------------------------------------------------------------------------
class Llama4MoE(Module):
    """A shared expert, and the routed ones, whose input is scaled by the sigmoid of their logit."""

    def __init__(self, config: Llama4Config) -> None:
        size = config.intermediate_size
        unit = partial(activation.gated_activation, kind=activation_kind(config.hidden_act))
        self._num_chosen = config.num_experts_per_tok
        self.router = Linear(config.hidden_size, config.num_local_experts)
        self.experts = Experts(
            config.num_local_experts, config.hidden_size, size, unit, scale_input=True
        )
        self.shared_expert = GatedMLP(config.hidden_size, size, config.hidden_act)

    def __call__(self, x: NDArray[Any]) -> Float32Array:
        """x storage[T, E] -> f32[T, E]."""
        chosen, logits = top_experts(self.router(x), self._num_chosen)
        shared = self.shared_expert(x)
        return np.add(shared, self.experts(x, chosen, sigmoid(logits)), out=shared)


# ---- DecoderLayer --------------------------------------------------------------------------------
class Llama4DecoderLayer(Module):
    """Attention, then mixture or MLP, each on a normalized copy of the residual stream."""

    def __init__(self, config: Llama4Config, layer_index: int) -> None:
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Llama4Attention(config, layer_index)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.feed_forward = (
            Llama4MoE(config)
            if config.moe_layers[layer_index]
            else GatedMLP(config.hidden_size, config.intermediate_size_mlp, config.hidden_act)
        )

    def __call__(
        self, residual: Float32Array, delta: Float32Array | None, rotation: Rotation, step: Step
    ) -> Float32Array:
        """residual f32[T, E] is updated in place; delta is the MLP output of the layer before,
        still to be added. Returns this layer's own MLP output."""
        delta = self.self_attn(self.input_layernorm(residual, delta), rotation, step)
        return self.feed_forward(self.post_attention_layernorm(residual, delta))


# ---- ForCausalLM ---------------------------------------------------------------------------------
class Llama4ForCausalLM(CausalLM):
    """`model(batch, kv)` -> hidden f32[T, E], `model.logits(hidden, rows)` -> f32[R, V]."""

    config_class = Llama4Config

    def __init__(self, config: Llama4Config) -> None:
        layers = [Llama4DecoderLayer(config, i) for i in range(config.num_hidden_layers)]
        super().__init__(config, layers, interleaved=True)

    # ---- weight names ----------------------------------------------------------------------------
    # The copy of a tied head, and what belongs to images (beginnings have a dot at the end).
    ignored_weights: ClassVar[tuple[str, ...]] = (
        "lm_head.weight",
        "vision_model.",
        "multi_modal_projector.",
    )

    def parts(self, name: str) -> Iterator[tuple[str, Module]]:
        """All parts are under the prefix that the checkpoint uses."""
        for part_name, part in super().parts(name):
            yield join(self._config.prefix, part_name), part


class Llama4ForConditionalGeneration(Llama4ForCausalLM):
    """The text part of the multimodal models: the same, found in `text_config`."""
