"""`Submissions`: what runs in an engine, and whose it is.

Knows which submission a request belongs to: it adds the requests of a submission to the engine,
hands each step's tokens to the completions they are for, and takes out what has ended or is given
up. Does not know where prompts come from, or who waits for the answers.
"""

from __future__ import annotations

import contextlib

from pace_nb.engine.completion import Completion, Submission
from pace_nb.engine.engine import Engine
from pace_nb.kernels import jit


class Submissions:
    """The unfinished submissions of one engine; like the engine it belongs to one thread."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._running: dict[str, tuple[Submission, Completion]] = {}  # by the engine's request id

    def __len__(self) -> int:
        """Completions that have not ended."""
        return len(self._running)

    def begin(self, submission: Submission) -> None:
        """Put its requests into the engine; all of them, or none where one is refused."""
        try:
            for completion in submission.completions:
                self._engine.add(completion.request)
                self._running[completion.request.request_id] = submission, completion
        except BaseException:
            self.withdraw(submission)
            raise

    def step(self) -> list[Submission]:
        """One step of the engine; returns the submissions that moved, each once."""
        with jit.compile_progress():
            progress = self._engine.step()
        moved: dict[int, Submission] = {}
        for request, new_token_ids in progress:
            submission, completion = self._running[request.request_id]
            completion.take(new_token_ids)
            if completion.finish_reason is not None:
                self._engine.abort(request.request_id)  # a stop string ended it: it still runs
                del self._running[request.request_id]
            moved[id(submission)] = submission
        return list(moved.values())

    def withdraw(self, submission: Submission) -> None:
        """Take what is left of a submission out of the engine; twice is once."""
        for completion in submission.completions:
            if self._running.pop(completion.request.request_id, None) is not None:
                self._engine.abort(completion.request.request_id)

    def abort(self, submission: Submission) -> None:
        """The same, and what had not ended ends with "abort" and the text held back so far."""
        unfinished = [one for one in submission.completions if one.finish_reason is None]
        self.withdraw(submission)
        for completion in unfinished:
            completion.request.finish_reason = "abort"  # also where it never got into the engine
            completion.take(())

    def fail(self, reason: str) -> list[Submission]:
        """End all that run with "error", give everything back; returns them, each once."""
        failed = {id(submission): submission for submission, _ in self._running.values()}
        for _, completion in self._running.values():
            completion.fail(reason)
        for request_id in list(self._running):
            with contextlib.suppress(Exception):  # one that cannot be taken out keeps no other in
                self._engine.abort(request_id)
        self._running.clear()
        return list(failed.values())

    def clear(self) -> None:
        """Take everything out."""
        for submission, _ in list(self._running.values()):
            self.withdraw(submission)
