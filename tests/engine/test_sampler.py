"""Each step of sampling against its definition, and what must hold of every row."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pace_nb.engine.sampler import (
    Sampler,
    candidates,
    likeliest,
    log_softmax,
    row_logprobs,
    sample_row,
    uniform,
)
from pace_nb.engine.scheduler import Scheduled
from pace_nb.sampling_params import SamplingParams

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
        Scheduled(request, request.num_behind if num_tokens is None else num_tokens)
        for request in requests
    ]
    return Sampler(0).sample(scheduled, Rows(rows))


def generating(scripted, generated, prompt=(1, 2), **params):
    """A request that has generated the given tokens."""
    request = scripted.request("a", prompt, max_tokens=50, **params)
    request.token_ids += generated
    request.seed = request.params.seed or 0
    return request


# ---- greedy ------------------------------------------------------------------------------------
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


# ---- min_p, top_k, top_p -----------------------------------------------------------------------
def definition(row, params):
    """Kept ids, by sorting everything, in float64."""
    scaled = (row - row.max()).astype(np.float32) / np.float32(params.temperature)
    order = np.argsort(-scaled, kind="stable")
    kept = [i for i in order if scaled[i] >= np.float32(np.log(params.min_p or 1e-300))]
    if params.top_k:
        kept = [i for i in kept if scaled[i] >= scaled[order[min(params.top_k, len(row)) - 1]]]
    weights = np.exp(scaled).astype(np.float64)
    needed = params.top_p * weights[sorted(kept)].sum()
    head, reached = [], 0.0
    for i in kept:
        if params.top_p < 1 and head and reached >= needed:
            break
        head.append(int(i))
        reached += weights[i]
    return sorted(head), weights


@given(
    row=ROWS,
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    min_p=st.sampled_from([0.0, 0.01, 0.3, 1.0]),
    top_k=st.integers(0, 45),
    top_p=st.sampled_from([1e-9, 0.1, 0.5, 0.9, 0.999999, 1.0]),
)
def test_what_may_be_drawn_is_what_the_definition_keeps(row, temperature, min_p, top_k, top_p):
    params = SamplingParams(temperature=temperature, min_p=min_p, top_k=top_k, top_p=top_p)
    kept, weights = candidates(row, params)
    expected, all_weights = definition(row, params)
    ids = np.arange(len(row)) if kept is None else kept
    assert ids.tolist() == expected
    assert weights.tolist() == all_weights[expected].tolist()


@pytest.mark.parametrize("top_p", [0.2, 0.9, 0.999])
def test_top_p_of_a_large_vocabulary_looks_past_its_first_head(top_p):
    """A flat distribution over 30,000 tokens: hundreds to thousands are kept."""
    row = np.random.default_rng(0).normal(0, 0.5, 30_000).astype(np.float32)
    kept, _ = candidates(row, SamplingParams(top_p=top_p))
    assert len(kept) > 256
    assert kept.tolist() == definition(row, SamplingParams(top_p=top_p))[0]


def test_top_k_keeps_what_ties_with_the_last():
    kept, _ = candidates(np.float32([1, 3, 2, 2, 2, 0]), SamplingParams(top_k=2))
    assert kept.tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("params", [{}, {"top_k": 3}, {"top_p": 0.8}, {"min_p": 0.2}])
def test_tokens_are_drawn_as_often_as_their_probability_says(scripted, params):
    """Chi-square over 4000 seeds; the bound is passed by chance once in 10^6."""
    row = np.float32([0.0, 1.0, 2.0, -1.0, 1.5])
    kept, weights = candidates(row, SamplingParams(**params))
    kept = np.arange(5) if kept is None else kept
    request = generating(scripted, [], temperature=1.0, **params)
    drawn = []
    for seed in range(4000):
        request.seed = seed
        drawn.append(sample_row(row, request))
    observed = np.bincount(drawn, minlength=5)[kept]
    assert observed.sum() == 4000
    expected = 4000 * weights / weights.sum()
    assert ((observed - expected) ** 2 / expected).sum() < 33.4  # 4 degrees of freedom


# ---- random numbers ----------------------------------------------------------------------------
def philox(key, counter):
    """First word of Philox4x64-10 as published; NumPy counts up before it draws."""
    words = [(counter + 1) >> shift & (2**64 - 1) for shift in (0, 64, 128, 192)]
    keys = [key & (2**64 - 1), key >> 64]
    for _ in range(10):
        left = words[0] * 0xD2E7470EE14C6C93
        right = words[2] * 0xCA5A826395121157
        words = [
            right >> 64 ^ words[1] ^ keys[0],
            right & (2**64 - 1),
            left >> 64 ^ words[3] ^ keys[1],
            left & (2**64 - 1),
        ]
        keys[0] = (keys[0] + 0x9E3779B97F4A7C15) % 2**64
        keys[1] = (keys[1] + 0xBB67AE8584CAA73B) % 2**64
    return words[0]


@pytest.mark.parametrize("seed", [0, 7, 2**64 - 1])
def test_the_random_number_depends_on_seed_and_output_position_only(scripted, seed):
    for position in (0, 1, 2, 30):
        expected = (philox(seed, position) >> 11) / 2**53
        for prompt in ([1, 2], [5] * 9):
            request = generating(scripted, [1] * position, prompt=prompt, seed=seed)
            assert uniform(request) == expected


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
@given(row=ROWS, n=st.integers(1, 50))
def test_likeliest_is_a_stable_sort(row, n):
    assert likeliest(row, n).tolist() == np.argsort(-row, kind="stable")[:n].tolist()


@settings(deadline=None)
@given(row=ROWS, n=st.integers(0, 8), data=st.data())
def test_logprobs_are_log_softmax_with_ranks_that_fit_the_order(row, n, data):
    token = data.draw(st.integers(0, len(row) - 1))
    exact = row.astype(np.float64) - np.log(np.exp(row.astype(np.float64)).sum())
    order = np.argsort(-row, kind="stable").tolist()

    entries = row_logprobs(row, token, n)
    assert next(iter(entries)) == token
    assert set(entries) == {token, *order[:n]}
    for token_id, entry in entries.items():
        assert entry.rank == order.index(token_id) + 1
        assert abs(entry.logprob - exact[token_id]) < 1e-5


def test_log_softmax_of_far_apart_logits():
    values = log_softmax(np.float32([1e30, 0, -1e30]))
    assert values.tolist() == [0.0, np.float32(-1e30), np.float32(-2e30)]


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
    assert result.logprobs[0] == row_logprobs(row, 0, 1)
    assert result.logprobs[0][0].rank == 3


def test_prompt_logprobs_come_chunk_by_chunk(scripted):
    rows = np.random.default_rng(0).normal(size=(200, 40)).astype(np.float32)
    prompt = np.random.default_rng(1).integers(0, 40, 200).tolist()
    request = scripted.request("a", prompt, prompt_logprobs=2)
    expected = [row_logprobs(rows[i], prompt[i + 1], 2) for i in range(199)]

    (result,) = sample([request], rows[:70], num_tokens=70)
    assert result.token_ids == () and list(result.prompt_logprobs) == expected[:70]
    request.prompt_logprobs += result.prompt_logprobs
    request.num_computed_tokens = 70
    (result,) = sample([request], rows[70:])
    assert list(result.prompt_logprobs) == expected[70:]
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
    assert result == ((), (), [], None)


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
