"""Whatever happens around a request, it gets the tokens and log-probabilities it gets alone."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from pace_nb.config import KV_CACHE_KINDS
from pace_nb.engine.engine import Engine
from pace_nb.errors import InvalidRequestError, OutOfMemoryError, WrongThreadError
from pace_nb.kv_cache import paged
from pace_nb.kv_cache.base import UNIT

quick = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

PARAMS = st.fixed_dictionaries(
    {"temperature": st.sampled_from([0.0, 0.7, 3.0]), "seed": st.integers(0, 2**64 - 1)},
    optional={
        "top_k": st.integers(0, 50),
        "top_p": st.floats(0.01, 1.0),
        "min_p": st.floats(0.0, 1.0),
        "repetition_penalty": st.floats(0.5, 2.0),
        "frequency_penalty": st.floats(-2, 2),
        "presence_penalty": st.floats(-2, 2),
        "logprobs": st.integers(0, 5),
        "prompt_logprobs": st.integers(0, 5),
        "logit_bias": st.dictionaries(st.integers(0, 38), st.floats(-5, 5), max_size=3),
        "allowed_token_ids": st.lists(st.integers(0, 38), min_size=3, max_size=20),
        "stop_token_ids": st.lists(st.integers(0, 37), max_size=4),
        "min_tokens": st.integers(0, 3),
        "ignore_eos": st.booleans(),
        "cache_salt": st.sampled_from(["a", "b"]),
    },
)
# Drawn by length: drawn as a list a prompt would nearly always be short, and nothing would preempt.
# Those of one seed begin alike; those of two end alike, which must not be mistaken for it.
PROMPTS = st.builds(
    lambda length, seed: (
        np.random.default_rng(seed).integers(0, 38, 60).tolist()[-length:]
        if seed == 2
        else np.random.default_rng(seed).integers(0, 38, length).tolist()
    ),
    st.integers(1, 60),
    st.integers(0, 2),
)
REQUESTS = st.lists(
    st.tuples(
        PROMPTS,
        st.integers(3, 25),  # max_tokens
        PARAMS,
        st.integers(0, 10),  # arrives at this step
    ),
    min_size=2,
    max_size=6,
)


@st.composite
def cache_options(draw):
    """Any kind of cache, with small and large blocks, beginnings shared or not."""
    kind = draw(st.sampled_from([*KV_CACHE_KINDS, "paged"]))
    if kind == "contiguous":
        return {"kv_cache": kind}
    options = {"kv_cache": kind, "block_size": draw(st.sampled_from([None, 16, 32]))}
    if kind == "paged":
        options["enable_prefix_caching"] = draw(st.sampled_from([None, True, False]))
    return options


@st.composite
def engine_options(draw):
    """Any kind of cache, any budget, and a pool that may hold little more than one request."""
    max_num_seqs = draw(st.integers(1, 6))
    return {
        **draw(cache_options()),
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": draw(st.integers(max_num_seqs, max_num_seqs + 40)),
        "enable_chunked_prefill": draw(st.booleans()),
        "num_units": draw(st.integers(6, 9)),  # 84 tokens, the most that one request needs, take 6
        "max_model_len": draw(st.sampled_from([100, 512, 2048])),
        "windows": draw(st.booleans()),
    }


def build(scripted, specifications):
    return [
        scripted.request(str(i), prompt, max_tokens=max_tokens, **params)
        for i, (prompt, max_tokens, params, _) in enumerate(specifications)
    ]


def alone(scripted, specifications, **options):
    """What each of the requests gets in an engine of its own."""
    results = []
    for request in build(scripted, specifications):
        scripted.setup(kv_cache="contiguous", **options).run(request)
        results.append(scripted.result(request))
    return results


def run_as_they_arrive(setup, requests, specifications, after_step=lambda step: None):
    step = 0
    pending = sorted(zip(specifications, requests, strict=True), key=lambda pair: pair[0][3])
    while pending or setup.engine.num_unfinished:
        while pending and pending[0][0][3] <= step:
            setup.engine.add(pending.pop(0)[1])
        setup.step()
        after_step(step)
        step += 1
        assert step < 5000, "no progress"
    setup.expect_idle()


@quick
@given(specifications=REQUESTS, options=engine_options())
def test_any_schedule_gives_what_each_request_gets_alone(scripted, specifications, options):
    requests = build(scripted, specifications)
    run_as_they_arrive(scripted.setup(**options), requests, specifications)
    event(f"preemptions: {sum(request.num_preemptions for request in requests)}")
    event(f"hits: {sum(request.num_cached_tokens > 0 for request in requests)}")
    expected = alone(scripted, specifications, windows=options["windows"])
    assert [scripted.result(request) for request in requests] == expected


@quick
@given(specifications=REQUESTS, options=engine_options(), switch_length=st.integers(1, 85))
def test_any_schedule_of_sequences_that_outgrow_their_keys(
    scripted, specifications, options, switch_length
):
    """The model is one with longrope. Alone means without neighbours, chunks and preemption."""
    switch = {"switch_length": switch_length, "windows": options.pop("windows")}
    requests = build(scripted, specifications)
    run_as_they_arrive(scripted.setup(**options, **switch), requests, specifications)
    assert [scripted.result(r) for r in requests] == alone(scripted, specifications, **switch)


def test_a_sequence_that_outgrows_its_keys_is_computed_anew(scripted):
    """Each token is what follows from all before it, as a prompt of their length has it."""
    setup = scripted.setup(switch_length=24)
    request = scripted.request("0", range(20), max_tokens=10, ignore_eos=True)
    setup.run(request)
    assert [batch.num_tokens for batch in setup.model.batches] == [20, 1, 1, 1, 1, 25, 1, 1, 1, 1]
    assert request.num_preemptions == 0
    for length in range(20, 30):
        again = scripted.request("1", request.token_ids[:length], max_tokens=1)
        scripted.setup(switch_length=24).run(again)
        assert again.token_ids == request.token_ids[: length + 1]


def test_room_for_what_is_computed_anew_comes_before_anybody_is_scheduled(scripted):
    """At 33 tokens the first needs a third unit, and the second, which decodes, has to give way."""
    specifications = [(list(range(31)), 8, {}, 0), (list(range(17)), 8, {}, 0)]
    requests = build(scripted, specifications)
    run_as_they_arrive(scripted.setup(num_units=4, switch_length=32), requests, specifications)
    assert [request.num_preemptions for request in requests] == [0, 1]
    expected = alone(scripted, specifications, switch_length=32)
    assert [scripted.result(request) for request in requests] == expected


@quick
@given(specifications=REQUESTS, options=engine_options(), data=st.data())
def test_aborts_give_everything_back_and_change_nobody_else(
    scripted, specifications, options, data
):
    requests = build(scripted, specifications)
    setup = scripted.setup(**options)
    doomed = data.draw(st.lists(st.sampled_from(requests), max_size=3, unique=True))
    at_step = {request.request_id: data.draw(st.integers(0, 20)) for request in doomed}

    def abort(step):
        for request_id, when in at_step.items():
            if when == step:
                setup.engine.abort(request_id)
                setup.cache.check()

    run_as_they_arrive(setup, requests, specifications, abort)
    results = alone(scripted, specifications, windows=options["windows"])
    for request, expected in zip(requests, results, strict=True):
        if request.finish_reason == "abort":
            assert request in doomed
            generated = request.generated_token_ids
            assert expected[0][: len(generated)] == generated
        else:
            assert scripted.result(request) == expected


@quick
@given(specifications=REQUESTS, options=engine_options(), data=st.data())
def test_a_poisoned_request_fails_alone_and_is_wiped_out(scripted, specifications, options, data):
    victim = data.draw(st.integers(0, len(specifications) - 1))
    where = data.draw(st.integers(0, len(specifications[victim][0]) - 1))
    expected = alone(scripted, specifications, windows=options["windows"])
    specifications[victim][0][where] = scripted.POISON
    requests = build(scripted, specifications)
    setup = scripted.setup(**options)
    run_as_they_arrive(setup, requests, specifications)

    for index, request in enumerate(requests):
        if index == victim:
            assert request.finish_reason == "error"
            assert "the model gave logits whose largest is nan" in request.error
            assert request.generated_token_ids == []
        else:
            assert scripted.result(request) == expected[index]
    if requests[victim].num_preemptions:
        return  # what it had before was given back when nobody knew yet; kernels never look at it
    for index in range(2):
        pool = setup.cache.layer(index)
        assert np.isfinite(pool.k).all() and np.isfinite(pool.v).all()


FIXED = [
    ([1, 2, 3] * 9, 9, {"temperature": 0.0, "logprobs": 2}, 0),
    ([4, 5, 6, 7] * 8, 12, {"temperature": 1.0, "seed": 3, "prompt_logprobs": 1}, 1),
    ([8], 15, {"temperature": 0.9, "seed": 4, "ignore_eos": True}, 2),
]
CACHES = [
    {"kv_cache": "contiguous"},
    {"kv_cache": "slab", "block_size": 16},
    {"kv_cache": "paged"},
    {"kv_cache": "paged", "enable_prefix_caching": False},
]


@pytest.fixture(params=CACHES, ids=lambda options: "-".join(map(str, options.values())))
def tight(request):
    """Little room, in every kind of cache."""
    return {"num_units": 5, "max_num_seqs": 3, "max_num_batched_tokens": 20, **request.param}


def test_the_fixed_case_preempts(scripted, tight):
    """The tests below are about a run in which everything happens."""
    requests = build(scripted, FIXED)
    setup = scripted.setup(**tight)
    run_as_they_arrive(setup, requests, FIXED)
    assert sum(request.num_preemptions for request in requests) >= 1
    assert len(setup.model.batches) < 60


def test_an_exception_at_the_nth_call_of_the_model_costs_nobody_anything(scripted, tight):
    expected = alone(scripted, FIXED)
    for nth in range(60):
        requests = build(scripted, FIXED)
        setup = scripted.setup(**tight)
        calls = iter(range(10_000))

        def fail_once(batch, calls=calls, nth=nth):
            if next(calls) == nth:
                raise MemoryError if nth % 2 else ValueError("a\nb")

        setup.model.before_run = fail_once
        run_as_they_arrive(setup, requests, FIXED)
        assert [scripted.result(request) for request in requests] == expected


def test_a_request_on_which_the_model_always_raises_fails_alone(scripted, tight):
    expected = alone(scripted, FIXED)
    for culprit in range(3):
        requests = build(scripted, FIXED)
        setup = scripted.setup(**tight)

        def fail(batch, culprit=culprit):
            if str(culprit) in batch.request_ids:
                raise ValueError("cannot\nbe")

        setup.model.before_run = fail
        run_as_they_arrive(setup, requests, FIXED)
        for index, request in enumerate(requests):
            if index == culprit:
                assert request.finish_reason == "error"
                assert request.error == "ValueError: cannot be"
            else:
                assert scripted.result(request) == expected[index]


def test_when_the_model_always_raises_all_end_and_the_next_is_served(scripted, tight):
    def fail(batch):
        raise ValueError("no")

    setup = scripted.setup(**tight)
    setup.model.before_run = fail
    requests = build(scripted, FIXED)
    setup.run(*requests)
    assert [request.finish_reason for request in requests] == ["error"] * 3

    setup.model.before_run = lambda batch: None
    requests = build(scripted, FIXED)
    setup.run(*requests)
    assert [scripted.result(request) for request in requests] == alone(scripted, FIXED)


def test_an_interrupt_in_the_middle_of_a_step_loses_nothing(scripted, tight):
    """Ctrl-C belongs to whoever pressed it; what others asked for goes on."""
    requests = build(scripted, FIXED)
    setup = scripted.setup(**tight)
    for request in requests:
        setup.engine.add(request)
    calls = iter(range(10_000))

    def interrupt(batch):
        if next(calls) % 3 == 1:
            raise KeyboardInterrupt

    setup.model.before_run = interrupt
    interrupts = 0
    while setup.engine.num_unfinished:
        try:
            setup.step()
        except KeyboardInterrupt:
            interrupts += 1
            setup.cache.check()
    assert interrupts > 3
    assert [scripted.result(request) for request in requests] == alone(scripted, FIXED)


def test_the_cache_denying_the_nth_request_for_room(scripted, tight, monkeypatch):
    """Whoever gets none ends with a reason or gets it later; nobody gets anything wrong."""
    expected = alone(scripted, FIXED)
    for nth in range(80):
        requests = build(scripted, FIXED)
        setup = scripted.setup(**tight)
        calls = iter(range(10_000))
        allocate = setup.cache.allocate
        monkeypatch.setattr(
            setup.cache,
            "allocate",
            lambda *asked, allocate=allocate, calls=calls, nth=nth: (
                next(calls) != nth and allocate(*asked)
            ),
        )
        run_as_they_arrive(setup, requests, FIXED)
        failed = [request for request in requests if request.finish_reason == "error"]
        assert all("no room in the KV cache" in request.error for request in failed)
        assert len(failed) <= 1
        for request, result in zip(requests, expected, strict=True):
            assert request in failed or scripted.result(request) == result


def test_neighbours_abort_and_preemption_in_one_step(scripted, tight):
    expected = alone(scripted, FIXED)
    requests = build(scripted, FIXED)
    setup = scripted.setup(**tight)

    def abort_what_was_preempted(step):
        for request in requests:
            if request.num_preemptions and request.finish_reason is None:
                setup.engine.abort(request.request_id)

    run_as_they_arrive(setup, requests, FIXED, abort_what_was_preempted)
    reasons = [request.finish_reason for request in requests]
    assert "abort" in reasons and set(reasons) != {"abort"}
    for request, result in zip(requests, expected, strict=True):
        assert request.finish_reason == "abort" or scripted.result(request) == result


# ---- shared beginnings ---------------------------------------------------------------------------
def busy(seed):
    """Many requests that begin in few ways and come close together, as under a system prompt."""
    rng = np.random.default_rng(seed)
    texts = rng.integers(0, 38, (2, 60)).tolist()
    variants = [
        {},
        {"temperature": 1.5, "logprobs": 2},
        {"prompt_logprobs": 1},
        {"cache_salt": "a"},
    ]
    return [
        (
            texts[rng.integers(2)][: rng.integers(1, 61)] + rng.integers(0, 38, 3).tolist(),
            int(rng.integers(1, 25)),
            {"seed": number, **variants[rng.choice([0, 0, 1, 1, 2, 3])]},
            int(rng.integers(0, 20)),
        )
        for number in range(12)
    ]


@pytest.mark.parametrize(
    ("bits", "windows"), [(256, False), (4, False), (0, False), (256, True), (4, True)]
)
def test_who_shares_a_beginning_gets_what_it_gets_alone(scripted, monkeypatch, bits, windows):
    """Full digests, and digests that collide; among preemptions, aborts and steps that raise."""
    digest = paged._digest

    def short(before, token_ids):
        return bytes([digest(before, token_ids)[0] % 2**bits])

    if bits < 256:
        monkeypatch.setattr(paged, "_digest", short)
    cached = preemptions = 0
    for seed in range(20):
        specifications = busy(seed)
        requests = build(scripted, specifications)
        rng = np.random.default_rng(seed)
        setup = scripted.setup(
            num_units=int(rng.integers(6, 12)),
            max_num_seqs=6,
            max_num_batched_tokens=int(rng.integers(6, 80)),
            enable_chunked_prefill=bool(rng.integers(2)),
            windows=windows,
        )

        def sometimes_fail(batch, rng=rng):
            if rng.random() < 0.05:
                raise MemoryError

        def abort(step, setup=setup, rng=rng):
            if rng.random() < 0.1:
                setup.engine.abort(str(rng.integers(12)))

        setup.model.before_run = sometimes_fail
        run_as_they_arrive(setup, requests, specifications, abort)
        cached += sum(request.num_cached_tokens for request in requests)
        preemptions += sum(request.num_preemptions for request in requests)
        results = alone(scripted, specifications, windows=windows)
        for request, expected in zip(requests, results, strict=True):
            if request.finish_reason == "abort":
                assert expected[0][: request.num_generated_tokens] == request.generated_token_ids
            elif request.error != "MemoryError: ":  # it failed twice, by chance
                assert scripted.result(request) == expected
    assert preemptions > 10, preemptions
    assert cached > (1000 if bits == 256 else 100), cached


def test_what_is_in_the_cache_is_not_computed(scripted):
    setup = scripted.setup(max_num_batched_tokens=64)
    prompt = [1, 2, 3] * 20
    for request_id, tokens, cached in [
        ("miss", prompt, 0),
        ("hit", prompt, 48),
        ("longer", prompt + [5] * 30, 48),
        ("partial", prompt[:40] + [5] * 20, 32),
        ("at a boundary", prompt[:48], 32),  # its last token must be computed, so its last block is
        ("short", prompt[:16], 0),
        ("other", [9, *prompt], 0),
    ]:
        setup.model.batches.clear()
        request = scripted.request(request_id, tokens, max_tokens=2, ignore_eos=True)
        setup.run(request)
        assert request.num_cached_tokens == cached, request_id
        computed = sum(batch.num_tokens for batch in setup.model.batches)
        assert computed == len(tokens) + 1 - cached
        assert (
            scripted.result(request) == alone(scripted, [(tokens, 2, {"ignore_eos": True}, 0)])[0]
        )


def test_prompt_logprobs_need_every_row(scripted):
    setup = scripted.setup()
    setup.run(scripted.request("plain", [1, 2] * 20))
    request = scripted.request("all", [1, 2] * 20, prompt_logprobs=0)
    setup.run(request)
    assert request.num_cached_tokens == 0
    assert len(request.prompt_logprobs) == 40


def test_requests_that_come_together_share_as_soon_as_one_is_through(scripted):
    """n completions of one prompt: only what one step takes is computed more than once."""
    setup = scripted.setup(max_num_batched_tokens=96, max_num_seqs=8)
    prompt = list(range(30)) * 2
    requests = [scripted.request(str(n), prompt, max_tokens=4, ignore_eos=True) for n in range(5)]
    for request in requests:
        setup.engine.add(request)
    setup.step()
    assert [batch.num_tokens for batch in setup.model.batches] == [60 + 36]
    setup.step()
    # One decodes, four have 48 of 60 tokens from it: the second gave back what it had computed.
    assert setup.model.batches[-1].num_tokens == 1 + 4 * 12
    assert [request.num_cached_tokens for request in requests] == [0, 12, 48, 48, 48]
    used = setup.cache.num_total_tokens - setup.cache.num_free_tokens
    assert used == (3 + 5) * UNIT
    setup.run()
    assert len({tuple(request.token_ids) for request in requests}) == 1


def test_a_preempted_request_finds_what_it_computed(scripted):
    setup = scripted.setup(num_units=6, max_num_seqs=2)
    old = scripted.request("old", [1] * 40, max_tokens=16, ignore_eos=True)
    young = scripted.request("young", [2] * 30, max_tokens=30, ignore_eos=True)
    setup.engine.add(old)
    setup.engine.add(young)
    while not young.num_preemptions:
        setup.step()
    assert young.num_tokens > 32
    setup.model.batches.clear()
    while young.num_computed_tokens == 0:
        setup.step()
    assert setup.model.batches[-1].positions[-1] == young.num_tokens - 2
    assert "young" in setup.model.batches[-1].request_ids
    assert setup.model.batches[-1].num_tokens < 20  # not all it has: its first block is still there
    assert young.num_cached_tokens == 0  # it computed all of its prompt once
    setup.run()
    assert scripted.result(young) == alone(scripted, [([2] * 30, 30, {"ignore_eos": True}, 0)])[0]


def test_a_failed_request_leaves_nothing_to_be_found(scripted):
    prompt = [1, 2, 3] * 20
    setup = scripted.setup(max_num_batched_tokens=32)
    setup.run(scripted.request("good", prompt))
    for name in ("bad", "bad again"):
        request = scripted.request(name, [*prompt, scripted.POISON, *prompt])
        setup.run(request)
        assert request.finish_reason == "error"
        assert request.num_cached_tokens == (48 if name == "bad" else 0)
    for index in range(2):
        pool = setup.cache.layer(index)
        assert np.isfinite(pool.k).all() and np.isfinite(pool.v).all()
    after = scripted.request("after", prompt)
    setup.run(after)
    assert after.num_cached_tokens == 0
    assert scripted.result(after) == alone(scripted, [(prompt, 8, {}, 0)])[0]


@pytest.mark.parametrize("salt", ["", 5, b"x"])
def test_a_salt_is_a_text(scripted, salt):
    setup = scripted.setup()
    with pytest.raises(InvalidRequestError, match=r"cache_salt is .*, expected a non-empty string"):
        setup.engine.add(scripted.request("a", [1], cache_salt=salt))


# ---- odds and ends -------------------------------------------------------------------------------
def test_unseeded_requests_differ_from_each_other_and_repeat_with_the_engine_seed(scripted):
    def run(seed):
        setup = scripted.setup(seed=seed)
        requests = [scripted.request(str(i), [1, 2], temperature=2.0) for i in range(4)]
        setup.run(*requests)
        return [tuple(request.generated_token_ids) for request in requests]

    assert run(0) == run(0)
    assert run(0) != run(1)
    assert len(set(run(0))) == 4


def test_a_stop_id_ends_it_and_min_tokens_puts_it_off(scripted):
    setup = scripted.setup()
    plain = scripted.request("plain", [1, 2, 3], max_tokens=20, ignore_eos=True)
    setup.run(plain)
    stop = plain.generated_token_ids[4]
    first = plain.generated_token_ids.index(stop)
    stopped = scripted.request("stopped", [1, 2, 3], max_tokens=20, stop_token_ids=[stop])
    setup.run(stopped)
    assert stopped.generated_token_ids == plain.generated_token_ids[: first + 1]
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", stop)

    later = scripted.request(
        "later", [1, 2, 3], max_tokens=20, stop_token_ids=[stop], min_tokens=first + 2
    )
    setup.run(later)
    assert stop not in later.generated_token_ids[: first + 2]


def test_metrics_are_in_order(scripted):
    setup = scripted.setup()
    request = scripted.request("a", [1, 2, 3], ignore_eos=True)
    setup.run(request)
    metrics = request.metrics
    times = [
        metrics.arrival_time,
        metrics.first_scheduled_time,
        metrics.first_token_time,
        metrics.last_token_time,
        metrics.finished_time,
    ]
    assert times == sorted(times) and metrics.first_token_time < metrics.last_token_time


def test_progress_tells_new_tokens_and_ends(scripted):
    setup = scripted.setup(max_num_batched_tokens=32)
    request = scripted.request("a", [1] * 40, max_tokens=2, ignore_eos=True)
    setup.engine.add(request)
    assert setup.step() == []  # a chunk of the prompt
    for number in range(2):
        ((moved, new_token_ids),) = setup.step()
        assert moved is request and list(new_token_ids) == request.generated_token_ids[number:]
    assert request.finish_reason == "length"
    assert setup.step() == []


@pytest.mark.parametrize(
    "prompt, options, message",
    [
        ([], {}, "the prompt is empty"),
        ([1, 40], {}, "prompt token id is 40, expected an integer from 0 to 39"),
        ([-1], {}, "prompt token id is -1"),
        ([True], {}, "prompt token id is True"),
        ([1.0], {}, "prompt token id is 1.0"),
        ([1], {"allowed_token_ids": [3, 77]}, "allowed_token_ids entry is 77"),
        ([1], {"logit_bias": {50: 1.0}}, "logit_bias key is 50"),
        ([1], {"bad_words": [[5, 99]]}, "token id of a bad word is 99"),
        ([1] * 200, {}, "the prompt has 200 tokens, expected at most 199"),
        ([1] * 190, {"max_tokens": 11}, "max_tokens is 11, expected 1 to 10"),
        ([1] * 90, {"max_tokens": 8}, "need KV cache for 97 tokens, the whole cache holds 96"),
    ],
)
def test_what_can_never_run_is_refused_with_the_numbers(scripted, prompt, options, message):
    setup = scripted.setup(num_units=6 if len(prompt) == 90 else 64, max_model_len=200)
    with pytest.raises(InvalidRequestError, match=message) as caught:
        setup.engine.add(scripted.request("a", prompt, **options))
    assert "\n" not in str(caught.value)
    setup.expect_idle()


def test_the_largest_request_that_fits_runs(scripted):
    setup = scripted.setup(num_units=6, max_model_len=97)
    request = scripted.request("a", [1] * 90, max_tokens=7, ignore_eos=True)
    setup.run(request)
    assert len(request.generated_token_ids) == 7
    assert setup.cache.num_total_tokens == 6 * UNIT


def test_an_id_can_be_taken_only_once_at_a_time(scripted):
    setup = scripted.setup()
    setup.engine.add(scripted.request("a", [1]))
    with pytest.raises(InvalidRequestError, match="'a' is taken"):
        setup.engine.add(scripted.request("a", [1]))
    setup.engine.abort("a")
    setup.engine.abort("a")
    setup.run(scripted.request("a", [1]))


def test_forward_is_what_sampling_saw(scripted):
    setup = scripted.setup(max_num_batched_tokens=32)
    request = scripted.request("a", [1, 2, 3] * 20, max_tokens=5, ignore_eos=True)
    setup.run(request)
    logits = setup.engine.forward(request.token_ids)
    assert logits.shape == (65, 40) and logits.dtype == np.float32
    assert logits[59:-1].argmax(axis=1).tolist() == request.generated_token_ids
    setup.expect_idle()


def test_forward_beside_running_requests_changes_nothing(scripted):
    expected = alone(scripted, FIXED)
    requests = build(scripted, FIXED)
    setup = scripted.setup()
    run_as_they_arrive(setup, requests, FIXED, forward_thirty(setup.engine))
    assert [scripted.result(request) for request in requests] == expected


def forward_thirty(engine: Engine):
    def after_step(step):
        assert engine.forward([step % 38] * 30).shape == (30, 40)

    return after_step


def test_forward_refuses_what_it_cannot_take(scripted):
    setup = scripted.setup(num_units=4, max_model_len=500)
    with pytest.raises(InvalidRequestError, match="forward got 0 tokens, expected 1 to 500"):
        setup.engine.forward([])
    with pytest.raises(InvalidRequestError, match="token id is 40"):
        setup.engine.forward([40])
    with pytest.raises(OutOfMemoryError, match="for 65 tokens, free are 64 of 64"):
        setup.engine.forward([1] * 65)
    setup.expect_idle()


def test_priorities_are_for_the_policy_that_heeds_them(scripted):
    setup = scripted.setup()
    urgent = scripted.request("a", [1])
    urgent.priority = -1
    with pytest.raises(InvalidRequestError, match=r"priority is -1, expected 0: .* 'fcfs'"):
        setup.engine.add(urgent)
    setup = scripted.setup(scheduling_policy="priority")
    setup.run(urgent)


@quick
@given(
    specifications=REQUESTS,
    options=engine_options(),
    priorities=st.lists(st.integers(-1, 1), min_size=6, max_size=6),
    threshold=st.integers(0, 20),
)
def test_priorities_and_chunk_bounds_change_nobodys_tokens(
    scripted, specifications, options, priorities, threshold
):
    if options["enable_chunked_prefill"]:
        options["long_prefill_token_threshold"] = threshold
    setup = scripted.setup(scheduling_policy="priority", **options)
    requests = build(scripted, specifications)
    for request, priority in zip(requests, priorities, strict=False):
        request.priority = priority

    def first_runs_on(step):
        places = [(request.priority, request.arrival) for request in running]
        assert places == sorted(places)

    running = setup.engine._scheduler.running
    run_as_they_arrive(setup, requests, specifications, first_runs_on)
    expected = alone(scripted, specifications, windows=options["windows"])
    assert [scripted.result(request) for request in requests] == expected


def test_one_thread_launches_kernels(scripted):
    """The first that steps owns the engine; before, any may add."""
    setup = scripted.setup()
    request = scripted.request("a", [1], ignore_eos=True)
    caught = []

    def elsewhere(call, *arguments):
        def attempt():
            try:
                call(*arguments)
            except WrongThreadError as error:
                caught.append(str(error))

        thread = threading.Thread(target=attempt, name="other")
        thread.start()
        thread.join()
        return len(caught)

    assert elsewhere(setup.engine.add, request) == 0
    setup.step()
    assert elsewhere(setup.engine.step) == 1
    assert elsewhere(setup.engine.forward, [1]) == 2
    assert elsewhere(setup.engine.abort, "a") == 3
    assert elsewhere(setup.engine.add, scripted.request("b", [1])) == 4
    assert elsewhere(setup.engine.check, scripted.request("b", [1])) == 4
    assert set(caught) == {
        "the engine was called from thread 'other', expected 'MainThread', which ran its first "
        "step: one thread launches kernels (EngineThread and AsyncLLM may be called from any)"
    }
    setup.run()


def test_many_requests_leave_nothing_behind(scripted):
    setup = scripted.setup(num_units=24, max_num_seqs=8, max_num_batched_tokens=64)
    rng = np.random.default_rng(1)
    for number in range(150):
        request = scripted.request(
            str(number),
            rng.integers(0, 38, rng.integers(1, 60)).tolist(),
            max_tokens=int(rng.integers(1, 12)),
        )
        setup.engine.add(request)
        if number % 10 == 3:
            setup.engine.abort(str(number - 2))
        setup.step()
    setup.run()
