"""OPT against a dense NumPy model written from the formulas, one mistake at a time.

Agreement with transformers is tested by the goldens (tests/e2e/test_golden.py): OPT with norms
before, and the 350M kind with norms after and narrow embeddings. Here: each setting by itself, and
that each is large enough for the comparison to see.
"""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from pace_nb import LLM
from pace_nb.errors import (
    ConfigError,
    InvalidRequestError,
    ModelFormatError,
    UnsupportedModelError,
)
from pace_nb.kv_cache.base import KVCacheConfig
from pace_nb.models.registry import load_model

CONFIG = {
    "architectures": ["OPTForCausalLM"],
    "vocab_size": 50,
    "hidden_size": 60,
    "ffn_dim": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 34,  # one more than `ids`
    "word_embed_proj_dim": 60,
    "do_layer_norm_before": True,
}
POST = {"do_layer_norm_before": False}
NARROW = {"word_embed_proj_dim": 28}
NO_BIAS = {"enable_bias": False}
BARE = {"layer_norm_elementwise_affine": False}
BOUND = 5e-5  # of float32 logits


def shapes_of(config, prefix="model.decoder"):
    """The tensors that transformers saves for this config."""
    narrow, biased = config["word_embed_proj_dim"], config.get("enable_bias", True)
    shapes = {"embed_tokens.weight": (50, narrow), "embed_positions.weight": (36, 60)}
    if narrow != 60:
        shapes |= {"project_in.weight": (60, narrow), "project_out.weight": (narrow, 60)}
    norms = []
    if config["do_layer_norm_before"] and not config.get("_remove_final_layer_norm"):
        norms.append("final_layer_norm")
    for i in range(2):
        layer = f"layers.{i}"
        linears = {f"self_attn.{p}_proj": (60, 60) for p in ("q", "k", "v", "out")}
        linears |= {"fc1": (44, 60), "fc2": (60, 44)}
        for name, shape in linears.items():
            shapes[f"{layer}.{name}.weight"] = shape
            if biased:
                shapes[f"{layer}.{name}.bias"] = shape[:1]
        norms += [f"{layer}.self_attn_layer_norm", f"{layer}.final_layer_norm"]
    if config.get("layer_norm_elementwise_affine", True):
        shapes |= {f"{name}.{kind}": (60,) for name in norms for kind in ("weight", "bias")}
    shapes = {f"{prefix}.{name}": shape for name, shape in shapes.items()}
    if not config.get("tie_word_embeddings", True):
        shapes["lm_head.weight"] = (50, narrow)
    return shapes


def tensors(config=CONFIG, seed=5):
    """(BF16 bits, the float64 values they stand for) of every tensor."""
    rng, bits, values = np.random.default_rng(seed), {}, {}
    for name, shape in shapes_of(config).items():
        x = rng.standard_normal(shape)
        if len(shape) == 2 and "embed" not in name:
            x *= 1.5 * shape[1] ** -0.5
        stored = x.astype(np.float32).astype(ml_dtypes.bfloat16)
        bits[name], values[name] = stored.view(np.uint16), stored.astype(np.float64)
    return bits, values


def relu(x):
    return np.maximum(x, 0)


def gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def dense(w, ids, *, before=True, offset=2, act=relu, biased=True, affine=True, last_norm=True,
          first_norm=True, scale=20**-0.5):  # fmt: skip
    """float64 logits of every position; the arguments are what a mistake would change."""
    t = len(ids)
    future = np.arange(t)[:, None] < np.arange(t)

    def tensor(name):
        return w.get(f"model.decoder.{name}")

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5)
        if tensor(f"{name}.weight") is None or not affine:
            return x
        return x * tensor(f"{name}.weight") + tensor(f"{name}.bias")

    def linear(x, name):
        bias = tensor(f"{name}.bias")
        return x @ tensor(f"{name}.weight").T + (0.0 if bias is None or not biased else bias)

    def attention(x, layer):
        q, k, v = (linear(x, f"{layer}.self_attn.{p}_proj").reshape(t, 3, 20) for p in "qkv")
        scores = np.einsum("qhd,khd->hqk", q, k) * scale
        scores[:, future] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        attended = np.einsum("hqk,khd->qhd", weights, v).reshape(t, -1)
        return linear(attended, f"{layer}.self_attn.out_proj")

    def mlp(x, layer):
        return linear(act(linear(x, f"{layer}.fc1")), f"{layer}.fc2")

    embedded = tensor("embed_tokens.weight")
    x = embedded[ids]
    if tensor("project_in.weight") is not None:
        x = linear(x, "project_in")
    x = x + tensor("embed_positions.weight")[np.arange(t) + offset]
    for i in range(2):
        layer = f"layers.{i}"
        first, second = f"{layer}.self_attn_layer_norm", f"{layer}.final_layer_norm"
        if before:
            x = x + attention(norm(x, first) if first_norm else x, layer)
            x = x + mlp(norm(x, second), layer)
        else:
            x = norm(x + attention(x, layer), first)
            x = norm(x + mlp(x, layer), second)
    if before and last_norm:
        x = norm(x, "final_layer_norm")
    if tensor("project_out.weight") is not None:
        x = linear(x, "project_out")
    return x @ w.get("lm_head.weight", embedded).T


VARIANTS = {
    "norms before": ({}, {}),
    "norms after": (POST, {"before": False}),
    "350m": (POST | NARROW, {"before": False}),
    "narrow embeddings": (NARROW, {}),
    "no norm at the end": ({"_remove_final_layer_norm": True}, {"last_norm": False}),
    "no biases": (NO_BIAS, {}),
    "norms without weights": (BARE, {}),
    "norms without weights, after": (BARE | POST, {"before": False}),
    "tanh gelu": ({"activation_function": "gelu_new"}, {"act": gelu_tanh}),
    "a head of its own": ({"tie_word_embeddings": False}, {}),
    "a narrow head of its own": ({"tie_word_embeddings": False} | NARROW, {}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits(memory_checkpoint, run, ids, variant):
    changes, arguments = VARIANTS[variant]
    config = CONFIG | changes
    bits, values = tensors(config)
    expected = dense(values, ids, **arguments)
    checkpoint = memory_checkpoint(config, bits)
    model = load_model(checkpoint, "float32")
    found = run(model, "float32", ids)
    np.testing.assert_allclose(found, expected, atol=BOUND * max(1, np.abs(expected).max() / 20))
    assert sorted(checkpoint.released) == sorted(bits)
    half = run(load_model(memory_checkpoint(config, bits)), "bfloat16", ids)
    assert np.abs(half - expected).max() < 0.05 * np.abs(expected).max()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("changes", [{}, POST | NARROW], ids=["before", "350m"])
def test_chunks_give_the_same_bits(memory_checkpoint, run, ids, dtype, changes):
    config = CONFIG | changes
    model = load_model(memory_checkpoint(config, tensors(config)[0]), dtype)
    at_once = run(model, dtype, ids)
    for chunks in ([1] * 33, [7] * 4 + [5], [20, 1, 12]):
        np.testing.assert_array_equal(run(model, dtype, ids, chunks), at_once)


@pytest.mark.parametrize(
    "mistake",
    [
        {"before": False},
        {"offset": 0},
        {"offset": 1},
        {"act": gelu_tanh},
        {"biased": False},
        {"affine": False},
        {"first_norm": False},
        {"last_norm": False},
        {"scale": 1.0},
    ],
    ids=str,
)
def test_every_mistake_would_be_seen(ids, mistake):
    _, values = tensors()
    assert np.abs(dense(values, ids, **mistake) - dense(values, ids)).max() > 100 * BOUND


def test_an_older_prefix(memory_checkpoint, run, ids):
    """The first published files say `decoder.` where transformers writes `model.decoder.`."""
    bits, values = tensors()
    bits = {name.removeprefix("model."): array for name, array in bits.items()}
    model = load_model(memory_checkpoint(CONFIG, bits), "float32")
    np.testing.assert_allclose(run(model, "float32", ids), dense(values, ids), atol=BOUND)


def test_a_tied_config_ignores_a_saved_head(memory_checkpoint, run, ids):
    bits, values = tensors()
    bits["lm_head.weight"] = np.zeros((50, 60), np.uint16)
    model = load_model(memory_checkpoint(CONFIG, bits), "float32")
    np.testing.assert_allclose(run(model, "float32", ids), dense(values, ids), atol=BOUND)


def test_no_position_beyond_the_last(memory_checkpoint, run, ids):
    """34 positions; the table's two extra rows come before them, not after."""
    bits, values = tensors()
    model = load_model(memory_checkpoint(CONFIG, bits), "float32")
    longest = np.append(ids, 7)
    np.testing.assert_allclose(run(model, "float32", longest), dense(values, longest), atol=BOUND)
    with pytest.raises(InvalidRequestError, match=r"position 34 is beyond the last .* 33"):
        run(model, "float32", np.append(longest, 7))


def test_the_engine_stops_at_the_last_position(tmp_path, ids):
    _, values = tensors()
    save_file(
        {name: array.astype(np.float32) for name, array in values.items()},
        tmp_path / "model.safetensors",
    )
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(ConfigError, match=r"max_model_len is 35, .* at most 34"):
        LLM(tmp_path, max_model_len=35)
    with LLM(tmp_path, dtype="float32", kernels="reference") as llm:
        assert llm.max_model_len == 34
        (output,) = llm.generate([{"prompt_token_ids": ids[:30].tolist()}], use_tqdm=False)
        with pytest.raises(InvalidRequestError, match="prompt has 34 tokens"):
            llm.generate([{"prompt_token_ids": [1] * 34}], use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 4
    assert output.outputs[0].finish_reason == "length"


def test_facts_for_the_engine(memory_checkpoint):
    model = load_model(memory_checkpoint(CONFIG, tensors()[0]))
    assert (model.vocab_size, model.max_position_embeddings) == (50, 34)
    assert model.kv_cache_config("float32") == KVCacheConfig(2, 3, 20, "float32")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"activation_function": "mish"}, UnsupportedModelError, "'mish' is not.*relu"),
        ({"num_attention_heads": 7}, ModelFormatError, "hidden_size is 60, expected a multiple"),
        ({"max_position_embeddings": 36}, ModelFormatError, r"\[36, 60\].*says \[38, 60\]"),
        ({"word_embed_proj_dim": 28}, ModelFormatError, r"\[50, 60\].*says \[50, 28\]"),
        ({"do_layer_norm_before": False}, ModelFormatError, "final_layer_norm.* has no place"),
        ({"_remove_final_layer_norm": True}, ModelFormatError, "final_layer_norm.* has no place"),
        ({"enable_bias": False}, ModelFormatError, r"fc1\.bias has no place"),
        ({"layer_norm_elementwise_affine": False}, ModelFormatError, "layer_norm.* has no place"),
        ({"do_layer_norm_before": 1}, ModelFormatError, "do_layer_norm_before is 1"),
        ({"num_hidden_layers": 10**9}, ModelFormatError, "num_hidden_layers is 1000000000"),
    ],
)
def test_a_config_that_cannot_be(memory_checkpoint, changes, error, message):
    with pytest.raises(error, match=message) as caught:
        load_model(memory_checkpoint(CONFIG | changes, tensors()[0]))
    assert "\n" not in str(caught.value)
