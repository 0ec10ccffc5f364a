"""Write on after a prompt. The text goes to standard output, everything else to standard error."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING

from pace_nb.cli import interrupts, stats
from pace_nb.cli import options as shared
from pace_nb.cli.text_output import TextOutput
from pace_nb.cli.warmup import warm_up

if TYPE_CHECKING:
    from pace_nb.outputs import CompletionOutput

DEFAULT_MAX_TOKENS = 256


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Prompt, model, engine, sampling, and what to show."""
    shared.add_prompt_arguments(parser)
    add = parser.add_argument
    add(
        "--no-echo",
        "--no-display-prompt",
        action="store_true",
        help="do not repeat the prompt before the text",
    )
    add("--stats", action="store_true", help="at the end: rates, and the share of memory's limit")
    add(
        "--logprobs",
        type=int,
        metavar="K",
        help="at the end: log-probabilities of the tokens and of the K likeliest",
    )
    shared.add_model_arguments(parser)
    shared.add_engine_arguments(parser)
    shared.add_sampling_arguments(parser, DEFAULT_MAX_TOKENS)


def run(options: argparse.Namespace) -> int:
    """Stream one completion."""
    prompt = shared.read_prompt(options)
    with shared.open_llm(options) as llm:
        params = shared.sampling_params(options, llm.get_default_sampling_params())
        # Before the text, which the bar that names kernels would overwrite, and before the clock.
        ready = warm_up(llm)
        if options.stats:
            sys.stderr.write(f"{ready}\nseed      {params.seed}\n")
        output = TextOutput()
        watch = stats.Stopwatch()
        news = llm.stream(prompt, params)  # a prompt that cannot be served is refused here
        if not options.no_echo:
            output.write(prompt)
        logprobs: list[str] = []
        with interrupts.noted() as interrupted:
            for completion in stats.timed(news, watch):
                output.write(completion.text)
                logprobs += logprob_lines(completion)
                if interrupted():
                    raise KeyboardInterrupt
        output.end_line()
        sys.stderr.writelines(logprobs)
        if options.stats:
            sys.stderr.write(stats.report_of(llm, watch))
    return 0


def logprob_lines(completion: CompletionOutput) -> list[str]:
    """One line per token: its id, log-probability, rank and text, then the likeliest tokens."""
    lines = []
    for token_id, entries in zip(completion.token_ids, completion.logprobs or (), strict=False):
        chosen = entries[token_id]
        likeliest = sorted(entries.values(), key=lambda entry: -entry.logprob)
        others = "  ".join(f"{quoted(one.decoded_token)} {one.logprob:.3f}" for one in likeliest)
        lines.append(
            f"{token_id:>7} {chosen.logprob:8.3f}  rank {chosen.rank}"
            f"  {quoted(chosen.decoded_token)}  of  {others}\n"
        )
    return lines


def quoted(token: str | None) -> str:
    """A token's text in quotes, with control characters written out."""
    return json.dumps(token, ensure_ascii=False)
