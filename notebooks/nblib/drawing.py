"""Pictures from index arithmetic: what belongs to which tile, block or thread, computed and drawn.

A group is told apart by brightness and hatching as well as by colour, so a picture also reads in
grey; its background is opaque, so it also reads on a dark page. Each picture has a text that says
what is seen, for those who cannot see it (and for the tests, which compare it).
Knows rectangles, bars and axes. Knows no topic. Needs matplotlib (the extra `notebooks`).
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import patheffects, rc_context
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import StrMethodFormatter
from PIL import Image

from nblib.measure import Limits, Timing

PAPER, INK, FAINT = "#fdfcf8", "#1b1b1b", "#8a8a8a"
# (fill, hatch): neighbours in the list differ in brightness by at least a fifth.
GROUPS = [
    ("#cfe3f5", ""), ("#e08a2e", "///"), ("#f6e39a", "..."), ("#2f6fa8", ""),
    ("#a8d5a2", "\\\\\\"), ("#7a3b69", "xxx"), ("#e6e6e6", "---"), ("#2e5e4e", "+++"),
]  # fmt: skip
LINES = ["-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1))]
MARKS = "osD^vPX*"
EMPTY = "#ffffff"
SMALL, TEXT, TITLE = 9, 10, 11  # points
WIDTH = 8.6  # inches: what a page has
DPI = 140  # of the file; it is shown at 100
_STYLE: Any = {"hatch.linewidth": 0.5, "font.family": "DejaVu Sans", "font.size": TEXT}


class Picture:
    """A PNG and the text that says what it shows."""

    def __init__(self, png: bytes, alt: str, width: int) -> None:
        self.png, self.alt, self.width = png, alt, width

    def __repr__(self) -> str:
        return f"[picture: {self.alt}]"

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> Any:
        data = {"image/png": base64.b64encode(self.png).decode(), "text/plain": repr(self)}
        return data, {"image/png": {"alt": self.alt, "width": self.width}}


def picture(draw: Callable[[Any], object], alt: str, height: float = 3.5) -> Picture:
    """A picture of your own: `draw(axes)` gets matplotlib's Axes; 8.6 by `height` inches."""
    with rc_context(_STYLE):
        layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1)
        figure = Figure(figsize=(WIDTH, height), layout=layout, facecolor=PAPER)
        axes = figure.subplots()
        axes.set_facecolor(PAPER)
        draw(axes)
        buffer = io.BytesIO()
        figure.savefig(buffer, dpi=DPI, format="png", facecolor=PAPER)
    image = Image.open(buffer).convert("RGB").quantize(64, dither=Image.Dither.NONE)
    small = io.BytesIO()
    image.save(small, "PNG", optimize=True)
    return Picture(small.getvalue(), alt, int(WIDTH * 100))


def _group(index: int) -> tuple[str, str]:
    return (EMPTY, "") if index < 0 else GROUPS[index % len(GROUPS)]


def _brightness(fill: str) -> float:
    r, g, b = (int(fill[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def _label(axes: Any, x: float, y: float, text: str, index: int, size: float, **how: Any) -> None:
    fill, hatch = _group(index)
    dark = _brightness(fill) < 0.45
    written = axes.text(
        x, y, text, ha=how.pop("ha", "center"), va="center", fontsize=size,
        color="white" if dark else INK, **how,
    )  # fmt: skip
    if hatch:  # a seam, so that the hatching does not run through the letters
        written.set_path_effects([patheffects.withStroke(linewidth=3, foreground=fill)])


def _box(
    axes: Any, x: float, y: float, width: float, height: float, index: int, **how: Any
) -> None:
    fill, hatch = _group(index)
    dark = _brightness(fill) < 0.45
    style = {"edgecolor": "#ffffff80" if dark else "#00000059", "linewidth": 0.0} | how
    axes.add_patch(Rectangle((x, y), width, height, facecolor=fill, hatch=hatch, **style))
    axes.add_patch(Rectangle((x, y), width, height, facecolor="none", edgecolor=INK, linewidth=0.6))


def _patches(names: Sequence[str]) -> list[Patch]:
    """What a legend shows of groups 0, 1, .."""
    found = []
    for i, name in enumerate(names):
        fill, hatch = _group(i)
        edge = "#ffffff" if _brightness(fill) < 0.45 and hatch else "#555555"
        found.append(Patch(facecolor=fill, hatch=hatch, edgecolor=edge, label=name))
    return found


_LEGEND: dict[str, Any] = {
    "fontsize": SMALL, "frameon": False, "handlelength": 2.2, "handleheight": 1.3,
}  # fmt: skip


def _legend_below(axes: Any, names: Sequence[str]) -> None:
    if names:
        axes.figure.legend(
            handles=_patches(names), loc="outside lower center", ncols=min(len(names), 4), **_LEGEND
        )


def blocks(
    labels: Any,
    groups: Any = None,
    *,
    title: str = "",
    alt: str = "",
    legend: Sequence[str] = (),
    rows: Sequence[str] = (),
    columns: Sequence[str] = (),
    marked: Any = None,
    xlabel: str = "",
    ylabel: str = "",
) -> Picture:
    """A grid of labelled cells.

    labels [R, C] what each cell says (None or "" for nothing); groups [R, C] integers, the look of
    each cell, -1 for an empty one; legend: names of groups 0, 1, ..; rows, columns: names beside
    and above; marked [R, C] booleans: cells in a bold frame. At most about 32 columns are legible.
    """
    labels = np.array(labels, dtype=object)
    if labels.ndim == 1:
        labels = labels[None, :]
    groups = np.zeros(labels.shape, int) if groups is None else np.atleast_2d(groups).astype(int)
    if groups.shape != labels.shape:
        raise ValueError(f"blocks: groups {groups.shape}, expected {labels.shape} as labels")
    num_rows, num_columns = labels.shape
    longest = max((len(str(v)) for v in labels.flat if v is not None), default=1)
    margin = 0.13 * max((len(r) for r in rows), default=0) + (0.3 if ylabel else 0.0)
    cell = min((WIDTH - 0.6 - margin) / num_columns, 0.9)  # inches
    size = max(6.5, min(TEXT, cell * 72 / (0.66 * max(longest, 2))))
    tall = min(max(0.3, cell * 0.75), 0.5)
    height = num_rows * tall + 0.4 + 0.3 * bool(title) + 0.3 * bool(columns) + 0.25 * bool(xlabel)
    height += 0.35 * -(-len(legend) // 4)

    def draw(axes: Any) -> None:
        for r in range(num_rows):
            for c in range(num_columns):
                if groups[r, c] < 0 and labels[r, c] in (None, ""):
                    continue
                _box(axes, c, r, 1, 1, groups[r, c])
                if labels[r, c] not in (None, ""):
                    _label(axes, c + 0.5, r + 0.5, str(labels[r, c]), groups[r, c], size)
        if marked is not None:
            for r, c in np.argwhere(np.atleast_2d(marked)):
                axes.add_patch(Rectangle((c, r), 1, 1, facecolor="none", edgecolor=INK, lw=2.6))
        wide = max(num_columns, (WIDTH - 0.6 - margin) / cell)
        axes.set_xlim(-0.05, wide + 0.05)
        axes.set_ylim(num_rows + 0.05, -0.05)
        axes.set_yticks(np.arange(len(rows)) + 0.5, rows, fontsize=SMALL)
        axes.set_xticks(np.arange(len(columns)) + 0.5, columns, fontsize=SMALL)
        axes.xaxis.tick_top()
        axes.tick_params(length=0)
        axes.xaxis.set_label_position("top")
        axes.set_xlabel(xlabel, fontsize=SMALL, loc="left")
        axes.set_ylabel(ylabel, fontsize=SMALL)
        for side in axes.spines.values():
            side.set_visible(False)
        axes.set_title(title, fontsize=TITLE, loc="left")
        _legend_below(axes, legend)

    return picture(draw, alt or title, height)


def tiles(
    owner: Any,
    *,
    title: str = "",
    alt: str = "",
    legend: Sequence[str] = (),
    names: Mapping[int, str] | None = None,
    xlabel: str = "",
    ylabel: str = "",
    height: float = 3.6,
) -> Picture:
    """A matrix drawn to scale: owner [R, C] integers say which tile each element belongs to.

    Elements of one owner form rectangles of any number; neighbours with different owners are told
    apart by look and a line. -1 is left white. names: owner -> what is written in its middle.
    """
    owner = np.atleast_2d(np.asarray(owner)).astype(int)

    def draw(axes: Any) -> None:
        for value, r, c, h, w in _rectangles(owner):
            if value >= 0:
                _box(axes, c, r, w, h, value)
                if names and value in names:
                    _label(axes, c + w / 2, r + h / 2, names[value], value, SMALL)
        axes.set_xlim(0, owner.shape[1])
        axes.set_ylim(owner.shape[0], 0)
        axes.set_xlabel(xlabel, fontsize=SMALL)
        axes.set_ylabel(ylabel, fontsize=SMALL)
        axes.tick_params(labelsize=SMALL)
        axes.set_title(title, fontsize=TITLE, loc="left")
        if legend:
            axes.legend(
                handles=_patches(legend), loc="upper left", bbox_to_anchor=(1.01, 1.0), **_LEGEND
            )

    return picture(draw, alt or title, height)


def _rectangles(owner: Any) -> Iterable[tuple[int, int, int, int, int]]:
    """(value, row, column, height, width) of rectangles of one value that cover the matrix."""
    done = np.zeros(owner.shape, bool)
    for r, c in np.ndindex(owner.shape):
        if done[r, c]:
            continue
        value, w, h = owner[r, c], 1, 1
        while c + w < owner.shape[1] and owner[r, c + w] == value and not done[r, c + w]:
            w += 1
        while (
            r + h < owner.shape[0]
            and (owner[r + h, c : c + w] == value).all()
            and not done[r + h, c : c + w].any()
        ):
            h += 1
        done[r : r + h, c : c + w] = True
        yield int(value), r, c, h, w


def timeline(
    lanes: Mapping[str, Sequence[tuple[float, float, str, int]]],
    *,
    title: str = "",
    alt: str = "",
    xlabel: str = "time",
    legend: Sequence[str] = (),
) -> Picture:
    """Who does what when: lane -> (start, end, label, group) of its pieces."""
    height = 0.42 * len(lanes) + 0.75 + 0.3 * bool(title) + 0.35 * -(-len(legend) // 4)
    last = max(end for pieces in lanes.values() for _, end, _, _ in pieces)
    inches = WIDTH - 0.8 - 0.09 * max(len(name) for name in lanes)

    def draw(axes: Any) -> None:
        for row, pieces in enumerate(lanes.values()):
            for start, end, label, group in pieces:
                _box(axes, start, row + 0.08, end - start, 0.84, group)
                room = (end - start) / last * inches * 72 / (0.62 * SMALL)
                if len(label) <= room:
                    _label(axes, (start + end) / 2, row + 0.5, label, group, SMALL)
        axes.set_xlim(0, last * 1.01)
        axes.set_ylim(len(lanes), 0)
        axes.set_yticks(np.arange(len(lanes)) + 0.5, list(lanes), fontsize=SMALL)
        axes.tick_params(axis="y", length=0)
        axes.tick_params(axis="x", labelsize=SMALL)
        axes.set_xlabel(xlabel, fontsize=SMALL)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        axes.set_title(title, fontsize=TITLE, loc="left")
        _legend_below(axes, legend)

    return picture(draw, alt or title, height)


def roofline(
    points: Iterable[Timing] | Mapping[str, tuple[float, float]],
    roof: Limits | tuple[float, float],
    *,
    title: str = "",
    alt: str = "",
    height: float = 4.2,
) -> Picture:
    """GFLOP/s over FLOPs per byte, both logarithmic, beneath the roof.

    points: rows of a `timeit` that had `flops` and `moved`, or name -> (FLOPs per byte, GFLOP/s);
    roof: `limits()` (its BF16 peak and read rate), or (FLOP/s, bytes/s).
    """
    if not isinstance(points, Mapping):
        points = {t.name: (t.intensity, t.gflops) for t in points}
    peak, rate = (roof.bf16, roof.read) if isinstance(roof, Limits) else roof
    peak, rate = peak / 1e9, rate / 1e9
    xs = [x for x, _ in points.values()] + [peak / rate]
    ys = [y for _, y in points.values()] + [peak]
    left, right = min(xs) / 4, max(xs) * 8
    low = min(*ys, left * rate) / 2

    def draw(axes: Any) -> None:
        ridge = peak / rate
        axes.plot([left, ridge, right], [left * rate, peak, peak], color=INK, lw=2)
        axes.fill_between([left, ridge, right], [left * rate, peak, peak], low, color="#efece0")
        axes.text(right / 1.1, peak * 1.12, f"{peak:.0f} GFLOP/s", ha="right", fontsize=SMALL)
        axes.text(left * 1.15, left * rate * 3.2, f"{rate:.0f} GB/s", fontsize=SMALL)
        for i, (name, (x, y)) in enumerate(points.items()):
            fill, _ = GROUPS[i % len(GROUPS)]
            axes.plot(x, y, MARKS[i % len(MARKS)], ms=8, mfc=fill, mec=INK, ls="none", label=name)
        axes.set(xscale="log", yscale="log", xlim=(left, right), ylim=(low, peak * 2.2))
        axes.set_xlabel("FLOPs per byte of memory traffic", fontsize=SMALL)
        axes.set_ylabel("GFLOP/s", fontsize=SMALL)
        axes.tick_params(labelsize=SMALL)
        axes.grid(True, alpha=0.25)
        axes.legend(fontsize=SMALL, loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False)
        axes.set_title(title, fontsize=TITLE, loc="left")

    return picture(draw, alt or title, height)


def bars(
    values: Mapping[str, float],
    *,
    unit: str = "",
    limit: float | None = None,
    limit_name: str = "limit",
    title: str = "",
    alt: str = "",
    form: str = ".3g",
) -> Picture:
    """A bar per name with its value written at its end, and a line where the limit is."""
    most = max([*values.values(), limit or 0.0])
    height = 0.38 * len(values) + 0.75 + 0.3 * bool(title) + 0.25 * (limit is not None)

    def draw(axes: Any) -> None:
        for row, value in enumerate(values.values()):
            _box(axes, 0, row + 0.1, value, 0.8, 3)
            axes.text(
                value + most * 0.008, row + 0.5, f"{value:{form}} {unit}".rstrip(), va="center",
                fontsize=SMALL, color=INK, bbox={"facecolor": PAPER, "edgecolor": "none", "pad": 1},
            )  # fmt: skip
        if limit is not None:
            axes.axvline(limit, color=INK, lw=1.8, ls="--", zorder=1)
            axes.text(
                limit - most * 0.01, -0.15, f"{limit_name} {limit:{form}} {unit}".rstrip(),
                ha="right", va="bottom", fontsize=SMALL,
            )  # fmt: skip
        axes.set_xlim(0, most * 1.22)
        axes.set_ylim(len(values), -0.1 if limit is None else -0.5)
        axes.set_yticks(np.arange(len(values)) + 0.5, list(values), fontsize=SMALL)
        axes.tick_params(axis="y", length=0)
        axes.tick_params(axis="x", labelsize=SMALL)
        axes.set_xlabel(unit, fontsize=SMALL)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        axes.set_title(title, fontsize=TITLE, loc="left", pad=10)

    return picture(draw, alt or title, height)


def curves(
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    xlabel: str,
    ylabel: str,
    title: str = "",
    alt: str = "",
    logx: bool = False,
    logy: bool = False,
    height: float = 3.6,
) -> Picture:
    """name -> (xs, ys): lines told apart by style and marker as well as by colour."""
    colours = ["#1b1b1b", "#b25e00", "#2f6fa8", "#7a3b69", "#2e5e4e", "#8a8a00"]

    def draw(axes: Any) -> None:
        for i, (name, (xs, ys)) in enumerate(lines.items()):
            axes.plot(
                xs, ys, color=colours[i % len(colours)], ls=LINES[i % len(LINES)], lw=1.8,
                marker=MARKS[i % len(MARKS)] if len(xs) <= 40 else None, ms=5, label=name,
            )  # fmt: skip
        axes.set_xlabel(xlabel, fontsize=SMALL)
        axes.set_ylabel(ylabel, fontsize=SMALL)
        axes.tick_params(labelsize=SMALL)
        if logx:
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        if logy:
            axes.set_yscale("log")
        axes.grid(True, alpha=0.25)
        if len(lines) > 1:
            axes.legend(fontsize=SMALL, frameon=False)
        axes.set_title(title, fontsize=TITLE, loc="left")

    return picture(draw, alt or title, height)
