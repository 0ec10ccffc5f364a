"""Phi-1.5 and 2 against a dense NumPy model written from the formulas, one mistake at a time.

Agreement with transformers is tested by the goldens (tests/e2e/test_golden.py). Here: the options
that no golden has, and that each difference from Llama is large enough for the comparison to see.
"""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest

from pace_nb.errors import ModelFormatError, UnsupportedModelError
from pace_nb.kv_cache.base import KVCacheConfig
from pace_nb.models.registry import load_model

CONFIG = {
    "architectures": ["PhiForCausalLM"],
    "vocab_size": 50,
    "hidden_size": 60,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "max_position_embeddings": 64,
    "partial_rotary_factor": 0.4,  # 8 of 20 dims, as Phi-2 rotates 32 of 80
    "layer_norm_eps": 0.01,
    "rope_theta": 100.0,
}
BOUND = 5e-5  # of float32 logits; the two forms of GELU are only 5e-4 apart


def tensors(qk_layernorm=False, kv_heads=3, seed=5):
    """(BF16 bits, the float64 values they stand for) of every tensor of CONFIG."""
    linears = {
        "self_attn.q_proj": (60, 60),
        "self_attn.k_proj": (20 * kv_heads, 60),
        "self_attn.v_proj": (20 * kv_heads, 60),
        "self_attn.dense": (60, 60),
        "mlp.fc1": (44, 60),
        "mlp.fc2": (60, 44),
    }
    norms = {"input_layernorm": 60}
    if qk_layernorm:
        norms |= {"self_attn.q_layernorm": 20, "self_attn.k_layernorm": 20}
    shapes = {"model.embed_tokens.weight": (50, 60), "lm_head.weight": (50, 60)}
    shapes |= {"lm_head.bias": (50,)}
    shapes |= {f"model.final_layernorm.{kind}": (60,) for kind in ("weight", "bias")}
    for i in range(2):
        for name, shape in linears.items():
            shapes[f"model.layers.{i}.{name}.weight"] = shape
            shapes[f"model.layers.{i}.{name}.bias"] = shape[:1]
        for name, size in norms.items():
            shapes[f"model.layers.{i}.{name}.weight"] = (size,)
            shapes[f"model.layers.{i}.{name}.bias"] = (size,)
    rng, bits, values = np.random.default_rng(seed), {}, {}
    for name, shape in shapes.items():
        x = rng.standard_normal(shape)
        if len(shape) == 2 and "embed" not in name:
            x *= 1.5 * shape[1] ** -0.5
        stored = x.astype(np.float32).astype(ml_dtypes.bfloat16)
        bits[name], values[name] = stored.view(np.uint16), stored.astype(np.float64)
    return bits, values


def gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def gelu_erf(x):
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / np.sqrt(2)))


def dense(w, ids, *, rotary=8, act=gelu_tanh, parallel=True, own_norm=False, centred=True,
          biased=True, eps=0.01):  # fmt: skip
    """float64 logits of every position; the arguments are what a mistake would change."""
    t, d = len(ids), 20
    angle = np.arange(t)[:, None, None] * 100.0 ** (-np.arange(0, rotary, 2) / rotary)
    future = np.arange(t)[:, None] < np.arange(t)

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True) if centred else x
        x = x / np.sqrt((x * x).mean(-1, keepdims=True) + eps)
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + (w[f"{name}.bias"] if biased else 0.0)

    def rotate(x):
        a, b, rest = np.split(x, [rotary // 2, rotary], axis=-1)
        cos, sin = np.cos(angle), np.sin(angle)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin, rest], -1)

    x = w["model.embed_tokens.weight"][ids]
    for i in range(2):
        layer = f"model.layers.{i}"
        h = norm(x, f"{layer}.input_layernorm")
        q, k, v = (linear(h, f"{layer}.self_attn.{p}_proj").reshape(t, -1, d) for p in "qkv")
        if f"{layer}.self_attn.q_layernorm.weight" in w:
            q = norm(q, f"{layer}.self_attn.q_layernorm")
            k = norm(k, f"{layer}.self_attn.k_layernorm")
        q, k = rotate(q), rotate(k)
        k, v = (np.repeat(y, 3 // y.shape[1], axis=1) for y in (k, v))
        scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(d)
        scores[:, future] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        attended = np.einsum("hqk,khd->qhd", weights, v).reshape(t, -1)
        attended = linear(attended, f"{layer}.self_attn.dense")
        if not parallel:
            x, attended = x + attended, 0.0
            h = norm(x, f"{layer}.input_layernorm")
        h = x if own_norm else h
        x = x + attended + linear(act(linear(h, f"{layer}.mlp.fc1")), f"{layer}.mlp.fc2")
    return linear(norm(x, "model.final_layernorm"), "lm_head")


VARIANTS = {
    "plain": ({}, {}, {}),
    "qk_layernorm": ({"qk_layernorm": True}, {"qk_layernorm": True}, {}),
    "one kv head": ({"num_key_value_heads": 1}, {"kv_heads": 1}, {}),
    "kv heads default to heads": ({"num_key_value_heads": None}, {}, {}),
    "half rotates by default": ({"partial_rotary_factor": None}, {}, {"rotary": 10}),
    "rope_parameters": (
        {
            "partial_rotary_factor": None,
            "rope_theta": None,
            "rope_parameters": {"rope_theta": 100.0, "partial_rotary_factor": 0.4},
        },
        {},
        {},
    ),
    "erf gelu": ({"hidden_act": "gelu"}, {}, {"act": gelu_erf}),
    "gelu_new": ({"hidden_act": "gelu_new"}, {}, {}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits(memory_checkpoint, run, ids, variant):
    changes, drawn, arguments = VARIANTS[variant]
    bits, values = tensors(**drawn)
    expected = dense(values, ids, **arguments)
    checkpoint = memory_checkpoint(CONFIG | changes, bits)
    model = load_model(checkpoint, "float32")
    found = run(model, "float32", ids)
    np.testing.assert_allclose(found, expected, atol=BOUND)
    np.testing.assert_array_equal(run(model, "float32", ids, [7] * 4 + [1] * 5), found)
    assert sorted(checkpoint.released) == sorted(bits)
    half = run(load_model(memory_checkpoint(CONFIG | changes, bits)), "bfloat16", ids)
    assert np.abs(half - expected).max() < 0.05 * np.abs(expected).max()


@pytest.mark.parametrize(
    "mistake",
    [
        {"rotary": 20},
        {"rotary": 10},
        {"act": gelu_erf},
        {"parallel": False},
        {"own_norm": True},
        {"centred": False},
        {"biased": False},
        {"eps": 1e-5},
    ],
    ids=str,
)
def test_every_mistake_would_be_seen(ids, mistake):
    _, values = tensors()
    assert np.abs(dense(values, ids, **mistake) - dense(values, ids)).max() > 5 * BOUND


def test_norms_of_heads_would_be_missed(ids):
    _, values = tensors(qk_layernorm=True)
    without = {name: w for name, w in values.items() if "q_layernorm" not in name}
    assert np.abs(dense(values, ids) - dense(without, ids)).max() > 0.1


@pytest.mark.parametrize(
    "name", ["lm_head", "model.layers.1.self_attn.dense", "model.layers.0.mlp.fc2"]
)
def test_every_bias_is_required(memory_checkpoint, name):
    bits, _ = tensors()
    del bits[f"{name}.bias"]
    with pytest.raises(ModelFormatError, match=rf"{name}\.bias is missing"):
        load_model(memory_checkpoint(CONFIG, bits))


def test_facts_for_the_engine(memory_checkpoint):
    model = load_model(memory_checkpoint(CONFIG, tensors()[0]))
    assert (model.vocab_size, model.max_position_embeddings) == (50, 64)
    assert model.kv_cache_config("float32") == KVCacheConfig(2, 3, 20, "float32")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"tie_word_embeddings": True}, UnsupportedModelError, "tie_word_embeddings is true"),
        ({"hidden_act": "mish"}, UnsupportedModelError, "'mish' is not supported.*gelu_new"),
        ({"qk_layernorm": True}, ModelFormatError, r"q_layernorm\.weight is missing"),
        ({"qk_layernorm": "yes"}, ModelFormatError, "qk_layernorm is 'yes'"),
        ({"partial_rotary_factor": 0.25}, ModelFormatError, "rotary dimension is 5"),
        ({"num_key_value_heads": 2}, ModelFormatError, "num_key_value_heads is 2"),
        ({"layer_norm_eps": 0}, ModelFormatError, "layer_norm_eps is 0"),
    ],
)
def test_a_config_that_cannot_be(memory_checkpoint, changes, error, message):
    with pytest.raises(error, match=message) as caught:
        load_model(memory_checkpoint(CONFIG | changes, tensors()[0]))
    assert "\n" not in str(caught.value)


def test_norms_of_heads_that_the_config_does_not_know_are_refused(memory_checkpoint):
    """Left out silently they would give a wrong model."""
    with pytest.raises(ModelFormatError, match=r"k_layernorm\.bias has no place"):
        load_model(memory_checkpoint(CONFIG, tensors(qk_layernorm=True)[0]))
