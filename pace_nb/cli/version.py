"""Print the version of pace-nb and of what its results depend on."""

from __future__ import annotations

import argparse
import platform
from importlib.metadata import version

import pace_nb

LIBRARIES = ("numba", "llvmlite", "numpy", "tokenizers")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No arguments."""


def run(options: argparse.Namespace) -> int:
    """Print one line per component."""
    print(f"pace-nb {pace_nb.__version__}")
    print(f"python {platform.python_version()}")
    for name in LIBRARIES:
        print(f"{name} {version(name)}")  # from the metadata: nothing is imported
    return 0
