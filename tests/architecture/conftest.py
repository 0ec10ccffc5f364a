"""The package as syntax trees, parsed once for all the rules."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Module:
    """One source file of the package."""

    name: str  # dotted, "pace_nb.kernels.norm"; a package is named without `__init__`
    path: Path
    tree: ast.Module

    def __str__(self) -> str:
        return self.name

    @property
    def package(self) -> str:
        return self.name if self.path.name == "__init__.py" else self.name.rpartition(".")[0]

    @property
    def area(self) -> str:
        """First name below `pace_nb`: "kernels", "llm"; empty for pace_nb itself."""
        return [*self.name.split("."), ""][1]

    def imports(self) -> Iterator[tuple[str, int]]:
        """(dotted name, line) of everything imported, wherever in the file.

        `from a import b` gives `a.b`: if b is a module that is what is imported, and if it is not,
        the rules look at the first parts only.
        """
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                yield from ((alias.name, node.lineno) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                base = node.module or ""
                if node.level:
                    parents = self.package.split(".")
                    base = ".".join(parents[: len(parents) - node.level + 1] + base.split("."))
                yield from ((f"{base}.{a.name}".strip("."), node.lineno) for a in node.names)


@pytest.fixture(scope="session")
def modules(repository: Path) -> list[Module]:
    """Every module of pace_nb, in order of name."""
    found = []
    for path in sorted((repository / "pace_nb").rglob("*.py")):
        parts = list(path.relative_to(repository).with_suffix("").parts)
        if parts[-1] == "__init__":
            parts.pop()
        found.append(Module(".".join(parts), path, ast.parse(path.read_text(), str(path))))
    return found
