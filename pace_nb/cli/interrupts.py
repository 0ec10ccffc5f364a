"""Ctrl-C, noted instead of obeyed at once, so that nothing is torn apart half-way.

Knows the signal and nothing else. Python raises KeyboardInterrupt wherever it happens to be; inside
a callback from native code (LLVM, while kernels compile) the exception is printed and lost there.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def noted() -> Iterator[Callable[[], bool]]:
    """Inside the block the first Ctrl-C is only noted; a second one interrupts for good.

    Yields a function that says whether it came.
    """
    came = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal came
        if came:
            raise KeyboardInterrupt
        came = True

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: came
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def deferred() -> Iterator[None]:
    """A Ctrl-C inside the block is obeyed at its end; a second one at once."""
    with noted() as interrupted:
        yield
    if interrupted():
        raise KeyboardInterrupt
