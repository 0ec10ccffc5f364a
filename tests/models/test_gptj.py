"""GPT-J against a dense NumPy model written from the formulas, one mistake at a time.

Agreement with transformers is tested by the golden (tests/e2e/test_golden.py). Here: the options
that it does not have, and that each difference from Llama is large enough for the comparison to
see.
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
    "architectures": ["GPTJForCausalLM"],
    "vocab_size": 50,
    "n_embd": 60,
    "n_inner": 44,
    "n_layer": 2,
    "n_head": 3,
    "n_positions": 64,
    "rotary_dim": 8,  # of 20, as GPT-J 6B rotates 64 of 256
    "layer_norm_epsilon": 0.01,
}
BOUND = 5e-5  # of float32 logits; the two forms of GELU are only 5e-4 apart


def tensors(inner=44, seed=5):
    """(BF16 bits, the float64 values they stand for) of every tensor of CONFIG."""
    shapes = {"transformer.wte.weight": (50, 60), "lm_head.weight": (50, 60), "lm_head.bias": (50,)}
    shapes |= {f"transformer.ln_f.{kind}": (60,) for kind in ("weight", "bias")}
    for i in range(2):
        block = f"transformer.h.{i}"
        shapes |= {f"{block}.ln_1.{kind}": (60,) for kind in ("weight", "bias")}
        shapes |= {f"{block}.attn.{p}_proj.weight": (60, 60) for p in ("q", "k", "v", "out")}
        shapes |= {
            f"{block}.mlp.fc_in.weight": (inner, 60),
            f"{block}.mlp.fc_in.bias": (inner,),
            f"{block}.mlp.fc_out.weight": (60, inner),
            f"{block}.mlp.fc_out.bias": (60,),
        }
    rng, bits, values = np.random.default_rng(seed), {}, {}
    for name, shape in shapes.items():
        x = rng.standard_normal(shape)
        if len(shape) == 2 and "wte" not in name:
            x *= 1.5 * shape[1] ** -0.5
        stored = x.astype(np.float32).astype(ml_dtypes.bfloat16)
        bits[name], values[name] = stored.view(np.uint16), stored.astype(np.float64)
    return bits, values


def gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def gelu_erf(x):
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / np.sqrt(2)))


def dense(w, ids, *, rotary=8, interleaved=True, parallel=True, act=gelu_tanh, head_bias=True,
          biased=True, eps=0.01, scale=20**-0.5):  # fmt: skip
    """float64 logits of every position; the arguments are what a mistake would change."""
    t, d = len(ids), 20
    future = np.arange(t)[:, None] < np.arange(t)
    angle = np.arange(t)[:, None, None] * 10000.0 ** (-np.arange(0, rotary, 2) / rotary)
    cos, sin = np.cos(angle), np.sin(angle)
    pairs = np.arange(rotary).reshape(-1, 2).T  # dims of the first and the second of each pair
    first, second = pairs if interleaved else np.arange(rotary).reshape(2, -1)

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x * x).mean(-1, keepdims=True) + eps)
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x, name, bias):
        return x @ w[f"{name}.weight"].T + (w[f"{name}.bias"] if bias else 0.0)

    def rotate(x):
        out = x.copy()
        out[..., first] = x[..., first] * cos - x[..., second] * sin
        out[..., second] = x[..., second] * cos + x[..., first] * sin
        return out

    x = w["transformer.wte.weight"][ids]
    for i in range(2):
        block = f"transformer.h.{i}"
        h = norm(x, f"{block}.ln_1")
        q, k, v = (linear(h, f"{block}.attn.{p}_proj", False).reshape(t, 3, d) for p in "qkv")
        scores = np.einsum("qhd,khd->hqk", rotate(q), rotate(k)) * scale
        scores[:, future] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        attended = np.einsum("hqk,khd->qhd", weights, v).reshape(t, -1)
        attended = linear(attended, f"{block}.attn.out_proj", False)
        if not parallel:
            x, attended = x + attended, 0.0
            h = norm(x, f"{block}.ln_1")
        inner = act(linear(h, f"{block}.mlp.fc_in", biased))
        x = x + attended + linear(inner, f"{block}.mlp.fc_out", biased)
    return linear(norm(x, "transformer.ln_f"), "lm_head", head_bias)


VARIANTS = {
    "plain": ({}, {}, {}),
    "n_inner is 4 n_embd by default": ({"n_inner": None}, {"inner": 240}, {}),
    "whole heads rotate": ({"rotary_dim": 20}, {}, {"rotary": 20}),
    "erf gelu": ({"activation_function": "gelu"}, {}, {"act": gelu_erf}),
    "gelu_new": ({"activation_function": "gelu_new"}, {}, {}),
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
    assert sorted(checkpoint.released) == sorted(bits)
    half = run(load_model(memory_checkpoint(CONFIG | changes, bits)), "bfloat16", ids)
    assert np.abs(half - expected).max() < 0.05 * np.abs(expected).max()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_chunks_give_the_same_bits(memory_checkpoint, run, ids, dtype):
    model = load_model(memory_checkpoint(CONFIG, tensors()[0]), dtype)
    at_once = run(model, dtype, ids)
    for chunks in ([1] * 33, [7] * 4 + [5], [20, 1, 12]):
        np.testing.assert_array_equal(run(model, dtype, ids, chunks), at_once)


@pytest.mark.parametrize(
    "mistake",
    [
        {"rotary": 20},
        {"rotary": 10},
        {"interleaved": False},
        {"parallel": False},
        {"act": gelu_erf},
        {"head_bias": False},
        {"biased": False},
        {"eps": 1e-5},
        {"scale": 1.0},
    ],
    ids=str,
)
def test_every_mistake_would_be_seen(ids, mistake):
    _, values = tensors()
    assert np.abs(dense(values, ids, **mistake) - dense(values, ids)).max() > 5 * BOUND


@pytest.mark.parametrize("name", ["lm_head", "transformer.h.1.mlp.fc_in", "transformer.ln_f"])
def test_every_bias_is_required(memory_checkpoint, name):
    bits, _ = tensors()
    del bits[f"{name}.bias"]
    with pytest.raises(ModelFormatError, match=rf"{name}\.bias is missing"):
        load_model(memory_checkpoint(CONFIG, bits))


def test_a_bias_of_attention_is_refused(memory_checkpoint):
    """Left out silently it would give a wrong model."""
    bits, _ = tensors()
    bits["transformer.h.0.attn.q_proj.bias"] = np.zeros(60, np.float32)
    with pytest.raises(ModelFormatError, match=r"attn\.q_proj\.bias has no place"):
        load_model(memory_checkpoint(CONFIG, bits))


def test_old_exports_may_hold_the_causal_mask(memory_checkpoint):
    bits, _ = tensors()
    bits["transformer.h.0.attn.bias"] = np.ones((1, 1, 64, 64), np.uint8)
    bits["transformer.h.0.attn.masked_bias"] = np.float32([-1e9]).reshape(())
    load_model(memory_checkpoint(CONFIG, bits))


def test_facts_for_the_engine(memory_checkpoint):
    model = load_model(memory_checkpoint(CONFIG, tensors()[0]))
    assert (model.vocab_size, model.max_position_embeddings) == (50, 64)
    assert model.kv_cache_config("float32") == KVCacheConfig(2, 3, 20, "float32")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"tie_word_embeddings": True}, UnsupportedModelError, "tie_word_embeddings is true"),
        ({"activation_function": "mish"}, UnsupportedModelError, "'mish' is not.*gelu_new"),
        ({"n_head": 7}, ModelFormatError, r"n_embd is 60, expected a multiple of n_head \(7\)"),
        ({"n_embd": 600, "n_head": 1}, ModelFormatError, "at most 512 times"),
        ({"n_layer": 10**9}, ModelFormatError, "n_layer is 1000000000"),
        ({"n_layer": 3}, ModelFormatError, r"transformer\.h\.2\.ln_1\.weight is missing"),
        ({"rotary_dim": 22}, ModelFormatError, r"rotary_dim is 22, .* \(20\)"),
        ({"rotary_dim": None}, ModelFormatError, r"rotary_dim is None, .* \(20\)"),
        ({"rotary_dim": 5}, ModelFormatError, "rotary dimension is 5"),
        ({"n_inner": None}, ModelFormatError, r"fc_in\.weight has shape \[44, 60\].*\[240, 60\]"),
        ({"n_positions": None}, ModelFormatError, "n_positions is missing"),
        ({"layer_norm_epsilon": 0}, ModelFormatError, "layer_norm_epsilon is 0"),
    ],
)
def test_a_config_that_cannot_be(memory_checkpoint, changes, error, message):
    with pytest.raises(error, match=message) as caught:
        load_model(memory_checkpoint(CONFIG | changes, tensors()[0]))
    assert "\n" not in str(caught.value)
