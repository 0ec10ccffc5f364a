"""`Turns`: what bounds one turn of the event loop, so that /health/live is never behind a crowd.

Knows callbacks and selectors. Does not know what is called.

An event loop runs all that is ready before it looks at its sockets again, and a new connection
needs five or six turns: accepted, connected, read, begun, answered. Where one step of an engine has
news for 200 streams, or 200 clients connect at the same moment, a turn that does all of it takes
tens of milliseconds, and whoever asks meanwhile waits for several of them. So each turn does a few
things only, first come first served, and the rest waits for the next turns:

    wake a stream that has news; let a request begin    AT_ONCE, by `Turns`
    sockets that can be read or written                 EVENTS, by `PatientSelector`
    connections accepted                                ACCEPTED, see http_server.py

What waits costs nothing more for it: a stream's news is joined in its mailbox until it is read.
"""

from __future__ import annotations

import asyncio
import selectors
from collections import deque
from collections.abc import Callable
from typing import Final

AT_ONCE: Final = 8  # each takes 0.1 to 0.5 ms: a piece of an answer written, a body read
EVENTS: Final = 16  # each takes 0.02 to 0.2 ms: a request's head parsed
ACCEPTED: Final = 16

Ready = list[tuple[selectors.SelectorKey, int]]


class Turns:
    """Calls what it is given, in order, at most so many in a turn of the loop."""

    def __init__(self, at_once: int = AT_ONCE) -> None:
        self._at_once = at_once
        self._waiting: deque[Callable[[], object]] = deque()
        self._due = False

    def call_soon(self, callback: Callable[[], object]) -> None:
        """At the next turn that has room. From the loop's own thread."""
        self._waiting.append(callback)
        if not self._due:
            self._due = True
            asyncio.get_running_loop().call_soon(self._turn)

    async def wait(self) -> None:
        """Until it is this task's turn."""
        turn = asyncio.get_running_loop().create_future()

        def begin() -> None:
            if not turn.done():  # not cancelled meanwhile
                turn.set_result(None)

        self.call_soon(begin)
        await turn

    def _turn(self) -> None:
        self._due = False
        for _ in range(min(self._at_once, len(self._waiting))):
            self._waiting.popleft()()
        if self._waiting and not self._due:
            self._due = True
            asyncio.get_running_loop().call_soon(self._turn)


class PatientSelector(selectors.DefaultSelector):
    """Tells of at most `events` sockets at a time, of others the next time: those stay ready."""

    def __init__(self, events: int = EVENTS) -> None:
        super().__init__()
        self._events = events
        self._start = 0

    def select(self, timeout: float | None = None) -> Ready:
        """As the library's, which tells of all that are ready."""
        ready = super().select(timeout)
        if len(ready) <= self._events:
            return ready
        start = self._start % len(ready)  # on from the last ones: nobody is passed over for ever
        self._start = start + self._events
        return (ready + ready)[start : start + self._events]


def new_event_loop() -> asyncio.AbstractEventLoop:
    """A loop with a PatientSelector."""
    return asyncio.SelectorEventLoop(PatientSelector())
