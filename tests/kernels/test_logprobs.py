"""logprobs.py: bit for bit its reference, within its bound of float64, in order, in any batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pace_nb.kernels import jit
from pace_nb.kernels.logprobs import Logprobs, token_logprobs, token_logprobs_ref

Array = NDArray[Any]
SIZES = [1, 15, 16, 17, 781, 1024, 1500] + ([] if jit.INTERPRETED else [32_003])


def logits(rows: int, v: int, step: float = 0.0, scale: float = 3.0) -> Array:
    x = np.random.default_rng(v).normal(0, scale, (rows, v)).astype(np.float32)
    return (np.round(x / step) * step).astype(np.float32) if step else x


def assert_same(found: Logprobs, expected: Logprobs) -> None:
    for name, a, b in zip(Logprobs._fields, found, expected, strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name)


@pytest.mark.parametrize("v", SIZES)
@pytest.mark.parametrize("step", [0.0, 0.5])
def test_matches_reference(v: int, step: float) -> None:
    x = logits(3, v, step)
    tokens = np.random.default_rng(0).integers(-1, v, 3)
    for n in (0, 1, 20, 200):
        assert_same(token_logprobs(x, tokens, n), token_logprobs_ref(x, tokens, n))


@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0])
def test_is_within_its_bound_of_log_softmax(scale: float) -> None:
    x = logits(4, 1500, scale=scale)
    tokens = np.array([0, 3, 700, 1499])
    found = token_logprobs(x, tokens, 7)
    exact = x.astype(np.float64) - x.max(1, keepdims=True)
    exact -= np.log(np.exp(exact).sum(1, keepdims=True))
    order = np.argsort(-x, axis=1, kind="stable")
    np.testing.assert_array_equal(found.top_ids, order[:, :7])
    np.testing.assert_array_equal(found.ranks, 1 + np.argmax(order == tokens[:, None], axis=1))
    for y, ref in (
        (found.own, exact[np.arange(4), tokens]),
        (found.top, np.take_along_axis(exact, order[:, :7], 1)),
    ):
        assert np.all(np.abs(y - ref) <= 2.0**-21 + 2.0**-23 * np.abs(ref))


def test_fewer_tokens_than_asked_for() -> None:
    found = token_logprobs(np.float32([[1, 2]]), np.array([0]), 4)
    assert found.top_ids.tolist() == [[1, 0, -1, -1]]
    assert found.top[0, 2:].tolist() == [-np.inf, -np.inf]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_bad_row_is_told_and_touches_no_other(bad: float) -> None:
    x = logits(3, 100)
    tokens = np.array([5, 6, 7])
    before = token_logprobs(x, tokens, 3)
    if bad == -np.inf:
        x[1] = bad
    else:
        x[1, 60] = bad
    found = token_logprobs(x, tokens, 3)
    assert np.array_equal(found.largest[1], np.float32(bad), equal_nan=True)
    for a, b in zip(found, before, strict=True):
        np.testing.assert_array_equal(a[[0, 2]], b[[0, 2]])


def test_impossible_tokens_have_minus_infinity() -> None:
    x = np.float32([[-np.inf, 0, -np.inf, -3]])
    found = token_logprobs(x, np.array([2]), 4)
    assert found.own[0] == -np.inf and found.ranks[0] == 4
    assert found.top_ids[0].tolist() == [1, 3, 0, 2]


def test_a_row_depends_on_itself_only() -> None:
    x, tokens = logits(9, 1100), np.arange(9) * 100
    threads = jit.num_threads()
    together = token_logprobs(x, tokens, 5)
    wide = np.full((9, 1200), np.nan, np.float32)
    wide[:, 50:1150] = x
    assert_same(token_logprobs(wide[:, 50:1150], tokens, 5), together)
    assert_same(token_logprobs(np.asfortranarray(x), tokens, 5), together)
    try:
        jit.set_num_threads(1)
        assert_same(token_logprobs(x, tokens, 5), together)
    finally:
        jit.set_num_threads(threads)
    for r in range(9):
        alone = token_logprobs(x[r : r + 1], tokens[r : r + 1], 5)
        assert_same(alone, Logprobs(*(a[r : r + 1] for a in together)))


def test_reference_mode_and_no_rows() -> None:
    x, tokens = logits(2, 40), np.array([1, 2])
    with jit.using("reference"):
        assert_same(token_logprobs(x, tokens, 3), token_logprobs(x, tokens, 3))
    assert token_logprobs(x[:0], tokens[:0], 3).top.shape == (0, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": np.zeros((2, 4))}, "logits has dtype float64, expected float32"),
        ({"logits": np.zeros((2, 0), np.float32)}, r"logits has shape \(2, 0\), expected V of 1"),
        ({"tokens": np.zeros(3, np.int64)}, r"tokens has shape \(3,\), expected \(2\)"),
        ({"tokens": np.array([0, 4])}, "tokens holds values outside -1 to 3"),
        ({"tokens": np.array([-2, 0])}, "tokens holds values outside -1 to 3"),
        ({"n": -1}, "n is -1, expected 0 to 1024"),
    ],
)
def test_bad_input_names_the_argument(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "logits": np.zeros((2, 4), np.float32),
        "tokens": np.zeros(2, np.int64),
        "n": 1,
    }
    with pytest.raises((TypeError, ValueError), match=f"token_logprobs: {message}"):
        token_logprobs(**(arguments | change))
