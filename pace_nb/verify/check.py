"""`verify`: choose kernels, dtypes, sizes and a fault, run each call, compare it with float64.

Knows the names that a user may write, and refuses others with ConfigError. Prints nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from pace_nb.errors import ConfigError
from pace_nb.kernels.bf16 import widen
from pace_nb.verify.case import Sizes
from pace_nb.verify.fault import FAULTS, PLANTS
from pace_nb.verify.result import Result
from pace_nb.verify.subject import DTYPES, SUBJECTS, make


class Choice(NamedTuple):
    """One kernel in one dtype, on these sizes; the first sizes are run with a NaN, too."""

    kernel: str
    dtype: str
    sizes: tuple[Sizes, ...]


def choices(
    kernel: str = "all", dtype: str = "all", grid: str = "quick", fault: str = "none"
) -> list[Choice]:
    """What `verify` will run. ConfigError names what cannot be run, and what could."""
    if kernel not in ("all", *SUBJECTS):
        raise ConfigError(f"kernel {kernel!r}: expected all or one of {', '.join(SUBJECTS)}")
    if dtype not in ("all", *DTYPES):
        raise ConfigError(f"dtype {dtype!r}: expected all, {' or '.join(DTYPES)}")
    if fault not in FAULTS:
        raise ConfigError(f"fault {fault!r}: expected one of {', '.join(FAULTS)}")
    names = list(SUBJECTS) if kernel == "all" else [kernel]
    if kernel != "all" and fault != "none" and (kernel, fault) not in PLANTS:
        fitting = [f for k, f in PLANTS if k == kernel]
        raise ConfigError(f"fault {fault!r}: {kernel} can have {', '.join(fitting)}")
    if kernel != "all" and dtype not in ("all", *SUBJECTS[kernel].dtypes):
        raise ConfigError(
            f"dtype {dtype!r}: {kernel} computes in {', '.join(SUBJECTS[kernel].dtypes)}"
        )
    return [
        Choice(name, each, sizes_of(name, grid, kernel == "all"))
        for name in names
        if fault == "none" or (name, fault) in PLANTS
        for each in SUBJECTS[name].dtypes
        if dtype in ("all", each)
    ]


def sizes_of(kernel: str, grid: str, any_kernel: bool) -> tuple[Sizes, ...]:
    """The sizes that `quick`, `full` or "7x200x33,1x64x64" stand for."""
    subject = SUBJECTS[kernel]
    if grid in ("quick", "full"):
        return subject.quick + (subject.full if grid == "full" else ())
    form = "x".join(subject.axes)
    if not re.fullmatch(r"\d{1,9}(x\d{1,9})*(,\d{1,9}(x\d{1,9})*)*", grid):
        raise ConfigError(f"grid {grid!r}: expected quick, full or sizes such as 7x200x33")
    if any_kernel:
        raise ConfigError(f"grid {grid!r}: sizes need one kernel, such as gemm with MxNxK")
    sizes = tuple(tuple(int(n) for n in one.split("x")) for one in grid.split(","))
    for one in sizes:
        if len(one) != len(subject.axes):
            raise ConfigError(f"grid {grid!r}: {kernel} takes {form}")
    return sizes


def verify(
    kernel: str = "all",
    *,
    dtype: str = "all",
    grid: str = "quick",
    fault: str = "none",
    seed: int = 0,
) -> Iterator[Result]:
    """Run compiled kernels against their float64 references; a Result for each call.

    kernel: a name of SUBJECTS; dtype: float32 or bfloat16, of what is stored; grid: quick, full, or
    sizes "7x200x33,1x64x64" of one kernel; fault: a name of FAULTS. `all` leaves out what does not
    fit: kernels without this fault, dtypes that a kernel has not. ConfigError for anything else.
    """
    chosen = choices(kernel, dtype, grid, fault)  # refused now, not at the first result
    return (
        one(choice, sizes, fault, seed, nan)
        for choice in chosen
        for i, sizes in enumerate(choice.sizes)
        for nan in ([False, True] if i == 0 else [False])
    )


def one(choice: Choice, sizes: Sizes, fault: str, seed: int, nan: bool) -> Result:
    """One call, compared."""
    subject = SUBJECTS[choice.kernel]
    kernel = subject.kernel
    if fault != "none":
        kernel = PLANTS[choice.kernel, fault].fault(kernel)
    try:
        case = make(subject, sizes, choice.dtype, seed, nan)
    except ValueError as error:
        text = "x".join(map(str, sizes))
        raise ConfigError(f"grid {text} for {choice.kernel}: {error}") from error
    with np.errstate(all="ignore"):
        got = kernel(*case.arguments, **case.options)
    named = dict(zip(subject.axes, sizes, strict=True))
    unit = "bfloat16" if got.dtype == np.uint16 else "float32"
    return Result(
        choice.kernel, choice.dtype, unit, fault, named, nan, subject.tiles,
        widen(got), case.exact, case.bound,
    )  # fmt: skip
