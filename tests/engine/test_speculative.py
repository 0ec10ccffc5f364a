"""With guesses or without a request gets the same, and of guesses nothing is left but what held."""

from __future__ import annotations

import math
import os

import numpy as np
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from pace_nb.config import SpeculativeConfig
from pace_nb.engine import engine as engine_module
from pace_nb.engine import speculative as speculative_module
from pace_nb.engine.logit_changes import Change, edits_of
from pace_nb.engine.speculative import Draft, PromptLookup, SpeculativeStats
from pace_nb.errors import ConfigError
from pace_nb.kernels.logit_edits import Edits
from pace_nb.kernels.sampling import distribution_ref
from tests.engine.conftest import ScriptedModel

quick = settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
NGRAM = {"method": "ngram", "num_speculative_tokens": 4}
ON = {"ignore_eos": True, "allowed_token_ids": list(range(38))}
CACHES = [
    {"kv_cache": "contiguous"},
    {"kv_cache": "slab", "block_size": 16},
    {"kv_cache": "paged"},
    {"kv_cache": "paged", "enable_prefix_caching": False},
]
CACHE_NAMES = ["contiguous", "slab", "paged", "paged-alone"]


class Foreseeing:
    """Guesses what each request was given alone, each token wrong with probability 1 - right."""

    def __init__(self, futures, right, seed=0):
        self.futures, self.right = futures, right
        self.random = np.random.default_rng(seed)
        self.told = []  # (request id, guesses)
        self.forgotten = []

    def propose(self, requests, limits):
        drafts = []
        for request, limit in zip(requests, limits, strict=True):
            done = request.num_generated_tokens
            coming = self.futures[request.request_id][done : done + limit]
            guess = [
                token if self.random.random() < self.right else (token + 1) % 38 for token in coming
            ]
            self.told.append((request.request_id, guess))
            drafts.append(Draft(guess))
        return drafts

    def forget(self, request):
        self.forgotten.append(request.request_id)


PARAMS = st.fixed_dictionaries(
    {"temperature": st.sampled_from([0.0, 0.0, 0.7, 3.0]), "seed": st.integers(0, 2**64 - 1)},
    optional={
        "top_k": st.integers(0, 50),
        "top_p": st.floats(0.01, 1.0),
        "repetition_penalty": st.floats(0.5, 2.0),
        "frequency_penalty": st.floats(-2, 2),
        "presence_penalty": st.floats(-2, 2),
        "logprobs": st.integers(0, 5),
        "prompt_logprobs": st.integers(0, 5),
        "stop_token_ids": st.lists(st.integers(0, 37), max_size=4),
        "min_tokens": st.integers(0, 6),
        "ignore_eos": st.booleans(),
        "cache_salt": st.sampled_from(["a", "b"]),
        "bad_words": st.just(()),
    },
)
REQUESTS = st.lists(
    st.tuples(
        st.builds(
            lambda length, seed: np.random.default_rng(seed).integers(0, 38, length).tolist(),
            st.integers(1, 60),
            st.integers(0, 2),
        ),
        st.integers(6, 40),  # max_tokens
        PARAMS,
    ),
    min_size=1,
    max_size=16,
)


def build(scripted, specifications):
    return [
        scripted.request(str(i), prompt, max_tokens=max_tokens, **params)
        for i, (prompt, max_tokens, params) in enumerate(specifications)
    ]


def alone(scripted, specifications, **options):
    """Requests as they end without speculation, each in an engine of its own."""
    requests = build(scripted, specifications)
    for request in requests:
        scripted.setup(kv_cache="contiguous", **options).run(request)
    return requests


@quick
@given(
    specifications=REQUESTS,
    options=st.sampled_from(CACHES),
    num_tokens=st.integers(1, 33),
    right=st.sampled_from([0.0, 0.5, 0.8, 0.95, 1.0]),
    num_units=st.integers(7, 60),
    max_num_seqs=st.sampled_from([1, 3, 16]),
    spare_budget=st.integers(0, 60),
    switch_length=st.none() | st.integers(1, 90),
    windows=st.booleans(),
)
def test_any_guesses_give_what_each_request_gets_without(
    scripted, specifications, options, num_tokens, right, num_units, max_num_seqs, spare_budget,
    switch_length, windows,
):  # fmt: skip
    model = {"switch_length": switch_length, "windows": windows}
    expected = alone(scripted, specifications, **model)
    drafter = Foreseeing({r.request_id: r.generated_token_ids for r in expected}, right)
    setup = scripted.setup(
        **options,
        num_units=num_units,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_seqs + spare_budget,
        **model,
        speculative_config={"method": "ngram", "num_speculative_tokens": num_tokens},
        drafter=drafter,
    )
    requests = build(scripted, specifications)
    setup.run(*requests)
    assert [scripted.result(r) for r in requests] == [scripted.result(r) for r in expected]
    assert sorted(drafter.forgotten) == sorted(r.request_id for r in requests)
    event(f"preempted: {any(r.num_preemptions for r in requests)}")
    event(f"guesses held: {setup.engine.speculative_stats.num_accepted_tokens > 0}")


@quick
@given(
    specifications=REQUESTS,
    options=st.sampled_from(CACHES),
    num_tokens=st.integers(1, 33),
    longest=st.integers(1, 4),
)
def test_prompt_lookup_gives_what_each_request_gets_without(
    scripted, specifications, options, num_tokens, longest
):
    expected = [scripted.result(request) for request in alone(scripted, specifications)]
    speculative = {
        "method": "prompt_lookup", "num_speculative_tokens": num_tokens,
        "prompt_lookup_min": 1, "prompt_lookup_max": longest,
    }  # fmt: skip
    setup = scripted.setup(**options, num_units=200, speculative_config=speculative)
    requests = build(scripted, specifications)
    setup.run(*requests)
    assert [scripted.result(request) for request in requests] == expected


class Wrong(Foreseeing):
    """Guesses `limit` tokens, of which the first n are right and none after them."""

    def __init__(self, future, n):
        super().__init__({"0": future}, 1.0)
        self.n = n

    def propose(self, requests, limits):
        (draft,) = super().propose(requests, limits)
        guess = list(draft.token_ids)
        guess[self.n :] = [(token + 1) % 38 for token in guess[self.n :]]
        return [Draft(guess)]


@pytest.mark.parametrize("options", CACHES, ids=CACHE_NAMES)
def test_what_is_kept_and_trimmed_is_exact(scripted, options):
    """K guesses of which n hold: n + 1 tokens are kept, K - n trimmed, for each n."""
    prompt, num_tokens = list(range(14)), 20
    (expected,) = alone(scripted, [(prompt, 100, {"ignore_eos": True})])
    future = expected.generated_token_ids
    for n in range(num_tokens + 1):
        speculative = {"method": "ngram", "num_speculative_tokens": num_tokens}
        drafter = Wrong(future, n)
        setup = scripted.setup(**options, speculative_config=speculative, drafter=drafter)
        trimmed = []
        truncate = setup.cache.truncate
        setup.cache.truncate = lambda *asked, to=truncate, told=trimmed: (
            told.append(asked), to(*asked),
        )  # fmt: skip
        request = scripted.request("0", prompt, max_tokens=100, ignore_eos=True)
        setup.engine.add(request)
        setup.step()
        assert (request.num_generated_tokens, trimmed) == (1, [])
        setup.step()
        assert request.generated_token_ids == future[: n + 2]
        assert request.num_behind == 1
        assert trimmed == [("0", len(prompt) + 1 + n)]
        assert [len(batch.token_ids) for batch in setup.model.batches] == [14, num_tokens + 1]
        stats = setup.engine.speculative_stats
        assert (stats.num_drafts, stats.num_draft_tokens) == (1, num_tokens)
        assert stats.num_accepted_tokens == n
        assert stats.num_accepted_tokens_per_pos == [1] * n + [0] * (num_tokens - n)
        setup.engine.abort("0")
        setup.cache.check()
        setup.expect_idle()


@pytest.mark.parametrize("options", CACHES, ids=CACHE_NAMES)
@pytest.mark.parametrize("place", range(1, 8))
def test_what_ends_a_request_amid_its_guesses_ends_it_there(scripted, options, place):
    """A stop id or max_tokens at each place of a block of which all guesses hold."""
    for first in range(30):  # until no token comes twice, so that the stop id is not there before
        prompt = list(range(first, first + 8))
        (expected,) = alone(scripted, [(prompt, 9, {"ignore_eos": True})])
        future = expected.generated_token_ids
        if len(set(future)) == len(future):
            break
    for ending in ({"stop_token_ids": [future[place]]}, {"max_tokens": place + 1}):
        drafter = Foreseeing({"0": future}, 1.0)
        speculative = {"method": "ngram", "num_speculative_tokens": 6}
        setup = scripted.setup(**options, speculative_config=speculative, drafter=drafter)
        request = scripted.request(
            "0", prompt, **{"max_tokens": 100, "ignore_eos": True, "logprobs": 1, **ending}
        )
        setup.run(request)
        assert len(set(future)) == 9
        assert request.generated_token_ids == future[: place + 1]
        assert len(request.logprobs) == place + 1
        assert request.finish_reason == ("length" if "max_tokens" in ending else "stop")
        # Of the block of 7 what came after the end counts as nothing.
        accepted = min(place - ("max_tokens" in ending), 6)  # with the last token no guess is left
        assert setup.engine.speculative_stats.num_accepted_tokens == accepted


def test_guesses_are_never_for_nothing(scripted):
    """The last token needs no guess beyond it, and the cache no room for one."""
    (expected,) = alone(scripted, [([1, 2, 3], 9, {"ignore_eos": True})])
    drafter = Foreseeing({"0": expected.generated_token_ids}, 1.0)
    setup = scripted.setup(
        num_units=1, speculative_config={"method": "ngram", "num_speculative_tokens": 30},
        drafter=drafter,
    )  # fmt: skip
    request = scripted.request("0", [1, 2, 3], max_tokens=9, ignore_eos=True)
    setup.run(request)
    assert request.generated_token_ids == expected.generated_token_ids
    assert [len(guess) for _, guess in drafter.told] == [7]


def test_guesses_preempt_nobody_and_leave_each_its_token(scripted):
    """Two requests that just fit, and a budget of three tokens: one is left for a guess."""
    specifications = [(list(range(10)), 22, {"ignore_eos": True})] * 2
    expected = alone(scripted, specifications)
    drafter = Foreseeing({r.request_id: r.generated_token_ids for r in expected}, 1.0)
    setup = scripted.setup(
        num_units=4, max_num_seqs=2, max_num_batched_tokens=3, drafter=drafter,
        speculative_config=NGRAM,
    )  # fmt: skip
    requests = build(scripted, specifications)
    setup.run(*requests)
    assert [r.token_ids for r in requests] == [r.token_ids for r in expected]
    assert [r.num_preemptions for r in requests] == [0, 0]
    assert max(batch.num_tokens for batch in setup.model.batches) == 3


@pytest.mark.parametrize("options", CACHES, ids=CACHE_NAMES)
def test_one_that_gives_way_loses_its_guesses(scripted, options):
    """It is computed anew, in chunks of a small budget, and no guess is laid behind a chunk."""
    specifications = [(list(range(12 + i)), 39, ON) for i in range(4)]
    expected = alone(scripted, specifications)
    drafter = Foreseeing({r.request_id: r.generated_token_ids for r in expected}, 0.5)
    setup = scripted.setup(
        **options, num_units=5, max_num_seqs=4, max_num_batched_tokens=12, drafter=drafter,
        speculative_config=NGRAM,
    )  # fmt: skip
    requests = build(scripted, specifications)
    setup.run(*requests)
    assert sum(r.num_preemptions for r in requests) > 2
    assert [r.token_ids for r in requests] == [r.token_ids for r in expected]
    assert max(batch.num_tokens for batch in setup.model.batches) == 12


def test_guesses_take_no_room_that_another_needs_in_the_same_step(scripted):
    """Four units: the first request's 30 wrong guesses would take the one that the second needs."""
    specifications = [(list(range(10)), 39, ON), (list(range(5, 15)), 12, ON)]
    expected = alone(scripted, specifications)
    drafter = Foreseeing({r.request_id: r.generated_token_ids for r in expected}, 0.0)
    speculative = {"method": "ngram", "num_speculative_tokens": 30}
    setup = scripted.setup(
        num_units=4, max_num_seqs=2, drafter=drafter, speculative_config=speculative
    )
    requests = build(scripted, specifications)
    setup.run(*requests)
    assert [r.token_ids for r in requests] == [r.token_ids for r in expected]
    assert [r.num_preemptions for r in requests] == [0, 0]
    assert setup.engine.speculative_stats.num_draft_tokens > 100


def test_a_drafter_that_fails_costs_only_its_guesses(scripted, caplog):
    (expected,) = alone(scripted, [([1, 2, 3], 9, {})])

    class Broken(Foreseeing):
        def propose(self, requests, limits):
            raise ValueError("no idea")

    setup = scripted.setup(speculative_config=NGRAM, drafter=Broken({}, 1.0))
    request = scripted.request("0", [1, 2, 3], max_tokens=9)
    setup.run(request)
    assert request.token_ids == expected.token_ids
    assert "no drafts for 1 requests" in caplog.text
    assert setup.engine.speculative_stats.num_drafts == 0


@pytest.mark.parametrize("nth", range(6))
def test_a_step_with_guesses_that_raises_is_run_again_without(scripted, nth):
    specifications = [([1, 2, 3], 12, {"frequency_penalty": 0.5}), ([4, 5], 12, {"logprobs": 1})]
    expected = alone(scripted, specifications)
    drafter = Foreseeing({r.request_id: r.generated_token_ids for r in expected}, 1.0)
    setup = scripted.setup(speculative_config=NGRAM, drafter=drafter)
    calls = iter(range(1000))

    def fail_once(batch):
        if next(calls) == nth:
            raise MemoryError

    setup.model.before_run = fail_once
    requests = build(scripted, specifications)
    setup.run(*requests)
    assert [scripted.result(r) for r in requests] == [scripted.result(r) for r in expected]


def test_a_guess_that_poisons_the_rows_after_it_harms_nobody(scripted):
    """Its own row and those after it are NaN; only the row before it is looked at."""
    specifications = [([1, 2, 3], 9, params) for params in ({}, {"temperature": 1.0, "seed": 1})]
    expected = alone(scripted, specifications)

    class Poisoning(Foreseeing):
        def propose(self, requests, limits):
            return [
                Draft([*draft.token_ids[:1], scripted.POISON, 5])
                for draft in super().propose(requests, limits)
            ]

    drafter = Poisoning({r.request_id: r.generated_token_ids for r in expected}, 1.0)
    setup = scripted.setup(speculative_config=NGRAM, drafter=drafter)
    requests = build(scripted, specifications)
    setup.run(*requests)
    assert [scripted.result(r) for r in requests] == [scripted.result(r) for r in expected]


def test_penalties_see_the_tokens_of_their_own_block(scripted):
    params = {
        "frequency_penalty": 2.0, "presence_penalty": 2.0, "repetition_penalty": 1.9,
        "ignore_eos": True, "allowed_token_ids": list(range(38)),
    }  # fmt: skip
    (expected,) = alone(scripted, [([1, 2, 3], 30, params)])
    assert len(set(expected.generated_token_ids)) > 20
    drafter = Foreseeing({"0": expected.generated_token_ids}, 1.0)
    speculative = {"method": "ngram", "num_speculative_tokens": 29}
    setup = scripted.setup(speculative_config=speculative, drafter=drafter)
    request = scripted.request("0", [1, 2, 3], max_tokens=30, **params)
    setup.run(request)
    assert request.token_ids == expected.token_ids
    assert len(setup.model.batches) == 2  # so all of it was one block


def test_a_token_mask_sees_the_tokens_of_its_own_block(scripted):
    """A mask that allows only the token after the last one."""

    def next_only(generated):
        allowed = np.zeros(scripted.VOCAB_SIZE, bool)
        allowed[(generated[-1] + 1) % 38 if generated else 7] = True
        return allowed

    drafter = Foreseeing({"0": list(range(7, 37))}, 1.0)
    speculative = {"method": "ngram", "num_speculative_tokens": 19}
    setup = scripted.setup(speculative_config=speculative, drafter=drafter)
    request = scripted.request("0", [1, 2, 3], max_tokens=20, token_mask=next_only)
    setup.run(request)
    assert request.generated_token_ids == list(range(7, 27))
    assert len(setup.model.batches) == 2


def test_only_tokens_that_were_accepted_are_found_by_others(scripted):
    """Blocks that guesses filled, right and wrong ones, against what a later request computes."""
    prompt = list(range(10))
    (expected,) = alone(scripted, [(prompt, 60, {"ignore_eos": True})])
    for right in (0.0, 0.7, 1.0):
        drafter = Foreseeing({"0": expected.generated_token_ids, "1": []}, right)
        speculative = {"method": "ngram", "num_speculative_tokens": 20}
        setup = scripted.setup(speculative_config=speculative, drafter=drafter)
        setup.run(scripted.request("0", prompt, max_tokens=60, ignore_eos=True))
        later = scripted.request(
            "1", [*prompt, *expected.generated_token_ids[:50]], max_tokens=10, ignore_eos=True
        )
        setup.run(later)
        assert later.num_cached_tokens == 48
        assert later.token_ids == expected.token_ids


# ---- the distribution ----


class Drawing(Foreseeing):
    """Draws guesses from distributions of its own, which know nothing of the model's."""

    def __init__(self, vocab_size, seed, kind):
        super().__init__({}, 1.0, seed)
        self.vocab_size, self.kind = vocab_size, kind
        q = np.random.default_rng(5).dirichlet(np.full(12, 0.7), size=vocab_size)
        self.q = np.zeros((vocab_size, vocab_size), np.float32)
        self.q[:, :12] = q  # by the last token

    def propose(self, requests, limits):
        drafts = []
        for request, limit in zip(requests, limits, strict=True):
            tokens, rows, last = [], [], request.token_ids[-1]
            for _ in range(limit):
                row = self.q[last]
                last = int(self.random.choice(self.vocab_size, p=row / row.sum(dtype=np.float64)))
                tokens.append(last)
                rows.append(row)
            drafts.append(Draft(tokens, np.stack(rows) if self.kind == "drawn" else None))
        return drafts


@pytest.mark.parametrize("kind", ["drawn", "single"])
def test_sampled_tokens_follow_the_model(scripted, kind):
    """Chi-square of the second and third token of many requests, which are guessed at; all of
    temperature, top_k, top_p, min_p and penalties are in play. The guesses are bad ones."""
    total = 100_000 if os.environ.get("PACE_NB_TEST_LONG") else 2_500
    params = {
        "temperature": 1.5, "top_k": 30, "top_p": 0.97, "min_p": 0.005, "repetition_penalty": 1.3,
        "frequency_penalty": 0.4, "presence_penalty": 0.3, "allowed_token_ids": list(range(12)),
        "ignore_eos": True,
    }  # fmt: skip
    prompt = [3, 5, 3, 7]
    setup = scripted.setup(
        num_units=4000, max_num_seqs=1000, max_num_batched_tokens=20_000,
        speculative_config={"method": "ngram", "num_speculative_tokens": 3},
        drafter=Drawing(scripted.VOCAB_SIZE, 7, kind),
    )  # fmt: skip
    # The first token is the same for all: it is part of the prompt of what is counted.
    first = scripted.request("first", prompt, max_tokens=1, seed=1, **params)
    setup.run(first)
    token = first.generated_token_ids[0]
    counts = np.zeros((scripted.VOCAB_SIZE, scripted.VOCAB_SIZE))
    for start in range(0, total, 1000):
        requests = [
            scripted.request(str(i), prompt, max_tokens=4, seed=i, **params)
            for i in range(start, min(start + 1000, total))
        ]
        setup.run(*requests)
        for request in requests:
            if request.generated_token_ids[0] == token:
                counts[tuple(request.generated_token_ids[1:3])] += 1
    stats = setup.engine.speculative_stats
    assert 0.02 < stats.acceptance_rate < 0.9
    again = scripted.request("again", prompt, max_tokens=4, **params)
    again.token_ids.append(token)
    expected = pairs_after(scripted, again) * counts.sum()
    assert counts[expected == 0].sum() == 0
    large = expected >= 5
    statistic = ((counts - expected)[large] ** 2 / expected[large]).sum()
    rest = counts[~large].sum(), expected[~large].sum()
    if rest[1] > 5:
        statistic += (rest[0] - rest[1]) ** 2 / rest[1]
    freedom = large.sum() - (rest[1] <= 5)
    assert freedom > 15
    assert cube_root_normal(statistic, freedom) < 4


class LastTokenDecides(ScriptedModel):
    """logits = table[last token]: every token of every request is a sample of one row of p."""

    vocab_size = 12

    def __init__(self):
        super().__init__()
        self.table = np.random.default_rng(11).normal(0, 2.5, (12, 12)).astype(np.float32)

    def __call__(self, batch, kv):
        return batch.token_ids[:, None].astype(np.float32)

    def logits(self, hidden, rows):
        return self.table[hidden[rows, 0].astype(int)]


class DrawingFast(Drawing):
    """The same for many requests at once."""

    def propose(self, requests, limits):
        last = np.array([request.token_ids[-1] for request in requests])
        rows = np.empty((len(requests), max(limits), self.vocab_size), np.float32)
        tokens = np.empty(rows.shape[:2], np.int64)
        for ahead in range(max(limits)):
            rows[:, ahead] = self.q[last]
            below = rows[:, ahead].cumsum(axis=1, dtype=np.float64)
            u = self.random.random(len(requests)) * below[:, -1]
            last = tokens[:, ahead] = (u[:, None] >= below).sum(axis=1)
        return [
            Draft(tokens[i, :limit].tolist(), rows[i, :limit] if self.kind == "drawn" else None)
            for i, limit in enumerate(limits)
        ]


@pytest.mark.parametrize("kind", ["drawn", "single"])
def test_100_000_sampled_tokens_follow_the_model(scripted, kind, record_property):
    """Chi-square of each token given the one before it: 1000 requests of 100 tokens, and 3 guesses
    in each step, drawn from a q that is not p. Each token follows the same row of p at every place
    of a block: accepted, replaced, and after the last guess."""
    params = {"temperature": 1.3, "top_k": 10, "top_p": 0.97, "min_p": 0.01, "ignore_eos": True}
    setup = scripted.setup(
        num_units=8000, max_num_seqs=1000, max_num_batched_tokens=20_000,
        enable_prefix_caching=False,
        speculative_config={"method": "ngram", "num_speculative_tokens": 3},
        drafter=DrawingFast(12, 7, kind),
    )  # fmt: skip
    model = setup.engine._runner._model = LastTokenDecides()
    likely = np.exp(model.table - model.table.max(axis=1, keepdims=True))
    drafter = setup.engine._speculation._drafter
    drafter.q = 0.3 * drafter.q + 0.7 * likely / likely.sum(axis=1, keepdims=True)
    requests = [
        scripted.request(str(i), [i % 12], max_tokens=100, seed=i, **params) for i in range(1000)
    ]
    for request in requests:
        setup.engine.add(request)
    while setup.engine.num_unfinished:
        setup.engine.step()
    tokens = np.array([request.token_ids for request in requests])
    counts = np.zeros((12, 12))
    np.add.at(counts, (tokens[:, :-1].reshape(-1), tokens[:, 1:].reshape(-1)), 1)
    assert counts.sum() == 100_000
    assert setup.engine.speculative_stats.num_accepted_tokens > 10_000
    sampler = setup.engine._sampler
    kept = sampler._keep(requests[0], 12)
    p = distribution_ref(
        model.table, sampler._settings, np.full(12, kept.slot), edits_of([Change()] * 12)
    )
    expected = p.astype(float) * counts.sum(axis=1, keepdims=True)
    assert counts[expected == 0].sum() == 0 and (expected == 0).any()
    possible = expected > 0
    assert expected[possible].min() > 5
    statistic = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
    freedom = possible.sum() - 12
    normal = cube_root_normal(statistic, freedom)
    record_property("p", 0.5 * math.erfc(normal / math.sqrt(2)))
    assert normal < 4 and freedom > 30


def cube_root_normal(statistic, freedom):
    """Wilson and Hilferty: the cube root is nearly normal; 4 sigmas are one in 30,000."""
    spread = 2 / (9 * freedom)
    return float(((statistic / freedom) ** (1 / 3) - (1 - spread)) / np.sqrt(spread))


def pairs_after(scripted, request):
    """p of the two tokens that follow a request's own, f64[V, V]."""
    setup = scripted.setup()
    sampler, vocab = setup.engine._sampler, scripted.VOCAB_SIZE

    def after(ahead):
        row = setup.engine.forward([*request.token_ids, *ahead])[-1:]
        sampler.forget(request)
        kept = sampler._keep(request, vocab)
        edits = edits_of([kept.changes.of_next_token(request, ahead)]) or Edits.none(1)
        slots = np.array([kept.slot], np.int64)
        return distribution_ref(row, sampler._settings, slots, edits)[0].astype(float)

    first = after([])
    pairs = np.zeros((vocab, vocab))
    for token in np.flatnonzero(first).tolist():
        pairs[token] = first[token] * after([token])
    return pairs


def test_a_guess_is_judged_by_p_and_q(scripted):
    """The corners: q = p, q = 0 at the guess, p = 0 at the guess, nothing left of p."""
    setup = scripted.setup()
    sampler, vocab = setup.engine._sampler, 4
    p = np.array([0.5, 0.25, 0.25, 0.0])
    row = np.log(np.maximum(p, 1e-30), dtype=np.float32)[None]

    def judged(guess, q, seeds=200):
        tokens = []
        for seed in range(seeds):
            request = scripted.request("0", [1], temperature=1.0, allowed_token_ids=[0, 1, 2])
            request.seed = seed
            request.draft_token_ids = (guess,)
            request.draft_probabilities = np.array([q], np.float32)
            kept = sampler._keep(request, vocab)
            slots = np.array([kept.slot], np.int64)
            position = np.array([0], np.int64)
            edits = edits_of([kept.changes.of_next_token(request)])
            tokens += sampler._judge([request], row, slots, position, edits).tolist()
            sampler.forget(request)
        return np.bincount(tokens, minlength=vocab) / seeds

    for guess in (0, 1, 2):
        assert judged(guess, p)[guess] == 1.0  # q = p: always accepted
        other = np.zeros(vocab)
        other[3] = 1.0
        assert judged(guess, other)[guess] == 1.0  # q(g) = 0 < p(g)
    # p(g) = 0: never accepted, and what replaces it is p without q.
    found = judged(3, [0.0, 0.25, 0.0, 0.75], 400)
    assert found[3] == 0 and found[1] == 0
    assert found[0] == pytest.approx(2 / 3, abs=0.1)
    # q takes more than p everywhere that p has anything: p itself is drawn from.
    found = judged(3, [1.0, 1.0, 1.0, 1.0], 400)
    assert found == pytest.approx(p, abs=0.1)


# ---- how many ----


def test_guesses_that_cost_too_much_are_turned_off_and_counted(scripted):
    """Nothing that is guessed holds, and each row costs as much as a step."""
    drafter = Foreseeing({"0": [1] * 200}, 0.0)
    speculative = {"method": "ngram", "num_speculative_tokens": 8, "adaptive": True}
    setup = scripted.setup(speculative_config=speculative, drafter=drafter)
    lengths = setup.engine._speculation._lengths
    for rows in (1, 1, 1, 5, 9):
        lengths.target.observe(rows, float(rows))
    lengths.target.observe = lambda rows, seconds: None
    request = scripted.request("0", [1], max_tokens=60, ignore_eos=True, allowed_token_ids=[5, 6])
    setup.run(request)
    assert request.num_generated_tokens == 60
    assert setup.engine.speculative_stats.num_steps_off >= 50
    assert len(drafter.told) < 8


class Clock:
    """Time as a step's rows make it: what a step of `fixed + per_row * rows` seconds would take."""

    def __init__(self, fixed, per_row):
        self.now, self.fixed, self.per_row = 0.0, fixed, per_row

    def perf_counter(self):
        return self.now

    monotonic = perf_counter

    def computes(self, batch):
        self.now += self.fixed + self.per_row * batch.num_tokens


@pytest.mark.parametrize("right", [0.0, 0.7, 1.0])
def test_with_many_running_requests_guessing_turns_itself_down(scripted, monkeypatch, right):
    """Rows cost as much as the weights when there are 10 of them. Alone a request gets its guesses;
    among 30 nobody does, or who is lucky, and the statistics say so; when the others have gone it
    gets them again. It takes no longer than without speculation, but for what finding out costs."""
    clock = Clock(1.0, 0.1)
    monkeypatch.setattr(engine_module, "time", clock)
    monkeypatch.setattr(speculative_module, "time", clock)
    options = {"num_units": 400, "max_num_seqs": 32, "max_num_batched_tokens": 1000}
    params = {"ignore_eos": True, "allowed_token_ids": list(range(38))}
    specifications = [(list(range(1 + i % 7)), 150 if i < 30 else 250, params) for i in range(31)]

    def took(setup, requests):
        setup.model.before_run = clock.computes
        before = clock.now
        for request in requests:
            setup.engine.add(request)
        counts = {}  # running requests: steps, and those that had guesses
        while setup.engine.num_unfinished:
            running = len(setup.engine._scheduler.running)
            given, steps = len(setup.model.batches), counts.setdefault(running, [0, 0])
            setup.step()
            (batch,) = setup.model.batches[given:]
            steps[0] += 1
            steps[1] += batch.num_tokens > batch.num_requests
        return clock.now - before, counts

    plain = build(scripted, specifications)
    plain_seconds, _ = took(scripted.setup(**options), plain)
    drafter = Foreseeing({one.request_id: one.generated_token_ids for one in plain}, right)
    speculative = {"method": "ngram", "num_speculative_tokens": 12, "adaptive": True}
    setup = scripted.setup(**options, speculative_config=speculative, drafter=drafter)
    requests = build(scripted, specifications)
    seconds, counts = took(setup, requests)
    assert [r.token_ids for r in requests] == [r.token_ids for r in plain]
    stats = setup.engine.speculative_stats
    steps, with_guesses = counts[31]
    alone, alone_with = counts[1]
    if right == 1.0:  # then it always pays
        assert with_guesses >= steps - 3 and seconds < 0.9 * plain_seconds
        assert stats.num_steps_off <= 5
        return
    assert with_guesses < 0.2 * steps and stats.num_steps_off > 100
    assert seconds < 1.1 * plain_seconds
    if right == 0.0:
        assert alone_with <= 5
    else:
        assert alone_with > 0.8 * alone and alone > 15


# ---- prompt lookup ----


def guess(scripted, tokens, limit=4, longest=3, shortest=2):
    config = SpeculativeConfig(
        "prompt_lookup", prompt_lookup_max=longest, prompt_lookup_min=shortest
    )
    (draft,) = PromptLookup(config).propose([scripted.request("0", tokens)], [limit])
    return list(draft.token_ids)


def test_prompt_lookup_guesses_what_followed(scripted):
    assert guess(scripted, [1, 2, 3, 4, 5, 6, 1, 2, 3]) == [4, 5, 6, 1]
    assert guess(scripted, [1, 2, 3, 4, 5, 6, 1, 2, 3], limit=1) == [4]
    # The longest run counts, and of equally long ones the latest.
    assert guess(scripted, [1, 2, 3, 4, 9, 2, 3, 5, 1, 2, 3], limit=1) == [4]
    assert guess(scripted, [2, 3, 4, 9, 2, 3, 5, 8, 2, 3], limit=1) == [5]
    # What is shorter than prompt_lookup_min or new is no reason for a guess.
    assert guess(scripted, [3, 4, 5, 3]) == []
    assert guess(scripted, [1, 2, 3, 4]) == []
    assert guess(scripted, [1]) == []


def test_prompt_lookup_goes_on_with_what_repeats(scripted):
    assert guess(scripted, [7, 8, 7, 8, 7, 8], limit=5) == [7, 8, 7, 8, 7]
    assert guess(scripted, [5, 5, 5], limit=4) == [5, 5, 5, 5]


def test_prompt_lookup_sees_what_was_added_as_a_new_one_does(scripted):
    random = np.random.default_rng(3)
    config = SpeculativeConfig("ngram", prompt_lookup_max=3, prompt_lookup_min=1)
    lookup, request = PromptLookup(config), scripted.request("0", [1, 2])
    for _ in range(60):
        (draft,) = lookup.propose([request], [6])
        assert list(draft.token_ids) == guess(scripted, request.token_ids, 6, 3, 1)
        request.token_ids += random.integers(0, 4, random.integers(1, 4)).tolist()
    lookup.forget(request)
    assert not lookup._places


# ---- configuration and statistics ----


def test_statistics():
    stats = SpeculativeStats(3)
    assert (stats.mean_acceptance_length, stats.acceptance_rate) == (1.0, 0.0)
    stats.observe(3, 3)
    stats.observe(3, 1)
    stats.observe(2, 0)
    assert stats.num_accepted_tokens_per_pos == [2, 1, 1]
    assert stats.acceptance_rate_per_pos == pytest.approx([2 / 3, 1 / 3, 1 / 3])
    assert stats.mean_acceptance_length == pytest.approx(1 + 4 / 3)
    assert stats.acceptance_rate == 0.5


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"method": "guess"}, "method must be one of ngram, prompt_lookup, pard, got 'guess'"),
        ({"method": "ngram", "pard_token": 3}, "pard_token is 3, expected None for method 'ngram'"),
        ({"method": "pard", "prompt_lookup_max": 3}, "prompt_lookup_max is 3, expected None for"),
        ({"method": "pard", "adaptive": 1}, "adaptive must be a bool or None, got 1"),
        (
            {"method": "pard", "adaptive": True, "draft_sample_method": "probabilistic"},
            "adaptive is True, expected False or None for draft_sample_method 'probabilistic'",
        ),
        ({"method": "pard", "pard_token": -1}, "pard_token must be an int >= 0, got -1"),
        ({"method": "pard", "model": ""}, "model must be a directory or a hub name, got ''"),
        ({"method": "pard", "draft_sample_method": "hot"}, "draft_sample_method must be one of"),
        ({"method": "ngram", "draft_sample_method": "probabilistic"}, "must be greedy for method"),
        ({"num_speculative_tokens": 3}, "names no method, expected one of ngram"),
        ({"method": "ngram", "k": 3}, "has no field 'k', expected method, num_speculative_tokens"),
        ({"method": "ngram", "num_speculative_tokens": 0}, "num_speculative_tokens must be an int"),
        ({"method": "ngram", "num_speculative_tokens": 65}, "must be 1 to 64, got 65"),
        (
            {"method": "ngram", "prompt_lookup_max": 2, "prompt_lookup_min": 3},
            r"at most prompt_loo",
        ),
        ("ngram", "must be a SpeculativeConfig or a dict of its fields, got 'ngram'"),
    ],
)
def test_configurations_that_are_refused(given, expected):
    with pytest.raises(ConfigError, match=expected):
        SpeculativeConfig.of(given)


def test_defaults_are_those_of_vllm():
    config = SpeculativeConfig.of({"method": "ngram"})
    assert (config.lookup_max, config.lookup_min) == (5, 5)
    assert (config.num_tokens, SpeculativeConfig.of({"method": "pard"}).num_tokens) == (5, 12)
    config = SpeculativeConfig.of({"method": "ngram", "prompt_lookup_max": 3})
    assert (config.lookup_max, config.lookup_min) == (3, 3)
    config = SpeculativeConfig.of({"method": "ngram", "prompt_lookup_min": 2})
    assert (config.lookup_max, config.lookup_min) == (2, 2)
