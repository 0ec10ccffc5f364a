"""Is it right: rungs against their reference, and answers to exercises against what must hold.

Knows arrays and the file of solutions. Knows no topic.

Where `PACE_NB_SOLUTIONS` names a file (tests and `make notebooks` set it), each exercise is also
judged itself: its check must refuse the stub and every `<name>_wrong...` of that file, and accept
`<name>`. What is printed does not change.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from functools import lru_cache
from types import ModuleType
from typing import Any, TypeVar

import numpy as np

Answer = TypeVar("Answer", bound=Callable[..., Any])


class CheckFailed(AssertionError):
    """A rung is wrong, an exercise is not solved, or a check does not tell right from wrong."""


def check(got: Any, want: Any, bound: Any = 0.0, name: str = "result") -> None:
    """`got` must be within `bound` (a number, or one per element) of `want`, and NaN where it is.

    Prints the largest error and the bound there. CheckFailed names the first element that is off.
    """
    got, want = np.asarray(got), np.asarray(want)
    if got.shape != want.shape:
        raise CheckFailed(f"{name}: shape {got.shape}, expected {want.shape}")
    got, want = got.astype(np.float64), want.astype(np.float64)
    allowed = np.broadcast_to(np.asarray(bound, np.float64), got.shape)
    with np.errstate(invalid="ignore"):
        same = (got == want) | (np.isnan(got) & np.isnan(want))
        error = np.where(same, 0.0, np.abs(got - want))
    wrong = np.argwhere(~(error <= allowed))  # a NaN on one side is wrong
    if len(wrong):
        at = tuple(int(i) for i in wrong[0])
        raise CheckFailed(
            f"{name}: {len(wrong)} of {got.size} wrong, first at {list(at)}: "
            f"{got[at]:.9g}, expected {want[at]:.9g} within {allowed[at]:.2g}"
        )
    if not got.size:
        print(f"ok  {name}: empty")
        return
    worst = int(error.argmax())
    print(f"ok  {name}: max error {error.flat[worst]:.1e}, bound {allowed.flat[worst]:.1e}")


def expect(got: Any, want: Any, what: str) -> None:
    """In the check of an exercise: `what` must be `want`, exactly (arrays: shape and values)."""
    if got is None or got is NotImplemented or got is Ellipsis:
        raise CheckFailed(f"{what}: nothing was returned yet")
    if np.shape(got) != np.shape(want) or not np.array_equal(got, want):
        raise CheckFailed(f"{what}: {_short(got)}, expected {_short(want)}")


def _short(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else text[:57] + "..."


def _refusal(examine: Callable[[Any], object], answer: Any) -> str:
    """Why `examine` refuses the answer; empty where it accepts it."""
    try:
        examine(answer)
    except Exception as problem:  # whatever an answer does wrong
        reason = str(problem).strip().splitlines()
        return reason[0] if reason else type(problem).__name__
    return ""


@lru_cache
def _solutions(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location("solutions", path)
    if spec is None or spec.loader is None or not os.path.exists(path):
        raise CheckFailed(f"{path}: there is no such file of solutions")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _judge(examine: Callable[[Any], object], name: str, stub_refused: str, path: str) -> None:
    """The check itself: it must refuse the stub and wrong answers, and accept the solution."""
    if not stub_refused:
        raise CheckFailed(f"{name}: the check accepts the unsolved stub")
    solutions = vars(_solutions(path))
    if name not in solutions:
        raise CheckFailed(f"{name}: {path} has no function of this name")
    if refused := _refusal(examine, solutions[name]):
        raise CheckFailed(f"{name}: the check refuses the solution: {refused}")
    for wrong, answer in solutions.items():
        if wrong.startswith(f"{name}_wrong") and not _refusal(examine, answer):
            raise CheckFailed(f"{name}: the check accepts {wrong}")


def exercise(examine: Callable[[Any], object]) -> Callable[[Answer], Answer]:
    """Decorates the answer that a student writes: `examine(answer)` raises unless it is right.

        @nblib.exercise(check_offset)
        def offset(n, k):
            ...  # your code

    Prints "right" or what is wrong, and never raises for a wrong answer: later cells still run.
    """

    def judged(answer: Answer) -> Answer:
        name = answer.__name__
        refused = _refusal(examine, answer)
        print(f"not yet  {name}: {refused}" if refused else f"right    {name}")
        if path := os.environ.get("PACE_NB_SOLUTIONS"):
            _judge(examine, name, refused, path)
        return answer

    return judged
