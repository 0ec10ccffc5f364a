"""Answer a file of requests in OpenAI's batch format, one JSON object per line, in order."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import BinaryIO

from pace_nb.cli import interrupts
from pace_nb.cli import options as shared
from pace_nb.cli.warmup import warm_up
from pace_nb.errors import ConfigError

DEMO_NAME = "pace-nb-demo"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Files, model, engine, and how many at a time."""
    add = parser.add_argument
    add("-i", "--input-file", required=True, metavar="FILE", help="requests, one per line")
    add("-o", "--output-file", required=True, metavar="FILE", help="where the answers go")
    shared.add_model_arguments(parser)
    add(
        "--served-model-name",
        nargs="+",
        metavar="NAME",
        help="what requests call the model (default: as it was given)",
    )
    shared.add_engine_arguments(parser)
    shared.add_batching_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Stream the input through the model; a summary goes to standard error."""
    source, target = Path(options.input_file), Path(options.output_file)
    with open_input(source) as lines, open_output(source, target) as output:
        num_lines = sum(1 for line in lines_of(lines) if line.strip())
        lines.seek(0)
        with shared.open_llm(options) as llm:
            from tqdm import tqdm

            from pace_nb.openai_api.batch_file import answer_lines

            sys.stderr.write(f"{warm_up(llm)}\n")
            served = options.served_model_name or [options.model or DEMO_NAME]
            num_failed = num_tokens = 0
            started = time.monotonic()
            with (
                interrupts.noted() as interrupted,
                closing(answer_lines(llm, lines_of(lines), served)) as answers,  # type: ignore[type-var]
                tqdm(total=num_lines, desc="requests", unit="") as bar,
            ):
                for answer in answers:
                    write(output, f"{json.dumps(answer, allow_nan=False)}\n", target)
                    usage = answer["response"]["body"].get("usage", {})
                    num_tokens += usage.get("completion_tokens", 0)
                    num_failed += answer["error"] is not None
                    rate = num_tokens / max(time.monotonic() - started, 1e-9)
                    bar.set_postfix_str(f"out {rate:.1f} tokens/s", refresh=False)
                    bar.update()
                    if interrupted():
                        raise KeyboardInterrupt
    sys.stderr.write(f"{num_lines} requests, {num_failed} with an error; answers in {target}\n")
    return 0


def open_input(path: Path) -> BinaryIO:
    """The requests. ConfigError where they cannot be read."""
    try:
        return path.open("rb")
    except OSError as error:
        raise ConfigError(f"--input-file {path}: {error.strerror}") from error


def open_output(source: Path, path: Path) -> BinaryIO:
    """Where the answers go. ConfigError where they cannot, above all over the requests."""
    try:
        if path.exists() and os.path.samefile(source, path):
            raise ConfigError(f"--output-file {path}: expected another file than --input-file")
        return path.open("wb", buffering=0)
    except OSError as error:
        raise ConfigError(f"--output-file {path}: {error.strerror}") from error


def write(output: BinaryIO, line: str, path: Path) -> None:
    """A whole line at once, so that whatever happens later leaves whole lines."""
    try:
        output.write(line.encode())
    except OSError as error:
        raise ConfigError(f"--output-file {path}: {error.strerror}") from error


def lines_of(file: BinaryIO) -> Iterator[bytes]:
    """Lines as bytes; of one that is too long only its beginning, one byte more than allowed."""
    from pace_nb.openai_api.batch_file import MAX_LINE_BYTES

    while line := file.readline(MAX_LINE_BYTES + 1):
        rest = line
        while len(rest) > MAX_LINE_BYTES and not rest.endswith(b"\n"):
            rest = file.readline(MAX_LINE_BYTES + 1)
        yield line
