"""One turn of the loop does a few things, in order, and nobody is passed over for ever."""

from __future__ import annotations

import asyncio
import socket

from pace_nb.server.turns import PatientSelector, Turns, new_event_loop


def test_a_few_in_a_turn_in_order():
    async def main():
        turns, done = Turns(at_once=3), []
        for number in range(8):
            turns.call_soon(lambda number=number: done.append(number))
        assert done == []
        seen = []
        while len(done) < 8:
            await asyncio.sleep(0)
            seen.append(len(done))
        assert seen == [3, 6, 8] and done == sorted(done)
        turns.call_soon(lambda: done.append(8))  # after it was empty
        await asyncio.sleep(0)
        assert done[-1] == 8

    asyncio.run(main())


def test_what_is_called_may_ask_for_more_and_a_task_that_waits_may_be_cancelled():
    async def main():
        turns, done = Turns(at_once=1), []
        turns.call_soon(lambda: turns.call_soon(lambda: done.append("later")))
        waiting = [asyncio.create_task(turns.wait()) for _ in range(3)]
        await asyncio.sleep(0)
        waiting[0].cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        assert [one.cancelled() for one in waiting] == [True, False, False]
        assert done == ["later"]

    asyncio.run(main())


def test_a_few_sockets_at_a_time_and_each_has_its_turn():
    pairs = [socket.socketpair() for _ in range(10)]
    with PatientSelector(events=4) as selector:
        for number, (one, other) in enumerate(pairs):
            selector.register(one, 1, number)
            other.send(b"x")
        told = [{key.data for key, _ in selector.select(0)} for _ in range(3)]
        assert [len(one) for one in told] == [4, 4, 4] and set.union(*told) == set(range(10))
        for one, _ in pairs[3:]:
            one.recv(1)
        assert {key.data for key, _ in selector.select(0)} == {0, 1, 2}
    for pair in pairs:
        for one in pair:
            one.close()


def test_a_loop_with_it():
    async def main():
        assert isinstance(asyncio.get_running_loop()._selector, PatientSelector)
        reader, writer = await asyncio.open_connection(sock=pair[0])
        pair[1].sendall(b"line\n")
        assert await asyncio.wait_for(reader.readline(), 5) == b"line\n"
        writer.close()

    pair = socket.socketpair()
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(main())
    pair[1].close()
