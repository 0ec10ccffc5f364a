"""A draft model reads each token once, its masks leave no trace, and its guesses fit their rows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pace_nb.config import CacheConfig, EngineConfig
from pace_nb.engine.pard import ParallelDrafter
from pace_nb.errors import OutOfMemoryError
from pace_nb.kv_cache import create_cache
from pace_nb.kv_cache.base import UNIT

MASK = 37
ON = {"ignore_eos": True, "allowed_token_ids": list(range(MASK))}
CACHES = [
    {"kv_cache": "contiguous"},
    {"kv_cache": "slab", "block_size": 16},
    {"kv_cache": "paged"},
    {"kv_cache": "paged", "enable_prefix_caching": False},
]


def knowing(scripted_model):
    """A draft model that knows what will come, and looks whether what it has read is the sequence.

    `sequences`: by request id, prompt and all that the target generates. `wrong_from`: in each
    block this guess and those after it are wrong. `faults`: where what it has read was not.
    """

    class Knowing(scripted_model):
        vocab_size = 40

        def __init__(self):
            super().__init__()
            self.sequences = {}
            self.wrong_from = 10**6
            self.faults = []

        def __call__(self, batch, kv):
            super().__call__(batch, kv)
            hidden = np.zeros((batch.num_tokens, 4), np.float32)
            for b, request_id in enumerate(batch.request_ids):
                sequence = self.sequences[request_id]
                new = range(batch.cu_seqlens_q[b], batch.cu_seqlens_q[b + 1])
                masks = 0
                while masks < len(new) - 1 and batch.token_ids[new[-1 - masks]] == MASK:
                    masks += 1
                known = batch.context_lens[b] - masks
                view = kv.views[0]
                positions = np.arange(known)
                blocks = view.block_table[b, positions // UNIT // view.units_per_block]
                units = blocks + positions // UNIT % view.units_per_block
                read = kv.layer(0).k[0, units, 0, positions % UNIT, 0].tolist()
                if read != sequence[:known]:
                    self.faults.append((request_id, read, sequence[:known]))
                for j in range(masks + 1):
                    place = known + j
                    token = sequence[place] if place < len(sequence) else 0
                    hidden[new[-1 - masks + j], 0] = token + (j >= self.wrong_from)
            return hidden

        def logits(self, hidden, rows):
            logits = np.zeros((len(rows), self.vocab_size), np.float32)
            logits[np.arange(len(rows)), hidden[rows, 0].astype(int) % self.vocab_size] = 9
            return logits

    return Knowing


def setup_with(scripted, model, *, num_draft_units=64, num_tokens=6, sample="greedy", **options):
    """A setup whose engine drafts with `model`."""
    speculative = {
        "method": "pard", "num_speculative_tokens": num_tokens, "draft_sample_method": sample,
    }  # fmt: skip
    given = {name: value for name, value in options.items() if name not in ("num_units",)}
    given.pop("switch_length", None)
    config = EngineConfig(speculative_config=speculative, **given)
    stored = model.kv_cache_config("float32")
    cache = create_cache(
        stored,
        CacheConfig(config.kv_cache, num_draft_units * UNIT, 512, UNIT, config.prefix_caching),
    )
    drafter = ParallelDrafter(model, cache, config, MASK, scripted.VOCAB_SIZE)
    setup = scripted.setup(**options, speculative_config=speculative, drafter=drafter)
    return setup, drafter


def alone(scripted, specifications, **options):
    requests = [
        scripted.request(str(i), prompt, max_tokens=max_tokens, **params)
        for i, (prompt, max_tokens, params) in enumerate(specifications)
    ]
    for request in requests:
        scripted.setup(kv_cache="contiguous", **options).run(request)
    return requests


def again(scripted, specifications):
    return [
        scripted.request(str(i), prompt, max_tokens=max_tokens, **params)
        for i, (prompt, max_tokens, params) in enumerate(specifications)
    ]


@pytest.fixture
def model(scripted):
    return knowing(type(scripted.setup().model))


SPECIFICATIONS = st.lists(
    st.tuples(
        st.builds(
            lambda length, seed: np.random.default_rng(seed).integers(0, MASK, length).tolist(),
            st.integers(1, 60),
            st.integers(0, 2),
        ),
        st.integers(3, 30),
        st.fixed_dictionaries(
            {
                "temperature": st.sampled_from([0.0, 0.0, 1.5]),
                "seed": st.integers(0, 99),
                "ignore_eos": st.booleans(),
                "allowed_token_ids": st.just(list(range(MASK))),
            },
            optional={"frequency_penalty": st.just(0.5), "cache_salt": st.sampled_from("ab")},
        ),
    ),
    min_size=1,
    max_size=6,
)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    specifications=SPECIFICATIONS,
    options=st.sampled_from(CACHES),
    num_tokens=st.integers(1, 33),
    wrong_from=st.sampled_from([0, 1, 3, 40]),
    num_units=st.integers(6, 40),
    num_draft_units=st.integers(1, 40),
    max_num_seqs=st.sampled_from([1, 3, 6]),
    spare=st.integers(0, 80),
)
def test_any_draft_gives_what_each_request_gets_without(
    scripted, model, specifications, options, num_tokens, wrong_from, num_units, num_draft_units,
    max_num_seqs, spare,
):  # fmt: skip
    expected = alone(scripted, specifications)
    draft = model()
    draft.sequences = {request.request_id: request.token_ids for request in expected}
    draft.wrong_from = wrong_from
    setup, drafter = setup_with(
        scripted, draft, num_tokens=num_tokens, num_draft_units=num_draft_units, **options,
        num_units=num_units, max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_seqs + spare,
    )  # fmt: skip
    requests = again(scripted, specifications)
    for request in requests:
        setup.engine.add(request)
    while setup.engine.num_unfinished:
        setup.step()
        drafter.cache.check()
    assert [scripted.result(r) for r in requests] == [scripted.result(r) for r in expected]
    assert drafter.cache.num_free_tokens == drafter.cache.num_total_tokens
    assert not drafter._num_computed
    assert not draft.faults


@pytest.mark.parametrize("options", CACHES)
@pytest.mark.parametrize("num_held", range(7))
def test_what_is_read_kept_and_trimmed_is_exact(scripted, model, options, num_held):
    """K = 6 guesses of which n hold: it reads n + 1 tokens and K - 1 masks, and drops the masks."""
    params = ON
    (expected,) = alone(scripted, [(list(range(20)), 60, params)])
    draft = model()
    draft.sequences, draft.wrong_from = {"0": expected.token_ids}, num_held
    setup, drafter = setup_with(scripted, draft, **options)
    trimmed = []
    truncate = drafter.cache.truncate
    drafter.cache.truncate = lambda *asked: (trimmed.append(asked), truncate(*asked))
    request = scripted.request("0", range(20), max_tokens=60, **params)
    setup.engine.add(request)
    setup.step()  # the prompt
    for step in range(3):
        before = request.num_tokens
        setup.step()
        assert request.num_tokens == before + num_held + 1
        assert trimmed[-1] == ("0", before)
        read = draft.batches[-1].token_ids.tolist()
        assert read[-5:] == [MASK] * 5
        assert len(read) == (21 if step == 0 else num_held + 1) + 5
    assert request.token_ids == expected.token_ids[: request.num_tokens]
    assert setup.engine.speculative_stats.mean_acceptance_length == num_held + 1
    assert not draft.faults


def test_one_batch_drafts_for_all(scripted, model):
    specifications = [(list(range(3 + i)), 20, {**ON}) for i in range(5)]
    expected = alone(scripted, specifications)
    draft = model()
    draft.sequences = {request.request_id: request.token_ids for request in expected}
    setup, _ = setup_with(scripted, draft, num_tokens=4)
    setup.run(*again(scripted, specifications))
    assert len(draft.batches[0].request_ids) == 5
    assert len(draft.batches) == 4  # 19 tokens after the first, five a step


def test_a_long_prompt_is_read_in_pieces_before_the_first_guess(scripted, model):
    (expected,) = alone(scripted, [(list(range(30)) * 3, 12, {**ON})])
    draft = model()
    draft.sequences = {"0": expected.token_ids}
    setup, _ = setup_with(scripted, draft, max_num_batched_tokens=40, max_num_seqs=4)
    request = scripted.request("0", list(range(30)) * 3, max_tokens=12, **ON)
    setup.run(request)
    assert request.token_ids == expected.token_ids
    assert not draft.faults
    assert [batch.num_tokens for batch in draft.batches[:3]] == [40, 40, 13 + 5]
    assert [len(batch.logits_rows) for batch in draft.batches[:3]] == [0, 0, 6]


def test_beginnings_are_shared_in_the_draft_s_cache_too(scripted, model):
    prompt = list(range(35))
    (expected,) = alone(scripted, [(prompt, 12, {**ON})])
    draft = model()
    draft.sequences = dict.fromkeys("01", expected.token_ids)
    setup, _ = setup_with(scripted, draft)
    for name in "01":
        setup.run(scripted.request(name, prompt, max_tokens=12, **ON))
        draft.batches, read = [], draft.batches
        assert read[0].positions[0] == (0 if name == "0" else 32)


def test_no_room_in_the_draft_s_cache_means_no_guesses(scripted, model):
    (expected,) = alone(scripted, [(list(range(35)), 12, {**ON})])
    draft = model()
    draft.sequences = {"0": expected.token_ids}
    setup, _ = setup_with(scripted, draft, num_draft_units=2)
    request = scripted.request("0", range(35), max_tokens=12, **ON)
    setup.run(request)
    assert request.token_ids == expected.token_ids
    assert not draft.batches


def test_a_draft_that_raises_costs_only_its_guesses(scripted, model):
    (expected,) = alone(scripted, [(list(range(35)), 12, {**ON})])
    draft = model()
    draft.sequences = {"0": expected.token_ids}
    calls = iter(range(100))

    def fail_twice(batch):
        if next(calls) in (0, 2):
            raise OutOfMemoryError("no")

    draft.before_run = fail_twice
    setup, _ = setup_with(scripted, draft, num_tokens=2)
    request = scripted.request("0", range(35), max_tokens=12, **ON)
    setup.run(request)
    assert request.token_ids == expected.token_ids
    assert setup.engine.speculative_stats.num_accepted_tokens > 4


@pytest.mark.parametrize("params", [{}, {"top_k": 5}, {"frequency_penalty": 0.7, "min_p": 0.01}])
def test_drawn_guesses_are_those_of_the_draft_s_own_distribution(scripted, params):
    """A draft that is the target itself: q = p at the first guess, so it always holds. Guesses
    after it are made from masks, and seldom do."""
    target = scripted.setup().model
    draft = type(target)()
    setup, _ = setup_with(scripted, draft, num_tokens=1, sample="probabilistic")
    requests = [
        scripted.request(str(i), [1, 2, 3 + i], max_tokens=12, temperature=1.0, seed=i,
                         ignore_eos=True, allowed_token_ids=list(range(30)), **params)
        for i in range(8)
    ]  # fmt: skip
    setup.run(*requests)
    assert setup.engine.speculative_stats.num_drafts == 40  # 11 tokens of each, two a step
    assert setup.engine.speculative_stats.acceptance_rate == 1.0
    assert len({tuple(request.generated_token_ids) for request in requests}) == 8


def test_the_masks_of_a_request_stay_in_the_draft_s_context(scripted, model):
    (expected,) = alone(scripted, [(list(range(10)), 20, {**ON})])
    draft = model()
    draft.sequences = {"0": expected.token_ids}
    draft.max_position_embeddings = 18
    setup, _ = setup_with(scripted, draft, num_tokens=12)
    request = scripted.request("0", range(10), max_tokens=20, **ON)
    setup.run(request)
    assert request.token_ids == expected.token_ids
    assert max(batch.positions.max() for batch in draft.batches) == 17
    assert replace(setup.engine.speculative_stats).num_accepted_tokens >= 7
