"""GPT-OSS against a dense NumPy model written from the formulas, one mistake at a time.

Agreement with transformers is tested by the goldens (tests/e2e/test_golden.py). Here: each
difference from Llama is large enough for the comparison to see it, both storages of the experts
are the same model, a sink of 0 is a sink, and a request does not notice its neighbours.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from pace_nb.batch import Batch
from pace_nb.config import CacheConfig
from pace_nb.errors import ModelFormatError, UnsupportedModelError
from pace_nb.kernels import quant
from pace_nb.kv_cache.base import BatchKV, KVCacheConfig
from pace_nb.kv_cache.contiguous import ContiguousCache
from pace_nb.layers.rope import RopeParameters, attention_factor, inverse_frequencies
from pace_nb.models.config_json import ConfigJson
from pace_nb.models.gpt_oss import GptOssConfig
from pace_nb.models.registry import build_model, load_model

E, F, D, HEADS, KV_HEADS, X, LAYERS = 64, 32, 16, 4, 2, 6, 3
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 2.0,  # within a head of 16 dims, at these lengths
    "beta_slow": 0.3,
    "truncate": False,
}
CONFIG = {
    "architectures": ["GptOssForCausalLM"],
    "vocab_size": 50,
    "hidden_size": E,
    "intermediate_size": F,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": D,
    "num_local_experts": X,
    "num_experts_per_tok": 2,
    "swiglu_limit": 1.5,
    "max_position_embeddings": 64,
    "rms_norm_eps": 0.01,
    "sliding_window": 9,
    "rope_theta": 150000.0,
    "rope_scaling": YARN,
}
MXFP4 = {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}}


def shapes():
    """What transformers saves: name -> shape."""
    found = {
        "model.embed_tokens.weight": (50, E),
        "model.norm.weight": (E,),
        "lm_head.weight": (50, E),
    }
    for i in range(LAYERS):
        attention, mlp = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
        for name, rows, columns in (
            ("q", HEADS * D, E),
            ("k", KV_HEADS * D, E),
            ("v", KV_HEADS * D, E),
            ("o", E, HEADS * D),
        ):
            found[f"{attention}.{name}_proj.weight"] = (rows, columns)
            found[f"{attention}.{name}_proj.bias"] = (rows,)
        found |= {
            f"{attention}.sinks": (HEADS,),
            f"{mlp}.router.weight": (X, E),
            f"{mlp}.router.bias": (X,),
            f"{mlp}.experts.gate_up_proj": (X, E, 2 * F),
            f"{mlp}.experts.gate_up_proj_bias": (X, 2 * F),
            f"{mlp}.experts.down_proj": (X, F, E),
            f"{mlp}.experts.down_proj_bias": (X, E),
            f"model.layers.{i}.input_layernorm.weight": (E,),
            f"model.layers.{i}.post_attention_layernorm.weight": (E,),
        }
    return found


def tensors(seed=5):
    """(BF16 bits, the float64 values they stand for) of every tensor."""
    rng, bits, values = np.random.default_rng(seed), {}, {}
    for name, shape in shapes().items():
        x = rng.standard_normal(shape)
        if name.endswith("_proj"):  # [X, K, N]; the clamp must bite
            x *= (2 if "gate_up" in name else 1) * shape[1] ** -0.5
        elif len(shape) == 2 and name.endswith(".weight") and "embed" not in name:
            x *= (2 if "q_proj" in name else 1) * shape[1] ** -0.5
        stored = x.astype(np.float32).astype(ml_dtypes.bfloat16)
        bits[name], values[name] = stored.view(np.uint16), stored.astype(np.float64)
    return bits, values


def in_mxfp4(bits, values, seed=6):
    """The same with the experts in MXFP4: (tensors, their values, the values as BF16 [X, K, N])."""
    rng, packed, plain = np.random.default_rng(seed), dict(bits), dict(bits)
    values = dict(values)
    for name in [name for name in bits if name.endswith("experts.gate_up_proj")]:
        for tensor in (name, name.replace("gate_up", "down")):
            x, k, n = bits[tensor].shape
            blocks = rng.integers(0, 256, (x, n, k // 32, 16)).astype(np.uint8)
            scales = rng.integers(122, 126, (x, n, k // 32)).astype(np.uint8)
            expanded = np.stack(
                [quant.dequantize_mxfp4_ref(*pair) for pair in zip(blocks, scales, strict=True)]
            ).transpose(0, 2, 1)
            del packed[tensor]
            packed |= {f"{tensor}_blocks": blocks, f"{tensor}_scales": scales}
            values[tensor] = expanded
            plain[tensor] = expanded.astype(np.float32).astype(ml_dtypes.bfloat16).view(np.uint16)
    return packed, values, plain


def dense(w, ids, *, window=9, first_sliding=0, sinks=True, rope=YARN, chosen=2, limit=1.5,
          alpha=1.702, one=1.0, over_all=False, interleaved=True, biases=True):  # fmt: skip
    """float64 logits of every position; the arguments are what a mistake would change."""
    t, position = len(ids), np.arange(len(ids))
    age = position[:, None] - position  # how far a key lies behind a query
    parameters = RopeParameters(D, 64, 150000.0, **rope)
    angle = position[:, None, None] * inverse_frequencies(parameters)
    cos, sin = (f(angle) * attention_factor(parameters) for f in (np.cos, np.sin))

    def norm(x, name):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 0.01) * w[f"{name}.weight"]

    def bias(name):
        return w[name] if biases else 0 * w[name]

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + bias(f"{name}.bias")

    def rotate(x):
        a, b = x[..., : D // 2], x[..., D // 2 :]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    def mixture(x, mlp):
        logits, y = linear(x, f"{mlp}.router"), np.zeros_like(x)
        for row, (token, its_logits) in enumerate(zip(x, logits, strict=True)):
            best = np.argsort(-its_logits)[:chosen]
            weights = (
                np.exp(its_logits) / np.exp(its_logits if over_all else its_logits[best]).sum()
            )
            for e in best:
                h = token @ w[f"{mlp}.experts.gate_up_proj"][e]
                h = h + bias(f"{mlp}.experts.gate_up_proj_bias")[e]
                gate, up = (h[::2], h[1::2]) if interleaved else np.split(h, 2)
                gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
                h = (up + one) * gate / (1 + np.exp(-alpha * gate))
                h = h @ w[f"{mlp}.experts.down_proj"][e] + bias(f"{mlp}.experts.down_proj_bias")[e]
                y[row] += weights[e] * h
        return y

    x = w["model.embed_tokens.weight"][ids]
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        h = norm(x, f"{layer}.input_layernorm")
        q, k, v = (linear(h, f"{layer}.self_attn.{p}_proj").reshape(t, -1, D) for p in "qkv")
        q, k = rotate(q), rotate(k)
        k, v = (np.repeat(y, HEADS // KV_HEADS, axis=1) for y in (k, v))
        scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(D)
        slides = window and i % 2 == first_sliding
        scores[:, (age < 0) | ((age >= window) if slides else False)] = -np.inf
        if sinks:
            sink = np.broadcast_to(w[f"{layer}.self_attn.sinks"][:, None, None], (HEADS, t, 1))
            scores = np.concatenate([scores, sink], -1)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights = (weights / weights.sum(-1, keepdims=True))[..., :t]
        h = np.einsum("hqk,khd->qhd", weights, v).reshape(t, -1)
        x = x + linear(h, f"{layer}.self_attn.o_proj")
        x = x + mixture(norm(x, f"{layer}.post_attention_layernorm"), f"{layer}.mlp")
    return norm(x, "model.norm") @ w["lm_head.weight"].T


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits(memory_checkpoint, run, ids, dtype):
    bits, values = tensors()
    checkpoint = memory_checkpoint(CONFIG, bits)
    model = load_model(checkpoint, dtype)
    assert sorted(checkpoint.released) == sorted(bits)
    found, expected = run(model, dtype, ids), dense(values, ids)
    if dtype == "float32":
        np.testing.assert_allclose(found, expected, atol=2e-4)
    else:  # an expert may flip, so only most rows can agree
        agreeing = np.abs(found - expected).max(axis=1) < 0.05 * np.abs(expected).max()
        assert agreeing.mean() > 0.8
    for chunks in ([1] * 33, [7] * 4 + [5], [20, 1, 12]):
        np.testing.assert_array_equal(run(model, dtype, ids, chunks), found)


MISTAKES = {
    "no window": {"window": 0},
    "window of one more": {"window": 10},
    "windows in the other layers": {"first_sliding": 1},
    "no sinks": {"sinks": False},
    "no yarn": {"rope": {}},
    "yarn truncated": {"rope": YARN | {"truncate": True}},
    "one expert more": {"chosen": 3},
    "no clamp": {"limit": 1e9},
    "silu": {"alpha": 1.0},
    "up without 1": {"one": 0.0},
    "softmax over all experts": {"over_all": True},
    "gate and up as halves": {"interleaved": False},
    "no biases": {"biases": False},
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_each_mistake_would_be_seen(ids, mistake):
    _, values = tensors()
    assert np.abs(dense(values, ids, **MISTAKES[mistake]) - dense(values, ids)).max() > 0.02


def test_a_sink_of_zero_is_a_sink(memory_checkpoint, run, ids):
    bits, values = tensors()
    for i in range(LAYERS):
        bits[f"model.layers.{i}.self_attn.sinks"] = np.zeros(HEADS, np.uint16)
        values[f"model.layers.{i}.self_attn.sinks"] = np.zeros(HEADS)
    found = run(load_model(memory_checkpoint(CONFIG, bits), "float32"), "float32", ids)
    np.testing.assert_allclose(found, dense(values, ids), atol=2e-4)
    assert np.abs(found - dense(values, ids, sinks=False)).max() > 0.02


def test_mxfp4_experts(memory_checkpoint, run, ids):
    """float32: the values they stand for. bfloat16: the very bits of the expanded model, in 4."""
    packed, values, plain = in_mxfp4(*tensors())
    config = CONFIG | MXFP4
    model = load_model(memory_checkpoint(config, packed), "float32")
    np.testing.assert_allclose(run(model, "float32", ids), dense(values, ids), atol=2e-4)
    checkpoint = memory_checkpoint(config, packed)
    model = load_model(checkpoint, "bfloat16")
    assert sorted(checkpoint.released) == sorted(packed)
    assert isinstance(model.layers[0].mlp.experts.down_proj._weight, quant.PackedMXFP4)
    expanded = load_model(memory_checkpoint(CONFIG, plain), "bfloat16")
    np.testing.assert_array_equal(
        run(model, "bfloat16", ids), run(expanded, "bfloat16", ids, [20, 1, 12])
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_request_does_not_depend_on_its_neighbours(memory_checkpoint, run, ids, dtype):
    """To the bit, though they share experts: prefill beside decode, and two of a length."""
    bits, _ = tensors()
    model = load_model(memory_checkpoint(CONFIG, bits), dtype)
    alone = {"a": run(model, dtype, ids, [30, 1, 1, 1]), "b": run(model, dtype, ids[::-1], [33])}
    cache = ContiguousCache(model.kv_cache_config(dtype), CacheConfig("contiguous", 192, 48))
    a, b = ids.tolist(), ids[::-1].tolist()

    def step(*spans):
        batch = Batch.from_spans(spans)
        for name, start, tokens, _ in spans:
            assert cache.allocate(name, start + len(tokens))
        hidden = model(batch, BatchKV(cache.view(batch), cache))
        return model.logits(hidden, batch.logits_rows)

    step(("a", 0, a[:30], 0))
    both = step(("a", 30, a[30:31], 1), ("b", 0, b[:20], 20))
    np.testing.assert_array_equal(both, np.concatenate([alone["a"][30:31], alone["b"][:20]]))
    both = step(("b", 20, b[20:], 13), ("a", 31, a[31:], 2))
    np.testing.assert_array_equal(both, np.concatenate([alone["b"][20:], alone["a"][31:]]))


def config_of(**changes):
    return GptOssConfig.from_json(ConfigJson(CONFIG | changes, ["lm_head.weight", "a", "b"]))


def test_windows_alternate_from_the_first_layer_unless_layer_types_says_otherwise():
    assert config_of().windows == (9, 0, 9)
    assert config_of(sliding_window=None).windows == (0, 0, 0)
    listed = ["full_attention", "sliding_attention", "full_attention"]
    assert config_of(layer_types=listed).windows == (0, 9, 0)


def test_defaults_are_those_of_the_published_models():
    config = config_of(swiglu_limit=None, num_experts_per_tok=None, rope_theta=None)
    assert (config.swiglu_alpha, config.swiglu_limit) == (1.702, 7.0)
    assert config.num_experts_per_tok == 4 and config.rope.rope_theta == 150000.0
    assert config.attention_bias and not config.rope.truncate and not config.mxfp4


def test_facts_for_the_engine(memory_checkpoint):
    model = load_model(memory_checkpoint(CONFIG, tensors()[0]))
    assert (model.vocab_size, model.max_position_embeddings) == (50, 64)
    expected = KVCacheConfig(LAYERS, KV_HEADS, D, "bfloat16", windows=(9, 0, 9))
    assert model.kv_cache_config("bfloat16") == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts_per_tok": 7}, "num_experts_per_tok is 7, expected an integer from 1 to 6"),
        ({"num_local_experts": None}, "num_local_experts is missing"),
        ({"num_local_experts": 5}, r"mlp\.router\.weight has shape \[6, 64\].*\[5, 64\]"),
        ({"intermediate_size": 64}, r"gate_up_proj has shape \[6, 64, 64\].*\[6, 64, 128\]"),
        ({"rope_scaling": None}, "rope_scaling is missing"),
        ({"swiglu_limit": 0}, "swiglu_limit is 0, expected a number above 0"),
        ({"attention_bias": False}, r"_proj\.bias has no place"),
        ({"layer_types": ["chunked_attention"] * 3}, "is 'chunked_attention', expected full_att"),
        (MXFP4, r"experts\.gate_up_proj_blocks is missing"),
        (MXFP4 | {"intermediate_size": 40}, "experts in MXFP4 have 40 inputs"),
    ],
)
def test_a_config_that_cannot_be(memory_checkpoint, changes, message):
    with pytest.raises(ModelFormatError, match=message) as caught:
        load_model(memory_checkpoint(CONFIG | changes, tensors()[0]))
    assert "\n" not in str(caught.value)


def test_a_quantized_checkpoint_without_its_setting_is_refused(memory_checkpoint):
    packed, _, _ = in_mxfp4(*tensors())
    with pytest.raises(ModelFormatError, match=r"experts\.gate_up_proj is missing"):
        load_model(memory_checkpoint(CONFIG, packed))


def test_other_quantizations_name_the_one_that_is_read():
    for method in ("gptq", "fp8"):
        with pytest.raises(UnsupportedModelError, match=rf"'{method}'.*supported: mxfp4, unquant"):
            build_model(CONFIG | {"quantization_config": {"quant_method": method}}, [])
