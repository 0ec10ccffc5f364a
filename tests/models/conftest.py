"""Tiny checkpoints in memory, a dense NumPy model to compare with, and running a model.

`dense` is written from the formulas and knows what the Llama-like families share and differ in:
biases and QK-norms where the weights have them, a window per layer. It has no cache and no dtype.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from pace_nb.batch import Batch
from pace_nb.config import CacheConfig
from pace_nb.kv_cache.base import BatchKV
from pace_nb.kv_cache.contiguous import ContiguousCache

FAMILY_BIASES = {"Qwen2ForCausalLM": ("q_proj", "k_proj", "v_proj")}  # whatever the config says


class MemoryCheckpoint:
    """config.json and named arrays with the protocol of `models/loader.py:Checkpoint`."""

    def __init__(self, config, tensors):
        self.config = config
        self.tensors = dict(tensors)
        self.released: list[str] = []

    def names(self):
        return self.tensors.keys()

    def shape(self, name):
        return self.tensors[name].shape

    def tensor(self, name, shape, dtypes=("BF16", "F16", "F32")):
        assert self.tensors[name].shape == tuple(shape), name
        assert (self.tensors[name].dtype == np.uint8) == (tuple(dtypes) == ("U8",)), name
        return self.tensors[name]

    def release(self, name, first=0, end=None):
        self.released.append(name)


def shapes_of(config):
    """The tensors that transformers saves for this config."""
    e, f = config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads", heads)
    d = config.get("head_dim") or e // heads
    family = config["architectures"][0]
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], e), "model.norm.weight": (e,)}
    if not config.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = (config["vocab_size"], e)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        linears = {
            "self_attn.q_proj": (heads * d, e),
            "self_attn.k_proj": (kv_heads * d, e),
            "self_attn.v_proj": (kv_heads * d, e),
            "self_attn.o_proj": (e, heads * d),
            "mlp.gate_proj": (f, e),
            "mlp.up_proj": (f, e),
            "mlp.down_proj": (e, f),
        }
        for name, shape in linears.items():
            shapes[f"{layer}.{name}.weight"] = shape
            part, projection = name.split(".")
            wanted = config.get("attention_bias" if part == "self_attn" else "mlp_bias")
            if wanted or projection in FAMILY_BIASES.get(family, ()):
                shapes[f"{layer}.{name}.bias"] = shape[:1]
        if family == "Qwen3ForCausalLM":
            shapes[f"{layer}.self_attn.q_norm.weight"] = (d,)
            shapes[f"{layer}.self_attn.k_norm.weight"] = (d,)
        shapes[f"{layer}.input_layernorm.weight"] = (e,)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (e,)
    return shapes


def dense_logits(config, w, ids, windows=None):
    """float64 logits of every position. w: name -> float64 array; windows: per layer, 0 = all."""
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads", heads)
    d = config.get("head_dim") or config["hidden_size"] // heads
    theta, eps, t = config.get("rope_theta", 10000.0), config["rms_norm_eps"], len(ids)
    angle = np.arange(t)[:, None, None] * theta ** (-np.arange(0, d, 2) / d)
    age = np.arange(t)[:, None] - np.arange(t)  # how far a key lies behind a query
    silu = config.get("hidden_act", "silu") == "silu"

    def norm(x, name):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * w[f"{name}.weight"]

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0)

    def rotate(x):
        a, b = x[..., : d // 2], x[..., d // 2 :]
        return np.concatenate(
            [a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1
        )

    def act(x):
        if silu:
            return x / (1 + np.exp(-x))
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

    x = w["model.embed_tokens.weight"][ids]
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        h = norm(x, f"{layer}.input_layernorm")
        q, k, v = (linear(h, f"{layer}.self_attn.{p}_proj").reshape(t, -1, d) for p in "qkv")
        if f"{layer}.self_attn.q_norm.weight" in w:
            q, k = norm(q, f"{layer}.self_attn.q_norm"), norm(k, f"{layer}.self_attn.k_norm")
        q, k = rotate(q), rotate(k)
        k, v = (np.repeat(y, heads // kv_heads, axis=1) for y in (k, v))
        window = windows[i] if windows else 0
        hidden = (age < 0) | ((age >= window) if window else False)
        scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(d)
        scores[:, hidden] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        attended = np.einsum("hqk,khd->qhd", weights, v).reshape(t, -1)
        x = x + linear(attended, f"{layer}.self_attn.o_proj")
        h = norm(x, f"{layer}.post_attention_layernorm")
        gated = act(linear(h, f"{layer}.mlp.gate_proj")) * linear(h, f"{layer}.mlp.up_proj")
        x = x + linear(gated, f"{layer}.mlp.down_proj")
    head = w.get("lm_head.weight", w["model.embed_tokens.weight"])
    return norm(x, "model.norm") @ head.T


def random_weights(config, seed=5):
    """(BF16 bits, the float64 values they stand for) of every tensor, scaled by 1/sqrt(fan-in)."""
    rng = np.random.default_rng(seed)
    bits, values = {}, {}
    for name, shape in shapes_of(config).items():
        x = rng.standard_normal(shape).astype(np.float32)
        if len(shape) == 2 and "embed" not in name:
            x /= np.sqrt(shape[1])
        stored = x.astype(ml_dtypes.bfloat16)
        bits[name], values[name] = stored.view(np.uint16), stored.astype(np.float64)
    return bits, values


def run_model(model, dtype, ids, chunks=None):
    """logits f32[T, V] of every position; `chunks` is how many tokens each step takes."""
    ids = [int(i) for i in ids]
    room = -(-len(ids) // 16) * 16
    cache = ContiguousCache(model.kv_cache_config(dtype), CacheConfig("contiguous", room, room))
    rows, start = [], 0
    for size in chunks or [len(ids)]:
        batch = Batch.from_spans([("r", start, ids[start : start + size], size)])
        assert cache.allocate("r", start + size)
        hidden = model(batch, BatchKV(cache.view(batch), cache))
        rows.append(model.logits(hidden, batch.logits_rows))
        start += size
    return np.concatenate(rows)


@pytest.fixture
def memory_checkpoint():
    return MemoryCheckpoint


@pytest.fixture
def random_tensors():
    return random_weights


@pytest.fixture
def dense():
    return dense_logits


@pytest.fixture
def run():
    return run_model


@pytest.fixture
def ids():
    """33 token ids below 50: two units of the cache and one token more."""
    return np.random.default_rng(1).integers(0, 50, 33)
