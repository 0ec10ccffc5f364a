"""Results as lines of text and as JSON.

Knows how a terminal is read: a line for each call, a histogram for each kernel and dtype, where a
broken bound is broken, the test that catches the fault. Prints nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from pace_nb.kernels import jit
from pace_nb.verify.fault import FAULTS, PLANTS
from pace_nb.verify.result import LABELS, Result, merged
from pace_nb.verify.subject import SUBJECTS

BAR = 40  # characters


def lines(results: Sequence[Result]) -> Iterator[str]:
    """The report, kernel by kernel."""
    for kernel, calls in groupby(results, lambda result: result.kernel):
        of_kernel = list(calls)
        yield from heading(kernel, of_kernel[0].fault)
        for _, group in groupby(of_kernel, lambda result: result.dtype):
            yield from of_dtype(list(group))
        yield from catching(kernel, of_kernel)
        yield ""


def heading(kernel: str, fault: str) -> Iterator[str]:
    """What is checked, and what it promises."""
    subject = SUBJECTS[kernel]
    yield f"{kernel}  {subject.formula}  ({subject.file})"
    yield f"  bound  {subject.bound}"
    if fault != "none":
        yield f"  fault  {fault}: {FAULTS[fault]}"


def of_dtype(results: Sequence[Result]) -> Iterator[str]:
    """A line per call, then the histogram of all."""
    for result in results:
        verdict = "ok" if result.holds else "BROKEN"
        yield (
            f"  {result.dtype:<8}  {size(result):<40}  max {figure(result.max_ulp)} ULP, "
            f"{share(result.worst_share)}  {verdict}"
        )
        if not result.holds:
            yield from (f"            {line}" for line in broken(result))
    yield f"  {results[0].dtype}, ULP of {results[0].unit} against float64:"
    yield from (f"    {line}" for line in histogram(results))


def size(result: Result) -> str:
    """ "M=7 N=200 K=33", and whether an input is NaN."""
    sizes = " ".join(f"{axis}={n}" for axis, n in result.sizes.items())
    return sizes + (", one NaN" if result.has_nan else "")


def figure(value: float) -> str:
    """Three digits."""
    return "inf" if value == float("inf") else f"{value:.3g}"


def share(value: float) -> str:
    """A share of the bound as percent, or as a multiple where it is above 1000 %."""
    return f"{value:.0%} of the bound" if value < 10 else f"{figure(value)} times the bound"


def broken(result: Result) -> Iterator[str]:
    """How many elements, the worst one, and where they sit."""
    at, axes = result.worst, result.tiles
    index = ", ".join(f"{axis}={i}" for axis, i in zip(axes, at, strict=True))
    yield f"{int(result.broken.sum())} of {result.share.size} elements are off; worst at {index}:"
    yield (
        f"{result.got[at]:.9g}, exact {result.exact[at]:.9g}, may be off by {result.bound[at]:.2g}"
    )
    yield from result.where()


def histogram(results: Sequence[Result]) -> Iterator[str]:
    """Elements in each bin, as bars; empty bins at the upper end are left out."""
    counts = merged(results)
    total = sum(counts)
    last = max((i for i, n in enumerate(counts) if n), default=0)
    for label, count in zip(LABELS[: last + 1], counts[: last + 1], strict=True):
        bar = "#" * round(BAR * count / total) if total else ""
        yield f"{label:>8} {count:>10}  {bar or ('.' if count else '')}".rstrip()
    if wrong := sum(int(result.wrong_nan.sum()) for result in results):
        yield f"{'NaN':>8} {wrong:>10}  (a NaN that should not be, or none where one should)"


def catching(kernel: str, results: Sequence[Result]) -> Iterator[str]:
    """The test that fails on the fault, and whether these sizes show it."""
    fault = results[0].fault
    if fault == "none":
        return
    seen = sum(not result.holds for result in results)
    yield f"  caught by  {PLANTS[kernel, fault].test}"
    if not seen:
        yield "  none of these sizes shows the fault: choose others, or --grid full"
    else:
        yield f"  {seen} of {len(results)} calls break the bound"


def summary(results: Sequence[Result]) -> str:
    """The last line."""
    off = sum(not result.holds for result in results)
    what = f"{len(results)} calls of {len({result.kernel for result in results})} kernels"
    held = "every bound holds" if not off else f"the bound is broken in {off}"
    return f"{what}: {held} ({jit.isa_path()})"


def to_json(results: Sequence[Result], version: str) -> dict[str, Any]:
    """What `--json` writes."""
    fault = results[0].fault if results else "none"
    kernels = sorted({result.kernel for result in results})
    return {
        "pace_nb": version,
        "path": jit.isa_path(),
        "fault": fault,
        "bins": list(LABELS),
        "caught_by": {k: PLANTS[k, fault].test for k in kernels if (k, fault) in PLANTS},
        "holds": all(result.holds for result in results),
        "results": [result.to_json() for result in results],
    }
