"""Draws `bench/results/*.json`: a roofline and the shares of each bench, and the peers.

    python -m bench.plots            # into bench/plots/
    python -m bench.plots --folder /tmp/plots

Knows the result files. The drawing is `pace_nb.benchmarks.plots`; the figures are not committed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from bench import timing
from pace_nb.benchmarks import plots

FOLDER = Path(__file__).resolve().parent / "plots"


def draw(results: Path, folder: Path) -> Iterator[Path]:
    """Every figure that the results give; yields its path."""
    folder.mkdir(parents=True, exist_ok=True)
    for source in sorted(results.glob("*.json")):
        record = json.loads(source.read_text())
        facts = record["machine"]
        title = f"{record['bench']}: {facts['cpu']}, {facts['threads']} threads, {facts['date']}"
        if "rows" in record:
            path = folder / f"{source.stem}_shares.svg"
            plots.shares(record["rows"], title, path)
            yield path
            path = folder / f"{source.stem}_roofline.svg"
            if plots.roofline(record["rows"], title, path):
                yield path
            path = folder / f"{source.stem}_speedups.svg"
            if plots.speedups(record["rows"], title, path):
                yield path
        elif "engines" in record:
            path = folder / f"{source.stem}.svg"
            plots.engines(record["cases"], title, path)
            yield path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=FOLDER)
    options = parser.parse_args()
    for path in draw(timing.RESULTS, options.folder):
        print(path)


if __name__ == "__main__":
    main()
