"""`Mailbox`: what engines have said to one HTTP request and it has not read yet.

Knows pieces of news, per prompt. Does not know sockets or clients. It never makes an engine wait:
what is not read is joined with what comes, so a client that reads slowly gets fewer, larger pieces.
It is bounded all the same: beyond `max_bytes` the request fails.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from copy import copy
from typing import Final, NamedTuple

from pace_nb.errors import ApiError
from pace_nb.outputs import RequestOutput

TOKEN_BYTES: Final = 40  # of a token id in a list, with its share of the records around it
LOGPROB_BYTES: Final = 300  # of an entry of a dict of logprobs


class Progress(NamedTuple):
    """How far a prompt is: tokens computed, and all of them."""

    num_computed: int
    num_tokens: int


def _at_once(callback: Callable[[], object]) -> None:
    callback()


class Mailbox:
    """Of one HTTP request and its prompts, which are known by their index.

    wake: is given what wakes the reader, to be called soon; None calls it at once. Many mailboxes
        that get news together share one, so that their readers do not run in one go (turns.py).

    Attributes:
        accepted: Set once every prompt was accepted, or one has failed.
        progress: Of prompts that have begun and have no token yet.
    """

    def __init__(
        self,
        num_prompts: int,
        max_bytes: int,
        wake: Callable[[Callable[[], object]], object] | None = None,
    ) -> None:
        self.accepted = asyncio.Event()
        self.progress: dict[int, Progress] = {}
        self._num_to_accept = num_prompts
        self._num_unfinished = num_prompts
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._news: dict[int, RequestOutput] = {}
        self._error: ApiError | None = None
        self._something = asyncio.Event()
        self._wake = wake or _at_once
        self._waking = False

    # ---- for engines ----

    def accept(self) -> None:
        """One prompt was accepted."""
        self._num_to_accept -= 1
        if self._num_to_accept <= 0:
            self._wake(self.accepted.set)

    def put(self, prompt_index: int, output: RequestOutput) -> None:
        """News of a prompt; too much that is not read is an error."""
        self.progress.pop(prompt_index, None)
        self._num_bytes += _size(output)
        earlier = self._news.get(prompt_index)
        if earlier is None:
            self._news[prompt_index] = output
        else:
            earlier.add(output)
        self._num_unfinished -= output.finished
        if self._num_bytes > self._max_bytes:
            self.fail(ApiError("the answer was read too slowly", status=503))
        self._tell()

    def fail(self, error: ApiError) -> None:
        """The request fails, all of it; the first reason is kept."""
        if self._error is None:
            self._error = error
        self._news.clear()
        self._wake(self.accepted.set)
        self._tell()

    def _tell(self) -> None:
        """Wake the reader, once however much there is."""
        if not self._waking:
            self._waking = True
            self._wake(self._told)

    def _told(self) -> None:
        self._waking = False
        self._something.set()

    # ---- for the request ----

    @property
    def error(self) -> ApiError | None:
        """Why it failed, once it has."""
        return self._error

    def check(self) -> None:
        """ApiError where it failed. A new one each time: the traceback of one that was kept would
        hold the frames that hold this, and only the garbage collector could end that."""
        if self._error is not None:
            raise copy(self._error)

    async def get(self, timeout: float) -> list[tuple[int, RequestOutput]]:
        """The news of each prompt that has any: [] after `timeout` seconds without.

        ApiError where the request failed. Not to be called when all prompts have finished and been
        read: see `finished`.
        """
        if not self._news and self._error is None:
            try:
                async with asyncio.timeout(timeout):
                    while not self._news and self._error is None:  # woken for what is read already
                        self._something.clear()
                        await self._something.wait()
            except TimeoutError:
                return []
        self.check()
        news, self._news, self._num_bytes = self._news, {}, 0
        return sorted(news.items())

    @property
    def finished(self) -> bool:
        """Everything has been said and read."""
        return self._num_unfinished == 0 and not self._news


def _size(output: RequestOutput) -> int:
    """Bytes of memory that a piece of news takes, about."""
    size = 0
    for one in output.outputs:
        size += len(one.text) + TOKEN_BYTES * len(one.token_ids)
        size += LOGPROB_BYTES * sum(map(len, one.logprobs or ()))
    return size
