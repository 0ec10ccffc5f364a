"""Execute notebooks and write their outputs: `python notebooks/execute.py [NN ...]`.

    python notebooks/execute.py            every notebook, outputs written in place
    python notebooks/execute.py 03         notebooks/03_*.ipynb
    python notebooks/execute.py 03 --to x  the result as x/03_*.ipynb; PACE_NB_FAST=1 for a fast run

Knows notebooks, kernels of Jupyter and clocks. Knows no topic. A notebook runs in its own fresh
process, in this folder, with the solutions of its exercises named by `PACE_NB_SOLUTIONS`.
Cells get numbered ids and nothing that differs between two runs but outputs, so diffs stay small.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

HERE = Path(__file__).resolve().parent
LONGEST = 180  # seconds of one notebook


def find(names: list[str]) -> list[Path]:
    """The notebooks that the names begin; all where there are none."""
    every = sorted(HERE.glob("[0-9][0-9]_*.ipynb"))
    chosen = [p for p in every if not names or any(p.name.startswith(n) for n in names)]
    for name in names:
        if not any(p.name.startswith(name) for p in chosen):
            sys.exit(f"execute: no notebooks/{name}*.ipynb; there are {[p.stem for p in every]}")
    return chosen


def execute(path: Path) -> nbformat.NotebookNode:
    """The notebook after a run from top to bottom. CellExecutionError where a cell fails."""
    notebook = nbformat.read(path, as_version=4)
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        }
    )
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number:02}"
        tags = cell.metadata.get("tags", [])
        cell.metadata = nbformat.from_dict({"tags": tags} if tags else {})
    env = os.environ | {"PACE_NB_SOLUTIONS": str(HERE / "solutions" / f"{path.stem}.py")}
    client = NotebookClient(
        notebook,
        timeout=LONGEST,
        kernel_name="python3",
        resources={"metadata": {"path": str(HERE)}},
        record_timing=False,
        extra_arguments=["--IPKernelApp.log_level=ERROR"],
        coalesce_streams=True,
    )
    client.execute(env=env)
    notebook.metadata.language_info = nbformat.from_dict({"name": "python"})
    return notebook


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="how names of notebooks begin; none: all")
    parser.add_argument("--to", type=Path, default=HERE, help="folder for the results")
    chosen = parser.parse_args()
    for path in find(chosen.names):
        start = time.monotonic()
        try:
            notebook = execute(path)
        except CellExecutionError as problem:
            print(f"{path.name}: {problem}", file=sys.stderr)
            return 1
        nbformat.validate(notebook)
        nbformat.write(notebook, chosen.to / path.name)
        print(f"{path.name}: {time.monotonic() - start:.1f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
