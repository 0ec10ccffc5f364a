"""The bundled demo model is what its card says: files agree with each other, and with the corpus.

It reads the files as they are, with the standard library, NumPy, tokenizers and Jinja; it needs
neither torch nor the engine. `tests/demo/demo_logits.npz` holds what torch computed from the same
weights; a forward pass in NumPy, written out below, must give the same.
"""

from __future__ import annotations

import importlib
import itertools
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import jinja2.sandbox
import numpy as np
import pytest
from tokenizers import Tokenizer

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "pace_nb" / "demo"
RECIPE = ROOT / "notebooks" / "demo_model"
BOS = {"bos_token": "<|bos|>"}


@pytest.fixture(scope="module")
def recipe() -> Any:
    """Imports a module of notebooks/demo_model by name, and leaves sys.path as it was."""

    def load(name: str) -> ModuleType:
        sys.path.insert(0, str(RECIPE))
        try:
            return importlib.import_module(name)
        finally:
            sys.path.remove(str(RECIPE))

    return load


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    return json.loads((DEMO / "config.json").read_text())


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(DEMO / "tokenizer.json"))


@pytest.fixture(scope="module")
def weights() -> dict[str, np.ndarray]:
    """name -> float32 array. BF16 is the upper half of a float32."""
    raw = (DEMO / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        assert entry["dtype"] == "BF16", name
        begin, end = (8 + length + offset for offset in entry["data_offsets"])
        words = np.frombuffer(raw[begin:end], "<u2").astype(np.uint32) << 16
        tensors[name] = words.view(np.float32).reshape(entry["shape"])
    return tensors


def test_is_small() -> None:
    assert (DEMO / "model.safetensors").stat().st_size <= 6_000_000
    everything = sum(path.stat().st_size for path in DEMO.iterdir())
    assert everything <= 6_500_000


def test_tensors_are_those_the_config_asks_for(
    config: dict[str, Any], weights: dict[str, np.ndarray]
) -> None:
    width, inner, dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    expected = {
        "model.embed_tokens.weight": (config["vocab_size"], width),
        "model.norm.weight": (width,),
    }
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        expected |= {
            f"{layer}.self_attn.q_proj.weight": (heads * dim, width),
            f"{layer}.self_attn.k_proj.weight": (kv_heads * dim, width),
            f"{layer}.self_attn.v_proj.weight": (kv_heads * dim, width),
            f"{layer}.self_attn.o_proj.weight": (width, heads * dim),
            f"{layer}.mlp.gate_proj.weight": (inner, width),
            f"{layer}.mlp.up_proj.weight": (inner, width),
            f"{layer}.mlp.down_proj.weight": (width, inner),
            f"{layer}.input_layernorm.weight": (width,),
            f"{layer}.post_attention_layernorm.weight": (width,),
        }
    assert {name: tensor.shape for name, tensor in weights.items()} == expected
    assert config["tie_word_embeddings"]  # hence no lm_head.weight
    assert all(np.isfinite(tensor).all() for tensor in weights.values())
    assert 2e6 <= sum(tensor.size for tensor in weights.values()) <= 5e6


def test_tokenizer_fits_the_config(config: dict[str, Any], tokenizer: Tokenizer) -> None:
    assert tokenizer.get_vocab_size() == config["vocab_size"]
    settings = json.loads((DEMO / "tokenizer_config.json").read_text())
    generation = json.loads((DEMO / "generation_config.json").read_text())
    assert tokenizer.token_to_id(settings["bos_token"]) == config["bos_token_id"] == 0
    eos = [tokenizer.token_to_id(token) for token in ("<|eos|>", "<|end|>")]
    assert config["eos_token_id"] == generation["eos_token_id"] == eos
    assert settings["eos_token"] == tokenizer.id_to_token(eos[0])
    assert settings["model_max_length"] == config["max_position_embeddings"]
    for index, entry in settings["added_tokens_decoder"].items():
        assert tokenizer.token_to_id(entry["content"]) == int(index)
        assert entry["special"]


@pytest.mark.parametrize(
    "text", ["Once upon a time", "12 + 7 = 19", "naïve café, 東京 🦊", "  spaces\n\tand tabs ", ""]
)
def test_any_text_survives_the_tokenizer(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text).ids
    assert ids[0] == 0  # <|bos|> comes by itself
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_digits_are_tokens(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("1207", add_special_tokens=False).tokens == ["1", "2", "0", "7"]


def chat_template() -> jinja2.Template:
    settings = json.loads((DEMO / "tokenizer_config.json").read_text())
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment.globals["raise_exception"] = raise_exception
    return environment.from_string(settings["chat_template"])


def test_chat_template_renders_what_was_trained_on(recipe: Any) -> None:
    """Every chat among 200 documents: Jinja and the training code give the same text."""
    render, template = recipe("chat_format").render, chat_template()
    chats = [
        document
        for document in itertools.islice(recipe("corpus").documents(7), 200)
        if not isinstance(document, str)
    ]
    assert any(len(chat) > 4 for chat in chats)
    assert any(chat[0]["role"] == "system" for chat in chats)
    for chat in chats:
        assert template.render(messages=chat, **BOS) == render(chat)


def test_chat_template_opens_the_answer_and_refuses_other_roles() -> None:
    template = chat_template()
    question = [{"role": "user", "content": " Hello! "}]
    rendered = template.render(messages=question, **BOS, add_generation_prompt=True)
    assert rendered == "<|bos|><|user|>Hello!<|end|><|assistant|>"
    with pytest.raises(jinja2.TemplateError, match="tool"):
        template.render(messages=[{"role": "tool", "content": ""}], **BOS)


def test_corpus_is_the_same_for_the_same_seed(recipe: Any) -> None:
    documents = recipe("corpus").documents
    first, again, other = (list(itertools.islice(documents(s), 300)) for s in (3, 3, 4))
    assert first == again
    assert first != other


def test_stories_have_no_fault(recipe: Any) -> None:
    """The critic that measures the model finds nothing to say against the grammar itself ..."""
    stories, random = recipe("stories"), importlib.import_module("random")
    rng = random.Random(0)
    for _ in range(1000):
        text = stories.story(rng)
        assert "{" not in text
        assert stories.story_faults(text) == [], text


@pytest.mark.parametrize(
    ("story", "fault"),
    [
        ("Once there was a fox named Tom. Tom met Mia. Ben met Tom.", "more than two characters"),
        ("Once there was a fox named Tom. She ran. Tom was glad.", "nobody in the story is a she"),
        ("Tom had a red kite. He lost the blue kite. Tom was sad.", "the kite changes colour"),
        ("Tom had a red kite. Then Tom had a red ball.", "more than one thing"),
        ("Tom ran. Tom ran.", "a sentence is repeated"),
        ("Tom ran. It was the best day of all. The end.", "the hero is never named again"),
    ],
)
def test_the_critic_sees_faults(recipe: Any, story: str, fault: str) -> None:
    """... and is not blind."""
    assert any(found.startswith(fault) for found in recipe("stories").story_faults(story))


def test_no_document_contains_a_held_out_question(recipe: Any) -> None:
    held_out = recipe("questions").held_out
    ask, random = recipe("questions").ask, importlib.import_module("random")
    rng = random.Random(5)
    for kind in ("arithmetic", "reading", "facts"):
        assert all(recipe("questions").is_held_out(ask(rng, kind, test=True)) for _ in range(20))
        assert not any(held_out(ask(rng, kind).question) for _ in range(500))


@pytest.mark.parametrize(
    ("question", "answer"),
    [("What is 13 minus 6?", "7"), ("What is 4 times 6?", "24"), ("What is 9 + 20?", "29")],
)
def test_sums_are_right(recipe: Any, question: str, answer: str) -> None:
    """The corpus itself must not teach wrong sums: this very question is drawn until it comes."""
    questions, random = recipe("questions"), importlib.import_module("random")
    rng = random.Random(0)
    turns = (questions.arithmetic(rng) for _ in range(100_000))
    turn = next(turn for turn in turns if turn.question == question)
    assert turn.answers[0].rstrip(".").split()[-1] == answer


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def forward(ids: np.ndarray, w: dict[str, np.ndarray], config: dict[str, Any]) -> np.ndarray:
    """ids[T] -> logits f64[T, V]: a Llama in the order of its formulas, for this test alone."""
    T, D = len(ids), config["head_dim"]
    eps, group = (
        config["rms_norm_eps"],
        config["num_attention_heads"] // config["num_key_value_heads"],
    )
    frequency = config["rope_theta"] ** (-np.arange(D // 2) / (D // 2))
    angle = np.outer(np.arange(T), frequency)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    future = np.triu(np.full((T, T), -np.inf), 1)

    def rotate(x: np.ndarray) -> np.ndarray:  # x[T, heads, D]
        low, high = np.split(x, 2, axis=-1)
        return np.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)

    x = w["model.embed_tokens.weight"][ids].astype(np.float64)
    for i in range(config["num_hidden_layers"]):
        layer = {
            name.split(f"layers.{i}.")[1]: t for name, t in w.items() if f"layers.{i}." in name
        }
        h = rms_norm(x, layer["input_layernorm.weight"], eps)
        q, k, v = (
            (h @ layer[f"self_attn.{part}_proj.weight"].T).reshape(T, -1, D) for part in "qkv"
        )
        q, k = rotate(q), np.repeat(rotate(k), group, axis=1)
        scores = np.einsum("thd,shd->hts", q, k) / np.sqrt(D) + future
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        shares /= shares.sum(-1, keepdims=True)
        mixed = np.einsum("hts,shd->thd", shares, np.repeat(v, group, axis=1)).reshape(T, -1)
        x = x + mixed @ layer["self_attn.o_proj.weight"].T
        h = rms_norm(x, layer["post_attention_layernorm.weight"], eps)
        gate, up = h @ layer["mlp.gate_proj.weight"].T, h @ layer["mlp.up_proj.weight"].T
        x = x + (gate / (1 + np.exp(-gate)) * up) @ layer["mlp.down_proj.weight"].T
    x = rms_norm(x, w["model.norm.weight"], eps)
    return x @ w["model.embed_tokens.weight"].T


def test_weights_give_the_logits_torch_computed(
    config: dict[str, Any], weights: dict[str, np.ndarray]
) -> None:
    golden = np.load(Path(__file__).parent / "demo_logits.npz", allow_pickle=False)
    prompt, greedy = golden["prompt_ids"], golden["greedy_ids"]
    logits = forward(np.concatenate([prompt, greedy]), weights, config)
    last = len(prompt) - 1
    np.testing.assert_allclose(logits[last - 3 : last + 1], golden["logits"], atol=1e-3)
    chosen = logits[last:-1].argmax(-1)
    np.testing.assert_array_equal(chosen, greedy)
    best = np.sort(logits[last:-1], axis=-1)
    np.testing.assert_allclose(best[:, -1] - best[:, -2], golden["margins"], atol=1e-3)
