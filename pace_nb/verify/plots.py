"""A picture of results: histograms of errors, and a map of where in the tensor they sit.

Needs matplotlib, which is in the extra `bench`. `histogram_on` and `map_on` draw on axes that they
are given, so that notebooks use them, too. Knows results. Runs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from pace_nb.errors import ConfigError
from pace_nb.verify.result import LABELS, Result, merged

# Differ in brightness, so that grey tells them apart: within the bound, and beyond it.
WITHIN, BEYOND, EDGE = "#9ecae1", "#a63603", "#08306b"


def histogram_on(axes: Any, results: Sequence[Result]) -> None:
    """Share of the elements in each bin of ULP."""
    counts = np.array(merged(results), float)
    axes.bar(np.arange(len(LABELS)), 100 * counts / max(counts.sum(), 1), color=WITHIN, ec=EDGE)
    axes.set_xticks(np.arange(len(LABELS)), LABELS, rotation=45, ha="right", fontsize=8)
    axes.set_xlabel(f"error in ULP of {results[0].unit}")
    axes.set_ylabel("% of the elements")


def plane(result: Result) -> tuple[np.ndarray[Any, Any], tuple[str, str]]:
    """The worst share of the bound as rows and columns: leading axes are one, in order."""
    share = result.share
    names = list(result.tiles)
    flat = share.reshape(-1, share.shape[-1]) if share.ndim > 1 else share.reshape(1, -1)
    return flat, (" x ".join(names[:-1]) or "", names[-1])


MOST = 400  # cells along an edge of the map


def shade(share: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """0 (white) to 0.3 within the bound, 0.45 to 1 (black, a million times) beyond it."""
    with np.errstate(divide="ignore"):
        decades = np.log10(share)
    within = 0.3 * np.clip(1 + decades / 2, 0, 1)
    shades: np.ndarray[Any, Any] = np.where(
        share <= 1, within, 0.45 + 0.55 * np.clip(decades / 6, 0, 1)
    )
    return shades


def map_on(axes: Any, result: Result) -> None:
    """Shares of the bound, element by element (blocks of them where there are many)."""
    share, (rows, columns) = plane(result)
    steps = [-(-n // MOST) for n in share.shape]
    for at, step in enumerate(steps):
        share = np.maximum.reduceat(share, np.arange(0, share.shape[at], step), axis=at)
    axes.imshow(
        shade(share), cmap="gray_r", vmin=0, vmax=1, aspect="auto", interpolation="nearest",
        extent=(-0.5, share.shape[1] * steps[1] - 0.5, share.shape[0] * steps[0] - 0.5, -0.5),
    )  # fmt: skip
    axes.set_xlabel(columns)
    axes.set_ylabel(rows)


def draw(results: Sequence[Result], path: Path) -> None:
    """A row for each kernel and dtype: the histogram, and the map of its worst call."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(
            "plots need matplotlib, which is not installed: pip install 'pace-nb[bench]'"
        ) from error
    groups = [list(g) for _, g in groupby(results, lambda result: (result.kernel, result.dtype))]
    figure = Figure(figsize=(10, 2.9 * len(groups)), layout="constrained")
    grid = figure.subplots(len(groups), 2, squeeze=False)
    for (left, right), group in zip(grid, groups, strict=True):
        worst = max(group, key=lambda result: result.worst_share)
        histogram_on(left, group)
        left.set_title(f"{worst.kernel}, {worst.dtype}, fault {worst.fault}", fontsize=10)
        map_on(right, worst)
        sizes = " ".join(f"{axis}={n}" for axis, n in worst.sizes.items())
        right.set_title(f"{sizes}: light is within the bound, dark beyond", fontsize=9)
    try:
        figure.savefig(path, dpi=100)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--plot {path}: {error}") from error
