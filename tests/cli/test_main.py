"""Dispatch, exit codes, and the one line that an error is."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings

import pytest

from pace_nb.cli import main as cli
from pace_nb.cli import version
from pace_nb.errors import ModelFormatError


def run(capsys, *arguments):
    """(exit code, standard output, standard error) of `pace-nb arguments`, in this process."""
    try:
        code = cli.main(list(arguments))
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def failing_verb(monkeypatch):
    """Makes `pace-nb version` raise what it is given."""

    def install(error):
        def fail(options):
            raise error

        monkeypatch.setattr(version, "run", fail)

    return install


def test_help_lists_every_verb(capsys):
    code, out, err = run(capsys, "--help")
    assert (code, err) == (0, "")
    for verb, text in cli.VERBS.items():
        assert verb in out and text in out


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_has_help(capsys, verb):
    code, out, err = run(capsys, verb, "--help")
    assert (code, err) == (0, "")
    assert out.startswith(f"usage: pace-nb {verb} ")


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("serf",),
        ("--frobnicate",),
        ("--debug",),
        ("version", "--frobnicate"),
        ("version", "extra"),
        ("generate", "x", "--top-k", "many"),
        ("generate", "x", "--dtype", "int4"),
        ("generate", "x", "--temper", "1"),
        ("tokenize", "x", "--ids", "--count"),
    ],
)
def test_wrong_arguments_are_one_line_and_exit_code_2(capsys, arguments):
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("pace-nb: error: ")
    assert err.count("\n") == 1 and err.endswith("--help)\n")


def test_an_unknown_verb_is_told_the_verbs(capsys):
    _, _, err = run(capsys, "serf")
    assert "'serf'" in err and "'generate'" in err


def test_a_pace_error_is_one_line(capsys, failing_verb):
    failing_verb(ModelFormatError("model.safetensors: header\nof 9 bytes"))
    code, out, err = run(capsys, "version")
    assert (code, out) == (2, "")
    assert err == "pace-nb: error: model.safetensors: header of 9 bytes\n"


def test_debug_shows_the_traceback(failing_verb, monkeypatch):
    failing_verb(ModelFormatError("x"))
    for arguments in (["version", "--debug"], ["--debug", "version"]):
        with pytest.raises(ModelFormatError):
            cli.main(arguments)
    monkeypatch.setenv("PACE_NB_DEBUG", "1")
    with pytest.raises(ModelFormatError):
        cli.main(["version"])


def test_a_wrong_debug_variable_is_an_error_too(capsys, monkeypatch):
    monkeypatch.setenv("PACE_NB_DEBUG", "maybe")
    code, _, err = run(capsys, "version")
    assert code == 2 and "PACE_NB_DEBUG" in err


def test_a_defect_keeps_its_traceback(failing_verb):
    failing_verb(ZeroDivisionError("x"))
    with pytest.raises(ZeroDivisionError):
        cli.main(["version"])


def test_ctrl_c_is_130(capsys, failing_verb):
    failing_verb(KeyboardInterrupt())
    code, out, err = run(capsys, "version")
    assert (code, out, err.strip()) == (130, "", "")


def test_warnings_are_one_line(capsys, monkeypatch):
    def warn(options):
        warnings.warn("compiled kernels are kept in memory only", RuntimeWarning, stacklevel=1)
        return 0

    monkeypatch.setattr(version, "run", warn)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        code, _, err = run(capsys, "version")
    assert code == 0
    assert err == "pace-nb: warning: compiled kernels are kept in memory only\n"


def test_a_reader_that_goes_away_is_no_error():
    """As for any program stopped by SIGPIPE: quiet, and 141."""
    process = subprocess.Popen(
        [sys.executable, "-c", "import sys; from pace_nb.cli import main, version\n"
         "version.run = lambda options: print('x' * 1000000) or 0\n"
         "sys.exit(main.main(['version']))"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip
    process.stdout.read(10)
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(timeout=30) == 141


@pytest.mark.parametrize(
    ("redirection", "message"),
    [
        (">/dev/full", "standard input or output: No space left on device"),
        (">&-", "standard output is closed"),
        ("2>&-", ""),
    ],
)
def test_standard_streams_that_cannot_be_used_are_one_line(redirection, message):
    if ">/dev/full" in redirection and not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    command = f"tokenize hi {redirection}"
    result = subprocess.run(
        ["sh", "-c", f'"$0" -m pace_nb {command}', sys.executable],
        capture_output=True,
        text=True,
        timeout=60,
    )
    if message:
        assert (result.returncode, result.stderr) == (2, f"pace-nb: error: {message}\n")
    else:
        assert result.returncode == 0 and result.stdout != ""
