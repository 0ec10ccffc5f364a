"""The arithmetic of `--stats`."""

from __future__ import annotations

import pytest

from pace_nb import LLM
from pace_nb.cli.stats import (
    Stopwatch,
    Tensor,
    model_weight_bytes,
    report,
    weight_bytes_per_token,
)
from pace_nb.models.hub import DEMO_MODEL
from pace_nb.models.loader import Checkpoint


def watch(num_tokens=5, num_compiled=0):
    return Stopwatch(10.0, 10.5, 12.5, 7, num_tokens, num_compiled)


def test_the_decode_rate_counts_the_tokens_after_the_first():
    assert watch().time_to_first_token == pytest.approx(0.5)
    assert watch().decode_rate == pytest.approx(4 / 2.0)


def test_a_rate_needs_two_tokens():
    assert watch(num_tokens=1).decode_rate is None
    assert Stopwatch().decode_rate is None
    assert Stopwatch().time_to_first_token is None


def test_tokens_sets_the_first_time_once(monkeypatch):
    times = iter([3.0, 4.0])
    monkeypatch.setattr("time.monotonic", lambda: next(times))
    stopwatch = Stopwatch(started=1.0)
    stopwatch.tokens(1)
    stopwatch.tokens(0)
    stopwatch.tokens(2)
    assert (stopwatch.first, stopwatch.last, stopwatch.num_tokens) == (3.0, 4.0, 3)


LAYER = [Tensor("layers.0.q_proj.weight", (8, 4), 2), Tensor("layers.0.norm.weight", (4,), 4)]
LAYER_BYTES = 2 * 8 * 4 + 4 * 4
EMBEDDING = Tensor("model.embed_tokens.weight", (100, 4), 2)


def test_weight_bytes_of_a_tied_head_count_the_embedding_once():
    assert weight_bytes_per_token([EMBEDDING, *LAYER]) == 2 * 100 * 4 + LAYER_BYTES


def test_weight_bytes_of_an_untied_head_count_one_row_of_the_embedding():
    tensors = [EMBEDDING, *LAYER, Tensor("lm_head.weight", (100, 4), 2)]
    assert weight_bytes_per_token(tensors) == 2 * 4 + 2 * 100 * 4 + LAYER_BYTES


def test_weight_bytes_of_experts_count_those_that_are_used():
    experts = Tensor("layers.0.mlp.experts.down_proj", (32, 8, 4), 2)
    assert weight_bytes_per_token([*LAYER, experts], 4 / 32) == 4 * 2 * 8 * 4 + LAYER_BYTES


def test_weight_bytes_of_the_bundled_model_are_those_of_its_file():
    """It is tied and BF16, so all but the f32 norms is read as it is stored."""
    with LLM(kernels="reference") as llm, Checkpoint.open(DEMO_MODEL) as checkpoint:
        norms = sum(checkpoint.shape(n)[0] for n in checkpoint.names() if "norm" in n)
        assert model_weight_bytes(llm) == checkpoint.nbytes + 2 * norms


def show(stopwatch, read_rate=8e6):
    return report(stopwatch, 1_000_000, read_rate)


def test_the_share_is_the_rate_over_the_limit():
    text = show(watch())  # 2 tokens/s of 8 MB/s over 1 MB
    assert "prompt    7 tokens" in text
    assert "500.0 ms to the first token" in text
    assert "2.0 tokens/s over 5 tokens" in text
    assert "25% of 8.0 tokens/s" in text
    assert "1.0 MB" in text


def test_compilation_in_the_first_token_is_named():
    assert "3 kernels compiled" in show(watch(num_compiled=3))
    assert "compiled" not in show(watch())


def test_nothing_is_made_up_where_nothing_was_measured():
    assert "roofline  not measured" in show(watch(), read_rate=None)
    assert "too few for a rate" in show(watch(num_tokens=1))
    assert "no token was generated" in show(Stopwatch())


def test_where_nothing_was_guessed_there_are_no_rates():
    from pace_nb.cli.stats import speculation
    from pace_nb.engine.speculative import SpeculativeStats

    told = SpeculativeStats(5)
    assert speculation(told) == "guesses   none were made\n"
    told.num_steps_off = 4
    assert speculation(told) == "guesses   none were made; off for 4 steps\n"


def test_what_guesses_were_worth():
    from pace_nb.cli.stats import speculation
    from pace_nb.engine.speculative import SpeculativeStats

    told = SpeculativeStats(2)
    told.observe(2, 2)
    told.observe(2, 1)
    told.num_steps_off = 3
    assert speculation(told) == (
        "guesses   mean acceptance length 2.50, 3 of 4 accepted (75%) in 2 drafts, by position "
        "1.00 0.50; off for 3 steps\n"
    )
