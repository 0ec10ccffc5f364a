"""The order of operations around attention and MLP, and the names of what is loaded."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from pace_nb.batch import Batch
from pace_nb.config import CacheConfig
from pace_nb.kv_cache.base import BatchKV
from pace_nb.kv_cache.paged import PagedCache
from pace_nb.layers.decoder import CausalLM, DecoderLayer
from pace_nb.layers.module import Module
from pace_nb.layers.rope import RopeParameters

V, E, EPS = 40, 8, 1e-2
ROPE = RopeParameters(4, 64, 1e4)


@dataclass(frozen=True)
class Config:
    tie_word_embeddings: bool
    vocab_size: int = V
    hidden_size: int = E
    num_hidden_layers: int = 2
    num_key_value_heads: int = 1
    head_dim: int = 4
    max_position_embeddings: int = 64
    rms_norm_eps: float = EPS
    rope: RopeParameters = ROPE


class Half(Module):
    """In the place of attention or MLP: a multiple of its input, and what it was given."""

    def __init__(self, factor, value):
        self._factor, self._value = factor, value

    def __call__(self, x, *rest):
        return (self._factor * self._value(x)).astype(np.float32)


def norm(x, weight):
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + EPS) * weight


@pytest.mark.parametrize("tied", [False, True])
def test_residuals_norms_and_head(load, rng, value, tied):
    """Against the formulas in float64: each part is moved by what comes before it."""
    config = Config(tied)
    factors = [(0.5, -1.5), (2.0, 0.25)]
    layers = [DecoderLayer(config, Half(a, value), Half(b, value)) for a, b in factors]
    model = CausalLM(config, layers)
    tensors = {"embed_tokens.weight": (V, E), "norm.weight": (E,)}
    for i in range(2):
        tensors[f"layers.{i}.input_layernorm.weight"] = (E,)
        tensors[f"layers.{i}.post_attention_layernorm.weight"] = (E,)
    tensors = {f"model.{name}": rng.standard_normal(shape) for name, shape in tensors.items()}
    if not tied:
        tensors["lm_head.weight"] = rng.standard_normal((V, E))
    w = {name: array.astype(np.float32) for name, array in tensors.items()}

    load(model, "float32", w, name="", prefix="")
    assert dict(model.tensors("")).keys() == w.keys()
    cache = PagedCache(model.kv_cache_config("float32"), CacheConfig("paged", 64, 64))
    assert cache.allocate("r", 5)
    batch = Batch.from_spans([("r", 0, [3, 0, 39, 7, 7], 2)])
    hidden = model(batch, BatchKV(cache.view(batch), cache))

    x = w["model.embed_tokens.weight"][batch.token_ids].astype(np.float64)
    for i, (a, b) in enumerate(factors):
        x = x + a * norm(x, w[f"model.layers.{i}.input_layernorm.weight"])
        x = x + b * norm(x, w[f"model.layers.{i}.post_attention_layernorm.weight"])
    np.testing.assert_allclose(hidden, x, rtol=1e-4, atol=1e-5)
    head = w["model.embed_tokens.weight" if tied else "lm_head.weight"]
    logits = model.logits(hidden, batch.logits_rows)
    expected = norm(x[3:], w["model.norm.weight"]) @ head.T
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


def test_facts_for_the_engine():
    model = CausalLM(Config(True), [])
    assert (model.vocab_size, model.max_position_embeddings, model.switch_length) == (V, 64, None)
    stored = model.kv_cache_config("bfloat16")
    assert (stored.num_layers, stored.num_kv_heads, stored.head_dim) == (2, 1, 4)
