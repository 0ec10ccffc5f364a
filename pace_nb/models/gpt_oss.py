"""GPT-OSS 20B and 120B (`GptOssForCausalLM`).

Knows the config.json fields, the order of operations in a layer and the weight names. Does not know
kernels, files or requests. What differs from Llama: every feed-forward half is a mixture of experts
with biases and a clamped gated unit; each query head has a sink, a learned logit that takes part in
its softmax and has no value; layers alternate between a sliding window and full attention; biases
everywhere; expert weights are BF16, or MXFP4 and then stay in four bits.

    residual = embed_tokens(token_ids)                          f32[T, E]
    each layer:  residual += self_attn(input_layernorm(residual))
                 residual += mlp(post_attention_layernorm(residual))
    mlp(x) = sum over the best experts e of w[e] * (unit(x @ gate_up[e] + b) @ down[e] + b')
             w = softmax over the router's logits of those experts alone
    logits = lm_head(norm(residual))                            f32[R, V], wanted rows only

The order of operations is that of `layers/decoder.py`, which adds in the norm that follows.
Source: transformers 5.19, models/gpt_oss; OpenAI 2025, gpt-oss-120b & gpt-oss-20b Model Card.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from numpy.typing import NDArray

from pace_nb.errors import ModelFormatError, UnsupportedModelError
from pace_nb.kernels import activation
from pace_nb.kernels.rope import Rotation
from pace_nb.layers.attention import Attention, Step
from pace_nb.layers.decoder import CausalLM, DecoderLayer
from pace_nb.layers.linear import FusedLinear, Linear
from pace_nb.layers.module import Module, Shape
from pace_nb.layers.moe import Experts, softmax, top_experts
from pace_nb.layers.rope import RopeParameters
from pace_nb.layers.weights import Float32Array, Weights
from pace_nb.models.config_json import ConfigJson


# ---- Config --------------------------------------------------------------------------------------
@dataclass(frozen=True)
class GptOssConfig:
    """Fields as in config.json. `windows` says per layer how many positions it sees (0 = all), from
    sliding_window and layer_types; `rope` is the rotary settings; `mxfp4` says that expert weights
    are stored so, from quantization_config."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    num_local_experts: int
    num_experts_per_tok: int
    swiglu_alpha: float
    swiglu_limit: float
    max_position_embeddings: int
    rms_norm_eps: float
    attention_bias: bool
    tie_word_embeddings: bool
    windows: tuple[int, ...]
    rope: RopeParameters
    mxfp4: bool

    @classmethod
    def from_json(cls, json: ConfigJson) -> GptOssConfig:
        """Read and validate. ModelFormatError or UnsupportedModelError naming the field."""
        num_heads = json.integer("num_attention_heads")
        head_dim = json.head_dim(json.integer("hidden_size"), num_heads)
        num_layers = json.num_hidden_layers()
        num_experts = json.integer("num_local_experts")
        if not (json.has("rope_scaling") or json.has("rope_parameters")):
            raise ModelFormatError("config.json: rope_scaling is missing, expected an object")
        if json.text("hidden_act", "silu") != "silu":  # the gated unit is built on it
            raise UnsupportedModelError(
                f"hidden_act {json.text('hidden_act', '')!r} is not supported here,"
                " supported: 'silu'"
            )
        return cls(
            vocab_size=json.integer("vocab_size"),
            hidden_size=json.integer("hidden_size"),
            intermediate_size=json.integer("intermediate_size"),
            num_hidden_layers=num_layers,
            num_attention_heads=num_heads,
            num_key_value_heads=json.num_key_value_heads(num_heads),
            head_dim=head_dim,
            num_local_experts=num_experts,
            num_experts_per_tok=json.integer("num_experts_per_tok", 4, maximum=num_experts),
            swiglu_alpha=json.number("swiglu_alpha", 1.702),
            swiglu_limit=json.number("swiglu_limit", 7.0),
            max_position_embeddings=json.integer("max_position_embeddings"),
            rms_norm_eps=json.number("rms_norm_eps", 1e-5),
            attention_bias=json.boolean("attention_bias", True),
            tie_word_embeddings=json.tie_word_embeddings(False),
            windows=_windows(json, num_layers),
            rope=json.rope_parameters(head_dim, default_theta=150000.0),
            mxfp4=json.section("quantization_config").text("quant_method", "") == "mxfp4",
        )


def _windows(json: ConfigJson, num_layers: int) -> tuple[int, ...]:
    """Every other layer slides, from the first, where layer_types does not say otherwise."""
    window = json.optional_integer("sliding_window", missing=128)
    if json.has("layer_types"):
        return json.layer_windows(num_layers, window, 0)
    return tuple((window or 0) if i % 2 == 0 else 0 for i in range(num_layers))


# ---- Attention -----------------------------------------------------------------------------------
class GptOssAttention(Module):
    """o_proj(attend(rotate(q), rotate(k), v, sinks)); q, k and v are one packed weight."""

    def __init__(self, config: GptOssConfig, layer_index: int) -> None:
        self._num_heads = config.num_attention_heads
        query_size = config.num_attention_heads * config.head_dim
        key_size = config.num_key_value_heads * config.head_dim
        self.qkv_proj = FusedLinear(
            config.hidden_size,
            {"q_proj": query_size, "k_proj": key_size, "v_proj": key_size},
            bias=config.attention_bias,
        )
        self._attend = Attention(
            layer_index, scale=config.head_dim**-0.5, window=config.windows[layer_index]
        )
        self._sinks: Float32Array
        self.o_proj = Linear(query_size, config.hidden_size, bias=config.attention_bias)

    def tensors(self, name: str) -> Iterator[tuple[str, Shape]]:
        yield from super().tensors(name)
        yield f"{name}.sinks", (self._num_heads,)

    def load(self, weights: Weights, name: str = "") -> None:
        super().load(weights, name)
        self._sinks = weights.vector(f"{name}.sinks", (self._num_heads,))

    def __call__(self, x: NDArray[Any], rotation: Rotation, step: Step) -> Float32Array:
        """x storage[T, E] -> f32[T, E]."""
        return self.o_proj(self._attend(self.qkv_proj(x), step, rotation, self._sinks))


# ---- MLP -----------------------------------------------------------------------------------------
class GptOssMLP(Module):
    """The experts with the largest logits, weighted by the softmax of those logits."""

    def __init__(self, config: GptOssConfig) -> None:
        self._num_chosen = config.num_experts_per_tok
        self.router = Linear(config.hidden_size, config.num_local_experts, bias=True)
        self.experts = Experts(
            config.num_local_experts,
            config.hidden_size,
            config.intermediate_size,
            partial(
                activation.clamped_swiglu, alpha=config.swiglu_alpha, limit=config.swiglu_limit
            ),
            bias=True,
            interleaved=True,
            mxfp4=config.mxfp4,
        )

    def __call__(self, x: NDArray[Any]) -> Float32Array:
        """x storage[T, E] -> f32[T, E]."""
        chosen, logits = top_experts(self.router(x), self._num_chosen)
        return self.experts(x, chosen, softmax(logits))


# ---- DecoderLayer --------------------------------------------------------------------------------
class GptOssDecoderLayer(DecoderLayer):
    """Attention, then MLP, each on a normalized copy of the residual stream."""

    def __init__(self, config: GptOssConfig, layer_index: int) -> None:
        super().__init__(config, GptOssAttention(config, layer_index), GptOssMLP(config))


# ---- ForCausalLM ---------------------------------------------------------------------------------
class GptOssForCausalLM(CausalLM):
    """`model(batch, kv)` -> hidden f32[T, E], `model.logits(hidden, rows)` -> f32[R, V].

    Weight names: those of `layers/decoder.py`.
    """

    config_class = GptOssConfig
    quantization_methods: ClassVar[tuple[str, ...]] = ("mxfp4",)

    def __init__(self, config: GptOssConfig) -> None:
        layers = [GptOssDecoderLayer(config, i) for i in range(config.num_hidden_layers)]
        super().__init__(config, layers)
