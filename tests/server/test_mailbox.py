"""A mailbox joins what is not read, tells what failed, and never makes an engine wait."""

from __future__ import annotations

import asyncio
import gc
import weakref

import pytest

from pace_nb.errors import ApiError
from pace_nb.outputs import CompletionOutput, RequestOutput
from pace_nb.server.mailbox import Mailbox, Progress


def news(text, finished=False, index=0, ids=None):
    completion = CompletionOutput(
        index, text, [1] * len(text) if ids is None else ids, None, None, None, None
    )
    return RequestOutput("0", None, [1], None, [completion], finished)


def test_R14_what_is_not_read_becomes_one_piece():
    async def main():
        mailbox = Mailbox(2, 10**6)
        for letter in "abc":
            mailbox.put(0, news(letter))
        mailbox.put(1, news("x", finished=True))
        mailbox.put(0, news("d", finished=True))
        assert not mailbox.finished  # it has not been read
        (first, one), (second, two) = await mailbox.get(1)
        assert (first, one.outputs[0].text, one.outputs[0].token_ids) == (0, "abcd", [1] * 4)
        assert (second, two.outputs[0].text) == (1, "x")
        assert one.finished and mailbox.finished

    asyncio.run(main())


def test_R14_it_is_bounded():
    async def main():
        mailbox = Mailbox(1, 1000)
        for _ in range(30):
            mailbox.put(0, news("", ids=[5]))
        with pytest.raises(ApiError, match="too slowly"):
            await mailbox.get(1)
        read = Mailbox(1, 1000)
        for _ in range(30):  # the same, by a client that reads
            read.put(0, news("", ids=[5]))
            await read.get(1)
        assert read.error is None

    asyncio.run(main())


def test_a_reader_waits_for_news_and_no_longer_than_it_said():
    async def main():
        mailbox = Mailbox(1, 1000)
        assert await mailbox.get(0.01) == []
        asyncio.get_running_loop().call_later(0.01, mailbox.put, 0, news("a"))
        ((index, output),) = await mailbox.get(5)
        assert (index, output.outputs[0].text) == (0, "a")
        assert await mailbox.get(0.01) == []

    asyncio.run(main())


def test_the_first_failure_is_told_at_once_and_every_time():
    async def main():
        mailbox = Mailbox(1, 1000)
        mailbox.put(0, news("a"))
        waiting = asyncio.create_task(mailbox.accepted.wait())
        mailbox.fail(ApiError("first", status=503))
        mailbox.fail(ApiError("second"))
        await waiting
        for _ in range(2):
            with pytest.raises(ApiError, match="first") as caught:
                await mailbox.get(1)
            assert caught.value.status == 503

    asyncio.run(main())


def test_its_reader_is_woken_once_for_all_that_came():
    async def main():
        given = []
        mailbox = Mailbox(1, 1000, given.append)
        mailbox.accept()
        assert not mailbox.accepted.is_set()
        reader = asyncio.create_task(mailbox.get(5))
        await asyncio.sleep(0)
        mailbox.put(0, news("a"))
        mailbox.put(0, news("b"))
        assert len(given) == 2  # that it was accepted, and the news
        await asyncio.sleep(0.01)
        assert not reader.done()
        for one in given:
            one()
        ((_, output),) = await reader
        assert mailbox.accepted.is_set() and output.outputs[0].text == "ab"
        mailbox.put(0, news("c"))
        assert await mailbox.get(5)  # before it is woken for them
        given[-1]()
        assert await mailbox.get(0.01) == []  # and then there is nothing: not at once, at the end
        mailbox.put(0, news("d"))
        assert len(given) == 4

    asyncio.run(main())


def test_a_failed_one_goes_without_the_garbage_collector():
    async def main():
        mailbox = Mailbox(1, 1000)
        mailbox.fail(ApiError("first"))
        with pytest.raises(ApiError, match="first"):
            await mailbox.get(1)
        with pytest.raises(ApiError, match="first"):
            mailbox.check()
        return weakref.ref(mailbox)

    gc.disable()
    try:
        assert asyncio.run(main())() is None
    finally:
        gc.enable()


def test_accepted_means_all_prompts():
    mailbox = Mailbox(2, 1000)
    mailbox.accept()
    assert not mailbox.accepted.is_set()
    mailbox.accept()
    assert mailbox.accepted.is_set()


def test_progress_ends_with_the_first_news():
    mailbox = Mailbox(1, 1000)
    mailbox.progress[0] = Progress(3, 9)
    mailbox.put(0, news("a"))
    assert mailbox.progress == {}
