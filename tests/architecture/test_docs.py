"""The documents: links lead somewhere, generated parts are the generated ones, commands exist."""

from __future__ import annotations

import ast
import re
import subprocess
import sys

import pytest

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
VERBS = "setup demo serve lint test test-long test-interpreted notebooks bench docs".split()


def documents(repository):
    return [*sorted(repository.glob("*.md")), *sorted((repository / "docs").rglob("*.md"))]


def anchors(text):
    """GitHub's anchors of a Markdown text's headings."""
    for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        yield re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")


def test_links_lead_somewhere(repository):
    broken = []
    for document in documents(repository):
        for target in LINK.findall(document.read_text()):
            if target.startswith(("http://", "https://", "mailto:")):
                continue
            name, _, anchor = target.partition("#")
            path = (document.parent / name).resolve() if name else document
            if not path.exists():
                broken.append(f"{document}: {target}")
            elif anchor and anchor not in anchors(path.read_text()):
                broken.append(f"{document}: {target} has no such heading")
    assert not broken, "\n".join(broken)


def test_readme_table_is_the_generated_one(repository):
    script = repository / "bench" / "readme_table.py"
    result = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("verb", VERBS)
def test_make_has_each_verb(repository, verb):
    assert re.search(rf"^{verb}:", (repository / "Makefile").read_text(), re.MULTILINE)


def test_make_has_no_other_verb(repository):
    phony = re.search(r"^\.PHONY: (.*)$", (repository / "Makefile").read_text(), re.MULTILINE)
    assert phony is not None
    assert set(phony[1].split()) == {"help", *VERBS}


def test_ci_runs_the_readme_test_command(repository):
    assert "\nmake test\n" in (repository / ".ci" / "run").read_text()
    assert re.search(r"^make test\b", (repository / "README.md").read_text(), re.MULTILINE)


def test_readme_uses_verbs_that_exist(repository):
    from pace_nb.cli.main import VERBS as cli_verbs

    text = (repository / "README.md").read_text()
    assert set(re.findall(r"\bmake ([a-z][a-z-]*)", text)) <= set(VERBS)
    used = set(re.findall(r"pace-nb ([a-z]+(?:-[a-z]+)*)", text))
    assert used and used <= set(cli_verbs)


def test_every_decision_is_listed(repository):
    folder = repository / "docs" / "adr"
    index = (folder / "README.md").read_text()
    records = sorted(path.name for path in folder.glob("[0-9]*.md"))
    numbers = [int(name[:4]) for name in records]
    assert numbers == list(range(1, len(records) + 1)), "numbered without gaps or doubles"
    assert not [name for name in records if f"({name})" not in index]
    for name in records:
        first = (folder / name).read_text().splitlines()[0]
        assert first.startswith(f"# {name[:4]}: "), name


def test_decisions_that_the_code_cites_exist(repository):
    records = {path.name[:4] for path in (repository / "docs" / "adr").glob("[0-9]*.md")}
    sources = [*(repository / "pace_nb").rglob("*.py"), *(repository / "tests").rglob("*.py")]
    cited = {n for path in sources for n in re.findall(r"docs/adr/(\d{4})", path.read_text())}
    assert cited
    assert cited <= records


def names_in(path):
    """What a module defines: classes, functions, methods as Class.method, constants."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign | ast.AnnAssign):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                yield ast.unparse(target)
        elif isinstance(node, ast.ClassDef | ast.FunctionDef):
            yield node.name
            for inner in getattr(node, "body", []):
                if isinstance(inner, ast.FunctionDef):
                    yield f"{node.name}.{inner.name}"


def test_the_walk_of_a_request_uses_the_real_names(repository):
    """Each name in backticks is in the file that was linked last before it."""
    page = (repository / "docs" / "architecture.md").read_text()
    walk = page.partition("## One request")[2].partition("\n## ")[0]
    steps = re.findall(r"^\d+\. .*$|^Other doors .*$", walk, re.MULTILINE)
    assert len(steps) == 15
    missing, found = [], 0
    for step in steps:
        names: set[str] = set()
        for target, name in re.findall(r"\]\(([^)]+\.py)\)|`([^`]+)`", step):
            if target:
                names = set(names_in(repository / "docs" / target))
            elif name not in names:
                missing.append(f"{step[:20]}: {name}")
            else:
                found += 1
    assert not missing, "\n".join(missing)
    assert found > 50


def test_architecture_page_names_every_rule_file(repository):
    page = (repository / "docs" / "architecture.md").read_text()
    files = {path.name for path in (repository / "tests" / "architecture").glob("test_*.py")}
    assert set(re.findall(r"`(test_\w+\.py)`", page)) == files


RELIABILITY = {
    *(f"S{i}" for i in range(1, 41)),
    *(f"R{i}" for first, last in [(1, 16), (20, 27), (30, 35), (40, 42), (50, 57)]
      for i in range(first, last + 1)),
    *(f"D{i}" for i in range(1, 9)),
}  # fmt: skip


def test_every_case_of_reliability_has_a_test_or_a_reason(repository):
    """docs/reliability.md: a case is in the name of a test, or in one of the two tables."""
    page = (repository / "docs" / "reliability.md").read_text()
    rows = re.findall(r"^\| ([SRD]\d+(?:, [SRD]\d+)*) \|", page, re.MULTILINE)
    listed = [case for row in rows for case in row.split(", ")]
    named = set()
    for path in (repository / "tests").rglob("test_*.py"):
        for name in re.findall(r"def (test_[SRD]\d+_\w+)", path.read_text()):
            named |= set(re.findall(r"(?<=_)[SRD]\d+(?=_)", name))
    assert len(listed) == len(set(listed)), "a case is listed twice"
    assert not named & set(listed), "a case is in the name of a test, and listed"
    assert named | set(listed) == RELIABILITY
    for file in re.findall(r"`(tests/[\w/]+\.py)`", page):
        assert (repository / file).is_file(), file
