"""The GGUF file read back by the format's description, and what llama.cpp will compute with it."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest

from bench import make_checkpoint
from bench.peers import to_gguf
from pace_nb.kernels.bf16 import to_f32
from pace_nb.layers.rope import RopeParameters, inverse_frequencies
from pace_nb.models.loader import Checkpoint

TINY = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 40,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": make_checkpoint.LLAMA_3,
    "tie_word_embeddings": True,
}


def read(data):
    """Settings and tensors of a GGUF file: {name: value}, {name: (type, array)}."""
    file = io.BytesIO(data)

    def number(form):
        return struct.unpack(f"<{form}", file.read(struct.calcsize(form)))[0]

    def text():
        return file.read(number("Q")).decode()

    values = {4: lambda: number("I"), 6: lambda: number("f"), 8: text}
    assert file.read(4) == b"GGUF" and number("I") == 3
    num_tensors, num_settings = number("Q"), number("Q")
    settings = {text(): values[number("I")]() for _ in range(num_settings)}
    entries = []
    for _ in range(num_tensors):
        name, dimensions = text(), number("I")
        shape = tuple(number("Q") for _ in range(dimensions))[::-1]
        entries.append((name, shape, number("I"), number("Q")))
    begin = -(-file.tell() // 32) * 32
    tensors = {}
    for name, shape, kind, offset in entries:
        assert offset % 32 == 0
        dtype = {0: np.float32, 30: np.uint16}[kind]
        found = np.frombuffer(data, dtype, int(np.prod(shape)), begin + offset)
        tensors[name] = (kind, found.reshape(shape))
    return settings, tensors


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(make_checkpoint.SHAPES, "tiny", TINY)
        make_checkpoint.write("tiny", directory)
    return directory


@pytest.fixture(scope="module")
def converted(directory):
    path = directory / "tiny.gguf"
    to_gguf.convert(directory, path)
    return read(path.read_bytes())


def test_every_weight_is_there_to_the_bit(directory, converted):
    _, tensors = converted
    with Checkpoint.open(directory) as checkpoint:
        assert len(tensors) == len(checkpoint.names()) + 1  # the divisors of RoPE

        def ours(name):
            return checkpoint.tensor(name, checkpoint.shape(name))

        kind, embedding = tensors["token_embd.weight"]
        assert kind == to_gguf.BF16
        np.testing.assert_array_equal(embedding, ours("model.embed_tokens.weight"))
        for layer in range(2):
            for name, theirs in (("mlp.down_proj", "ffn_down"), ("self_attn.v_proj", "attn_v")):
                _, found = tensors[f"blk.{layer}.{theirs}.weight"]
                np.testing.assert_array_equal(found, ours(f"model.layers.{layer}.{name}.weight"))
            kind, norm = tensors[f"blk.{layer}.ffn_norm.weight"]
            expected = to_f32(ours(f"model.layers.{layer}.post_attention_layernorm.weight"))
            assert kind == to_gguf.F32
            np.testing.assert_array_equal(norm, expected)


def test_settings_are_the_configuration(converted):
    settings, _ = converted
    assert settings["general.architecture"] == "llama"
    assert settings["llama.attention.head_count"] == 3
    assert settings["llama.attention.head_count_kv"] == 1
    assert settings["llama.rope.dimension_count"] == 8
    assert settings["llama.attention.layer_norm_rms_epsilon"] == np.float32(1e-5)
    assert settings["llama.vocab_size"] == 40


def rotated(x, angles, pairs):
    """x [heads, D] rotated by angles [D/2]; pairs: indices of the first and second of each pair."""
    first, second = pairs
    out = x.copy()
    out[:, first] = x[:, first] * np.cos(angles) - x[:, second] * np.sin(angles)
    out[:, second] = x[:, second] * np.cos(angles) + x[:, first] * np.sin(angles)
    return out


def test_scores_are_those_of_the_checkpoint():
    """llama.cpp rotates neighbours, Hugging Face halves: with permuted rows, q . k is the same."""
    rng = np.random.default_rng(0)
    heads, dim, size = 3, 8, 24
    wq, wk = (rng.standard_normal((heads * dim, size)) for _ in range(2))
    x, y, i = rng.standard_normal(size), rng.standard_normal(size), np.arange(dim // 2)
    halves, neighbours = (i, i + dim // 2), (2 * i, 2 * i + 1)

    def scores(wq, wk, pairs):
        q = rotated((wq @ x).reshape(heads, dim), 5 * 0.1**i, pairs)
        k = rotated((wk @ y).reshape(heads, dim), 2 * 0.1**i, pairs)
        return (q * k).sum(axis=1)

    theirs = scores(*(to_gguf.rotate_neighbours(w, heads) for w in (wq, wk)), neighbours)
    np.testing.assert_allclose(theirs, scores(wq, wk, halves), rtol=1e-12)
    assert not np.allclose(scores(wq, wk, neighbours), theirs), "unpermuted it would show"


def test_rope_divisors_give_the_scaled_frequencies(converted):
    scaling = dict(make_checkpoint.LLAMA_3)
    parameters = RopeParameters(64, 131072, 500000.0, **scaling)
    divisors = to_gguf.rope_divisors({**TINY, "rope_scaling": scaling}, 64)
    plain = 500000.0 ** (-np.arange(0, 64, 2) / 64)
    np.testing.assert_allclose(plain / divisors, inverse_frequencies(parameters), rtol=1e-6)
    assert converted[1]["rope_freqs.weight"][1].shape == (4,)
    assert to_gguf.rope_divisors({**TINY, "rope_scaling": None}, 64) is None


def test_an_untied_head_is_written(directory, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(make_checkpoint.SHAPES, "u", {**TINY, "tie_word_embeddings": False})
        make_checkpoint.write("u", tmp_path)
    to_gguf.convert(tmp_path, tmp_path / "u.gguf")
    _, tensors = read((tmp_path / "u.gguf").read_bytes())
    assert tensors["output.weight"][1].shape == (40, 24)


def test_what_it_cannot_convert_is_refused(tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        qwen = {**TINY, "architectures": ["Qwen2ForCausalLM"], "rope_scaling": None}
        patch.setitem(make_checkpoint.SHAPES, "q", qwen)
        make_checkpoint.write("q", tmp_path)
    with pytest.raises(ValueError, match="only LlamaForCausalLM"):
        to_gguf.convert(tmp_path, tmp_path / "q.gguf")
    with pytest.raises(ValueError, match="only llama3"):
        to_gguf.rope_divisors({**TINY, "rope_scaling": {"rope_type": "yarn"}}, 64)
