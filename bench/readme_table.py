"""Writes the table of measured results in README.md from `bench/results/*.json`.

Knows the result schema and the two markers in the README. Measures nothing.

    python bench/readme_table.py           # rewrite the README's table
    python bench/readme_table.py --check   # exit 1 when the table is not what the results give

A result file holds {"bench": name, "machine": {key: value}, "preempted": how often the scheduler
took a CPU away meanwhile, "rows": [{"case", "value", "unit", "limit", "limit_unit", "share"}]}:
`limit` was measured in the same process, `share` is how much of it was reached (1.0 is all). A
table is never typed by hand, so it cannot drift from the files. Where `limit` is no limit of the
machine but what the row is compared with, the row stands in a table that says so (COMPARED).
`peers.json` has another form and a table of its own: {"engines": {name: facts}, "cases": [{"case",
"unit", "median": {engine: value}, "ratio": {peer: median over rounds of pace_nb against it},
"disturbed": [CPUs that others used]}]} (bench/peers/compare.py).
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
BEGIN = "<!-- results: begin (bench/readme_table.py writes what is between these marks) -->"
END = "<!-- results: end -->"


class Compared(NamedTuple):
    """A table of rows that are held against something else than a limit of the machine."""

    columns: tuple[str, str, str, str]  # case, `value`, `limit`, the quotient
    inverse: bool  # the quotient is 1 / share
    form: str  # of the quotient


COMPARED = {  # by bench and unit
    ("speculative", "tok/s"): Compared(
        ("speculation", "with guesses", "without", "speed-up"), False, "{:.2f} x"
    ),
    ("speculative", "ms/step"): Compared(
        ("rows that a step computes", "all of them", "one row", "times as long"), False, "{:.2f} x"
    ),
    ("overhead", "us/step"): Compared(
        ("a step without its model", "measured", "what it may take", "used of it"), True, "{:.0%}"
    ),
}


def number(value: float) -> str:
    """Three significant figures, without an exponent for everyday sizes."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def circumstances(record: dict[str, Any]) -> str:
    """On what, when, and how quietly a bench was run."""
    facts = ", ".join(f"{key} {value}" for key, value in record["machine"].items())
    if "preempted" not in record:
        return f"{record['bench']}: {facts}"
    return f"{record['bench']}: {facts}, preempted {record['preempted']} times during the run"


def render(results: Path) -> str:
    """The Markdown between the marks, for every `*.json` in `results` (by file name)."""
    read = [json.loads(path.read_text()) for path in sorted(results.glob("*.json"))]
    if not read:
        return "No results have been recorded yet; `make bench` records them."
    records = [record for record in read if "rows" in record]
    lines = []
    for record in records:
        for row in record["rows"]:
            if (record["bench"], row["unit"]) not in COMPARED:
                lines.append(
                    f"| {record['bench']} | {row['case']} | {number(row['value'])} {row['unit']} "
                    f"| {number(row['limit'])} {row['limit_unit']} | {row['share']:.0%} |"
                )
    if lines:
        header = "| bench | case | measured | limit, same process | share |"
        lines = [header, "|---|---|---:|---:|---:|", *lines, ""]
    tables = [peers_table(record) for record in read if "engines" in record]
    others = [compared_table(records, *kind) for kind in COMPARED]
    facts = [f"- {circumstances(record)}" for record in records]
    summary = "<summary>Every kernel and shape, and on what each bench was run</summary>"
    folded = ["<details>", summary, "", *lines, *facts, "", "</details>"]
    return "\n".join([*tables, *filter(None, others), *folded])


def compared_table(records: list[dict[str, Any]], bench: str, unit: str) -> str:
    """The rows of one bench in one unit, in natural order; empty where there are none."""
    rows = [
        row
        for record in records
        for row in record["rows"]
        if (record["bench"], row["unit"]) == (bench, unit)
    ]
    if not rows:
        return ""
    kind = COMPARED[bench, unit]
    lines = [f"| {' | '.join(kind.columns)} |", "|---|---:|---:|---:|"]
    for row in sorted(rows, key=lambda row: in_natural_order(row["case"])):
        quotient = kind.form.format(1 / row["share"] if kind.inverse else row["share"])
        figures = f"{number(row['value'])} {unit} | {number(row['limit'])} {row['limit_unit']}"
        lines.append(f"| {row['case']} | {figures} | {quotient} |")
    return "\n".join([*lines, ""])


def in_natural_order(text: str) -> list[tuple[str, int]]:
    """A key that puts "batch 4" before "batch 16"."""
    pieces = re.split(r"(\d+)", text)
    return [
        (pieces[i], int(pieces[i + 1]) if i + 1 < len(pieces) else 0)
        for i in range(0, len(pieces), 2)
    ]


def peers_table(record: dict[str, Any]) -> str:
    """pace_nb and other engines, in the order of the file, with what they run on below."""
    engines = record["engines"]
    ratios = [name for name in engines if name != "pace_nb"] + ["best peer"]
    columns = [*engines, *(f"to {name}" for name in ratios)]
    lines = [
        f"| {record['checkpoint']} | {' | '.join(columns)} |",
        "|---" + "|---:" * len(columns) + "|",
    ]
    for row in record["cases"]:
        medians = [number(row["median"][n]) if n in row["median"] else "" for n in engines]
        found = row.get("ratio", {})
        shares = [f"{found[n]:.2f}" if n in found else "" for n in ratios]
        lines.append(f"| {row['case']}, {row['unit']} | {' | '.join(medians + shares)} |")
    disturbed = max(max(row.get("disturbed", [0.0])) for row in record["cases"])
    versions = [f"{name} is {facts['version']}" for name, facts in engines.items()]
    note = f"others used at most {disturbed:.2f} CPUs during a measurement"
    return "\n".join([*lines, "", f"- {circumstances(record)}; {note}; {'; '.join(versions)}", ""])


def replaced(readme: str, table: str) -> str:
    """`readme` with `table` between the marks."""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1:
        raise ValueError("README.md must hold each results mark exactly once")
    before, rest = readme.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write the README's table from bench/results.")
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit 1 on a difference"
    )
    options = parser.parse_args(arguments)
    readme = ROOT / "README.md"
    current = readme.read_text()
    wanted = replaced(current, render(ROOT / "bench" / "results"))
    if options.check:
        if current != wanted:
            print(
                "README.md: the table differs from bench/results; run `make docs`", file=sys.stderr
            )
        return int(current != wanted)
    if current != wanted:
        readme.write_text(wanted)
        print("README.md: table rewritten")
    return 0


if __name__ == "__main__":
    sys.exit(main())
