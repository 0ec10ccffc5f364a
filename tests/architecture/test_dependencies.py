"""The core install stays small: what is declared, and what that pulls in."""

from __future__ import annotations

import importlib.metadata
import tomllib

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

CORE = {
    "numba", "llvmlite", "numpy", "safetensors", "tokenizers", "huggingface-hub", "jinja2", "tqdm",
}  # fmt: skip
MOST_PACKAGES = 25


def project(repository):
    return tomllib.loads((repository / "pyproject.toml").read_text())["project"]


def installed_closure(requirements):
    """Names of all packages that the requirements need in this environment, themselves included."""
    wanted = [Requirement(text) for text in requirements]
    seen: dict[tuple[str, frozenset[str]], str] = {}
    while wanted:
        requirement = wanted.pop()
        name = canonicalize_name(requirement.name)
        key = (name, frozenset(requirement.extras))
        extras = [{"extra": extra} for extra in requirement.extras] or [{"extra": ""}]
        if key in seen or not (
            requirement.marker is None or any(requirement.marker.evaluate(e) for e in extras)
        ):
            continue
        seen[key] = name
        for text in importlib.metadata.requires(name) or []:
            needed = Requirement(text)
            if needed.marker is None or any(needed.marker.evaluate(e) for e in extras):
                needed.marker = None
                wanted.append(needed)
    return set(seen.values())


def test_core_dependencies_are_these(repository):
    declared = {Requirement(text).name for text in project(repository)["dependencies"]}
    assert declared == CORE


def test_extras_are_these(repository):
    extras = set(project(repository)["optional-dependencies"])
    assert extras == {
        "server", "notebooks", "ray", "bench", "docs", "browser", "test", "dev", "train"
    }  # fmt: skip


def test_core_install_is_small(repository):
    packages = installed_closure(project(repository)["dependencies"])
    assert packages >= CORE | {"markupsafe"}
    assert len(packages) <= MOST_PACKAGES, sorted(packages)
    assert not packages & {"torch", "transformers", "pydantic", "fastapi", "scipy", "pandas"}


def test_python_floor(repository):
    assert project(repository)["requires-python"] == ">=3.11"


def test_the_version_is_written_once(repository):
    import pace_nb

    assert "version" in project(repository)["dynamic"]
    assert importlib.metadata.version("pace-nb") == pace_nb.__version__
