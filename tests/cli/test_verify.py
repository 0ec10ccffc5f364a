"""`pace-nb verify`: its exit codes, its files, its complaints."""

from __future__ import annotations

import json

import pytest

from pace_nb.cli.main import main
from pace_nb.verify import SUBJECTS


def test_a_sound_kernel_exits_with_0(capsys, tmp_path):
    path = tmp_path / "v.json"
    assert main(["verify", "--kernel", "gemm", "--grid", "3x5x17", "--json", str(path)]) == 0
    out = capsys.readouterr().out
    assert "every bound holds" in out and "M=3 N=5 K=17" in out
    assert json.loads(path.read_text())["holds"] is True


def test_a_broken_bound_exits_with_1_and_names_the_test(capsys, tmp_path):
    plot = tmp_path / "v.png"
    arguments = ["--kernel", "gemm", "--grid", "3x5x17", "--fault", "lost-tail"]
    assert main(["verify", *arguments, "--plot", str(plot)]) == 1
    out = capsys.readouterr().out
    assert "caught by  tests/kernels/test_gemm.py::test_matches_reference" in out
    assert plot.stat().st_size > 1000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kernel", "conv"], "kernel 'conv': expected all or one of gemm"),
        (["--grid", "3"], "sizes need one kernel"),
        (["--kernel", "rope", "--grid", "1x1x7"], "D must be even"),
        (["--json", "/nowhere/x.json"], "--json /nowhere/x.json: no such folder"),
        (["--fault", "nnan", "--kernel", "norm"], "norm can have lost-tail, bf16-accumulate"),
        (["--threads", "0"], "--threads: num_threads=0: expected 1 to"),
        (["--seed", "x"], "--seed"),
    ],
)
def test_bad_input_is_one_line(arguments, message, capsys):
    try:
        code = main(["verify", *arguments])
    except SystemExit as stop:  # argparse
        code = stop.code
    error = capsys.readouterr().err
    assert code == 2 and message in error and error.count("\n") == 1


def test_help_names_every_kernel(capsys):
    with pytest.raises(SystemExit):
        main(["verify", "--help"])
    words = capsys.readouterr().out.replace(",", " ").split()
    assert set(SUBJECTS) <= set(words)
