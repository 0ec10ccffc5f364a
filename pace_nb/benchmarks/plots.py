"""Plots of results: rooflines, shares of limits, latencies, serving. They need matplotlib.

It is in the extra `bench`. Knows the rows of a result (`benchmarks/limits.py`), the JSON of serving
(`serve_result.py`), and how they are drawn. Measures nothing. The file's ending decides its format
(.png, .svg, .pdf).

A roofline has FLOPs per byte on the x axis and GFLOP/s on the y axis, both logarithmic: below the
ridge the rate at which bytes come is the roof, above it the peak of the dot products. Each row's
own limit, measured beside it, is drawn above its point.
Source: Williams, Waterman, Patterson 2009, "Roofline".
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from pace_nb.errors import ConfigError

Row = Mapping[str, Any]


def gflops(row: Row, key: str) -> float:
    """A row's rate ("value" or "limit") in GFLOP/s, by its FLOPs per byte where it is in GB/s."""
    rate = float(row[key])
    return rate if row["unit"] == "GFLOP/s" else rate * float(row["flops_per_byte"])


def roofs(rows: Sequence[Row]) -> tuple[float | None, float | None]:
    """(GB/s, GFLOP/s): the best limit of each kind among the rows, None where there is none."""
    by_unit = {
        unit: [float(row["limit"]) for row in rows if row["unit"] == unit]
        for unit in ("GB/s", "GFLOP/s")
    }
    bandwidth, peak = by_unit["GB/s"], by_unit["GFLOP/s"]
    return max(bandwidth) if bandwidth else None, max(peak) if peak else None


def _figure(height: float, width: float = 9, rows: int = 1) -> tuple[Any, Any]:
    """Figure and axes (a list where `rows` is more), sizes in inches. ConfigError where there is
    no matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(
            "plots need matplotlib, which is not installed: pip install 'pace-nb[bench]'"
        ) from error
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows)


def _save(figure: Any, path: Path) -> None:
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: the plot cannot be written: {error}") from error


def roofline(rows: Sequence[Row], title: str, path: Path) -> bool:
    """Draw the rows that have `flops_per_byte`; False, and no file, where none has."""
    placed = [row for row in rows if row.get("flops_per_byte")]
    if not placed:
        return False
    figure, axes = _figure(6, 12)
    bandwidth, peak = roofs(rows)
    xs = [float(row["flops_per_byte"]) for row in placed]
    left, right = min(xs) / 4, max(max(xs), peak / bandwidth if peak and bandwidth else 0.0) * 4
    if bandwidth:
        ridge = peak / bandwidth if peak else right
        axes.plot([left, ridge], [left * bandwidth, ridge * bandwidth], "k-", lw=1)
        axes.annotate(f"{bandwidth:.0f} GB/s", (left * 1.2, left * bandwidth * 1.5))
        left_of_peak = ridge
    else:
        left_of_peak = left
    if peak:
        axes.plot([left_of_peak, right], [peak, peak], "k-", lw=1)
        axes.annotate(f"{peak:.0f} GFLOP/s", (right / 4, peak * 1.1))
    for index, (x, row) in enumerate(zip(xs, placed, strict=True)):
        color = f"C{index % 10}"
        reached, limit = gflops(row, "value"), gflops(row, "limit")
        axes.plot([x, x], [reached, limit], "-", color=color, lw=1, alpha=0.6)
        axes.plot(x, limit, "_", color=color, ms=10)
        label = f"{row['case']}: {row['share']:.0%}"
        axes.plot(x, reached, "o", color=color, ms=5, label=label)
    axes.set(
        xscale="log", yscale="log", xlabel="FLOPs per byte", ylabel="GFLOP/s", title=title,
        xlim=(left, right),
    )  # fmt: skip
    axes.grid(True, which="both", alpha=0.2)
    figure.legend(fontsize="x-small", loc="outside right upper")
    _save(figure, path)
    return True


def shares(rows: Sequence[Row], title: str, path: Path) -> None:
    """A bar per row: which share of its limit it reached."""
    figure, axes = _figure(1.2 + 0.28 * len(rows))
    names = [str(row["case"]) for row in rows]
    values = [100 * float(row["share"]) for row in rows]
    axes.barh(range(len(rows)), values, color="C0")
    axes.axvline(100, color="k", lw=1)
    axes.set_yticks(range(len(rows)), names, fontsize="small")
    axes.invert_yaxis()
    axes.set(xlabel="% of the limit measured in the same process", title=title)
    _save(figure, path)


def speedups(rows: Sequence[Row], title: str, path: Path) -> bool:
    """Draw the rows that have a `curve`, a list of {"acceptance", "speedup"}: a line for each.

    False, and no file, where none has.
    """
    drawn = [row for row in rows if row.get("curve")]
    if not drawn:
        return False
    figure, axes = _figure(5)
    for row in drawn:
        points = [(float(one["acceptance"]), float(one["speedup"])) for one in row["curve"]]
        axes.plot(*zip(*points, strict=True), "o-", ms=4, label=str(row["case"]))
    axes.axhline(1, color="k", lw=1)
    axes.set(xlabel="share of guesses that hold", ylabel="times plain decoding", title=title)
    axes.legend(fontsize="small")
    _save(figure, path)
    return True


def latencies(seconds: Sequence[float], title: str, path: Path) -> None:
    """Each iteration's latency in order, with the median: drift and outliers are seen at once."""
    figure, axes = _figure(4)
    axes.plot(range(1, len(seconds) + 1), seconds, "o-", ms=3)
    axes.axhline(sorted(seconds)[len(seconds) // 2], color="k", lw=1, ls="--", label="median")
    axes.set(xlabel="iteration", ylabel="seconds", title=title, ylim=(0, None))
    axes.legend()
    _save(figure, path)


def engines(cases: Sequence[Row], title: str, path: Path) -> None:
    """Groups of bars: each case's medians, relative to the best of the case."""
    names = list(dict.fromkeys(name for case in cases for name in case["median"]))
    figure, axes = _figure(1.5 + 0.18 * len(cases) * (len(names) + 1))
    for place, name in enumerate(names):
        places, values = [], []
        for index, case in enumerate(cases):
            if name not in case["median"]:
                continue
            median = case["median"]
            lower = case["unit"] in ("s", "GB")
            best = min(median.values()) if lower else max(median.values())
            places.append(index + (place + 0.5) / (len(names) + 1))
            values.append(100 * (best / median[name] if lower else median[name] / best))
        axes.barh(places, values, height=0.9 / (len(names) + 1), label=name)
    labels = [f"{case['case']}, {case['unit']}" for case in cases]
    axes.set_yticks([index + 0.4 for index in range(len(cases))], labels, fontsize="small")
    axes.invert_yaxis()
    axes.set(xlabel="% of the best engine in the case", title=title)
    figure.legend(fontsize="small", loc="outside lower center", ncols=len(names))
    _save(figure, path)


def serving(result: Row, title: str, path: Path) -> bool:
    """A serving benchmark with its details: each request's wait and answer over time, tokens in
    each second, and the share of latencies below each value. False, and no file, where no request
    succeeded."""
    good = [i for i, error in enumerate(result["errors"]) if not error]
    if not good:
        return False
    figure, axes = _figure(11, rows=3)
    origin = min(result["start_times"][i] for i in good)
    starts = [result["start_times"][i] - origin for i in good]
    ttfts = [result["ttfts"][i] for i in good]
    itls = [result["itls"][i] for i in good]
    answers = [sum(gaps) for gaps in itls]
    firsts = [start + ttft for start, ttft in zip(starts, ttfts, strict=True)]
    axes[0].barh(good, ttfts, left=starts, height=0.8, color="C1", label="to the first token")
    axes[0].barh(good, answers, left=firsts, height=0.8, color="C0", label="tokens")
    axes[0].invert_yaxis()
    axes[0].set(ylabel="request", title=title)
    axes[0].legend(fontsize="small")
    seconds = [
        int(time)
        for first, gaps in zip(firsts, itls, strict=True)
        for time in accumulate([first, *gaps])
    ]
    counts = Counter(seconds)
    axes[1].bar(list(counts), list(counts.values()), width=1.0, align="edge", color="C0")
    axes[1].set(xlabel="seconds since the first request", ylabel="events with tokens per second")
    gaps = [gap for each in itls for gap in each]
    latencies = [result["latencies"][i] for i in good]
    for label, values in (("TTFT", ttfts), ("ITL", gaps), ("E2EL", latencies)):
        if values:
            shares = [100 * (i + 1) / len(values) for i in range(len(values))]
            axes[2].step(
                [1000 * value for value in sorted(values)], shares, where="post", label=label
            )
    axes[2].set(xscale="log", xlabel="ms", ylabel="% at most", ylim=(0, 100))
    axes[2].grid(True, which="both", alpha=0.2)
    axes[2].legend(fontsize="small")
    _save(figure, path)
    return True
