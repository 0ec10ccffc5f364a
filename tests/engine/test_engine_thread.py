"""Any thread may ask; one runs the engine; whatever fails, the next is served."""

from __future__ import annotations

import threading
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pace_nb.engine import submissions as submissions_module
from pace_nb.engine.completion import Completion, Submission
from pace_nb.engine.engine_thread import EngineThread
from pace_nb.errors import (
    EngineBusyError,
    EngineClosedError,
    InvalidRequestError,
    PaceError,
    WrongThreadError,
)

SECONDS = 30


class Listener:
    """Collects a submission's news; `wait` returns once it has finished."""

    def __init__(self):
        self.news = []
        self._done = threading.Event()

    def __call__(self, news):
        self.news.append(news)
        if news.finished:
            self._done.set()

    def wait(self):
        assert self._done.wait(SECONDS), "it never ended"
        return self

    @property
    def token_ids(self):
        return [i for news in self.news for one in news.outputs for i in one.token_ids]

    @property
    def reasons(self):
        return [one.finish_reason for one in self.news[-1].outputs]


@pytest.fixture
def make(scripted):
    def build(name, prompt=(1, 2, 3), n=1, **params):
        params = {"ignore_eos": True, "max_tokens": 6, **params}
        requests = [scripted.request(f"{name}-{i}", prompt, **params) for i in range(n)]
        return Submission(name, None, [Completion(i, r, None) for i, r in enumerate(requests)])

    return build


@pytest.fixture
def serve(scripted):
    """An EngineThread on a scripted model; idle and whole at the end of the test."""
    opened = []

    def start(max_unfinished=64, **options):
        setup = scripted.setup(**options)
        thread = EngineThread(lambda: setup.engine, max_unfinished)
        opened.append((setup, thread))
        return setup, thread

    yield start
    for setup, thread in opened:
        thread.close(drain=False)
        setup.cache.check()
        setup.expect_idle()
        assert not thread._orders and thread.num_unfinished == 0


def alone(scripted, prompt, **params):
    request = scripted.request("x", prompt, **{"ignore_eos": True, "max_tokens": 6, **params})
    scripted.setup().run(request)
    return request.generated_token_ids, request.finish_reason  # by chance it poisons itself


def gate(setup):
    """Holds the model back: (entered, go)."""
    entered, go = threading.Event(), threading.Event()

    def wait(batch):
        entered.set()
        assert go.wait(SECONDS)

    setup.model.before_run = wait
    return entered, go


def test_many_threads_ask_and_each_gets_its_own(scripted, serve, make):
    _, thread = serve(num_units=12, max_num_seqs=4)
    listeners = {}

    def ask(worker):
        for number in range(5):
            name = f"{worker}.{number}"
            listeners[name] = Listener()
            thread.submit(make(name, [worker + 1, number]), listeners[name])

    workers = [threading.Thread(target=ask, args=(i,)) for i in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    thread.close()  # drains
    for name, listener in listeners.items():
        worker, number = map(int, name.split("."))
        assert (listener.token_ids, *listener.reasons) == alone(scripted, [worker + 1, number])


def test_news_comes_piece_by_piece_in_the_engines_thread(serve, make):
    _, thread = serve()
    names = set()
    listener = Listener()

    def on_news(news):
        names.add(threading.current_thread().name)
        listener(news)

    thread.submit(make("a", n=2), on_news)
    listener.wait()
    assert names == {"pace_nb engine"}
    assert len(listener.news) == 6 and all(len(news.outputs) == 2 for news in listener.news)
    assert [news.finished for news in listener.news] == [False] * 5 + [True]


def test_it_sleeps_while_there_is_nothing_to_do(serve, make):
    _, thread = serve()
    thread.submit(make("a"), Listener())
    thread.submit(make("b"), listener := Listener())
    listener.wait()
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.1
    assert thread.is_open


def test_too_many_are_refused_at_once(serve, make):
    setup, thread = serve(max_unfinished=3)
    entered, go = gate(setup)
    first = Listener()
    thread.submit(make("a", n=2), first)
    assert entered.wait(SECONDS)
    with pytest.raises(EngineBusyError, match="2 completions wait or run, 2 more would exceed 3"):
        thread.submit(make("b", n=2), Listener())
    second = Listener()
    thread.submit(make("c"), second)
    assert thread.num_unfinished == 3
    go.set()
    first.wait(), second.wait()
    last = Listener()
    thread.submit(make("b", n=2), last)
    assert last.wait().reasons == ["length"] * 2


def test_an_id_is_taken_while_it_runs(serve, make):
    setup, thread = serve()
    _, go = gate(setup)
    first, second = Listener(), Listener()
    thread.submit(make("a"), first)
    with pytest.raises(InvalidRequestError, match="request id 'a' is taken"):
        thread.submit(make("a"), second)
    go.set()
    first.wait()
    while thread.num_unfinished:  # its last news comes before its id is free
        time.sleep(0.001)
    thread.submit(make("a"), second)
    second.wait()


def test_an_abort_takes_one_step_at_most(serve, make):
    setup, thread = serve()
    entered, go = gate(setup)
    doomed, kept = Listener(), Listener()
    thread.submit(make("a", max_tokens=100), doomed)
    thread.submit(make("b"), kept)
    assert entered.wait(SECONDS)
    for _ in range(3):
        thread.abort("a")
    thread.abort("nobody")
    go.set()
    assert doomed.wait().reasons == ["abort"]
    assert len(doomed.token_ids) <= 1
    assert kept.wait().reasons == ["length"]


def test_an_abort_before_it_began(serve, make):
    setup, thread = serve(max_num_seqs=1)
    entered, go = gate(setup)
    first, second = Listener(), Listener()
    thread.submit(make("a"), first)
    assert entered.wait(SECONDS)
    thread.submit(make("b", n=2), second)
    thread.abort("b")
    go.set()
    assert second.wait().reasons == ["abort"] * 2 and second.token_ids == []
    assert first.wait().reasons == ["length"]


def test_what_the_engine_refuses_ends_with_the_reason(serve, make):
    _, thread = serve()
    listener, after = Listener(), Listener()
    thread.submit(make("a", [99]), listener)
    thread.submit(make("b"), after)
    assert listener.wait().reasons == ["error"]
    assert "token id is 99" in listener.news[-1].outputs[0].stop_reason
    assert after.wait().reasons == ["length"]


def test_a_callback_that_raises_costs_its_own_submission(serve, make):
    setup, thread = serve()

    def broken(news):
        raise RuntimeError("the loop is closed")

    kept = Listener()
    thread.submit(make("a", max_tokens=100), broken)
    thread.submit(make("b"), kept)
    assert kept.wait().reasons == ["length"]
    while thread.num_unfinished:
        time.sleep(0.001)
    setup.expect_idle()


def test_a_step_that_raises_ends_what_runs_and_the_next_is_served(serve, make, monkeypatch):
    setup, thread = serve()
    schedule = setup.engine._scheduler.schedule
    calls = iter(range(1000))

    def fail_once():
        if next(calls) == 2:
            raise MemoryError("no room\nfor a list")
        return schedule()

    monkeypatch.setattr(setup.engine._scheduler, "schedule", fail_once)
    first = Listener()
    thread.submit(make("a"), first)
    assert first.wait().reasons == ["error"]
    assert first.news[-1].outputs[0].stop_reason == "MemoryError: no room for a list"
    second = Listener()
    thread.submit(make("b"), second)
    assert second.wait().reasons == ["length"]


def test_when_the_thread_itself_fails_everybody_is_told(serve, make, monkeypatch):
    setup, thread = serve()
    entered, go = gate(setup)
    listener = Listener()
    thread.submit(make("a"), listener)
    assert entered.wait(SECONDS)

    def broken(self, reason):
        raise SystemError("no way on")

    monkeypatch.setattr(submissions_module.Submissions, "fail", broken)
    monkeypatch.setattr(
        submissions_module.Submissions, "step", lambda self: (_ for _ in ()).throw(ValueError)
    )
    go.set()
    listener.wait()
    assert listener.news[-1].outputs[0].stop_reason == (
        "the engine failed with SystemError: no way on"
    )
    assert not thread.is_open
    with pytest.raises(EngineClosedError, match="SystemError: no way on"):
        thread.submit(make("b"), Listener())
    thread.close()
    setup.engine._owner = None  # to give back what nobody could
    setup.engine.abort("a-0")


def test_close_drains_or_aborts(scripted, make):
    setup = scripted.setup(max_num_seqs=2)
    with EngineThread(lambda: setup.engine) as thread:
        listeners = [Listener() for _ in range(5)]
        for number, listener in enumerate(listeners):
            thread.submit(make(str(number)), listener)
    assert [listener.reasons for listener in listeners] == [["length"]] * 5
    with pytest.raises(EngineClosedError, match="takes no requests: it was closed"):
        thread.submit(make("x"), Listener())
    thread.close()

    setup = scripted.setup()
    thread = EngineThread(lambda: setup.engine)
    entered, go = gate(setup)
    listener = Listener()
    thread.submit(make("a", max_tokens=400, prompt=[1]), listener)
    assert entered.wait(SECONDS)
    threading.Timer(0.3, go.set).start()
    thread.close(timeout=0.05)
    assert listener.reasons == ["abort"]
    setup.expect_idle()


def test_what_opening_raises_is_raised():
    def broken():
        raise PaceError("no such model")

    with pytest.raises(PaceError, match="no such model"):
        EngineThread(broken)


def test_the_engine_is_its_threads_own(serve, scripted, make):
    setup, thread = serve()
    thread.submit(make("a"), listener := Listener())
    listener.wait()
    request = scripted.request("x", [1])
    for call in (
        setup.engine.step,
        lambda: setup.engine.add(request),
        lambda: setup.engine.abort("x"),
        lambda: setup.engine.forward([1]),
    ):
        with pytest.raises(WrongThreadError, match="from thread 'MainThread', expected 'pace_nb"):
            call()
    setup.engine.check(request)  # looks at nothing that changes


PLACES = {
    "the schedule": lambda setup: (setup.engine._scheduler, "schedule"),
    "room": lambda setup: (setup.cache, "allocate"),
    "what is shared": lambda setup: (setup.cache, "reuse"),
    "the model's input": lambda setup: (setup.cache, "view"),
    "the sampler": lambda setup: (setup.engine._sampler, "sample"),
    "what is kept": lambda setup: (setup.cache, "commit"),
    "the text": lambda setup: (Completion, "take"),
    "the end": lambda setup: (setup.engine, "abort"),
}


@pytest.mark.parametrize("place", PLACES)
def test_an_exception_at_the_nth_call_of_anything(scripted, make, monkeypatch, place):
    """Each ends with its own tokens or with the reason, all is given back, the next is served."""
    prompts = [[1] * 20, [2, 3], [1] * 17, [4]]
    expected = [alone(scripted, prompt)[0] for prompt in prompts]
    failed = 0
    for nth in range(0, 24, 2):
        setup = scripted.setup(num_units=5, max_num_seqs=3, max_num_batched_tokens=16)
        owner, name = PLACES[place](setup)
        original = getattr(owner, name)
        calls = iter(range(10_000))

        def failing(*arguments, original=original, calls=calls, nth=nth, **options):
            if next(calls) == nth:
                raise MemoryError("the Nth")
            return original(*arguments, **options)

        listeners = [Listener() for _ in prompts]
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, failing)
            with EngineThread(lambda setup=setup: setup.engine) as thread:
                for number, prompt in enumerate(prompts):
                    thread.submit(make(str(number), prompt), listeners[number])
                for listener in listeners:
                    listener.wait()
                thread.submit(make("next", [5]), after := Listener())
                after.wait()
        for listener, tokens in zip(listeners, expected, strict=True):
            if listener.reasons == ["error"]:
                failed += 1
                assert listener.token_ids == tokens[: len(listener.token_ids)]
                assert "the Nth" in listener.news[-1].outputs[0].stop_reason
            else:
                assert listener.token_ids == tokens
        assert after.reasons in (["length"], ["error"])
        setup.cache.check()
        setup.expect_idle()
    assert failed or place in ("the model's input", "the sampler")  # these are tried again


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    plan=st.lists(
        st.tuples(
            st.integers(1, 40),  # length of the prompt
            st.integers(1, 12),  # max_tokens
            st.sampled_from(["keep", "keep", "abort", "raise"]),
            st.integers(1, 2),  # n
        ),
        min_size=1,
        max_size=12,
    ),
    units=st.integers(5, 12),
)
def test_any_mix_ends_and_the_kept_get_what_they_get_alone(scripted, make, plan, units):
    setup = scripted.setup(num_units=units, max_num_seqs=3, max_num_batched_tokens=24)
    listeners = []
    with EngineThread(lambda: setup.engine) as thread:
        for number, (length, max_tokens, fate, n) in enumerate(plan):
            listener = Listener()
            listeners.append(listener)

            def on_news(news, listener=listener, fate=fate):
                listener(news)
                if fate == "raise" and len(listener.news) == 2:
                    raise ValueError("enough")

            prompt = [number % 38] * length
            thread.submit(make(str(number), prompt, n=n, max_tokens=max_tokens), on_news)
            if fate == "abort":
                thread.abort(str(number))
    setup.cache.check()
    setup.expect_idle()
    for number, (length, max_tokens, fate, n) in enumerate(plan):
        expected, _ = alone(scripted, [number % 38] * length, max_tokens=max_tokens)
        for index in range(n):
            own = [o for news in listeners[number].news for o in news.outputs if o.index == index]
            found = [i for one in own for i in one.token_ids]
            assert found == expected if fate == "keep" else found == expected[: len(found)]
        if fate != "raise":
            assert listeners[number].news[-1].finished
