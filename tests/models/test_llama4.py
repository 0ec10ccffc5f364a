"""Llama 4 against a dense NumPy model written from the formulas, one mistake at a time.

Agreement with transformers is tested by the goldens (tests/e2e/test_golden.py). Here: Scout's and
Maverick's settings, each spelling of the per-layer ones, the text part of a multimodal checkpoint,
and that each difference from Llama is large enough for the comparison to see it.
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
from pace_nb.models.llama4 import Llama4Config
from pace_nb.models.registry import load_model

E, F, F_DENSE, D, HEADS, KV_HEADS, X, LAYERS = 48, 24, 56, 16, 4, 2, 4, 4
CONFIG = {
    "architectures": ["Llama4ForCausalLM"],
    "vocab_size": 50,
    "hidden_size": E,
    "intermediate_size": F,
    "intermediate_size_mlp": F_DENSE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": D,
    "num_local_experts": X,
    "num_experts_per_tok": 1,
    "max_position_embeddings": 64,
    "rms_norm_eps": 0.01,
    "rope_theta": 500.0,
    "attention_chunk_size": 10,
    "floor_scale": 8,
    "attn_scale": 0.5,
}
SCOUT = {"interleave_moe_layer_step": 1, "use_qk_norm": True}
MAVERICK = {"interleave_moe_layer_step": 2, "use_qk_norm": False}
TWO_EXPERTS = SCOUT | {"num_experts_per_tok": 2, "attention_bias": True}


def shapes(config):
    """What transformers saves: name -> shape."""
    found = {
        "model.embed_tokens.weight": (50, E),
        "model.norm.weight": (E,),
        "lm_head.weight": (50, E),
    }
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        for name, rows, columns in (
            ("q", HEADS * D, E),
            ("k", KV_HEADS * D, E),
            ("v", KV_HEADS * D, E),
            ("o", E, HEADS * D),
        ):
            found[f"{layer}.self_attn.{name}_proj.weight"] = (rows, columns)
            if config.get("attention_bias"):
                found[f"{layer}.self_attn.{name}_proj.bias"] = (rows,)
        mlp, size = f"{layer}.feed_forward", F_DENSE
        if (i + 1) % config["interleave_moe_layer_step"] == 0:
            found |= {
                f"{mlp}.router.weight": (X, E),
                f"{mlp}.experts.gate_up_proj": (X, E, 2 * F),
                f"{mlp}.experts.down_proj": (X, F, E),
            }
            mlp, size = f"{mlp}.shared_expert", F
        found |= {f"{mlp}.{name}_proj.weight": (size, E) for name in ("gate", "up")}
        found[f"{mlp}.down_proj.weight"] = (E, size)
        for norm in ("input", "post_attention"):
            found[f"{layer}.{norm}_layernorm.weight"] = (E,)
    return found


def tensors(config, seed=5):
    """(BF16 bits, the float64 values they stand for) of every tensor."""
    rng, bits, values = np.random.default_rng(seed), {}, {}
    for name, shape in shapes(config).items():
        x = rng.standard_normal(shape)
        if len(shape) == 3:
            x *= 2 * shape[1] ** -0.5
        elif len(shape) == 2 and "embed" not in name:
            x *= (2 if "q_proj" in name else 1) * shape[1] ** -0.5
        stored = x.astype(np.float32).astype(ml_dtypes.bfloat16)
        bits[name], values[name] = stored.view(np.uint16), stored.astype(np.float64)
    return bits, values


def dense(w, ids, *, qk_norm=True, chosen=1, chunk=10, chunk_nope=False, rotated=(1, 1, 1, 0),
          interleaved=True, norm_first=False, floor_scale=8, attn_scale=0.5, shared=True,
          scale_output=False, softmax=False, gate_first=True):  # fmt: skip
    """float64 logits of every position; the arguments are what a mistake would change."""
    t, position = len(ids), np.arange(len(ids))
    angle = position[:, None, None] * 500.0 ** (-np.arange(0, D, 2) / D)

    def norm(x, weight=1.0):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 0.01) * weight

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0)

    def silu(x):
        return x / (1 + np.exp(-x))

    def rotate(x):
        a, b = (x[..., ::2], x[..., 1::2]) if interleaved else np.split(x, 2, axis=-1)
        c = a * np.cos(angle) - b * np.sin(angle)
        s = b * np.cos(angle) + a * np.sin(angle)
        if not interleaved:
            return np.concatenate([c, s], -1)
        return np.stack([c, s], -1).reshape(x.shape)

    def mlp(x, name):
        gated = silu(linear(x, f"{name}.gate_proj")) * linear(x, f"{name}.up_proj")
        return linear(gated, f"{name}.down_proj")

    def mixture(x, name):
        logits = linear(x, f"{name}.router")
        y = mlp(x, f"{name}.shared_expert") if shared else np.zeros_like(x)
        for row in range(t):
            for e in np.argsort(-logits[row])[:chosen]:
                score = 1 / (1 + np.exp(-logits[row, e]))
                if softmax:
                    score = np.exp(logits[row, e]) / np.exp(logits[row]).sum()
                h = (x[row] if scale_output else x[row] * score) @ w[
                    f"{name}.experts.gate_up_proj"
                ][e]
                gate, up = np.split(h, 2)[:: 1 if gate_first else -1]
                h = (silu(gate) * up) @ w[f"{name}.experts.down_proj"][e]
                y[row] += h * (score if scale_output else 1)
        return y

    x = w["model.embed_tokens.weight"][ids]
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        h = norm(x, w[f"{layer}.input_layernorm.weight"])
        q, k, v = (linear(h, f"{layer}.self_attn.{p}_proj").reshape(t, -1, D) for p in "qkv")
        if rotated[i]:
            if qk_norm and norm_first:  # commutes with the rotation: not a mistake
                q, k = norm(q), norm(k)
            q, k = rotate(q), rotate(k)
            if qk_norm and not norm_first:
                q, k = norm(q), norm(k)
        else:
            steps = np.floor((position + 1) / floor_scale)
            q = q * (np.log1p(steps) * attn_scale + 1)[:, None, None]
        k, v = (np.repeat(y, HEADS // KV_HEADS, axis=1) for y in (k, v))
        scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(D)
        hidden = position[:, None] < position
        if (i != LAYERS - 1 or chunk_nope) and chunk:
            hidden = hidden | (position[:, None] // chunk != position // chunk)
        scores[:, hidden] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        h = np.einsum("hqk,khd->qhd", weights, v).reshape(t, -1)
        x = x + linear(h, f"{layer}.self_attn.o_proj")
        h = norm(x, w[f"{layer}.post_attention_layernorm.weight"])
        routed = f"{layer}.feed_forward.router.weight" in w
        x = x + (mixture if routed else mlp)(h, f"{layer}.feed_forward")
    return norm(x, w["model.norm.weight"]) @ w["lm_head.weight"].T


VARIANTS = {
    "scout": (SCOUT, {}),
    "maverick": (MAVERICK, {"qk_norm": False}),
    "two experts, biases": (TWO_EXPERTS, {"chosen": 2}),
    "no temperature": (SCOUT | {"attn_temperature_tuning": False}, {"attn_scale": 0.0}),
    "every layer sees all": (SCOUT | {"attention_chunk_size": None}, {"chunk": 0}),
    "every second layer without rope": (
        SCOUT
        | {
            "no_rope_layer_interval": 2,
            "layer_types": ["chunked_attention"] * 3 + ["full_attention"],
        },
        {"rotated": (1, 0, 1, 0)},
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits(memory_checkpoint, run, ids, variant):
    changes, settings = VARIANTS[variant]
    config = CONFIG | changes
    bits, values = tensors(config)
    checkpoint = memory_checkpoint(config, bits)
    model = load_model(checkpoint, "float32")
    assert sorted(checkpoint.released) == sorted(bits)
    found = run(model, "float32", ids)
    np.testing.assert_allclose(found, dense(values, ids, **settings), atol=2e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_chunks_give_the_same_bits(memory_checkpoint, run, ids, dtype):
    bits, values = tensors(CONFIG | MAVERICK)
    model = load_model(memory_checkpoint(CONFIG | MAVERICK, bits), dtype)
    at_once = run(model, dtype, ids)
    for chunks in ([1] * 33, [7] * 4 + [5], [20, 1, 12]):
        np.testing.assert_array_equal(run(model, dtype, ids, chunks), at_once)
    if dtype == "bfloat16":  # an expert may flip, so only most rows can agree
        expected = dense(values, ids, qk_norm=False)
        agreeing = np.abs(at_once - expected).max(axis=1) < 0.05 * np.abs(expected).max()
        assert agreeing.mean() > 0.8


MISTAKES = {
    "no chunks": {"chunk": 0},
    "chunks of one more": {"chunk": 11},
    "chunks everywhere": {"chunk_nope": True},
    "no norm of queries and keys": {"qk_norm": False},
    "rope everywhere": {"rotated": (1, 1, 1, 1)},
    "rope in halves": {"interleaved": False},
    "no temperature": {"attn_scale": 0.0},
    "another floor_scale": {"floor_scale": 9},
    "no shared expert": {"shared": False},
    "scores on the output": {"scale_output": True},
    "softmax": {"softmax": True},
    "two experts": {"chosen": 2},
    "up before gate": {"gate_first": False},
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_each_mistake_would_be_seen(ids, mistake):
    _, values = tensors(CONFIG | SCOUT)
    assert np.abs(dense(values, ids, **MISTAKES[mistake]) - dense(values, ids)).max() > 0.02


def test_the_norm_commutes_with_the_rotation(ids):
    """Which is why the order of the two cannot be a mistake."""
    _, values = tensors(CONFIG | SCOUT)
    np.testing.assert_allclose(dense(values, ids, norm_first=True), dense(values, ids), atol=1e-9)


@pytest.mark.parametrize("tied", [False, True])
def test_the_text_part_of_a_multimodal_checkpoint(memory_checkpoint, run, ids, tied):
    bits, values = tensors(CONFIG | SCOUT)
    if tied:
        del bits["lm_head.weight"]
        values["lm_head.weight"] = values["model.embed_tokens.weight"]
    nested = {name: value for name, value in (CONFIG | SCOUT).items() if name != "architectures"}
    config = {
        "architectures": ["Llama4ForConditionalGeneration"],
        "text_config": nested,
        "vision_config": {"hidden_size": 8, "num_hidden_layers": 1},
    }
    whole = {f"language_model.{name}": tensor for name, tensor in bits.items()}
    images = {
        "vision_model.patch_embedding.linear.weight": np.zeros((8, 8), np.float32),
        "multi_modal_projector.linear_1.weight": np.zeros((E, 8), np.float32),
    }
    checkpoint = memory_checkpoint(config, whole | images)
    model = load_model(checkpoint, "float32")
    assert sorted(checkpoint.released) == sorted(whole)  # images are not looked at
    assert (model.vocab_size, model.max_position_embeddings) == (50, 64)
    np.testing.assert_allclose(run(model, "float32", ids), dense(values, ids), atol=2e-4)


def test_a_request_does_not_depend_on_its_neighbours(memory_checkpoint, run, ids):
    """To the bit, though they share experts and stand at other places of their chunks."""
    config = CONFIG | TWO_EXPERTS
    bits, _ = tensors(config)
    model = load_model(memory_checkpoint(config, bits), "bfloat16")
    a, b = ids.tolist(), ids[::-1].tolist()
    alone = {"a": run(model, "bfloat16", a), "b": run(model, "bfloat16", b)}
    cache = ContiguousCache(model.kv_cache_config("bfloat16"), CacheConfig("contiguous", 192, 48))

    def step(*spans):
        batch = Batch.from_spans(spans)
        for name, start, tokens, _ in spans:
            assert cache.allocate(name, start + len(tokens))
        hidden = model(batch, BatchKV(cache.view(batch), cache))
        return model.logits(hidden, batch.logits_rows)

    step(("a", 0, a[:29], 0))
    both = step(("a", 29, a[29:30], 1), ("b", 0, b[:20], 20))
    np.testing.assert_array_equal(both, np.concatenate([alone["a"][29:30], alone["b"][:20]]))
    both = step(("b", 20, b[20:], 13), ("a", 30, a[30:], 3))
    np.testing.assert_array_equal(both, np.concatenate([alone["b"][20:], alone["a"][30:]]))


def config_of(**changes):
    names = [*shapes(CONFIG | SCOUT)]
    return Llama4Config.from_json(ConfigJson(CONFIG | SCOUT | changes, names))


def test_layers_in_each_of_their_spellings():
    config = config_of()
    assert config.rope_layers == (True, True, True, False)
    assert config.chunks == (10, 10, 10, 0)
    assert config.moe_layers == (True,) * 4
    assert config_of(no_rope_layers=[]) == config  # as published before they were listed
    assert config_of(no_rope_layers=[1, 1, 1, 0, 1, 1]) == config
    assert config_of(no_rope_layers=[0, 1, 1, 1]).chunks == (0, 10, 10, 10)
    assert config_of(interleave_moe_layer_step=2).moe_layers == (False, True, False, True)
    assert config_of(moe_layers=[0, 3]).moe_layers == (True, False, False, True)
    assert config_of(moe_layers=[]).moe_layers == (False,) * 4
    types = ["full_attention", "chunked_attention"] * 2
    assert config_of(layer_types=types).chunks == (0, 10, 0, 10)


def test_defaults_are_those_of_the_published_models():
    gone = ("head_dim", "attention_chunk_size", "floor_scale", "attn_scale", "rope_theta")
    fields = {name: value for name, value in (CONFIG | SCOUT).items() if name not in gone}
    config = Llama4Config.from_json(ConfigJson(fields, [*shapes(CONFIG | SCOUT)]))
    assert (config.head_dim, config.rope.rotary_dim, config.chunks[0]) == (128, 128, 8192)
    assert (config.floor_scale, config.attn_scale, config.rope.rope_theta) == (8192, 0.1, 5e5)
    assert config.use_qk_norm and config.attn_temperature_tuning


def test_facts_for_the_engine(memory_checkpoint):
    model = load_model(memory_checkpoint(CONFIG | SCOUT, tensors(CONFIG | SCOUT)[0]))
    assert (model.vocab_size, model.max_position_embeddings) == (50, 64)
    expected = KVCacheConfig(LAYERS, KV_HEADS, D, "bfloat16", chunks=(10, 10, 10, 0))
    assert model.kv_cache_config("bfloat16") == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts_per_tok": 5}, "num_experts_per_tok is 5, expected an integer from 1 to 4"),
        ({"no_rope_layers": [1, 1]}, "no_rope_layers has 2 numbers, expected 4"),
        ({"no_rope_layers": [1, 1, 1, None]}, "no_rope_layers is .* a list of integers from 0"),
        ({"attention_chunk_size": 0}, "attention_chunk_size is 0, expected an integer from 1"),
        (
            {"layer_types": ["sliding_attention"] * 4},
            "'sliding_attention', expected full_attention",
        ),
        (
            {"layer_types": ["chunked_attention"] * 4, "attention_chunk_size": None},
            "attention_chunk_size is None, expected a window, for layer_types",
        ),
        ({"interleave_moe_layer_step": 2}, r"feed_forward\.gate_proj\.weight is missing"),
        ({"moe_layers": [0, 1, 2]}, r"layers\.3\.feed_forward\.gate_proj\.weight is missing"),
        ({"intermediate_size": 32}, r"gate_up_proj has shape \[4, 48, 48\].*\[4, 48, 64\]"),
        ({"floor_scale": 0}, "floor_scale is 0, expected a number above 0"),
    ],
)
def test_a_config_that_cannot_be(memory_checkpoint, changes, message):
    bits, _ = tensors(CONFIG | SCOUT)
    with pytest.raises(ModelFormatError, match=message) as caught:
        load_model(memory_checkpoint(CONFIG | SCOUT | changes, bits))
    assert "\n" not in str(caught.value)


def test_unsupported_settings_name_the_supported(memory_checkpoint):
    bits, _ = tensors(CONFIG | SCOUT)
    for changes, message in (
        ({"hidden_act": "mish"}, "activation 'mish' is not supported.*silu"),
        ({"quantization_config": {"quant_method": "mxfp4"}}, "'mxfp4'.* supported: unquantized"),
    ):
        with pytest.raises(UnsupportedModelError, match=message):
            load_model(memory_checkpoint(CONFIG | SCOUT | changes, bits))
