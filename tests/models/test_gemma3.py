"""Gemma 3 against a dense NumPy model written from the formulas, one mistake at a time.

Agreement with transformers is tested by the goldens (tests/e2e/test_golden.py). Here: every field
that a published config may hold, in each of its spellings, the places a checkpoint may keep the
text model, and that each difference from Llama is large enough for the comparison to see it.
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
from pace_nb.layers.weights import Weights
from pace_nb.models.config_json import ConfigJson
from pace_nb.models.gemma3 import Gemma3Config, Gemma3RMSNorm
from pace_nb.models.registry import load_model

CONFIG = {
    "architectures": ["Gemma3ForCausalLM"],
    "vocab_size": 50,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 20,
    "max_position_embeddings": 64,
    "rms_norm_eps": 0.01,
    "query_pre_attn_scalar": 7,
    "rope_theta": 3000.0,
    "rope_local_base_freq": 100.0,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    "sliding_window": 9,
    "sliding_window_pattern": 2,
}
SLIDING, FULL = "sliding_attention", "full_attention"
WINDOWS = (9, 0, 9)  # of the pattern above: every second layer is global


def tensors(seed=5):
    """(BF16 bits, the float64 values they stand for) of every tensor of CONFIG."""
    e, f, d = 48, 40, 20
    norms = ("input", "post_attention", "pre_feedforward", "post_feedforward")
    shapes = {"model.embed_tokens.weight": (50, e), "model.norm.weight": (e,)}
    for i in range(3):
        layer = f"model.layers.{i}"
        shapes |= {f"{layer}.{name}_layernorm.weight": (e,) for name in norms}
        shapes |= {f"{layer}.self_attn.{name}_norm.weight": (d,) for name in "qk"}
        shapes |= {
            f"{layer}.self_attn.{n}_proj.weight": (d * h, e)
            for n, h in zip("qkv", (4, 2, 2), strict=True)
        }
        shapes |= {f"{layer}.self_attn.o_proj.weight": (e, 4 * d)}
        shapes |= {f"{layer}.mlp.{name}_proj.weight": (f, e) for name in ("gate", "up")}
        shapes |= {f"{layer}.mlp.down_proj.weight": (e, f)}
    rng, bits, values = np.random.default_rng(seed), {}, {}
    for name, shape in shapes.items():
        x = rng.standard_normal(shape) * (0.3 if len(shape) == 1 else shape[1] ** -0.5)
        stored = x.astype(np.float32).astype(ml_dtypes.bfloat16)
        bits[name], values[name] = stored.view(np.uint16), stored.astype(np.float64)
    return bits, values


def dense(w, ids, *, windows=WINDOWS, theta=3000.0, local_theta=100.0, factor=8.0, scalar=7.0,
          one=1.0, head_norms=True, post_norms=True):  # fmt: skip
    """float64 logits of every position; the arguments are what a mistake would change."""
    t, e, d, eps = len(ids), 48, 20, 0.01
    position = np.arange(t)
    age = position[:, None] - position  # how far a key lies behind a query

    def norm(x, name):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * (one + w[f"{name}.weight"])

    def linear(x, name):
        return x @ w[f"{name}.weight"].T

    def rotate(x, frequencies):
        angle = position[:, None, None] * frequencies
        a, b = x[..., : d // 2], x[..., d // 2 :]
        return np.concatenate(
            [a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1
        )

    x = w["model.embed_tokens.weight"][ids] * np.sqrt(e)
    for i, window in enumerate(windows):
        layer = f"model.layers.{i}"
        h = norm(x, f"{layer}.input_layernorm")
        q, k, v = (linear(h, f"{layer}.self_attn.{p}_proj").reshape(t, -1, d) for p in "qkv")
        if head_norms:
            q, k = norm(q, f"{layer}.self_attn.q_norm"), norm(k, f"{layer}.self_attn.k_norm")
        base = local_theta if window else theta
        frequencies = base ** (-np.arange(0, d, 2) / d) / (1.0 if window else factor)
        q, k = rotate(q, frequencies), rotate(k, frequencies)
        k, v = np.repeat(k, 2, axis=1), np.repeat(v, 2, axis=1)
        scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(scalar)
        scores[:, (age < 0) | ((age >= window) if window else False)] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        h = linear(
            np.einsum("hqk,khd->qhd", weights, v).reshape(t, -1), f"{layer}.self_attn.o_proj"
        )
        x = x + (norm(h, f"{layer}.post_attention_layernorm") if post_norms else h)
        h = norm(x, f"{layer}.pre_feedforward_layernorm")
        gate, up = linear(h, f"{layer}.mlp.gate_proj"), linear(h, f"{layer}.mlp.up_proj")
        gate = 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
        h = linear(gate * up, f"{layer}.mlp.down_proj")
        x = x + (norm(h, f"{layer}.post_feedforward_layernorm") if post_norms else h)
    return linear(norm(x, "model.norm"), "model.embed_tokens")


def without(*fields):
    return {name: value for name, value in CONFIG.items() if name not in fields}


OLD_ROPE = ("rope_theta", "rope_local_base_freq", "rope_scaling")
NESTED_ROPE = {
    FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 3000.0},
    SLIDING: {"rope_type": "default", "rope_theta": 100.0},
}
VARIANTS = {
    "pattern": (CONFIG, {}),
    "layer_types win": (
        CONFIG | {"layer_types": [FULL, SLIDING, SLIDING]},
        {"windows": (0, 9, 9)},
    ),
    "default pattern": (without("sliding_window_pattern"), {"windows": (9, 9, 9)}),
    "rope per layer type": (without(*OLD_ROPE) | {"rope_parameters": NESTED_ROPE}, {}),
    "no scaling": (CONFIG | {"rope_scaling": None}, {"factor": 1.0}),
    "default bases": (without(*OLD_ROPE), {"theta": 1e6, "local_theta": 1e4, "factor": 1.0}),
    "default scalar": (without("query_pre_attn_scalar"), {"scalar": 256.0}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits(memory_checkpoint, run, ids, variant):
    config, arguments = VARIANTS[variant]
    bits, values = tensors()
    expected = dense(values, ids, **arguments)
    model = load_model(memory_checkpoint(config, bits), "float32")
    found = run(model, "float32", ids)
    np.testing.assert_allclose(found, expected, atol=2e-4)
    np.testing.assert_array_equal(run(model, "float32", ids, [7] * 4 + [1] * 5), found)


@pytest.mark.parametrize(
    "mistake",
    [
        {"windows": (0, 0, 0)},
        {"windows": (10, 0, 10)},
        {"windows": (8, 0, 8)},
        {"windows": (0, 9, 0)},
        {"theta": 100.0},
        {"local_theta": 3000.0},
        {"factor": 1.0},
        {"scalar": 20.0},
        {"one": 0.0},
        {"head_norms": False},
        {"post_norms": False},
    ],
    ids=str,
)
def test_every_mistake_would_be_seen(ids, mistake):
    """The bound of `test_logits` is 2e-4."""
    _, values = tensors()
    assert np.abs(dense(values, ids, **mistake) - dense(values, ids)).max() > 0.02


def test_one_plus_weight_is_float32_in_bfloat16_too(memory_checkpoint):
    """Rounded to BF16, 1 + w would lose most of a small w."""
    w = np.array([1e-3, -2e-3, 3e-3, 0.3], np.float32).astype(ml_dtypes.bfloat16)
    norm = Gemma3RMSNorm(4, 1e-6)
    norm.load(Weights(memory_checkpoint({}, {"n.weight": w.view(np.uint16)}), "bfloat16"), "n")
    assert norm.weight.dtype == np.float32
    np.testing.assert_allclose(norm.weight, 1 + w.astype(np.float64), rtol=1e-6)


@pytest.mark.parametrize(("dtype", "scale"), [("bfloat16", 6.9375), ("float32", 48**0.5)])
def test_the_embedding_scale_is_rounded_as_the_weights_are(memory_checkpoint, dtype, scale):
    """sqrt(48) = 6.928. The layers add nothing here: their outputs are zero."""
    bits, values = tensors()
    for name in bits:
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            bits[name] = np.zeros_like(bits[name])
    model = load_model(memory_checkpoint(CONFIG, bits), dtype)
    cache = ContiguousCache(model.kv_cache_config(dtype), CacheConfig("contiguous", 16, 16))
    batch = Batch.from_spans([("r", 0, [3, 1, 4], 0)])
    assert cache.allocate("r", 3)
    hidden = model(batch, BatchKV(cache.view(batch), cache))
    expected = values["model.embed_tokens.weight"][[3, 1, 4]].astype(np.float32) * np.float32(scale)
    np.testing.assert_array_equal(hidden, expected)


# ---- the text part of the multimodal models ------------------------------------------------------
@pytest.mark.parametrize("prefix", ["language_model.model", "model.language_model"])
def test_text_part(memory_checkpoint, run, ids, prefix):
    """The same bits as the text model alone, from either layout; nothing of the vision tower is
    read."""
    bits, _ = tensors()
    expected = run(load_model(memory_checkpoint(CONFIG, bits)), "bfloat16", ids)
    text = without("architectures") | {"model_type": "gemma3_text"}
    config = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": text}
    moved = {prefix + name.removeprefix("model"): value for name, value in bits.items()}
    vision = prefix.removesuffix("language_model").removesuffix("language_model.model")
    images = {
        f"{vision}vision_tower.vision_model.embeddings.patch_embedding.bias": np.zeros(3),
        f"{vision}multi_modal_projector.mm_input_projection_weight": np.zeros((3, 3)),
    }
    checkpoint = memory_checkpoint(config, moved | images)
    np.testing.assert_array_equal(run(load_model(checkpoint), "bfloat16", ids), expected)
    assert sorted(checkpoint.released) == sorted(moved)


def test_vision_tensors_under_another_name_are_refused(memory_checkpoint):
    bits, _ = tensors()
    with pytest.raises(ModelFormatError, match=r"audio_tower\.weight has no place"):
        load_model(memory_checkpoint(CONFIG, bits | {"audio_tower.weight": np.zeros(3)}))


def read(fields):
    names = [f"tensor {i}" for i in range(100)]
    return Gemma3Config.from_json(ConfigJson(fields, names))


def test_a_published_text_config_names_only_what_differs():
    """google/gemma-3-4b-it; the rest is transformers' Gemma3TextConfig."""
    text = {
        "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text",
        "num_hidden_layers": 34, "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }  # fmt: skip
    config = read({"architectures": ["Gemma3ForConditionalGeneration"], "text_config": text})
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (8, 4, 256)
    assert (config.vocab_size, config.query_pre_attn_scalar) == (262_208, 256.0)
    assert (config.rope.rope_theta, config.rope.factor) == (1e6, 8.0)
    assert (config.local_rope.rope_theta, config.local_rope.rope_type) == (1e4, "default")
    assert config.windows == ((1024,) * 5 + (0,)) * 5 + (1024,) * 4


def test_facts_for_the_engine(memory_checkpoint):
    model = load_model(memory_checkpoint(CONFIG, tensors()[0]))
    assert (model.vocab_size, model.max_position_embeddings) == (50, 64)
    assert model.kv_cache_config("float32") == KVCacheConfig(3, 2, 20, "float32", windows=WINDOWS)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"final_logit_softcapping": 30.0}, UnsupportedModelError, "final_logit_softcapping is"),
        ({"attn_logit_softcapping": 50.0}, UnsupportedModelError, "attn_logit_softcapping is"),
        ({"tie_word_embeddings": False}, UnsupportedModelError, "tie_word_embeddings is false"),
        ({"use_bidirectional_attention": True}, UnsupportedModelError, "use_bidirectional"),
        (
            {"rope_scaling": None, "rope_parameters": {SLIDING: {"rope_type": "yarn"}}},
            UnsupportedModelError,
            "rope_type of sliding_attention is 'yarn'",
        ),
        ({"rope_scaling": {"rope_type": "mrope"}}, UnsupportedModelError, "'mrope'.*linear"),
        ({"hidden_activation": "mish"}, UnsupportedModelError, "'mish'.*gelu_pytorch_tanh"),
        ({"sliding_window": None}, ModelFormatError, "sliding_window is missing"),
        ({"sliding_window_pattern": 0}, ModelFormatError, "sliding_window_pattern is 0"),
        ({"layer_types": ["full_attention"]}, ModelFormatError, "a list of 3 strings"),
        ({"text_config": []}, ModelFormatError, r"text_config is \[\], expected an object"),
        ({"num_key_value_heads": 3}, ModelFormatError, "num_key_value_heads is 3"),
    ],
)
def test_what_no_gemma3_has_is_refused(memory_checkpoint, changes, error, message):
    with pytest.raises(error, match=message) as caught:
        load_model(memory_checkpoint(CONFIG | changes, tensors()[0]))
    assert "\n" not in str(caught.value)
