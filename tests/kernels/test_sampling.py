"""sampling.py: the tokens of its references, the distribution of real numbers, bad rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pace_nb.kernels import jit, sampling
from pace_nb.kernels.logit_edits import Edits
from pace_nb.kernels.sampling import (
    NEUTRAL,
    distribution,
    distribution_ref,
    greedy,
    greedy_ref,
    sample,
    sample_ref,
    sample_residual,
    sample_residual_ref,
    uniform_bits,
    uniform_bits_ref,
)

Array = NDArray[Any]
SIZES = [1, 2, 15, 16, 17, 781, 1024, 1500] + ([] if jit.INTERPRETED else [32_003])
FILTERS: list[dict[str, float]] = [
    {},
    {"TEMPERATURE": 0.0},
    {"TEMPERATURE": 0.3},
    {"TOP_P": 0.5},
    {"TOP_P": 0.999},
    {"TOP_P": 1e-9},
    {"TOP_P": 0.9, "TEMPERATURE": 7.0},
    {"TOP_K": 1},
    {"TOP_K": 20},
    {"TOP_K": 1200},
    {"LOG_MIN_P": float(np.log(0.05))},
    {"TOP_K": 30, "TOP_P": 0.8, "LOG_MIN_P": -6.0, "TEMPERATURE": 1.7},
    {"TOP_P": 0.7, "LOG_MIN_P": -3.0},
]


def logits(rows: int, v: int, step: float = 0.0) -> Array:
    x = np.random.default_rng(v).normal(0, 3, (rows, v)).astype(np.float32)
    return (np.round(x / step) * step).astype(np.float32) if step else x


def settings(rows: int, **columns: float) -> Array:
    table = np.tile(np.array(NEUTRAL), (rows, 1))
    for name, value in columns.items():
        table[:, getattr(sampling, name)] = value
    return table


def arguments(rows: int, **columns: float) -> tuple[Array, ...]:
    """settings, seeds, slots, positions."""
    seeds = np.arange(1, rows + 1).astype(np.uint64) * np.uint64(2**60 + 3)
    return settings(rows, **columns), seeds, np.arange(rows), np.arange(rows) * 5


def some_edits(rows: int, v: int) -> Edits:
    """A mask for every other row, biases and bans, and seen tokens, more from row to row."""
    rng = np.random.default_rng(rows + v)
    masks = rng.integers(-(2**31), 2**31, (2, -(-v // 32))).astype(np.int32)
    masks[0, 0] |= 1
    masks[1] = -1
    mask_rows = np.array([(0, -1, 1)[r % 3] for r in range(rows)])
    adds = [rng.choice(v, min(r, v), replace=False) for r in range(rows)]
    seen = [rng.choice(v, min(3 * r, v), replace=False) for r in range(rows)]
    values = rng.normal(0, 5, sum(map(len, adds))).astype(np.float32)
    values[::4] = -np.inf
    return Edits(
        masks,
        mask_rows,
        np.concatenate(([0], np.cumsum([len(a) for a in adds]))),
        np.concatenate(adds).astype(np.int64),
        values,
        np.concatenate(([0], np.cumsum([len(s) for s in seen]))),
        np.concatenate(seen).astype(np.int64),
        rng.integers(0, 4, sum(map(len, seen))),
    )


def assert_same(found: Any, expected: Any) -> None:
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)


# ---- greedy --------------------------------------------------------------------------------------
@pytest.mark.parametrize("v", SIZES)
@pytest.mark.parametrize("step", [0.0, 1.0])
def test_greedy_is_the_first_of_the_largest(v: int, step: float) -> None:
    x = logits(5, v, step)
    tokens, largest = greedy(x)
    np.testing.assert_array_equal(tokens, x.argmax(1))
    np.testing.assert_array_equal(largest, x.max(1))
    assert_same((tokens, largest), greedy_ref(x))


# ---- against the references ----------------------------------------------------------------------
@pytest.mark.parametrize("columns", FILTERS, ids=str)
@pytest.mark.parametrize("v", SIZES)
def test_tokens_and_distributions_are_those_of_the_references(
    v: int, columns: dict[str, float]
) -> None:
    for step in (0.0, 1.0):
        x = logits(4, v, step)
        given = arguments(4, **columns)
        assert_same(sample(x, *given), sample_ref(x, *given, Edits.none(4)))
        table, _, slots, _ = given
        np.testing.assert_array_equal(
            distribution(x, table, slots), distribution_ref(x, table, slots, Edits.none(4))
        )


@pytest.mark.parametrize("columns", [{}, {"TEMPERATURE": 0.0}, {"TOP_P": 0.8}, {"TOP_K": 5}])
@pytest.mark.parametrize("v", [1, 17, 70, 1500])
def test_edits_are_those_of_the_reference(v: int, columns: dict[str, float]) -> None:
    x, edits = logits(7, v), some_edits(7, v)
    before = x.copy()
    columns = {"REPETITION": 1.3, "FREQUENCY": 0.4, "PRESENCE": -0.6, **columns}
    given = arguments(7, **columns)
    assert_same(sample(x, *given, edits), sample_ref(x, *given, edits))
    table, _, slots, _ = given
    np.testing.assert_array_equal(
        distribution(x, table, slots, edits), distribution_ref(x, table, slots, edits)
    )
    np.testing.assert_array_equal(x, before)


def kept_by_definition(row: Array, table: Array) -> Array:
    """p float64[V], sorting and adding in real numbers."""
    l64 = row.astype(np.float64)
    p = np.exp((l64 - l64.max()) / table[sampling.TEMPERATURE])
    keep = p >= np.exp(table[sampling.LOG_MIN_P])
    order = np.argsort(-row, kind="stable")
    k = int(table[sampling.TOP_K])
    if k:
        keep &= row >= row[order[min(k, len(row)) - 1]]
    p[~keep] = 0
    if table[sampling.TOP_P] < 1:
        before = np.cumsum(p[order]) - p[order]
        p[order[before >= table[sampling.TOP_P] * p.sum()]] = 0
    return p / p.sum()


@pytest.mark.parametrize("columns", [f for f in FILTERS if f.get("TEMPERATURE") != 0.0], ids=str)
def test_the_distribution_is_that_of_real_numbers(columns: dict[str, float]) -> None:
    x, table = logits(3, 781), settings(3, **columns)
    p = distribution(x, table, np.arange(3))
    exact = np.stack([kept_by_definition(row, table[0]) for row in x])
    np.testing.assert_allclose(p, exact, rtol=2.0**-20, atol=2.0**-38)
    np.testing.assert_allclose(p.sum(1), 1, rtol=1e-5)


@pytest.mark.parametrize("columns", FILTERS[2:7] + FILTERS[-2:], ids=str)
def test_tokens_come_as_often_as_their_probability_says(columns: dict[str, float]) -> None:
    """Chi-square over 3000 seeds, with a bound that chance passes less than once in 10^6."""
    num, v = 3000, 40
    row = logits(1, v)
    tokens = sample(np.repeat(row, num, axis=0), *arguments(num, **columns)).tokens
    p = kept_by_definition(row[0], settings(1, **columns)[0])
    observed = np.bincount(tokens, minlength=v)
    assert observed[p == 0].sum() == 0
    likely = num * p >= 5
    expected = np.append(num * p[likely], max(num * p[~likely].sum(), 1e-9))
    counted = np.append(observed[likely], observed[~likely].sum())
    assert counted[-1] == 0 or expected[-1] > 1e-3
    freedom = max(len(expected) - 1, 1)
    chi = ((counted - expected) ** 2 / np.maximum(expected, 1)).sum()
    assert chi < freedom + 8 * (2 * freedom) ** 0.5 + 15


def test_ties_at_the_end_of_top_p_and_top_k() -> None:
    """top_k keeps all that tie with its last, top_p as many as it needs, the lowest ids first."""
    x = np.float32([[0, 3, 1, 3, 1, 1, 1]])
    slots = np.array([0])
    p = distribution(x, settings(1, TOP_K=3), slots)[0]
    assert (p > 0).tolist() == [False, True, True, True, True, True, True]
    p = distribution(x, settings(1, TOP_P=0.35), slots)[0]
    assert (p > 0).tolist() == [False, True] + [False] * 5
    weights = np.exp(x[0].astype(float))
    needed = (2 * weights[1] + 1.5 * weights[2]) / weights.sum()
    p = distribution(x, settings(1, TOP_P=needed), slots)[0]
    assert (p > 0).tolist() == [False, True, True, True, True, False, False]


# ---- random numbers ------------------------------------------------------------------------------
def test_random_words_are_those_of_the_reference() -> None:
    seeds = np.array([0, 5, 2**64 - 1, 2**63 + 12345], np.uint64)
    positions = np.array([0, 1, 1000, 2**40])
    for stream in (0, 1, 7):
        found = uniform_bits(seeds, positions, stream)
        np.testing.assert_array_equal(found, uniform_bits_ref(seeds, positions, stream))
    assert len(set(uniform_bits(seeds, positions, 1)) & set(uniform_bits(seeds, positions))) == 0


# ---- residual ------------------------------------------------------------------------------------
def test_residual_is_what_the_reference_draws() -> None:
    rng = np.random.default_rng(0)
    for v in (1, 16, 17, 300):
        p, q = rng.dirichlet(np.ones(v), (2, 6)).astype(np.float32)
        q[3] = p[3]
        p[4] = 0
        random = uniform_bits(np.arange(6).astype(np.uint64), np.arange(6))
        tokens = sample_residual(p, q, random)
        np.testing.assert_array_equal(tokens, sample_residual_ref(p, q, random))
        assert tokens[4] == -1 and (tokens[[0, 1, 2, 3, 5]] >= 0).all()


def test_drafts_that_are_accepted_or_replaced_follow_p() -> None:
    """Accept x of q with min(1, p / q), else draw from the residual: together that is p."""
    num, p, q = 4000, np.float32([[0.5, 0.2, 0.3, 0.0]]), np.float32([[0.1, 0.6, 0.2, 0.1]])
    seeds, zeros = np.arange(num).astype(np.uint64), np.zeros(num, np.int64)
    u = [(uniform_bits(seeds, zeros, stream) >> np.uint64(11)) / 2.0**53 for stream in (1, 2)]
    drafts = np.searchsorted(np.cumsum(q[0]), u[0]).clip(0, 3)
    accepted = u[1] < np.minimum(1, p[0, drafts] / q[0, drafts])
    rows = np.repeat(p, num, 0), np.repeat(q, num, 0)
    replaced = sample_residual(*rows, uniform_bits(seeds, zeros, 3))
    tokens = np.where(accepted, drafts, replaced)
    observed = np.bincount(tokens, minlength=4)
    assert observed[3] == 0
    assert ((observed - num * p[0]) ** 2 / np.maximum(num * p[0], 1)).sum() < 33.4


# ---- bad rows, other rows, threads ---------------------------------------------------------------
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("columns", [{"TEMPERATURE": 0.0}, {}, {"TOP_P": 0.9}, {"TOP_K": 3}])
def test_a_bad_row_has_no_token_and_touches_no_other(bad: float, columns: Any) -> None:
    x, given = logits(3, 100), arguments(3, **columns)
    before = sample(x, *given)
    x[1] = bad if bad == -np.inf else x[1]
    x[1, 77] = bad
    found = sample(x, *given)
    assert found.tokens[1] == -1 and greedy(x)[0][1] == -1
    assert np.array_equal(found.largest[1], np.float32(bad), equal_nan=True)
    for a, b in zip(found, before, strict=True):
        np.testing.assert_array_equal(a[[0, 2]], b[[0, 2]])
    p = distribution(x, given[0], given[2])
    assert np.isnan(p[1]).all() and np.isfinite(p[[0, 2]]).all()


def test_where_everything_is_ruled_out_or_overflows_there_is_no_token() -> None:
    x, given = np.float32([[1, 2], [1, 2], [1, 3e38]]), arguments(3, REPETITION=0.01)
    nothing = Edits.none(3)._replace(
        masks=np.zeros((1, 1), np.int32),
        mask_rows=np.array([0, -1, -1]),
        seen_starts=np.array([0, 0, 0, 1]),
        seen_ids=np.array([1]),
        seen_counts=np.array([0]),
    )
    for found in (sample(x, *given, nothing), sample_ref(x, *given, nothing)):
        assert found.tokens[0] == -1 and found.tokens[1] >= 0 and found.tokens[2] == -1
        assert found.left[[0, 2]].tolist() == [-np.inf, np.inf]


@pytest.mark.parametrize("temperature", [1e-5, 1e-3, 1e6])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e38])
def test_extreme_numbers_give_a_token_that_can_be(scale: float, temperature: float) -> None:
    row = np.float32([-1, 0.5, 1, -np.inf, 0.25] * 4) * np.float32(scale)
    for columns in ({}, {"TOP_P": 0.999}, {"TOP_K": 3}, {"LOG_MIN_P": -1.0}):
        given = arguments(30, TEMPERATURE=temperature, **columns)
        x = np.repeat(row[None], 30, 0)
        found = sample(x, *given)
        assert_same(found, sample_ref(x, *given, Edits.none(30)))
        assert np.isfinite(row[found.tokens]).all()


def test_a_row_depends_on_itself_only() -> None:
    rows, v = 9, 1100
    x, edits = logits(rows, v), some_edits(rows, v)
    table, seeds, slots, positions = arguments(rows, REPETITION=1.2, FREQUENCY=0.1)
    for r, columns in enumerate(FILTERS[:rows]):
        for name, value in columns.items():
            table[r, getattr(sampling, name)] = value
    together = sample(x, table, seeds, slots, positions, edits)
    wide = np.full((rows, v + 9), np.nan, np.float32)
    wide[:, 5 : v + 5] = x
    for same in (wide[:, 5 : v + 5], np.asfortranarray(x), x[::-1].copy()[::-1]):
        assert_same(sample(same, table, seeds, slots, positions, edits), together)
    fixed = x.copy()
    fixed.flags.writeable = False
    assert_same(sample(fixed, table, seeds, slots, positions, edits), together)
    np.testing.assert_array_equal(greedy(fixed)[0], x.argmax(1))
    threads = jit.num_threads()
    try:
        jit.set_num_threads(1)
        assert_same(sample(x, table, seeds, slots, positions, edits), together)
    finally:
        jit.set_num_threads(threads)
    for r in range(rows):
        a, s = edits.add_starts[r : r + 2], edits.seen_starts[r : r + 2]
        own = Edits(
            edits.masks,
            edits.mask_rows[r : r + 1],
            a - a[0],
            edits.add_ids[a[0] : a[1]],
            edits.add_values[a[0] : a[1]],
            s - s[0],
            edits.seen_ids[s[0] : s[1]],
            edits.seen_counts[s[0] : s[1]],
        )
        alone = sample(x[r : r + 1], table, seeds, slots[r : r + 1], positions[r : r + 1], own)
        assert_same(alone, [a[r : r + 1] for a in together])


def test_slots_say_which_row_of_the_settings_is_meant() -> None:
    x = logits(3, 50)
    table, seeds, _, positions = arguments(3, TOP_P=0.9)
    table[1, sampling.TEMPERATURE] = 0
    slots = np.array([2, 1, 1])
    found = sample(x, table, seeds, slots, positions)
    expected = sample(x, table[slots], seeds[slots], np.arange(3), positions)
    assert_same(found, expected)


def test_reference_mode_and_no_rows() -> None:
    x, given = logits(3, 40), arguments(3, TOP_P=0.9)
    with jit.using("reference"):
        assert_same(sample(x, *given), sample_ref(x, *given, Edits.none(3)))
        assert_same(greedy(x), greedy_ref(x))
    none = arguments(0)
    assert sample(x[:0], *none).tokens.shape == (0,)
    assert greedy(x[:0])[0].shape == (0,)


# ---- bad input -----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": np.zeros((2, 4))}, "logits has dtype float64, expected float32"),
        ({"logits": np.zeros((2, 0), np.float32)}, r"logits has shape \(2, 0\), expected V of 1"),
        ({"settings": np.zeros((2, 6))}, r"settings has shape \(2, 6\), expected \(S, 7\)"),
        ({"settings": settings(2, TOP_P=0.0)}, "settings of row 0 are"),
        ({"settings": settings(2, TEMPERATURE=np.nan)}, "settings of row 0 are"),
        ({"settings": settings(2, TEMPERATURE=np.inf)}, "settings of row 0 are"),
        ({"settings": settings(2, FREQUENCY=np.inf)}, "settings of row 0 are"),
        ({"slots": np.array([0, 2])}, "slots holds 2, expected 0 to 1"),
        ({"slots": np.zeros(3, np.int64)}, r"slots has shape \(3,\), expected \(2\)"),
        ({"seeds": np.zeros(2, np.int64)}, "seeds has dtype int64, expected uint64"),
        ({"positions": np.zeros(1, np.int64)}, r"positions has shape \(1,\), expected \(2\)"),
        ({"edits": Edits.none(3)}, r"edits.mask_rows has shape \(3,\), expected \(2\)"),
    ],
)
def test_bad_input_names_the_argument(change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {
        "logits": np.zeros((2, 4), np.float32),
        "settings": settings(2),
        "seeds": np.zeros(2, np.uint64),
        "slots": np.arange(2),
        "positions": np.arange(2),
    }
    with pytest.raises((TypeError, ValueError), match=message):
        sample(**given | change)


def test_residual_refuses_what_does_not_fit() -> None:
    p = np.ones((2, 3), np.float32)
    with pytest.raises(ValueError, match=r"sample_residual: q has shape \(2, 2\)"):
        sample_residual(p, p[:, :2], np.zeros(2, np.uint64))
    with pytest.raises(TypeError, match="random has dtype int64, expected uint64"):
        sample_residual(p, p, np.zeros(2, np.int64))
    with pytest.raises(ValueError, match=r"uniform_bits: positions has shape \(2,\)"):
        uniform_bits(np.zeros(3, np.uint64), np.zeros(2, np.int64))
