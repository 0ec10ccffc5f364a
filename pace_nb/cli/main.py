"""`main`: finds the verb, parses its arguments, runs it, and turns errors into one line.

Knows the verbs' names and the exit codes. Imports a verb's file only when that verb is asked for,
and no verb imports NumPy or Numba before it runs, so that help and mistakes cost no waiting.

Exit codes: 0 done; 2 the input was wrong (one line on stderr); 130 Ctrl-C; 141 the reader of our
output went away (as for a program stopped by SIGPIPE). Anything else is a defect and shows its
traceback.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn, Protocol, TextIO

import pace_nb
from pace_nb import env
from pace_nb.errors import ConfigError, PaceError

VERBS = {
    "generate": "write on after a prompt",
    "chat": "talk with a model",
    "run-batch": "answer a file of requests",
    "serve": "answer over HTTP, as OpenAI's API does",
    "tokenize": "show the tokens of a text",
    "warmup": "compile a model's kernels ahead of time",
    "bench": "measure latency, throughput, serving, startup or kernels",
    "doctor": "say what runs on this machine, and why",
    "verify": "check kernels against float64, with or without a fault",
    "list": "list the models in the local cache",
    "pull": "download a model from the Hugging Face hub",
    "show": "describe a model",
    "version": "print the versions of what matters",
}

EXIT_WRONG_INPUT = 2
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141


class Verb(Protocol):
    """What the file of a verb provides."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None: ...

    def run(self, options: argparse.Namespace) -> int: ...


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose complaint is one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_WRONG_INPUT, f"pace-nb: error: {message} (see {self.prog} --help)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `pace-nb` with `arguments` (default: the process's own); returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    if sys.stderr is None:  # the caller closed it (2>&-)
        sys.stderr = open(os.devnull, "w")  # for as long as the process lives
    while arguments[:1] == ["--debug"]:  # it may stand before the verb, too
        arguments = arguments[1:]
    try:
        debug = debug or env.debug()
        env.num_threads()  # refused here; Numba would fail on a wrong number with a traceback
        with warnings.catch_warnings():
            if not debug:
                warnings.showwarning = _show_warning
            if sys.stdout is None:  # >&-
                raise ConfigError("standard output is closed")
            code = _run(arguments)
        sys.stdout.flush()  # a reader that went away shows here and not while Python shuts down
        return code
    except PaceError as error:
        if debug:
            raise
        sys.stderr.write(f"pace-nb: error: {error}\n")
        return EXIT_WRONG_INPUT
    except KeyboardInterrupt:
        if debug:
            raise
        sys.stderr.write("\n")
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        _discard_output()
        return EXIT_BROKEN_PIPE
    except OSError as error:
        # Files that are opened by name are judged where that happens, and the error has the name.
        if debug or error.filename is not None:
            raise
        _discard_output()
        sys.stderr.write(f"pace-nb: error: standard input or output: {error.strerror}\n")
        return EXIT_WRONG_INPUT


def _discard_output() -> None:
    """What is still to be written must not fail once more while Python shuts down."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(arguments: Sequence[str]) -> int:
    name = next((word for word in arguments if not word.startswith("-")), None)
    if name not in VERBS or arguments[0] != name:
        _top_parser().parse_args(arguments)  # prints help or the version, or refuses
        return 0
    verb: Verb = import_module(f"pace_nb.cli.{name.replace('-', '_')}")
    parser = Parser(
        prog=f"pace-nb {name}", description=verb.__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--debug", action="store_true", help="show tracebacks and plain warnings")
    verb.add_arguments(parser)
    return verb.run(parser.parse_args(arguments[1:]))


def _top_parser() -> Parser:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {name:<{width}}  {text}" for name, text in VERBS.items())
    parser = Parser(
        prog="pace-nb", usage="pace-nb [--debug] VERB [arguments]", allow_abbrev=False,
        description="LLM inference on CPUs from NumPy and Numba.",
        epilog=f"verbs:\n{verbs}\n\npace-nb VERB --help lists the arguments of a verb.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"pace-nb {pace_nb.__version__}")
    parser.add_argument("verb", choices=list(VERBS), metavar="VERB", help=argparse.SUPPRESS)
    return parser


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """One line, without the source that Python adds."""
    del category, filename, lineno, line
    (file or sys.stderr).write(f"pace-nb: warning: {message}\n")
