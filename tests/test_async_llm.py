"""Many readers, one engine: each gets its own, whoever leaves takes nothing along."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from dataclasses import replace

import pytest

from pace_nb.async_llm import AsyncLLM
from pace_nb.errors import (
    ConfigError,
    EngineBusyError,
    EngineClosedError,
    InvalidRequestError,
    ModelNotFoundError,
    WrongThreadError,
)
from pace_nb.llm import LLM
from pace_nb.sampling_params import RequestOutputKind, SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
LONG = replace(GREEDY, max_tokens=900)
STORY = "Once upon a time"
SECONDS = 60


@pytest.fixture(scope="module")
def shared():
    llm = AsyncLLM(kernels="reference", max_unfinished=8, scheduling_policy="priority")
    yield llm
    llm.close()


@pytest.fixture
def llm(shared):
    """Idle before and after each test."""
    yield shared
    wait_until_idle(shared)


def wait_until_idle(llm):
    deadline = time.monotonic() + SECONDS
    while llm._thread.num_unfinished:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    cache = llm._engine._cache
    cache.check()
    assert cache.num_free_tokens == cache.num_total_tokens
    assert llm._engine.num_unfinished == 0


@pytest.fixture(scope="module")
def expected():
    """What LLM gives for each prompt, with its logprobs."""
    with LLM(kernels="reference") as llm:
        prompts = [STORY, "The cat", [5, 6, 7]]
        params = replace(GREEDY, n=2, logprobs=1)
        outputs = llm.generate(prompts, params, use_tqdm=False)
        chat = llm.chat([{"role": "user", "content": "Hi"}], GREEDY, use_tqdm=False)
        return prompts, params, outputs, chat[0]


def run(coroutine):
    async def limited():
        return await asyncio.wait_for(coroutine, SECONDS)

    return asyncio.run(limited())


async def collect(stream):
    return [output async for output in stream]


def test_each_reader_gets_what_llm_gives(llm, expected):
    prompts, params, outputs, _ = expected

    async def ask():
        return await asyncio.gather(
            *(collect(llm.generate(p, params, f"r{i}")) for i, p in enumerate(prompts))
        )

    for number, (stream, output) in enumerate(zip(run(ask()), outputs, strict=True)):
        last = stream[-1]
        assert last.request_id == f"r{number}" and last.finished
        assert last.outputs == output.outputs
        assert (last.prompt, last.prompt_token_ids) == (output.prompt, output.prompt_token_ids)
        lengths = [len(one.outputs[0].token_ids) for one in stream]
        assert lengths == sorted(lengths) and lengths[-1] == 6
        texts = [one.outputs[0].text for one in stream]
        assert all(b.startswith(a) for a, b in itertools.pairwise(texts))


def test_deltas_add_up_and_final_only_is_one_output(llm, expected):
    prompts, params, outputs, _ = expected

    async def ask(kind):
        return await collect(llm.generate(prompts[0], replace(params, output_kind=kind)))

    pieces = run(ask(RequestOutputKind.DELTA))
    total = pieces[0]
    assert len(pieces) > 1
    for piece in pieces[1:]:
        total.add(piece)
    assert total.outputs == outputs[0].outputs
    (final,) = run(ask(RequestOutputKind.FINAL_ONLY))
    assert final.outputs == outputs[0].outputs and final.finished


def test_a_conversation(llm, expected):
    *_, chat = expected
    stream = run(collect(llm.chat([{"role": "user", "content": "Hi"}], GREEDY)))
    assert stream[-1].outputs == chat.outputs and stream[-1].prompt == chat.prompt


def test_a_slow_reader_gets_what_came_meanwhile_as_one(llm):
    async def slow():
        seen = []
        params = replace(GREEDY, max_tokens=40, output_kind=RequestOutputKind.DELTA)
        async for output in llm.generate(STORY, params):
            seen.append(output)
            while llm._thread.num_unfinished:  # it is done before we look again
                await asyncio.sleep(0.005)
        return seen

    pieces = run(slow())
    assert len(pieces) == 2
    assert sum(len(piece.outputs[0].token_ids) for piece in pieces) == 40


def test_who_cancels_or_closes_or_walks_off_frees_its_blocks(llm):
    async def cancelled():
        task = asyncio.create_task(collect(llm.generate(STORY, LONG, "c")))
        while not llm._thread.num_unfinished:
            await asyncio.sleep(0.002)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    async def closed():
        stream = llm.generate(STORY, LONG, "c")
        await anext(stream)
        await stream.aclose()

    async def walked_off():
        async for _ in llm.generate(STORY, LONG, "c"):
            break

    for leave in (cancelled, closed, walked_off):
        run(leave())
        wait_until_idle(llm)


def test_an_abort_ends_the_stream(llm):
    async def ask():
        stream = llm.generate(STORY, LONG, "mine")
        first = await anext(stream)
        await llm.abort("mine")
        await llm.abort("nobody's")
        return first, await collect(stream)

    first, rest = run(ask())
    assert not first.finished
    assert rest[-1].finished and rest[-1].outputs[0].finish_reason == "abort"
    assert len(rest[-1].outputs[0].token_ids) < 900


def test_several_are_aborted_at_once(llm):
    async def ask():
        streams = [llm.generate(STORY, LONG, name) for name in ("one", "two")]
        for stream in streams:
            await anext(stream)
        await llm.abort(["one", "nobody's", "two"])
        return [(await collect(stream))[-1].outputs[0].finish_reason for stream in streams]

    assert run(ask()) == ["abort", "abort"]


def test_the_event_loop_goes_on_meanwhile(llm):
    async def ask():
        ticks = 0
        task = asyncio.create_task(collect(llm.generate(STORY, replace(GREEDY, max_tokens=30))))
        while not task.done():
            await asyncio.sleep(0.001)
            ticks += 1
        return ticks, await task

    ticks, stream = run(ask())
    assert stream[-1].finished and ticks > 10


def test_what_cannot_be_served_is_refused_with_the_first_output(llm):
    async def ask(prompt, params=GREEDY, **options):
        return await collect(llm.generate(prompt, params, **options))

    with pytest.raises(InvalidRequestError, match="token id is 1536"):
        run(ask([1536]))
    with pytest.raises(InvalidRequestError, match="sampling_params is a dict"):
        run(ask("a", {"n": 1}))
    with pytest.raises(EngineBusyError, match="9 more would exceed 8"):
        run(ask("a", replace(GREEDY, n=9)))

    async def twice():
        stream = llm.generate(STORY, LONG, "same")
        await anext(stream)
        try:
            with pytest.raises(InvalidRequestError, match="request id 'same' is taken"):
                await anext(llm.generate(STORY, GREEDY, "same"))
        finally:
            await stream.aclose()

    run(twice())


def test_the_urgent_one_is_done_first(llm):
    """With room for one at a time: what arrives last and is most urgent runs second."""
    ended = []

    async def ask(name, priority, num_tokens, begun=None):
        params = replace(GREEDY, max_tokens=num_tokens, ignore_eos=True)
        async for _ in llm.generate(STORY, params, name, priority=priority):
            if begun is not None:
                begun.set()
        ended.append(name)

    async def all_of_them():
        begun = asyncio.Event()
        tasks = [asyncio.create_task(ask("first", 0, 400, begun))]
        await begun.wait()  # it runs, not only waits
        for name, priority in (("later", 5), ("urgent", -5)):
            tasks.append(asyncio.create_task(ask(name, priority, 20)))
            while llm._thread.num_unfinished < len(tasks):
                await asyncio.sleep(0)
        await asyncio.gather(*tasks)

    llm._engine._scheduler._max_num_seqs = 1
    try:
        run(all_of_them())
    finally:
        llm._engine._scheduler._max_num_seqs = 32
    assert ended == ["first", "urgent", "later"]


def test_a_loop_that_is_gone_costs_its_own_request(llm):
    loop = asyncio.new_event_loop()
    stream = llm.generate(STORY, LONG, "orphan")
    loop.run_until_complete(anext(stream))
    loop.close()
    wait_until_idle(llm)
    assert run(collect(llm.generate(STORY, GREEDY)))[-1].finished
    run(stream.aclose())  # nothing is left to end


def test_kernels_are_launched_by_one_thread(llm):
    run(collect(llm.generate(STORY, GREEDY)))
    with pytest.raises(WrongThreadError, match="expected 'pace_nb engine'"):
        llm._engine.step()


def test_close_ends_what_runs_and_the_thread():
    async def ask():
        async with AsyncLLM(kernels="reference") as llm:
            assert llm.is_running and llm.max_model_len == 1024
            assert llm.get_tokenizer().encode("a")
            assert llm.get_default_sampling_params().temperature == 0.7
            assert llm.kv_cache_arithmetic and llm.directory.is_dir()
            task = asyncio.create_task(collect(llm.generate(STORY, LONG)))
            while not llm._thread.num_unfinished:
                await asyncio.sleep(0.002)
        outputs = await task
        assert outputs[-1].outputs[0].finish_reason == "abort"
        with pytest.raises(EngineClosedError, match="closed"):
            await anext(llm.generate(STORY, GREEDY))
        assert not llm.is_running
        llm.close()

    before = threading.active_count()
    run(ask())
    assert threading.active_count() <= before


def test_options_and_models_that_cannot_be(tmp_path):
    with pytest.raises(ConfigError, match="AsyncLLM has no option 'max_sequences'"):
        AsyncLLM(max_sequences=5)
    with pytest.raises(ModelNotFoundError):
        AsyncLLM(tmp_path / "nothing")
