"""A stateful test: whatever happens in whatever order, each request gets what it gets alone.

The scripted model of tests/engine stands for the real one. Requests arrive, alone or 63 at a time,
with priorities and salts; steps run; requests are given up; the cache denies room, the model or the
cache raises, all at any moment, in one step too, with guesses that hold or not, or without any.
The model sees everything, or parts in some layers (windows, chunks), or stores other keys in long
sequences. After every step the cache must be sound; at the end it must be empty, and the next
request must be served.
"""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from pace_nb.config import KV_CACHE_KINDS
from pace_nb.engine.speculative import Draft
from tests.engine.conftest import Scripted

BEGINNINGS = [[7, 3, 9, 1] * 12, [2] * 40]
PARAMS = [
    {},
    {"temperature": 1.0, "seed": 1, "logprobs": 2},
    {"prompt_logprobs": 1, "temperature": 0.8, "seed": 2, "top_p": 0.8},
    {"cache_salt": "a", "repetition_penalty": 1.3, "logprobs": 0},
]
INJECTED = "injected"


class Foreseeing:
    """Guesses what a request gets alone; every third guess is wrong, and every seventh call fails.

    `alone` gives a request that was made as the one with an id and had an engine to itself.
    `known`: who was guessed for and not forgotten yet.
    """

    def __init__(self, alone):
        self.alone, self.futures, self.count = alone, {}, 0
        self.known = set()

    def propose(self, requests, limits):
        self.count += 1
        self.known.update(request.request_id for request in requests)
        if self.count % 7 == 0:
            raise RuntimeError(INJECTED)
        return [
            Draft([t if (self.count + i) % 3 else (t + 1) % 38 for i, t in enumerate(future)])
            for future in map(self._coming, requests, limits)
        ]

    def _coming(self, request, limit):
        name = request.request_id
        if name not in self.futures:
            self.futures[name] = self.alone(name).generated_token_ids
        done = request.num_generated_tokens
        return self.futures[name][done : done + limit]

    def forget(self, request):
        self.known.discard(request.request_id)


class History(RuleBasedStateMachine):
    """One engine and all that was asked of it."""

    @initialize(
        kind=st.sampled_from(KV_CACHE_KINDS),
        units=st.integers(5, 14),
        budget=st.integers(8, 90),
        chunked=st.booleans(),
        max_num_seqs=st.integers(1, 8),
        num_guesses=st.sampled_from([0, 1, 5, 33]),
        model=st.sampled_from([{}, {"windows": True}, {"switch_length": 40}]),
    )
    def open(self, kind, units, budget, chunked, max_num_seqs, num_guesses, model):
        self.options = model
        self.asked = []  # (request, how to make it again)
        self.drafter = Foreseeing(
            lambda name: self._alone(
                *(([1, 2, 3], 8, {}) if name == "last" else self.asked[int(name)][1])
            )
        )
        speculative = {"method": "ngram", "num_speculative_tokens": num_guesses}
        given = {"speculative_config": speculative, "drafter": self.drafter} if num_guesses else {}
        self.setup = Scripted.setup(
            num_units=units,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget,
            enable_chunked_prefill=chunked,
            kv_cache=kind,
            block_size=None if kind == "contiguous" else 16,
            scheduling_policy="priority",
            **given,
            **model,
        )
        self.deny = self.fail_model = self.fail_commit = 0
        self.injected = 0
        cache, model = self.setup.cache, self.setup.model
        allocate, commit = cache.allocate, cache.commit

        def denying(request_id, num_tokens):
            if self.deny:
                self.deny -= 1
                return False
            return allocate(request_id, num_tokens)

        def failing_commit(*arguments):
            if self.fail_commit:
                self.fail_commit -= 1
                raise MemoryError(INJECTED)
            commit(*arguments)

        def failing_model(batch):
            if self.fail_model:
                self.fail_model -= 1
                raise RuntimeError(INJECTED)

        cache.allocate, cache.commit = denying, failing_commit
        model.before_run = failing_model

    @rule(
        beginning=st.sampled_from(BEGINNINGS),
        length=st.integers(0, 40),
        end=st.integers(0, 37),
        max_tokens=st.integers(1, 20),
        params=st.sampled_from(PARAMS),
        priority=st.integers(-1, 1),
    )
    def arrive(self, beginning, length, end, max_tokens, params, priority):
        self._add([*beginning[:length], end], max_tokens, params, priority)

    @precondition(lambda self: len(self.asked) < 100)
    @rule(num=st.sampled_from([1, 7, 31, 63]))
    def arrive_together(self, num):
        for number in range(num):
            self._add([number % 38, 5], 1 + number % 3, PARAMS[number % 4], 0)

    def _add(self, prompt, max_tokens, params, priority):
        request = Scripted.request(str(len(self.asked)), prompt, max_tokens=max_tokens, **params)
        request.priority = priority
        self.setup.engine.add(request)
        self.asked.append((request, (prompt, max_tokens, params)))

    def _alone(self, prompt, max_tokens, params):
        """A request that was made like this and had an engine to itself."""
        request = Scripted.request("x", prompt, max_tokens=max_tokens, **params)
        Scripted.setup(kv_cache="contiguous", **self.options).run(request)
        return request

    @rule(num=st.integers(1, 12))
    def step(self, num):
        for _ in range(num):
            self.setup.step()

    @rule(data=st.data())
    def abort(self, data):
        """Anybody: waiting, running, just preempted, ended, or not there at all."""
        number = data.draw(st.integers(0, max(0, len(self.asked))))
        self.setup.engine.abort(str(number))
        self.setup.cache.check()

    @rule(num=st.integers(1, 3))
    def deny_room(self, num):
        self.deny += num

    @rule(num=st.integers(1, 2))
    def fail_in_the_model(self, num):
        self.fail_model += num

    @rule()
    def fail_in_the_cache(self):
        self.fail_commit += 1

    @precondition(
        lambda self: any(r.num_preemptions and not r.finish_reason for r, _ in self.asked)
    )
    @rule()
    def abort_what_was_preempted_while_the_next_step_fails(self):
        self.fail_model += 1
        for request, _ in self.asked:
            if request.num_preemptions and request.finish_reason is None:
                self.setup.engine.abort(request.request_id)
                break
        self.setup.step()

    def teardown(self):
        if not hasattr(self, "setup"):
            return
        self.setup.run(Scripted.request("last", [1, 2, 3]))  # and all that is left
        assert not self.drafter.known
        for request, (prompt, max_tokens, params) in self.asked:
            expected = self._alone(prompt, max_tokens, params)
            generated = request.generated_token_ids
            if request.finish_reason == "abort" or (request.error and INJECTED in request.error):
                assert expected.generated_token_ids[: len(generated)] == generated
            elif request.error and "no room in the KV cache" in request.error:
                pass  # room was denied although it was there
            else:
                assert Scripted.result(request) == Scripted.result(expected)


TestAnyHistory = History.TestCase
TestAnyHistory.settings = settings(
    max_examples=60,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)


def test_the_machine_can_see_a_mistake(monkeypatch):
    """With a scheduler that forgets to give room back, it fails."""
    from pace_nb.engine import scheduler

    def forget(self, request, *, zero=False):
        line = self.running if request in self.running else self.waiting
        line.remove(request)
        request.status = scheduler.RequestStatus.FINISHED

    monkeypatch.setattr(scheduler.Scheduler, "finish", forget)
    machine = History()
    machine.open("paged", 8, 40, True, 4, 0, {})
    machine.arrive([5] * 20, 20, 3, 4, {}, 0)
    with pytest.raises(AssertionError):
        machine.teardown()
