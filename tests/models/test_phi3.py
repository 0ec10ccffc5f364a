"""Phi-3 against a dense NumPy model written from the formulas, one mistake at a time.

Agreement with transformers is tested by the goldens (tests/e2e/test_golden.py). Here: fused
tensors, partial rotation, the window, and longrope at, before and beyond its boundary, for
sequences side by side and for one that grows past it.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from pace_nb.batch import Batch
from pace_nb.config import CacheConfig
from pace_nb.errors import ModelFormatError, UnsupportedModelError
from pace_nb.kv_cache.base import BatchKV, KVCacheConfig
from pace_nb.kv_cache.contiguous import ContiguousCache
from pace_nb.models.config_json import ConfigJson
from pace_nb.models.phi3 import Phi3Config
from pace_nb.models.registry import load_model

SHORT, LONG = (1.0, 1.1, 1.3, 1.7, 2.0), (1.5, 3.0, 9.0, 20.0, 40.0)
LONGROPE = {"type": "longrope", "short_factor": [*SHORT], "long_factor": [*LONG]}
CONFIG = {
    "architectures": ["Phi3ForCausalLM"],
    "vocab_size": 50,
    "hidden_size": 64,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "original_max_position_embeddings": 32,
    "partial_rotary_factor": 0.625,  # 10 of 16 dims rotate
    "rms_norm_eps": 1e-5,
    "rope_theta": 100.0,
    "rope_scaling": LONGROPE,
    "sliding_window": 9,
    "tie_word_embeddings": True,
}
FACTOR = np.sqrt(1 + np.log(64 / 32) / np.log(32))  # of cos and sin, from the two lengths


def tensors(seed=5, head=False):
    """(BF16 bits, the float64 values they stand for) of every tensor of CONFIG."""
    shapes = {"model.embed_tokens.weight": (50, 64), "model.norm.weight": (64,)}
    if head:
        shapes["lm_head.weight"] = (50, 64)
    for i in range(2):
        layer = f"model.layers.{i}"
        shapes |= {
            f"{layer}.input_layernorm.weight": (64,),
            f"{layer}.post_attention_layernorm.weight": (64,),
            f"{layer}.self_attn.qkv_proj.weight": (8 * 16, 64),
            f"{layer}.self_attn.o_proj.weight": (64, 64),
            f"{layer}.mlp.gate_up_proj.weight": (80, 64),
            f"{layer}.mlp.down_proj.weight": (64, 40),
        }
    rng, bits, values = np.random.default_rng(seed), {}, {}
    for name, shape in shapes.items():
        x = rng.standard_normal(shape)
        if len(shape) == 2 and "embed" not in name:
            x *= shape[1] ** -0.5
        stored = x.astype(np.float32).astype(ml_dtypes.bfloat16)
        bits[name], values[name] = stored.view(np.uint16), stored.astype(np.float64)
    return bits, values


def dense(w, ids, lengths, *, boundary=32, short=SHORT, long=LONG, factor=FACTOR, window=9,
          rotary=10, gate_first=True):  # fmt: skip
    """float64 logits of every position. lengths[t]: how long the sequence was when token t was
    computed; the other arguments are what a mistake would change."""
    t, d, eps = len(ids), 16, 1e-5
    age = np.arange(t)[:, None] - np.arange(t)  # how far a key lies behind a query
    stretch = np.where(np.asarray(lengths)[:, None] > boundary, long, short)[:, : rotary // 2]
    frequencies = 100.0 ** (-np.arange(0, rotary, 2) / rotary) / stretch
    angle = (np.arange(t)[:, None] * frequencies)[:, None]
    cos, sin = factor * np.cos(angle), factor * np.sin(angle)

    def norm(x, name):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * w[f"{name}.weight"]

    def linear(x, name):
        return x @ w[f"{name}.weight"].T

    def rotate(x):
        a, b, rest = np.split(x, [rotary // 2, rotary], axis=-1)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin, rest], -1)

    x = w["model.embed_tokens.weight"][ids]
    for i in range(2):
        layer = f"model.layers.{i}"
        heads = linear(norm(x, f"{layer}.input_layernorm"), f"{layer}.self_attn.qkv_proj")
        q, k, v = np.split(heads.reshape(t, 8, d), [4, 6], axis=1)
        q, k, v = rotate(q), np.repeat(rotate(k), 2, axis=1), np.repeat(v, 2, axis=1)
        scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(d)
        scores[:, (age < 0) | ((age >= window) if window else False)] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        attended = np.einsum("hqk,khd->qhd", weights, v).reshape(t, -1)
        x = x + linear(attended, f"{layer}.self_attn.o_proj")
        h = norm(x, f"{layer}.post_attention_layernorm")
        gate, up = np.split(linear(h, f"{layer}.mlp.gate_up_proj"), 2, axis=-1)
        gate, up = (gate, up) if gate_first else (up, gate)
        x = x + linear(gate / (1 + np.exp(-gate)) * up, f"{layer}.mlp.down_proj")
    head = "lm_head" if "lm_head.weight" in w else "model.embed_tokens"
    return linear(norm(x, "model.norm"), head)


VARIANTS = {
    "long, one beyond the boundary": ({}, {}),
    "short, at the boundary": (
        {"original_max_position_embeddings": 33},
        {"boundary": 33, "factor": np.sqrt(1 + np.log(64 / 33) / np.log(33))},
    ),
    "all positions": ({"sliding_window": None}, {"window": 0}),
    "window 1": ({"sliding_window": 1}, {"window": 1}),
    "given attention factor": (
        {"rope_scaling": LONGROPE | {"attention_factor": 1.4}},
        {"factor": 1.4},
    ),
    "an old name of longrope": ({"rope_scaling": LONGROPE | {"type": "su"}}, {}),
    "rope_parameters": (
        {
            "rope_scaling": None,
            "partial_rotary_factor": None,
            "rope_theta": None,
            "rope_parameters": LONGROPE | {"partial_rotary_factor": 0.625, "rope_theta": 100.0},
        },
        {},
    ),
    "no longrope": ({"rope_scaling": None}, {"long": (1.0,) * 5, "factor": 1.0}),
    "whole heads rotate": (
        {"rope_scaling": None, "partial_rotary_factor": 1.0},
        {"long": (1.0,) * 8, "short": (1.0,) * 8, "factor": 1.0, "rotary": 16},
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits(memory_checkpoint, run, ids, variant):
    changes, arguments = VARIANTS[variant]
    bits, values = tensors()
    expected = dense(values, ids, [33] * 33, **arguments)
    model = load_model(memory_checkpoint(CONFIG | changes, bits), "float32")
    np.testing.assert_allclose(run(model, "float32", ids), expected, atol=2e-4)


def test_a_head_of_its_own(memory_checkpoint, run, ids):
    bits, values = tensors(head=True)
    config = CONFIG | {"tie_word_embeddings": False}
    model = load_model(memory_checkpoint(config, bits), "float32")
    expected = dense(values, ids, [33] * 33)
    np.testing.assert_allclose(run(model, "float32", ids), expected, atol=2e-4)


@pytest.mark.parametrize(
    "mistake",
    [
        {"boundary": 33},
        {"boundary": 33, "long": SHORT},
        {"factor": 1.0},
        {"window": 0},
        {"window": 10},
        {"window": 8},
        {"rotary": 8},
        {"gate_first": False},
    ],
    ids=str,
)
def test_every_mistake_would_be_seen(ids, mistake):
    """The bound of `test_logits` is 2e-4."""
    _, values = tensors()
    difference = dense(values, ids, [33] * 33, **mistake) - dense(values, ids, [33] * 33)
    assert np.abs(difference).max() > 0.02


@pytest.mark.parametrize("chunks", [[20, 12, 1], [28] + [1] * 5, [7, 7, 7, 7, 5]], ids=str)
def test_growing_past_the_boundary(memory_checkpoint, run, ids, chunks):
    """A step of up to 32 tokens rotates with the short factors and what it cached stays; the one
    that passes 32 rotates its own tokens with the long ones."""
    bits, values = tensors()
    model = load_model(memory_checkpoint(CONFIG, bits), "float32")
    lengths = np.repeat(np.cumsum(chunks), chunks)
    expected = dense(values, ids, lengths)
    np.testing.assert_allclose(run(model, "float32", ids, chunks), expected, atol=2e-4)
    assert np.abs(expected - dense(values, ids, [33] * 33))[:28].max() > 0.02


def test_chunks_of_a_known_sequence_rotate_alike(memory_checkpoint, run, ids):
    """A prompt of 33 tokens is long from its first chunk on, where 32 would be short."""
    bits, _ = tensors()
    model = load_model(memory_checkpoint(CONFIG, bits), "float32")
    for length in (32, 33):
        at_once = run(model, "float32", ids[:length])
        cache = ContiguousCache(model.kv_cache_config("float32"), CacheConfig("contiguous", 48, 48))
        assert cache.allocate("r", length)
        rows = []
        for start in range(0, length, 7):
            chunk = ids[start : min(start + 7, length)].tolist()
            batch = Batch.from_spans([("r", start, chunk, len(chunk))], [length])
            hidden = model(batch, BatchKV(cache.view(batch), cache))
            rows.append(model.logits(hidden, batch.logits_rows))
        np.testing.assert_array_equal(np.concatenate(rows), at_once)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_long_neighbour_changes_nothing(memory_checkpoint, run, ids, dtype):
    """One step with sequences of 5, 33 and 32 tokens: each has the bits that it has alone."""
    model = load_model(memory_checkpoint(CONFIG, tensors()[0]), dtype)
    spans = {"a": ids[:5], "b": ids, "c": ids[::-1][:32]}
    cache = ContiguousCache(model.kv_cache_config(dtype), CacheConfig("contiguous", 112, 112))
    batch = Batch.from_spans([(name, 0, part.tolist(), len(part)) for name, part in spans.items()])
    assert all(cache.allocate(name, len(part)) for name, part in spans.items())
    found = model.logits(model(batch, BatchKV(cache.view(batch), cache)), batch.logits_rows)
    alone = np.concatenate([run(model, dtype, part) for part in spans.values()])
    np.testing.assert_array_equal(found, alone)


def test_published_longrope_settings():
    """microsoft/Phi-4-mini-instruct: 3/4 of 128 dims, 131072 of 4096 positions."""
    fields = {
        "vocab_size": 200064, "hidden_size": 3072, "intermediate_size": 8192,
        "num_hidden_layers": 32, "num_attention_heads": 24, "num_key_value_heads": 8,
        "max_position_embeddings": 131072, "original_max_position_embeddings": 4096,
        "partial_rotary_factor": 0.75, "sliding_window": 262144, "resid_pdrop": 0.0,
        "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48},
    }  # fmt: skip
    config = Phi3Config.from_json(ConfigJson(fields, [f"tensor {i}" for i in range(200)]))
    assert (config.head_dim, config.rope.rotary_dim, config.rope.stretch) == (128, 96, 32.0)
    assert config.tie_word_embeddings  # there is no lm_head.weight


def test_facts_for_the_engine(memory_checkpoint):
    model = load_model(memory_checkpoint(CONFIG, tensors()[0]))
    assert (model.vocab_size, model.max_position_embeddings) == (50, 64)
    assert model.kv_cache_config("float32") == KVCacheConfig(2, 2, 16, "float32", True, (9, 9))
    model = load_model(memory_checkpoint(CONFIG | {"rope_scaling": None}, tensors()[0]))
    assert model.kv_cache_config("float32") == KVCacheConfig(2, 2, 16, "float32", False, (9, 9))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"rope_scaling": LONGROPE | {"long_factor": [1.0] * 8}},
            ModelFormatError,
            "long_factor has 8 numbers, expected 5",
        ),
        ({"rope_scaling": {"type": "longrope"}}, ModelFormatError, "short_factor is missing"),
        ({"rope_scaling": {"type": "mrope"}}, UnsupportedModelError, "'mrope'.*longrope"),
        ({"hidden_act": "mish"}, UnsupportedModelError, "'mish' is not supported.*silu"),
        ({"num_key_value_heads": 4}, ModelFormatError, r"qkv_proj\.weight has shape \[128, 64\]"),
        ({"intermediate_size": 48}, ModelFormatError, r"gate_up_proj\.weight has shape \[80, 64\]"),
        ({"partial_rotary_factor": 0.5}, ModelFormatError, "short_factor has 5 numbers"),
    ],
)
def test_a_config_that_cannot_be(memory_checkpoint, changes, error, message):
    with pytest.raises(error, match=message) as caught:
        load_model(memory_checkpoint(CONFIG | changes, tensors()[0]))
    assert "\n" not in str(caught.value)


def test_a_bias_that_no_phi3_has_is_refused(memory_checkpoint):
    """Left out silently it would give a wrong model."""
    bits, _ = tensors()
    bits["model.layers.0.self_attn.qkv_proj.bias"] = np.zeros(128, np.float32)
    with pytest.raises(ModelFormatError, match=r"qkv_proj\.bias has no place"):
        load_model(memory_checkpoint(CONFIG | {"attention_bias": True}, bits))
