"""What an import loads, judged by the names of modules and not by the clock."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = {"numba", "llvmlite", "numpy", "tokenizers", "safetensors", "huggingface_hub", "jinja2"}


def loaded_by(*arguments):
    """Top-level names of all modules that `python *arguments` imports."""
    result = subprocess.run(
        [sys.executable, "-X", "importtime", *arguments], capture_output=True, text=True, check=True
    )
    lines = [line for line in result.stderr.splitlines() if line.startswith("import time:")]
    assert len(lines) > 10, result.stderr
    return {line.rsplit("|", 1)[1].strip().split(".")[0] for line in lines}


@pytest.mark.parametrize(
    "arguments",
    [
        ("-c", "import pace_nb; pace_nb.__version__"),
        ("-m", "pace_nb", "--help"),
        ("-m", "pace_nb", "--version"),
        ("-m", "pace_nb", "generate", "--help"),
        ("-m", "pace_nb", "chat", "--help"),
    ],
)
def test_nothing_heavy_is_imported(arguments):
    loaded = loaded_by(*arguments)
    assert "pace_nb" in loaded
    assert not loaded & (HEAVY | {"tqdm", "asyncio"})


def test_the_rule_can_see_a_heavy_import():
    assert "numpy" in loaded_by("-c", "import numpy")
