"""`pace-nb version` tells what results depend on, without loading it."""

from __future__ import annotations

import importlib.metadata

import pace_nb
from pace_nb.cli.main import main


def test_versions(capsys):
    assert main(["version"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"pace-nb {pace_nb.__version__}"
    assert f"numba {importlib.metadata.version('numba')}" in lines
    assert f"numpy {importlib.metadata.version('numpy')}" in lines
