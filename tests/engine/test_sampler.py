"""Each step of sampling against its definition, and what must hold of every row."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pace_nb.engine.logit_changes import packed
from pace_nb.engine.sampler import Sampled, Sampler
from pace_nb.errors import InvalidRequestError
from pace_nb.kernels.philox import philox_ref
from pace_nb.outputs import Logprob

# Steps of 1/8 within a small range: ties are common, sums are nearly exact.
ROWS = arrays(np.float32, st.integers(1, 40), elements=st.integers(-40, 40).map(lambda i: i / 8))


class Rows:
    """StepLogits of a given array."""

    def __init__(self, array):
        self.array = np.asarray(array, np.float32)

    def rows(self, indices):
        return self.array[indices]


def sample(requests, rows, num_tokens=None):
    """One step over requests that all catch up (or compute num_tokens each)."""
    scheduled = [
        (request, request.num_behind if num_tokens is None else num_tokens) for request in requests
    ]
    return Sampler(0).sample(scheduled, Rows(rows))


def sample_row(row, request):
    """The token of one request alone."""
    (result,) = sample([request], [row])
    assert result.error is None, result.error
    return result.token_ids[0]


def row_logprobs(row, token, n):
    """{token: entry, then the n likeliest}, from the definition."""
    row = np.asarray(row, np.float32)
    with np.errstate(over="ignore"):
        shifted = row - row.max()
    exact = shifted - np.log(np.exp(shifted.astype(np.float64)).sum())
    order = np.argsort(-row, kind="stable").tolist()
    wanted = dict.fromkeys([token, *order[:n]])
    return {i: Logprob(float(np.float32(exact[i])), order.index(i) + 1) for i in wanted}


def same_entries(found, expected):
    """The same tokens, in order, of the same ranks, with logprobs but for rounding."""
    assert list(found) == list(expected)
    for token_id, entry in found.items():
        assert entry.rank == expected[token_id].rank
        assert entry.logprob == pytest.approx(expected[token_id].logprob, abs=2e-6, rel=2e-6)


def generating(scripted, generated, prompt=(1, 2), **params):
    """A request that has generated the given tokens."""
    request = scripted.request("a", prompt, max_tokens=50, **params)
    request.token_ids += generated
    request.seed = request.params.seed or 0
    return request


# ---- greedy ------------------------------------------------------------------------------------
@settings(deadline=None)
@given(row=ROWS)
def test_greedy_takes_the_largest_and_of_ties_the_lowest_id(scripted, row):
    (result,) = sample([generating(scripted, [])], [row])
    assert result.token_ids == (row.tolist().index(row.max()),)


def test_a_temperature_too_small_to_divide_by_is_greedy(scripted):
    row = np.float32([0, 1, 1, 0.5])
    request = generating(scripted, [], temperature=9e-6)
    assert sample([request], [row])[0].token_ids == (1,)


@pytest.mark.parametrize("temperature", [1e-5, 1e-3, 1.0, 1e6])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30, 3e38])
def test_extreme_logits_and_temperatures_give_a_valid_token(scripted, temperature, scale):
    row = np.float32([-1, 0.5, 1, -np.inf, 0.25]) * np.float32(scale)
    for seed in range(20):
        request = generating(scripted, [], temperature=temperature, seed=seed, top_p=0.999)
        assert sample_row(row, request) in (0, 1, 2, 4)


# ---- drawing -----------------------------------------------------------------------------------
@pytest.mark.parametrize("params", [{}, {"top_k": 3}, {"top_p": 0.8}, {"min_p": 0.2}])
def test_tokens_are_drawn_as_often_as_their_probability_says(scripted, params):
    """Chi-square over 4000 seeds; the bound is passed by chance once in 10^6."""
    row = np.float32([0.0, 1.0, 2.0, -1.0, 1.5])
    kept = {"top_k": [1, 2, 4], "top_p": [1, 2, 4], "min_p": [1, 2, 4]}.get(
        next(iter(params), ""), range(5)
    )
    probabilities = np.exp(row[list(kept)].astype(float))
    probabilities /= probabilities.sum()
    requests = [generating(scripted, [], temperature=1.0, **params) for _ in range(4000)]
    for seed, request in enumerate(requests):
        request.seed = seed
    drawn = [token for result in sample(requests, [row] * 4000) for token in result.token_ids]
    observed = np.bincount(drawn, minlength=5)[list(kept)]
    assert observed.sum() == 4000
    expected = 4000 * probabilities
    assert ((observed - expected) ** 2 / expected).sum() < 33.4  # 4 degrees of freedom


# ---- random numbers ----------------------------------------------------------------------------
@pytest.mark.parametrize("seed", [0, 7, 2**64 - 1])
def test_the_random_number_depends_on_seed_and_output_position_only(scripted, seed):
    """All logits are 0, so of 1000 tokens the one is drawn that u * 1000 falls on."""
    row = np.zeros(1000, np.float32)
    for position in (0, 1, 2, 30):
        expected = (philox_ref(seed, position) >> 11) * 1000 >> 53
        for prompt in ([1, 2], [5] * 9):
            request = generating(
                scripted, [1] * position, prompt=prompt, seed=seed, temperature=1.0
            )
            assert sample_row(row, request) == expected


def test_seeds_drawn_by_the_engine_differ_and_repeat():
    seeds = [Sampler(3).draw_seed(arrival) for arrival in range(100)]
    assert seeds == [Sampler(3).draw_seed(arrival) for arrival in range(100)]
    assert len(set(seeds)) == 100 and all(0 <= seed < 2**64 for seed in seeds)
    assert seeds != [Sampler(-4).draw_seed(arrival) for arrival in range(100)]


# ---- bias, masks, penalties --------------------------------------------------------------------
def test_logit_bias_is_added(scripted):
    request = generating(scripted, [], logit_bias={0: 2.0, 2: -5.0})
    assert sample_row(np.float32([0, 1, 3]), request) == 0


def test_only_allowed_tokens(scripted):
    request = generating(scripted, [], allowed_token_ids=[0, 2], temperature=5.0)
    drawn = set()
    for request.seed in range(50):
        drawn.add(sample_row(np.float32([1, 9, 1, 9]), request))
    assert drawn == {0, 2}


def test_bad_words_are_not_completed(scripted):
    row = np.float32([0, 1, 2, 3])
    words = [[3], [1, 2], [0, 1, 2]]
    assert sample_row(row, generating(scripted, [], bad_words=words)) == 2
    assert sample_row(row, generating(scripted, [0], bad_words=words)) == 2
    assert sample_row(row, generating(scripted, [1], bad_words=words)) == 1
    assert sample_row(row, generating(scripted, [1, 0], bad_words=words)) == 2
    only_long = [[0, 1, 2]]
    row = np.float32([0, 1, 3, 2])
    assert sample_row(row, generating(scripted, [1], prompt=[0], bad_words=only_long)) == 2
    assert sample_row(row, generating(scripted, [0, 1], bad_words=only_long)) == 3


def test_min_tokens_masks_what_would_end_it(scripted):
    row = np.zeros(40, np.float32)
    row[[38, 5, 6]] = [3, 2, 1]
    options = {"min_tokens": 2, "stop_token_ids": [5, 1000]}
    assert sample_row(row, generating(scripted, [9], **options)) == 6
    assert sample_row(row, generating(scripted, [9, 9], **options)) == 38
    assert sample_row(row, generating(scripted, [9], ignore_eos=True, **options)) == 38


@settings(deadline=None)
@given(
    row=ROWS.filter(lambda row: len(row) >= 4),
    generated=st.lists(st.integers(0, 3), max_size=12),
    repetition=st.sampled_from([0.5, 1.0, 1.3]),
    frequency=st.sampled_from([-0.5, 0.0, 0.25]),
    presence=st.sampled_from([-1.0, 0.0, 0.75]),
)
def test_penalties(scripted, row, generated, repetition, frequency, presence):
    request = generating(
        scripted,
        generated,
        prompt=[1, 1],
        repetition_penalty=repetition,
        frequency_penalty=frequency,
        presence_penalty=presence,
    )
    expected = row.copy()
    for token in {1, *generated}:
        value = expected[token]
        penalty = np.float32(repetition)
        expected[token] = value / penalty if value > 0 else value * penalty
    for token in set(generated):
        expected[token] -= np.float32(frequency) * generated.count(token)
        expected[token] -= np.float32(presence)
    before = row.copy()
    assert sample_row(row, request) == expected.argmax()
    assert (row == before).all()


def test_penalised_tokens_are_counted_as_they_come(scripted):
    """One sampler over many steps gives what fresh ones give; sampling twice changes nothing."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(30, 12)).astype(np.float32)
    request = generating(
        scripted, [], prompt=[3, 3, 4], frequency_penalty=0.7, repetition_penalty=1.4
    )
    sampler = Sampler(0)
    for row in rows:
        scheduled = [(request, request.num_behind)]
        (result,) = sampler.sample(scheduled, Rows([row]))
        assert sampler.sample(scheduled, Rows([row])) == [result]
        assert sample_row(row, request) == result.token_ids[0]
        request.token_ids += result.token_ids
    assert len(set(request.generated_token_ids)) > 6


def test_slots_of_requests_that_have_ended_are_used_again(scripted):
    sampler = Sampler(0)
    for turn in range(50):
        requests = [
            generating(scripted, [], temperature=1.0, top_k=k, seed=turn) for k in (1, 2, 3)
        ]
        rows = np.random.default_rng(turn).normal(size=(3, 30)).astype(np.float32)
        scheduled = [(request, 2) for request in requests]
        assert sampler.sample(scheduled, Rows(rows)) == sample(requests, rows)
        for request in requests:
            sampler.forget(request)
    assert len(sampler._seeds) == 8 and not sampler._kept


# ---- token masks ---------------------------------------------------------------------------------
def test_a_token_mask_comes_before_everything_else(scripted):
    row = np.float32([5, 4, 3, 2] + [0] * 36)
    allowed = np.zeros(40, bool)
    allowed[[1, 3, 39]] = True
    words = packed(allowed, 40)
    for mask in (allowed, words, words.view(np.uint32), lambda generated: allowed):
        assert sample_row(row, generating(scripted, [], token_mask=mask)) == 1
        biased = generating(scripted, [], token_mask=mask, logit_bias={0: 90, 39: 50})
        assert sample_row(row, biased) == 39
        both = generating(scripted, [], token_mask=mask, allowed_token_ids=[0, 2, 3])
        assert sample_row(row, both) == 3
        drawn = generating(scripted, [], token_mask=mask, temperature=1.0, logprobs=1)
        (result,) = sample([drawn], [row])
        assert result.token_ids[0] in (1, 3, 39)
        assert list(result.logprobs[0])[-1] == 0  # logprobs are the model's own


def test_a_token_mask_is_asked_with_what_was_generated(scripted):
    asked = []

    def next_token(generated):
        asked.append(list(generated))
        mask = np.zeros(40, bool)
        mask[len(generated)] = True
        return mask

    request = scripted.request("a", [5, 6], max_tokens=4, token_mask=next_token)
    scripted.setup().run(request)
    assert request.generated_token_ids == [0, 1, 2, 3]
    assert asked == [[], [0], [0, 1], [0, 1, 2]]


@pytest.mark.parametrize(
    "mask, said",
    [
        (lambda generated: 1 / 0, "token_mask raised ZeroDivisionError: division by zero"),
        (
            lambda generated: np.ones(39, bool),
            r"token_mask is bool of shape \(39,\), expected bool",
        ),
        (lambda generated: np.zeros(40, bool), "no token is left to sample: token_mask"),
    ],
)
def test_a_token_mask_that_fails_fails_its_request_alone(scripted, mask, said):
    bad = generating(scripted, [], token_mask=mask)
    row = np.arange(40, dtype=np.float32)
    results = sample([generating(scripted, []), bad, generating(scripted, [])], [row] * 3)
    assert [result.token_ids for result in results] == [(39,), (), (39,)]
    assert re.match(said, results[1].error), results[1].error


def test_a_token_mask_of_the_wrong_size_is_refused(scripted):
    request = scripted.request("a", [1], token_mask=np.ones(3, np.int32))
    with pytest.raises(InvalidRequestError, match=r"token_mask is int32 of shape \(3,\), expected"):
        scripted.setup().engine.add(request)
    with pytest.raises(InvalidRequestError, match="token_mask is 3, expected a NumPy array"):
        scripted.request("a", [1], token_mask=3)


def test_when_nothing_is_left_to_sample_the_request_fails(scripted):
    impossible = generating(scripted, [], allowed_token_ids=[1], bad_words=[[1]])
    fine = generating(scripted, [])
    results = sample([fine, impossible, fine], [[0, 1, 2]] * 3)
    assert [result.token_ids for result in results] == [(2,), (), (2,)]
    assert "no token is left to sample" in results[1].error
    assert results[0].error is None


# ---- bad rows ----------------------------------------------------------------------------------
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    "bad, said",
    [
        ([1, np.nan, 2], "nan"),
        ([np.nan] * 3, "nan"),
        ([np.inf, 0, np.nan], "nan"),
        ([0, np.inf, 0], "inf"),
        ([-np.inf] * 3, "-inf"),
    ],
)
def test_a_bad_row_fails_its_request_alone(scripted, temperature, bad, said):
    requests = [generating(scripted, [], temperature=temperature, top_p=0.9) for _ in range(3)]
    results = sample(requests, [[0, 9, 1], bad, [0, 1, 99]])
    assert results[1].error.startswith(f"the model gave logits whose largest is {said}, expected")
    assert "weights" in results[1].error
    assert results[1].token_ids == ()
    assert [results[0].token_ids, results[2].token_ids] == [(1,), (2,)]


def test_minus_infinity_is_only_a_token_that_cannot_be(scripted):
    request = generating(scripted, [], temperature=1.0, top_p=0.99, logprobs=3)
    (result,) = sample([request], [[-np.inf, 0, -np.inf]])
    assert result.token_ids == (1,)
    assert [(i, e.logprob, e.rank) for i, e in result.logprobs[0].items()] == [
        (1, 0.0, 1),
        (0, -np.inf, 2),
        (2, -np.inf, 3),
    ]


# ---- log-probabilities -------------------------------------------------------------------------
@settings(deadline=None)
@given(row=ROWS, n=st.integers(0, 8))
def test_logprobs_are_log_softmax_with_ranks_that_fit_the_order(scripted, row, n):
    request = generating(scripted, [], logprobs=n)
    (result,) = sample([request], [row])
    same_entries(result.logprobs[0], row_logprobs(row, int(row.argmax()), n))


def test_logprobs_of_far_apart_logits(scripted):
    (result,) = sample([generating(scripted, [], logprobs=3)], [[1e30, 0, -1e30]])
    assert [e.logprob for e in result.logprobs[0].values()] == [
        0.0,
        np.float32(-1e30),
        np.float32(-2e30),
    ]


def test_each_request_of_a_step_gets_as_many_logprobs_as_it_asked_for(scripted):
    rows = np.random.default_rng(0).normal(size=(4, 40)).astype(np.float32)
    requests = [generating(scripted, [], logprobs=n) for n in (0, 3, None, 20)]
    for row, result, n in zip(rows, sample(requests, rows), (0, 3, None, 20), strict=True):
        if n is None:
            assert result.logprobs == ()
        else:
            same_entries(result.logprobs[0], row_logprobs(row, int(row.argmax()), n))


def test_logprobs_are_of_the_models_own_logits(scripted):
    """Before bias, penalties, temperature and masks, as vLLM's default."""
    request = generating(
        scripted,
        [2, 2],
        logprobs=1,
        temperature=3.0,
        top_k=1,
        logit_bias={0: 50.0},
        frequency_penalty=2.0,
    )
    row = np.float32([0, 1, 2])
    (result,) = sample([request], [row])
    assert result.token_ids == (0,)
    same_entries(result.logprobs[0], row_logprobs(row, 0, 1))
    assert result.logprobs[0][0].rank == 3


def test_prompt_logprobs_come_chunk_by_chunk(scripted):
    rows = np.random.default_rng(0).normal(size=(200, 40)).astype(np.float32)
    prompt = np.random.default_rng(1).integers(0, 40, 200).tolist()
    request = scripted.request("a", prompt, prompt_logprobs=2)
    expected = [row_logprobs(rows[i], prompt[i + 1], 2) for i in range(199)]

    (result,) = sample([request], rows[:70], num_tokens=70)
    assert result.token_ids == ()
    for pair in zip(result.prompt_logprobs, expected[:70], strict=True):
        same_entries(*pair)
    request.prompt_logprobs += result.prompt_logprobs
    request.num_computed_tokens = 70
    (result,) = sample([request], rows[70:])
    for pair in zip(result.prompt_logprobs, expected[70:], strict=True):
        same_entries(*pair)
    assert result.token_ids == (int(rows[-1].argmax()),)


def test_a_bad_row_within_a_prompt_fails_the_request(scripted):
    rows = np.zeros((3, 40), np.float32)
    rows[1, 7] = np.nan
    request = scripted.request("a", [1, 2, 3], prompt_logprobs=0)
    (result,) = sample([request], rows)
    assert "nan" in result.error and result.token_ids == ()


def test_a_step_in_which_nobody_catches_up(scripted):
    request = scripted.request("a", [1] * 9)
    (result,) = sample([request], np.empty((0, 40)), num_tokens=5)
    assert result == Sampled(prompt_logprobs=[])


# ---- batches -----------------------------------------------------------------------------------
@settings(deadline=None)
@given(seed=st.integers(0, 1000), size=st.integers(2, 9))
def test_a_row_gives_the_same_bits_in_any_batch(scripted, seed, size):
    rng = np.random.default_rng(seed)
    rows = rng.normal(0, 3, (size, 1000)).astype(np.float32)
    requests = [
        generating(
            scripted,
            rng.integers(0, 1000, 5).tolist(),
            temperature=float(rng.choice([0.0, 0.8])),
            top_p=0.95,
            seed=int(rng.integers(1, 99)),
            logprobs=5,
            presence_penalty=0.5,
        )
        for _ in range(size)
    ]
    together = sample(requests, rows)
    for request, row, result in zip(requests, rows, together, strict=True):
        assert sample([request], row[None]) == [result]
