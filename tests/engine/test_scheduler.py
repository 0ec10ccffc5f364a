"""Who gets how many tokens: budgets, order, chunks, preemption."""

from __future__ import annotations

import pytest

from pace_nb.config import CacheConfig, EngineConfig
from pace_nb.engine.request import RequestStatus
from pace_nb.engine.scheduler import Scheduler
from pace_nb.kv_cache import create_cache
from pace_nb.kv_cache.base import UNIT, KVCacheConfig

MODEL = KVCacheConfig(num_layers=1, num_kv_heads=1, head_dim=2, dtype="float32")


@pytest.fixture
def make(scripted):
    """A scheduler and the requests a, b, c, ... with prompts of the given lengths in its line."""

    def build(*lengths, num_units=100, kind="contiguous", **options):
        size = CacheConfig(kind, num_units * UNIT, 64, enable_prefix_caching=True)
        cache = create_cache(MODEL, size)
        scheduler = Scheduler(EngineConfig(**options), cache)
        requests = [
            scripted.request(name, [1] * length, max_tokens=99)
            for name, length in zip("abcdefgh", lengths, strict=False)
        ]
        for arrival, request in enumerate(requests):
            request.arrival = arrival
            scheduler.add(request)
        return scheduler, requests

    return build


def turn(scheduler):
    """Schedule and compute: {request id: tokens}. Those that catch up generate a token."""
    scheduled = scheduler.schedule()
    for request, num_tokens in scheduled:
        request.num_computed_tokens += num_tokens
        if not request.num_behind:
            computed = request.num_computed_tokens
            scheduler._cache.commit(request.request_id, request.token_ids, computed, None)
            request.token_ids.append(7)
    scheduler._cache.check()
    return {request.request_id: num_tokens for request, num_tokens in scheduled}


def test_prompts_share_the_budget_in_order_of_arrival(make):
    scheduler, _ = make(5, 8, 4, max_num_batched_tokens=10, max_num_seqs=4)
    assert turn(scheduler) == {"a": 5, "b": 5}
    assert turn(scheduler) == {"a": 1, "b": 3, "c": 4}
    assert turn(scheduler) == {"a": 1, "b": 1, "c": 1}


def test_decoding_comes_before_an_older_prompt_that_is_not_through(make):
    scheduler, _ = make(30, 2, max_num_batched_tokens=8, max_num_seqs=4)
    assert turn(scheduler) == {"a": 8}
    scheduler._max_num_batched_tokens = 26
    assert list(turn(scheduler).items()) == [("a", 22), ("b", 2)]
    long = make(6, 50, max_num_batched_tokens=8, max_num_seqs=4)[0]
    assert turn(long) == {"a": 6, "b": 2}
    assert list(turn(long).items()) == [("a", 1), ("b", 7)]


def test_no_more_than_max_num_seqs_run(make):
    scheduler, requests = make(2, 2, 2, max_num_seqs=2)
    assert turn(scheduler) == {"a": 2, "b": 2}
    assert turn(scheduler) == {"a": 1, "b": 1}
    scheduler.finish(requests[0])
    assert turn(scheduler) == {"b": 1, "c": 2}


def test_without_chunks_a_prompt_runs_whole_or_waits(make):
    options = {"max_num_batched_tokens": 10, "max_num_seqs": 8, "enable_chunked_prefill": False}
    scheduler, _ = make(6, 5, 3, **options)
    assert turn(scheduler) == {"a": 6}  # b does not fit, and c does not overtake it
    assert turn(scheduler) == {"a": 1, "b": 5, "c": 3}


def test_without_chunks_one_prompt_per_step_may_exceed_the_budget(make):
    options = {"max_num_batched_tokens": 10, "max_num_seqs": 8, "enable_chunked_prefill": False}
    scheduler, _ = make(3, 25, 12, **options)
    assert turn(scheduler) == {"a": 3}
    assert turn(scheduler) == {"a": 1, "b": 25}
    assert turn(scheduler) == {"a": 1, "b": 1, "c": 12}


def test_a_request_without_room_waits_and_nobody_overtakes_it(make):
    scheduler, requests = make(UNIT + 1, 3 * UNIT, 1, num_units=4)
    assert turn(scheduler) == {"a": UNIT + 1}
    assert turn(scheduler) == {"a": 1}
    scheduler.finish(requests[0])
    assert turn(scheduler) == {"b": 3 * UNIT, "c": 1}


def test_the_youngest_gives_way_and_keeps_its_place_in_the_line(make):
    scheduler, (a, b, c, d) = make(2 * UNIT - 1, UNIT, UNIT, 1, num_units=4, max_num_seqs=3)
    assert turn(scheduler) == {"a": 2 * UNIT - 1, "b": UNIT, "c": UNIT}
    assert turn(scheduler) == {"a": 1, "b": 1}  # b needed a second unit, and took it from c
    assert c.status is RequestStatus.WAITING
    assert (c.num_computed_tokens, c.num_preemptions, c.num_tokens) == (0, 1, UNIT + 1)
    assert scheduler.waiting == [c, d]
    assert turn(scheduler) == {"a": 1}  # a takes a third one from b, who had none left to take
    assert scheduler.waiting == [b, c, d] and scheduler.running == [a]
    scheduler.finish(a)
    assert turn(scheduler) == {"b": UNIT + 2, "c": UNIT + 1}
    assert (b.num_preemptions, a.num_preemptions) == (1, 0)


def test_one_that_gave_way_has_no_guesses_any_more(make):
    """Computed anew in chunks, its guesses would be laid behind a part of its tokens: stored in
    places that are not theirs, beyond the budget, and without room."""
    scheduler, (a, b) = make(UNIT, UNIT, num_units=3, max_num_batched_tokens=40, max_num_seqs=4)
    assert turn(scheduler) == {"a": UNIT, "b": UNIT}
    a.draft_token_ids, b.draft_token_ids = (5,), (6, 7)
    assert turn(scheduler) == {"a": 1}  # the third unit is a's
    assert (b.num_preemptions, b.draft_token_ids) == (1, ())
    assert a.draft_token_ids == (5,)
    scheduler.finish(a)
    scheduler._max_num_batched_tokens = 8
    assert scheduler.schedule() == [(b, 8)]
    assert not b.draft_token_ids


def test_the_oldest_is_never_preempted(make):
    scheduler, requests = make(*[UNIT] * 6, num_units=7)
    for _ in range(6 * UNIT - 1):
        oldest = scheduler.running[0] if scheduler.running else requests[0]
        assert oldest.request_id in turn(scheduler)
    assert requests[0].num_preemptions == 0
    assert all(request.num_preemptions for request in requests[3:])


def test_finishing_a_waiting_or_a_running_request_gives_everything_back(make):
    scheduler, (a, b) = make(5, 5, max_num_seqs=1)
    turn(scheduler)
    scheduler.finish(b)
    scheduler.finish(a)
    assert not scheduler.waiting and not scheduler.running
    assert scheduler._cache.num_free_tokens == scheduler._cache.num_total_tokens
    assert a.status is b.status is RequestStatus.FINISHED
    assert scheduler.schedule() == []


def test_the_first_schedule_is_noted_once(make):
    scheduler, (a, b) = make(UNIT, UNIT, num_units=3)
    turn(scheduler)
    times = [request.metrics.first_scheduled_time for request in (a, b)]
    assert None not in times
    for _ in range(UNIT + 2):
        turn(scheduler)
    assert b.num_preemptions
    scheduler.finish(a)
    turn(scheduler)
    assert b.metrics.first_scheduled_time == times[1]


def test_one_long_prompt_gets_no_more_than_the_threshold(make):
    options = {"max_num_batched_tokens": 20, "max_num_seqs": 4, "long_prefill_token_threshold": 8}
    scheduler, _ = make(30, 7, 9, **options)
    assert turn(scheduler) == {"a": 8, "b": 7, "c": 5}
    assert list(turn(scheduler).items()) == [("b", 1), ("a", 8), ("c", 4)]


# ---- priorities ----------------------------------------------------------------------------------
def prioritised(make, priorities, *lengths, **options):
    scheduler, requests = make(*lengths, scheduling_policy="priority", **options)
    scheduler.waiting.clear()
    for request, priority in zip(requests, priorities, strict=True):
        request.priority = priority
        scheduler.add(request)
    return scheduler, requests


def test_the_most_urgent_goes_first_and_then_the_oldest(make):
    scheduler, _ = prioritised(make, [5, -1, 5, 0], 4, 4, 4, 4, max_num_seqs=3)
    assert list(turn(scheduler)) == ["b", "d", "a"]
    assert [request.request_id for request in scheduler.running] == ["b", "d", "a"]


def test_priorities_count_for_nothing_where_the_policy_is_fcfs(make):
    scheduler, requests = make(4, 4, 4, max_num_seqs=2)
    requests[2].priority = -9
    assert list(turn(scheduler)) == ["a", "b"]


def test_the_least_urgent_and_of_those_the_youngest_gives_way(make):
    scheduler, (a, b, c) = prioritised(
        make, [1, 0, 1], UNIT, UNIT, UNIT, num_units=4, max_num_seqs=3
    )
    assert turn(scheduler) == {"a": UNIT, "b": UNIT, "c": UNIT}
    assert list(turn(scheduler).items()) == [("b", 1), ("a", 1)]  # both needed a unit; one was free
    assert [one.num_preemptions for one in (a, b, c)] == [0, 0, 1]
    for _ in range(UNIT):
        turn(scheduler)
    assert (a.num_preemptions, b.num_preemptions) == (1, 0)  # the older, but less urgent
    assert scheduler.running == [b] and scheduler.waiting == [a, c]


def test_a_more_urgent_request_does_not_stop_one_that_runs(make):
    """As in vLLM: it goes before all that wait, and takes room only when it runs."""
    scheduler, (a, b) = prioritised(make, [3, 0], 2 * UNIT, 3 * UNIT, num_units=4)
    scheduler.waiting.remove(b)
    assert turn(scheduler) == {"a": 2 * UNIT}
    scheduler.add(b)
    assert turn(scheduler) == {"a": 1}
    scheduler.finish(a)
    assert turn(scheduler) == {"b": 3 * UNIT}


# ---- what the cache has already (all prompts are of the same token, so they begin alike) ---------
def test_what_the_cache_has_takes_nothing_of_the_budget(make):
    scheduler, requests = make(40, 40, 60, kind="paged", max_num_batched_tokens=42, max_num_seqs=4)
    assert turn(scheduler) == {"a": 40, "b": 2}
    # b has what a computed, two blocks, and so has c: 8 of b, then what is left for c
    assert turn(scheduler) == {"a": 1, "b": 8, "c": 28}
    assert [request.num_cached_tokens for request in requests] == [0, 30, 32]


def test_without_chunks_only_what_is_left_of_a_prompt_must_fit(make):
    options = {"max_num_batched_tokens": 40, "enable_chunked_prefill": False, "kind": "paged"}
    scheduler, _ = make(40, 60, 60, **options)
    assert turn(scheduler) == {"a": 40}
    assert turn(scheduler) == {"a": 1, "b": 28}  # 60 - 32; with c it would be more than 40


def test_a_request_that_is_not_admitted_holds_nothing_of_what_it_found(make):
    scheduler, (a, b) = make(40, 80, kind="paged", num_units=5)
    assert turn(scheduler) == {"a": 40}
    for _ in range(3):
        assert turn(scheduler) == {"a": 1}
        assert (b.num_computed_tokens, b.num_cached_tokens) == (0, 0)
        assert scheduler._cache.num_free_tokens == 2 * UNIT
    scheduler.finish(a)
    assert scheduler._cache.num_free_tokens == 5 * UNIT
    assert turn(scheduler) == {"b": 48}
    assert b.num_cached_tokens == 32


def test_one_that_gave_way_goes_on_from_what_is_still_there(make):
    scheduler, (a, b) = make(46, 60, kind="paged", num_units=5, max_num_batched_tokens=47)
    assert turn(scheduler) == {"a": 46}
    assert turn(scheduler) == {"a": 1, "b": 28}  # 2 of its 4 blocks are a's
    assert (b.num_preemptions, scheduler._cache.num_free_tokens) == (0, 0)
    assert turn(scheduler) == {"a": 1, "b": 1}
    assert turn(scheduler) == {"a": 1}  # its 49th token takes a block from b
    assert b.num_preemptions == 1
    scheduler.finish(a)
    # Of 62 tokens 32 are a's, and 16 its own, which nobody has taken since.
    assert turn(scheduler) == {"b": 14}
    assert b.num_cached_tokens == 32
