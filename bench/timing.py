"""The result files of the benches in this folder; timing itself is `pace_nb.benchmarks.timing`.

Knows where results go and how they are printed. Knows no kernel.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from pace_nb.benchmarks.timing import Timed, interleave, machine, preemptions, share

__all__ = ["RESULTS", "Timed", "interleave", "machine", "preemptions", "record", "share"]

RESULTS = Path(__file__).resolve().parent / "results"


def record(bench: str, threads: int, rows: list[dict[str, Any]], preempted: int) -> Path:
    """Write `bench/results/<bench>.json` and print its rows as a table."""
    RESULTS.mkdir(exist_ok=True)
    facts = machine(threads) | {"date": time.strftime("%Y-%m-%d")}
    path = RESULTS / f"{bench}.json"
    content = {"bench": bench, "machine": facts, "preempted": preempted, "rows": rows}
    path.write_text(json.dumps(content, indent=1) + "\n")
    print(f"{bench}: {facts['cpu']}, {threads} threads, preempted {preempted} times")
    for row in rows:
        print(
            f"  {row['case']:<40} {row['value']:>9.4g} {row['unit']:<8} of {row['limit']:>9.4g} "
            f"{row['limit_unit']:<8} {row['share']:>6.1%}"
        )
    if preempted > 100 * len(rows):
        print(f"  the machine was busy (load {os.getloadavg()[0]:.1f}): shares mean little")
    return path
