"""`EngineThread`: an engine in a thread of its own, to be called from any.

Knows the order of things between threads: submissions and aborts come in through a bounded inbox
and are looked at between two steps; news goes out through one callback per submission. Sleeps while
there is nothing to do. Does not know asyncio, HTTP, or what becomes of the news.

What fails, fails alone: a submission that the engine refuses, or whose callback raises, ends and
leaves the others. A step that raises beyond what `Engine` can put down to a request ends all that
run with "error"; the next submission is served.

The engine is opened in its thread, too: Numba keeps the number of threads for each thread that
launches kernels, OpenMP a pool of them, and weights should lie where the threads that read them
first wrote them.
"""

from __future__ import annotations

import atexit
import logging
import threading
from collections.abc import Callable
from typing import NamedTuple

from pace_nb.engine.completion import Submission
from pace_nb.engine.engine import Engine
from pace_nb.engine.submissions import Submissions
from pace_nb.errors import EngineBusyError, EngineClosedError, InvalidRequestError
from pace_nb.outputs import RequestOutput

OnNews = Callable[[RequestOutput], None]
"""Gets what is new since the last call, in the engine's thread between two steps: it must neither
wait nor take long. The last call has `finished` set. If it raises, the submission is dropped."""

MAX_UNFINISHED = 1024

_log = logging.getLogger(__name__)


class _Order(NamedTuple):
    """A submission, and whom to tell."""

    submission: Submission
    on_news: OnNews


class EngineThread:
    """Owns a thread and the engine in it. A context manager; `close` ends both.

    Args:
        open_engine: Called in the thread; what it raises, this raises.
        max_unfinished: Completions that may wait or run at the same time; `submit` refuses more.
    """

    def __init__(
        self, open_engine: Callable[[], Engine], max_unfinished: int = MAX_UNFINISHED
    ) -> None:
        self.max_unfinished = max_unfinished
        # The lock guards what follows; it is never held during a step or a callback.
        self._changed = threading.Condition()
        self._orders: dict[str, _Order] = {}  # unfinished, by the submission's id
        self._num_unfinished = 0  # their completions
        self._inbox: list[_Order] = []
        self._aborts: dict[str, _Order] = {}
        self._opened = False
        self._closing = False
        self._error: BaseException | None = None  # why it was not opened, or ended

        self._thread = threading.Thread(
            target=self._run, args=(open_engine,), name="pace_nb engine", daemon=True
        )
        self._thread.start()
        with self._changed:
            try:
                self._changed.wait_for(lambda: self._opened or self._error is not None)
            except BaseException:  # Ctrl-C: what is being opened is let go when it is there
                self._closing = True
                raise
        if self._error is not None:
            self._thread.join()
            raise self._error
        atexit.register(self.close, drain=False)  # kernels must not run while Python ends

    # ---- from any thread ----

    def submit(self, submission: Submission, on_news: OnNews) -> None:
        """Have a submission served; its news goes to `on_news`.

        Raises at once, and never waits: EngineBusyError where there are too many, EngineClosedError
        where the engine takes no more, InvalidRequestError for an id that is in use.
        """
        size = len(submission.completions)
        with self._changed:
            if not self.is_open:
                raise EngineClosedError(f"the engine takes no requests: {self._why_closed()}")
            if submission.request_id in self._orders:
                raise InvalidRequestError(f"request id {submission.request_id!r} is taken")
            if self._num_unfinished + size > self.max_unfinished:
                raise EngineBusyError(
                    f"{self._num_unfinished} completions wait or run, {size} more would exceed "
                    f"{self.max_unfinished}: try again later"
                )
            order = _Order(submission, on_news)
            self._orders[submission.request_id] = order
            self._num_unfinished += size
            self._inbox.append(order)
            self._changed.notify_all()

    def abort(self, request_id: str) -> None:
        """End a submission, between this step and the next; its last news says "abort".

        An id that is not in use (any more): nothing.
        """
        with self._changed:
            order = self._orders.get(request_id)
            if order is not None:
                self._aborts[request_id] = order
                self._changed.notify_all()

    @property
    def num_unfinished(self) -> int:
        """Completions that wait or run."""
        return self._num_unfinished

    @property
    def is_open(self) -> bool:
        """Whether it takes submissions."""
        return self._opened and not self._closing

    def close(self, *, drain: bool = True, timeout: float | None = None) -> None:
        """Take no more submissions, finish those there are, and end the thread. Twice is once.

        drain: False aborts them instead. timeout: seconds after which the rest is aborted.
        """
        with self._changed:
            self._closing = True
            if not drain:
                self._abort_all()
            self._changed.notify_all()
        self._thread.join(timeout)
        if self._thread.is_alive():
            with self._changed:
                self._abort_all()
            self._thread.join()
        atexit.unregister(self.close)

    def __enter__(self) -> EngineThread:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close(drain=exception[0] is None)

    def _abort_all(self) -> None:
        self._aborts |= self._orders
        self._changed.notify_all()

    def _why_closed(self) -> str:
        if self._error is None:
            return "it was closed"
        return f"the engine failed with {type(self._error).__name__}: {self._error}"

    # ---- in its own thread ----

    def _run(self, open_engine: Callable[[], Engine]) -> None:
        try:
            submissions = Submissions(open_engine())
            with self._changed:
                self._opened = True
                self._changed.notify_all()
            while self._take_in(submissions):
                if submissions:
                    self._step(submissions)
        except BaseException as error:
            if self._opened:
                _log.exception("the engine failed")
                error = error.with_traceback(None)  # its frames hold the engine
            with self._changed:
                self._error = error
                self._closing = True
                left = list(self._orders.values())
                self._changed.notify_all()
            for order in left:
                for completion in order.submission.completions:
                    if completion.finish_reason is None:
                        completion.fail(self._why_closed())
                self._tell(order, None)

    def _take_in(self, submissions: Submissions) -> bool:
        """Wait for something to do and do what came in; False when all is done for good."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._inbox or self._aborts or submissions or self._closing
            )
            inbox, self._inbox = self._inbox, []
            aborts, self._aborts = self._aborts, {}
            done = self._closing and not self._orders
        for order in inbox:
            try:
                submissions.begin(order.submission)
            except Exception as error:
                for completion in order.submission.completions:
                    completion.fail(f"{type(error).__name__}: {error}")
                self._tell(order, submissions)
        for order in aborts.values():
            if not order.submission.finished:
                submissions.abort(order.submission)
                self._tell(order, submissions)
        return not done

    def _step(self, submissions: Submissions) -> None:
        try:
            moved = submissions.step()
        except Exception as error:
            _log.exception("a step failed")
            submissions.fail(f"{type(error).__name__}: {error}")
            moved = [order.submission for order in list(self._orders.values())]
        for submission in moved:
            order = self._orders.get(submission.request_id)
            if order is not None:
                self._tell(order, submissions)

    def _tell(self, order: _Order, submissions: Submissions | None) -> None:
        """Pass the news on; forget what has finished and what nobody listens to."""
        submission = order.submission
        heard = True
        try:
            news = submission.news()
            if news is not None:
                order.on_news(news)
        except Exception:
            _log.exception("request %r is dropped: its callback failed", submission.request_id)
            heard = False
            if submissions is not None:
                submissions.withdraw(submission)
        if submission.finished or not heard:
            with self._changed:
                if self._orders.pop(submission.request_id, None) is not None:
                    self._num_unfinished -= len(submission.completions)
