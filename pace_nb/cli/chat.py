"""Talk with a model. Each line is a message; a message of several lines stands between two \"\"\".

Ctrl-C stops the answer and keeps what was said; Ctrl-D or /exit ends the program. Lines may come
from a pipe: each is answered in turn, and nothing but the answers goes to standard output.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Callable, Generator
from contextlib import closing
from typing import TYPE_CHECKING

from pace_nb.cli import interrupts, stats
from pace_nb.cli import options as shared
from pace_nb.cli.text_output import TextOutput
from pace_nb.cli.warmup import warm_up
from pace_nb.errors import ConfigError, PaceError

if TYPE_CHECKING:
    from pace_nb.outputs import CompletionOutput

DEFAULT_MAX_TOKENS = 512
FENCE = '"""'
COMMANDS = {
    "/help": "show this",
    "/reset": "forget the conversation",
    "/exit": "end (so does Ctrl-D)",
}

Messages = list[dict[str, str]]
Answer = Callable[[Messages], Generator[str, None, None]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Model, engine, sampling, and the system prompt."""
    parser.add_argument("--system-prompt", "--system", "-sys", metavar="TEXT",
                        help="what the model is told before the conversation")  # fmt: skip
    parser.add_argument("--stats", action="store_true", help="print rates after each answer")
    shared.add_model_arguments(parser)
    shared.add_engine_arguments(parser)
    shared.add_sampling_arguments(parser, DEFAULT_MAX_TOKENS)


def run(options: argparse.Namespace) -> int:
    """Open the model and converse."""
    if sys.stdin is None:
        raise ConfigError("chat reads its lines from standard input, which is closed")
    if isinstance(sys.stdin, io.TextIOWrapper):  # so that `utf8` can name the line that is wrong
        sys.stdin.reconfigure(errors="surrogateescape")
    if options.system_prompt is not None:
        options.system_prompt = shared.utf8(options.system_prompt, "--system-prompt")
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    with shared.open_llm(options) as llm:
        params = shared.sampling_params(options, llm.get_default_sampling_params())
        if options.stats:
            sys.stderr.write(f"{warm_up(llm)}\nseed      {params.seed}\n")

        def answer(messages: Messages) -> Generator[str, None, None]:
            watch = stats.Stopwatch()
            news = llm.stream_chat(messages, params)
            return told(stats.timed(news, watch), watch)

        def told(
            completions: Generator[CompletionOutput, None, None], watch: stats.Stopwatch
        ) -> Generator[str, None, None]:
            with closing(completions):
                for completion in completions:
                    yield completion.text
            if options.stats:
                sys.stderr.write(stats.report_of(llm, watch))

        if interactive:
            import readline  # noqa: F401  # gives input() its history and editing

            sys.stderr.write(f"{llm.directory.name}; /help lists the commands\n")
        return converse(
            answer,
            input if interactive else lambda _: input(),
            TextOutput(),
            interactive=interactive,
            system_prompt=options.system_prompt,
        )


def read_message(read_line: Callable[[str], str]) -> str:
    """The next message from `read_line(prompt)`; EOFError at the end of the input."""
    line = read_line(">>> ")
    if not line.strip().startswith(FENCE):
        return line
    lines = [line.strip().removeprefix(FENCE)]
    try:
        while not lines[-1].rstrip().endswith(FENCE):
            lines.append(read_line("... "))
    except EOFError:  # the end of the input ends the message, too
        return "\n".join(lines).strip("\n")
    lines[-1] = lines[-1].rstrip().removesuffix(FENCE)
    return "\n".join(lines).strip("\n")


def converse(
    answer: Answer,
    read_line: Callable[[str], str],
    output: TextOutput,
    *,
    interactive: bool,
    system_prompt: str | None = None,
) -> int:
    """The loop: read, answer, remember. An error is told, and the next message is read.

    Returns the exit code: 2 where there were errors and not one answer, and nobody who saw it.
    """
    opening: Messages = [{"role": "system", "content": system_prompt}] if system_prompt else []
    messages = list(opening)
    num_answers = num_errors = 0
    while True:
        try:
            message = read_message(read_line)
        except EOFError:
            break
        except KeyboardInterrupt:
            if not interactive:
                raise
            sys.stderr.write("\n(/exit or Ctrl-D ends the program)\n")
            continue
        word = message.strip()
        if word == "/exit":
            break
        if word == "/reset":
            messages = list(opening)
        elif word == "/help":
            sys.stderr.write("".join(f"{name:<8}{what}\n" for name, what in COMMANDS.items()))
            sys.stderr.write(f"{FENCE:<8}begins and ends a message of several lines\n")
        elif word.startswith("/") and len(word.split()) == 1:
            sys.stderr.write(f"{word} is no command; /help lists them\n")
        elif word:
            messages.append({"role": "user", "content": message})
            try:
                messages[-1]["content"] = shared.utf8(message, "the message")
                text = say(answer(messages), output, interactive=interactive)
            except PaceError as error:
                messages.pop()
                num_errors += 1
                hint = " (/reset forgets the conversation)" if len(messages) > len(opening) else ""
                sys.stderr.write(f"pace-nb: error: {error}{hint}\n")
            else:
                num_answers += 1
                messages.append({"role": "assistant", "content": text})
    return 2 if num_errors and not num_answers and not interactive else 0


def say(pieces: Generator[str, None, None], output: TextOutput, *, interactive: bool) -> str:
    """Write an answer as it comes; returns it, cut short where Ctrl-C came."""
    said = []
    with closing(pieces), interrupts.noted() as interrupted:
        for piece in pieces:
            output.write(piece)
            said.append(piece)
            if interrupted():
                if not interactive:
                    raise KeyboardInterrupt
                break
    output.end_line()
    return "".join(said)
