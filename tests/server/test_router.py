"""Which engine gets a prompt, and how many may come, with engines that only count."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import threading

import pytest

from pace_nb.errors import ApiError
from pace_nb.sampling_params import SamplingParams
from pace_nb.server.limits import Limits
from pace_nb.server.mailbox import Mailbox
from pace_nb.server.router import AFFINITY_SLACK, PIECE, Router

PARAMS = SamplingParams()


class CountingEngine:
    def __init__(self, index):
        self.index, self.ready, self.facts = index, True, {"num_kv_tokens": 1000}
        self.num_sequences = self.num_waiting_tokens = 0
        self.prompts = []

    def submit(self, mailbox, prompt_index, prompt, prompt_token_ids, params, **options):
        self.num_sequences += params.n
        self.prompts.append(prompt_token_ids)
        return prompt_token_ids


@pytest.fixture
def engines():
    return [CountingEngine(index) for index in range(3)]


def router(engines, **limits):
    return Router(engines, 4, Limits(**limits))


def submit(router, ids, salt=None, params=PARAMS):
    engine, _ = router.submit(
        Mailbox(1, 1000), 0, None, ids, params, cache_salt=salt, priority=0, arrival_time=0.0
    )
    return engine.index


def test_the_least_busy_engine_is_chosen_and_equals_take_turns(engines):
    chosen = router(engines)
    assert [submit(chosen, [i] * 5) for i in range(6)] == [0, 1, 2, 0, 1, 2]
    engines[1].num_sequences = 0
    assert [submit(chosen, [i] * 5) for i in range(3)] == [1, 1, 0]


def test_a_prompt_goes_where_its_beginning_is(engines):
    chosen = router(engines)
    beginning = list(range(PIECE))
    first = submit(chosen, [*beginning, 1, 2])
    submit(chosen, [9] * PIECE), submit(chosen, [8] * PIECE)
    engines[first].num_sequences += 2
    assert submit(chosen, [*beginning, 3]) == first
    assert submit(chosen, [*beginning, 3], salt="other") != first  # it shares nothing with it
    assert submit(chosen, beginning[:-1]) != first  # shorter than what is compared


def test_the_longest_beginning_counts(engines):
    chosen = router(engines)
    short, long = [1] * PIECE, [1] * 2 * PIECE
    a = submit(chosen, short + [2] * PIECE)
    engines[a].num_sequences += AFFINITY_SLACK + 1
    b = submit(chosen, long)
    assert a != b
    engines[a].num_sequences = engines[b].num_sequences = 2
    assert submit(chosen, [*long, 7]) == b
    assert submit(chosen, short + [2] * PIECE + [7]) == a


def test_affinity_gives_way_where_an_engine_is_too_busy(engines):
    chosen = router(engines)
    ids = [1] * PIECE
    first = submit(chosen, ids)
    engines[first].num_sequences = AFFINITY_SLACK
    assert submit(chosen, ids) == first
    assert submit(chosen, ids) != first


def test_engines_that_are_not_ready_get_nothing(engines):
    chosen = router(engines)
    ids = [1] * PIECE
    engines[submit(chosen, ids)].ready = False
    assert {submit(chosen, [i] * PIECE) for i in range(1, 5)} == {1, 2}
    engines[1].ready = engines[2].ready = False
    with pytest.raises(ApiError, match="no engine") as caught:
        submit(chosen, ids)
    assert caught.value.status == 503
    with pytest.raises(ApiError, match="no engine"):
        chosen.admit(1)


def test_R10_admitted_are_exactly_as_many_as_may_be(engines):
    chosen = router(engines[:2], max_queued_requests=1)
    assert chosen.capacity == 10

    async def burst():
        async def post():
            try:
                return chosen.admit(1)
            except ApiError as error:
                assert error.status == 503 and "full" in str(error)
                return None

        return await asyncio.gather(*(post() for _ in range(1000)))

    admitted = [one for one in asyncio.run(burst()) if one is not None]
    assert len(admitted) == 10 == chosen.num_admitted
    admitted[0].release()
    admitted[0].release()
    assert chosen.num_admitted == 9
    chosen.admit(1)
    with pytest.raises(ApiError):
        chosen.admit(1)


def test_R10_a_request_larger_than_the_queue_is_taken_alone(engines):
    chosen = router(engines[:1], max_queued_requests=1)
    large = chosen.admit(100)
    with pytest.raises(ApiError):
        chosen.admit(1)
    large.release()
    chosen.admit(1)
    with pytest.raises(ApiError):
        chosen.admit(100)


def test_R13_one_client_cannot_take_all(engines):
    chosen = router(engines, max_requests_per_client=2)
    first, _ = chosen.admit(5, "a"), chosen.admit(1, "a")
    with pytest.raises(ApiError, match="2 requests under way") as caught:
        chosen.admit(1, "a")
    assert caught.value.status == 429
    chosen.admit(1, "b").release()
    first.release()
    first.release()
    chosen.admit(1, "a")
    assert chosen.clients == {"a": 2} and chosen.num_admitted == 2


def test_R11_tokens_that_wait_are_bounded(engines):
    chosen = router(engines[:1])
    submit(chosen, [1] * 5000)  # alone, it is not for the queue to judge
    engines[0].num_waiting_tokens = 3999
    submit(chosen, [1])
    with pytest.raises(ApiError, match="tokens of prompts wait, at most 4000") as caught:
        submit(chosen, [1, 2])
    assert caught.value.status == 503
    few = router(engines[:1], max_queued_tokens=10)
    engines[0].num_waiting_tokens = 8
    submit(few, [1, 2])
    with pytest.raises(ApiError, match="at most 10"):
        submit(few, [1, 2, 3])


def test_beginnings_that_are_remembered_are_bounded(engines, monkeypatch):
    monkeypatch.setattr("pace_nb.server.router.MAX_BEGINNINGS", 5)
    chosen = router(engines)
    for i in range(10):
        submit(chosen, [i] * 2 * PIECE)
    assert len(chosen._beginnings) == 5


# ---- real engines ------------------------------------------------------------------------------
CORES = len(os.sched_getaffinity(0))


@pytest.mark.skipif(CORES < 2, reason="two engines need two cores")
def test_two_engines_share_the_work_and_one_that_dies_takes_only_its_own(start, waiting):
    server = start("--data-parallel-size", "2", threads=()).listening()
    waiting(lambda: server.get("/metrics").body.count(b"engine_up{") == 2, 10)
    waiting(lambda: server.metric("engine_up") == 2, 300, server.log)
    first, second = pids = server.engine_pids()
    assert os.sched_getaffinity(first).isdisjoint(os.sched_getaffinity(second))
    assert os.sched_getaffinity(first) | os.sched_getaffinity(second) == os.sched_getaffinity(0)

    def by_engine(name):
        found = {}
        for line in server.get("/metrics").body.decode().splitlines():
            match = re.match(rf'pace_nb:{name}{{engine="(\d)".*}} (\S+)', line)
            if match:
                found[int(match[1])] = float(match[2])
        return found

    prompt = [7] * 200  # a beginning stays with the engine that has computed it
    for _ in range(4):
        assert server.complete(prompt, max_tokens=1).status == 200
    assert sorted(by_engine("prompt_tokens_total").values()) == [0, 800]
    assert sorted(by_engine("prefix_cache_hits_total").values())[1] >= 3 * 192

    events = []
    threads = [
        threading.Thread(
            target=lambda i=i: events.append(
                server.events(prompt=[i] * 3, max_tokens=900, ignore_eos=True)
            )
        )
        for i in range(6)
    ]
    for thread in threads:
        thread.start()
    waiting(lambda: sorted(by_engine("num_requests_running").values()) == [3, 3], 10, server.log)
    os.kill(pids[0], signal.SIGKILL)
    waiting(lambda: 0.0 in by_engine("engine_up").values(), 5)
    assert server.get("/health").status == 200
    assert server.complete(max_tokens=1).status == 200
    for thread in threads:
        thread.join()
    failed = [one for one in events if '"error"' in one[-2]]
    assert len(failed) == 3 and all(one[-1] == "[DONE]" for one in events)
    assert all('"finish_reason":"length"' in one[-2] for one in events if one not in failed)
    waiting(lambda: server.metric("engine_up") == 2, 60, server.log)
    server.idle()
    assert server.stop() == 0
    for pid in (second, *server.engine_pids()):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
