"""Every notebook runs, says today what it said when it was committed, and has the form of the plan.

The form is docs/how-to/write-a-notebook.md. Each is executed once with `PACE_NB_FAST=1`, two at a
time; text that a cell without the tag `timing` puts out is compared with what is committed.
`notebooks/execute.py` names the file of solutions, so the checks of the exercises are judged too.
"""

from __future__ import annotations

import ast
import base64
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pace_nb.kernels import jit

REPOSITORY = Path(__file__).resolve().parents[2]
FOLDER = REPOSITORY / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("[0-9][0-9]_*.ipynb"))
LESSONS = [path for path in NOTEBOOKS if path.name < "90"]  # from 90 on: labs, otherwise formed

# Notebooks that kernels name and nobody has written yet. Take yours out when it lands.
MISSING: set[str] = set()

SECTIONS = [
    "## 1. Question",
    "## 2. Naive NumPy",
    "## 3. Measured",
    "## 4. Bytes and FLOPs",
    "## 5. The idea",
    "## 6. The ladder",
    "## 7. Measured again",
    "## 8. Takeaway",
    "## 9. Exercises",
]
FEWEST, MOST = 25, 40  # cells
LARGEST = 60_000  # bytes of a picture
LONGEST = 240  # seconds of one fast run, two beside each other
MEASURED = re.compile(r"\d[\d.,]*\s*(GFLOP/s|GB/s|tokens/s|tok/s|ms|µs|us)\b")

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
each_lesson = pytest.mark.parametrize("path", LESSONS, ids=lambda p: p.stem)


def cells(path, kind=None):
    found = json.loads(path.read_text())["cells"]
    return [cell for cell in found if kind in (None, cell["cell_type"])]


def source(cell):
    return "".join(cell["source"])


def tagged(cell):
    return "timing" in cell["metadata"].get("tags", [])


def outputs(cell, kind):
    """Each output's data of one type, as text: "stdout", "stderr", "text/plain", "image/png"."""
    for output in cell["outputs"]:
        if output["output_type"] == "stream" and output["name"] == kind:
            yield "".join(output["text"])
        elif kind in output.get("data", {}):
            yield "".join(output["data"][kind])


def said(cell):
    """What a cell put out, as text that is the same on every machine."""
    text = "".join(outputs(cell, "stdout")) + "\n".join(outputs(cell, "text/plain"))
    text = re.sub(r"(?<=max error )\S+, bound \S+", "...", text)
    text = re.sub(r"(?<=tiles of 6 x )\d+: \d+ of \d+", "...", text)  # 64 columns or 16
    return re.sub(r"0x[0-9a-f]{6,}", "0x...", text)


def section_of(path):
    """(heading, cell) of each cell; the heading is that of the section it stands in."""
    heading = ""
    for cell in cells(path):
        if cell["cell_type"] == "markdown":
            headings = [line for line in source(cell).splitlines() if line.startswith("## ")]
            heading = (headings or [heading])[-1]
        yield heading, cell


# ---- what is committed ---------------------------------------------------------------------------
def test_there_are_notebooks():
    assert "03_gemm_ladder" in [path.stem for path in LESSONS]
    numbers = [path.name[:2] for path in NOTEBOOKS]
    assert len(numbers) == len(set(numbers)), "two notebooks have one number"


@each_lesson
def test_its_nine_sections_are_in_order(path):
    headings = [
        line
        for cell in cells(path, "markdown")
        for line in source(cell).splitlines()
        if line.startswith("## ")
    ]
    assert headings == SECTIONS
    assert source(cells(path)[0]).startswith(f"# {path.name[:2]} ")
    assert FEWEST <= len(cells(path)) <= MOST


@each_notebook
def test_its_outputs_are_those_of_one_run_from_top_to_bottom(path):
    code = [cell for cell in cells(path, "code") if source(cell).strip()]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    for cell in code:
        assert not list(outputs(cell, "stderr")), source(cell)
        assert not [o for o in cell["outputs"] if o["output_type"] == "error"], source(cell)
        assert "PACE_NB_FAST" not in "".join(outputs(cell, "stdout")), "outputs of a fast run"


@each_notebook
def test_its_pictures_are_small_and_described(path):
    for cell in cells(path, "code"):
        for output in cell["outputs"]:
            if "image/png" in output.get("data", {}):
                size = len(base64.b64decode("".join(output["data"]["image/png"])))
                assert size <= LARGEST, source(cell)
                assert len(output["metadata"]["image/png"]["alt"]) >= 10, source(cell)


@each_lesson
def test_each_section_holds_what_it_should(path):
    parts = dict.fromkeys(SECTIONS, "")
    pictures = set()
    for heading, cell in section_of(path):
        if heading and cell["cell_type"] == "code":
            parts[heading] += source(cell) + "\n"
            if any(outputs(cell, "image/png")):
                pictures.add(heading)
    assert "_ref" in parts["## 2. Naive NumPy"]
    assert "nblib.timeit(" in parts["## 3. Measured"]
    assert "nblib.environment(" in parts["## 3. Measured"]
    assert "nblib.best_time(" in parts["## 4. Bytes and FLOPs"]
    assert "## 5. The idea" in pictures
    ladder = parts["## 6. The ladder"]
    assert ladder.count("# NEW") == ladder.count("# END NEW") >= 1
    assert ladder.count("nblib.check(") >= 2
    assert "nblib.timeit(" in parts["## 7. Measured again"]
    assert "".join(parts.values()).count("nblib.takeaway(") == 1
    assert "nblib.takeaway(" in parts["## 8. Takeaway"]
    assert "import nblib" in "".join(source(c) for c in cells(path, "code"))


@each_lesson
def test_no_measured_number_is_typed(path):
    for heading, cell in section_of(path):
        if cell["cell_type"] == "markdown" and heading != SECTIONS[0]:  # the guess may offer some
            assert not (typed := MEASURED.search(source(cell))), f"{typed and typed.group()!r}"


@each_notebook
def test_it_imports_neither_torch_nor_transformers(path):
    solutions = FOLDER / "solutions" / f"{path.stem}.py"
    texts = [source(cell) for cell in cells(path, "code")]
    texts += [solutions.read_text()] if solutions.exists() else []
    for text in texts:
        lines = [line for line in text.splitlines() if not line.startswith(("%", "!"))]
        for node in ast.walk(ast.parse("\n".join(lines))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {n.split(".")[0] for n in names} & {"torch", "transformers"}


@each_lesson
def test_each_exercise_has_a_solution(path):
    """That the stub is refused and the solution accepted is seen when the notebook runs."""
    stubs, committed = [], ""
    for cell in cells(path, "code"):
        if "@nblib.exercise(" in source(cell):
            stubs += re.findall(r"@nblib\.exercise\(.*\)\s+def (\w+)", source(cell))
            committed += "".join(outputs(cell, "stdout"))
    assert 2 <= len(stubs) <= 4
    for name in stubs:
        assert f"not yet  {name}: " in committed
    text = (FOLDER / "solutions" / f"{path.stem}.py").read_text()
    public = {
        node.name
        for node in ast.parse(text).body
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
    }
    assert {name for name in public if "_wrong" not in name} == set(stubs)
    assert all(name.split("_wrong")[0] in stubs for name in public)
    hints = sum(source(cell).count("<details>") for cell in cells(path, "markdown"))
    assert hints >= len(stubs)


# ---- kernels and notebooks name each other -------------------------------------------------------
def named_by_kernels():
    """Number of a notebook -> the kernel files whose docstring names it."""
    found = {}
    for path in sorted((REPOSITORY / "pace_nb" / "kernels").glob("*.py")):
        text = ast.get_docstring(ast.parse(path.read_text())) or ""
        for line in re.findall(r"Notebook:(.*?)(?:Ledger:|$)", text, re.MULTILINE):
            for number in re.findall(r"\b\d\d\b", line):
                found.setdefault(number, set()).add(f"pace_nb/kernels/{path.name}")
    return found


def test_every_notebook_that_a_kernel_names_exists_or_is_missing():
    written = {path.name[:2] for path in LESSONS}
    assert set(named_by_kernels()) - written == MISSING


@each_lesson
def test_it_names_the_kernels_that_name_it(path):
    kernels = set(re.findall(r"pace_nb/kernels/\w+\.py", source(cells(path)[0])))
    assert kernels == named_by_kernels().get(path.name[:2], set())


# ---- a fast run ----------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def runs(request, tmp_path_factory):
    """notebook -> a future of its run, for those that are selected; two at a time."""
    folder = tmp_path_factory.mktemp("executed")
    wanted = [
        item.callspec.params["path"]
        for item in request.session.items
        if getattr(item, "originalname", "") == test_it_says_what_it_said.__name__
    ]

    def run(path):
        command = [sys.executable, str(FOLDER / "execute.py"), path.stem, "--to", str(folder)]
        env = os.environ | {"PACE_NB_FAST": "1"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=LONGEST, env=env)
        return done, folder / path.name

    with ThreadPoolExecutor(2) as pool:
        yield {path: pool.submit(run, path) for path in wanted}


@pytest.mark.skipif(jit.INTERPRETED, reason="minutes of plain Python")
@each_notebook
def test_it_says_what_it_said(path, runs):
    done, result = runs[path].result()
    assert done.returncode == 0, done.stderr
    for number, (committed, fresh) in enumerate(zip(cells(path), cells(result), strict=True)):
        if committed["cell_type"] == "code":
            where = f"{path.name}, cell {number}:\n{source(committed)}"
            assert not list(outputs(fresh, "stderr")), where
            if not tagged(committed):
                assert said(fresh) == said(committed), where


def test_a_changed_output_is_found():
    cell = {
        "metadata": {},
        "outputs": [
            {"output_type": "stream", "name": "stdout", "text": ["ok  a: max error 1.0e-06, "]},
            {"output_type": "stream", "name": "stdout", "text": ["bound 2.0e-06\n", "12 loads\n"]},
            {"output_type": "execute_result", "data": {"text/plain": ["<f at 0x7f0011223344>"]}},
        ],
    }
    assert said(cell) == "ok  a: max error ...\n12 loads\n<f at 0x...>"
