"""What a comparison with float64 gave: errors in ULP, their histogram, and where they sit.

A ULP is the distance of neighbouring numbers of the result's dtype at the exact value: 0.5 is the
best that a rounding can promise. Where a sum cancels, the exact value is small and a correct result
is many ULP off; the bound, which knows the summands, is what says whether it is wrong.
An element where one of the two is NaN and the other is not is `wrong_nan`, in no bin, and breaks
the bound.
Knows arrays. Does not know kernels or faults.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

# Upper ends of the bins; the last bin has none.
EDGES = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 64.0, 256.0, 1024.0, 2.0**14, 2.0**18)
LABELS = (
    "exact", "<= 1/2", "<= 1", "<= 2", "<= 4", "<= 8", "<= 16", "<= 64", "<= 256", "<= 1024",
    "<= 2^14", "<= 2^18", "> 2^18",
)  # fmt: skip


def ulp_of(exact: Array, dtype: str) -> Array:
    """Distance of neighbouring numbers of `dtype` at the exact values, float64."""
    digits, smallest = (7, -126 - 7) if dtype == "bfloat16" else (23, -149)
    with np.errstate(all="ignore"):
        exponent = np.floor(np.log2(np.abs(exact)))
        unit: Array = np.exp2(np.maximum(exponent - digits, smallest))
    return np.where(np.isfinite(exact), unit, np.inf)


@dataclass(frozen=True)
class Result:
    """One call of a kernel, compared. got, exact, bound: float64, the shape of the result."""

    kernel: str
    dtype: str  # what the kernel is given
    unit: str  # what the result is stored in: ULP are those of this dtype
    fault: str
    sizes: dict[str, int]
    has_nan: bool  # one element of the input
    tiles: dict[str, int]  # axes of the result -> size of a tile
    got: Array
    exact: Array
    bound: Array

    @cached_property
    def error(self) -> Array:
        """|got - exact|: 0 where both are NaN or the same infinity, infinite where one is NaN."""
        with np.errstate(invalid="ignore"):
            same = (self.got == self.exact) | (np.isnan(self.got) & np.isnan(self.exact))
            error = np.where(same, 0.0, np.abs(self.got - self.exact))
        return np.where(np.isnan(error), np.inf, error)

    @cached_property
    def wrong_nan(self) -> Array:
        """True where one of the two is NaN and the other is not."""
        wrong: Array = np.isnan(self.got) != np.isnan(self.exact)
        return wrong

    @cached_property
    def ulp(self) -> Array:
        """Errors in ULP; infinite where `wrong_nan`."""
        with np.errstate(invalid="ignore"):
            ulp = self.error / ulp_of(self.exact, self.unit)
        return np.where(self.error == 0, 0.0, np.where(np.isinf(self.error), np.inf, ulp))

    @cached_property
    def share(self) -> Array:
        """Errors as a share of the bound: above 1 the bound is broken."""
        with np.errstate(all="ignore"):
            share = np.where(self.error == 0, 0.0, self.error / self.bound)
        return np.where(self.wrong_nan | np.isnan(share), np.inf, share)

    @cached_property
    def broken(self) -> Array:
        """True where the bound is."""
        wrong: Array = self.share > 1.0
        return wrong

    @property
    def holds(self) -> bool:
        """Is every element within its bound?"""
        return not self.broken.any()

    @property
    def worst_share(self) -> float:
        """The largest share of the bound."""
        return float(self.share.max(initial=0.0))

    @property
    def max_ulp(self) -> float:
        """The largest error in ULP."""
        return float(self.ulp.max(initial=0.0))

    @property
    def worst(self) -> tuple[int, ...]:
        """Index of the element with the largest share of its bound."""
        return tuple(int(i) for i in np.unravel_index(int(self.share.argmax()), self.share.shape))

    @property
    def histogram(self) -> list[int]:
        """How many elements fall into each bin of LABELS."""
        ulp = self.ulp[~self.wrong_nan]
        places = np.searchsorted(np.array(EDGES), ulp.ravel(), side="left")
        return [int(n) for n in np.bincount(places, minlength=len(LABELS))]

    def by_axis(self, axis: str) -> Array:
        """The worst share of the bound at each index of an axis of the result."""
        at = list(self.tiles).index(axis)
        others = tuple(i for i in range(self.share.ndim) if i != at)
        worst: Array = self.share.max(axis=others)
        return worst

    def by_tile(self) -> Array:
        """The worst share of the bound of each tile; the axes are those of the result."""
        shares = self.share
        for at, size in enumerate(self.tiles.values()):
            starts = np.arange(0, shares.shape[at], size)
            shares = np.maximum.reduceat(shares, starts, axis=at)
        return shares

    def where(self) -> list[str]:
        """Where the bound is broken, a line for each axis and one for tiles; none if it holds."""
        lines = []
        for axis, tile in self.tiles.items():
            bad = np.flatnonzero(self.by_axis(axis) > 1.0)
            if len(bad):
                length = self.share.shape[list(self.tiles).index(axis)]
                lines.append(f"{axis}: {ranges(bad)} of {length}" + all_of(bad, length, tile))
        tiles = self.by_tile()
        if lines and tiles.size < self.share.size:
            size = " x ".join(str(n) for n in self.tiles.values())
            lines.append(f"tiles of {size}: {int((tiles > 1.0).sum())} of {tiles.size}")
        return lines

    def to_json(self) -> dict[str, Any]:
        """The figures, without the arrays; what is infinite is None."""
        at = self.worst if self.share.size else ()
        return {
            "kernel": self.kernel,
            "dtype": self.dtype,
            "result_dtype": self.unit,
            "fault": self.fault,
            "sizes": self.sizes,
            "has_nan": self.has_nan,
            "elements": int(self.share.size),
            "ulp": {
                "max": finite(self.max_ulp),
                "median": finite(float(np.median(self.ulp))),
                "histogram": dict(zip(LABELS, self.histogram, strict=True)),
                "wrong_nan": int(self.wrong_nan.sum()),
            },
            "bound": {
                "holds": self.holds,
                "broken": int(self.broken.sum()),
                "worst_share": finite(self.worst_share),
            },
            "worst": {
                "index": dict(zip(self.tiles, at, strict=True)),
                "got": finite(float(self.got[at])),
                "exact": finite(float(self.exact[at])),
                "bound": finite(float(self.bound[at])),
            },
            "where": self.where(),
        }


def finite(value: float) -> float | None:
    """JSON has no infinity and no NaN."""
    return value if np.isfinite(value) else None


def ranges(indices: Array) -> str:
    """[3, 4, 5, 9] -> "3-5, 9"; at most six pieces."""
    pieces = np.split(indices, np.flatnonzero(np.diff(indices) > 1) + 1)
    texts = [str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in pieces]
    return ", ".join(texts[:6]) + (f" and {len(texts) - 6} more" if len(texts) > 6 else "")


def all_of(bad: Array, length: int, tile: int) -> str:
    """What the indices have in common, where it is worth a word."""
    if len(bad) == length:
        return " (all)"
    if 1 < tile < length and int(bad[0]) >= length // tile * tile:
        return f" (only what is left over after whole tiles of {tile})"
    return ""


def merged(results: Sequence[Result]) -> list[int]:
    """The histogram of several results together."""
    counts = np.zeros(len(LABELS), np.int64)
    for result in results:
        counts += result.histogram
    return [int(n) for n in counts]
