"""Options that several verbs share, and what they become: an open `LLM`, a `SamplingParams`.

Knows the flags' names: vLLM's first, llama.cpp's accepted beside them. Does not judge values beyond
their type; `SamplingParams` and `EngineConfig` do, in the same words for every front door.
"""

from __future__ import annotations

import argparse
import json
import re
import secrets
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pace_nb.cli import interrupts
from pace_nb.errors import ConfigError, InvalidRequestError

if TYPE_CHECKING:
    from pace_nb.llm import LLM
    from pace_nb.sampling_params import SamplingParams

# Option -> EngineConfig field of the same name, of `add_batching_arguments`.
BATCHING_FIELDS = (
    "max_num_seqs", "max_num_batched_tokens", "long_prefill_token_threshold",
    "enable_chunked_prefill", "scheduling_policy", "kv_cache_memory_bytes",
)  # fmt: skip
# Option -> SamplingParams field of the same name. None means: not given on the command line.
SAMPLING_FIELDS = (
    "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "frequency_penalty",
    "presence_penalty", "seed", "stop", "stop_token_ids", "ignore_eos", "min_tokens", "max_tokens",
    "logprobs",
)  # fmt: skip


def add_prompt_arguments(parser: argparse.ArgumentParser) -> None:
    """Where the text comes from; see `read_prompt`."""
    add = parser.add_argument
    add(
        "positional_prompt",
        nargs="?",
        metavar="PROMPT",
        help="the text (default, or '-': standard input)",
    )
    add("-p", "--prompt", metavar="PROMPT", help="the text, as an option")
    add("-f", "--file", metavar="FILE", help="read the text from a file")


def add_model_arguments(parser: argparse.ArgumentParser, *, positional: bool = False) -> None:
    """Which model. `positional`: the verb takes it as an argument instead of as `--model`."""
    add = parser.add_argument_group("model").add_argument
    what = "local directory or hub name (default: the bundled demo model)"
    if positional:
        add("model", nargs="?", metavar="MODEL", help=what)
    else:
        add("-m", "--model", "-hf", metavar="MODEL", help=what)
    add("--revision", help="branch, tag or commit on the hub")
    add("--hf-token", metavar="TOKEN", help="for gated models (the variable HF_TOKEN is safer)")
    add("--offline", action="store_true", help="use only what is already downloaded")


def add_engine_arguments(
    parser: argparse.ArgumentParser, *, prefix_caching: str = "on where paged"
) -> None:
    """How the model is run. `prefix_caching`: its default, in words."""
    add = parser.add_argument_group("engine").add_argument
    add(
        "--dtype",
        default="auto",
        choices=("auto", "bfloat16", "float32"),
        help="storage of weights and KV cache (auto: bfloat16)",
    )
    add(
        "--kernels",
        default="numba",
        choices=("numba", "reference"),
        help="compiled kernels, or plain NumPy (slow)",
    )
    add(
        "-t",
        "--threads",
        type=int,
        metavar="N",
        help="threads of the kernels (default: what affinity and cgroup allow)",
    )
    add(
        "-c",
        "--max-model-len",
        "--ctx-size",
        type=human_integer,
        metavar="N",
        help="longest prompt and output together, in tokens",
    )
    add(
        "--kv-cache",
        "--kv-backend",
        default="paged",
        choices=("contiguous", "slab", "paged"),
        help="how keys and values are stored (default: %(default)s)",
    )
    add(
        "--block-size",
        type=int,
        metavar="N",
        help="tokens of a block of the KV cache, a multiple of 16 (default: 16; slab: by L2)",
    )
    add(
        "--enable-prefix-caching",
        action=argparse.BooleanOptionalAction,
        help=f"compute what prompts begin with in common only once (default: {prefix_caching})",
    )
    add(
        "--speculative-config",
        type=json_object,
        metavar="JSON",
        help="guess tokens ahead, such as "
        """'{"method": "prompt_lookup", "num_speculative_tokens": 5}'; the text stays the same""",
    )


def add_batching_arguments(parser: argparse.ArgumentParser) -> None:
    """How many requests share a step, and who goes first; what is not given is EngineConfig's."""
    add = parser.add_argument_group("many requests at a time").add_argument
    add(
        "--max-num-seqs",
        "--parallel",
        "-np",
        type=int,
        metavar="N",
        help="requests that run at the same time (default: 32)",
    )
    add(
        "--max-num-batched-tokens",
        type=human_integer,
        metavar="N",
        help="tokens of a step: first one for each that decodes, then prompts (default: 2048)",
    )
    add(
        "--long-prefill-token-threshold",
        type=human_integer,
        metavar="N",
        help="most tokens of one prompt in a step (default: 0, no bound but the step's)",
    )
    add(
        "--enable-chunked-prefill",
        action=argparse.BooleanOptionalAction,
        help="let long prompts run in pieces between the others' tokens (default: on)",
    )
    add(
        "--scheduling-policy",
        choices=("fcfs", "priority"),
        help="first come, first served, or by the requests' priority, lower values first "
        "(default: fcfs)",
    )
    add(
        "--kv-cache-memory-bytes",
        type=human_integer,
        metavar="BYTES",
        help="size of the KV cache, such as 4G (default: by what memory is free)",
    )


def add_sampling_arguments(parser: argparse.ArgumentParser, max_tokens: int) -> None:
    """How tokens are chosen. What is not given comes from the model's generation_config.json."""
    group = parser.add_argument_group("sampling")

    def number(kind: type, help: str, *names: str) -> None:
        group.add_argument(*names, type=kind, metavar="N" if kind is int else "X", help=help)

    number(int, f"most tokens to generate (default: {max_tokens})",
           "-n", "--max-tokens", "--n-predict", "--max-new-tokens")  # fmt: skip
    group.set_defaults(max_tokens=max_tokens)
    number(int, "do not stop before so many", "--min-tokens")
    number(float, "0 takes the most likely token", "--temperature", "--temp")
    number(float, "the smallest set of tokens that reaches this share", "--top-p")
    number(int, "the N most likely tokens (0: all)", "--top-k")
    number(float, "drop tokens below this share of the likeliest", "--min-p")
    number(float, "divide the logits of tokens seen before",
           "--repetition-penalty", "--repeat-penalty")  # fmt: skip
    number(float, "subtract per earlier occurrence", "--frequency-penalty")
    number(float, "subtract once for a token that occurred", "--presence-penalty")
    number(int, "same seed, same text (default: drawn at random, shown by --stats)", "-s", "--seed")
    group.add_argument(
        "--stop",
        "-r",
        "--reverse-prompt",
        action="append",
        metavar="TEXT",
        help="end before this text (may be repeated)",
    )
    group.add_argument(
        "--stop-token-ids",
        type=int,
        nargs="+",
        metavar="ID",
        help="end after one of these tokens",
    )
    group.add_argument(
        "--ignore-eos",
        action="store_true",
        default=None,
        help="go on past the end token",
    )


def resolve_model(options: argparse.Namespace) -> Path:
    """Directory of the model that the options name, downloaded if need be."""
    from pace_nb.models import hub

    return hub.resolve(
        options.model,
        revision=options.revision,
        token=options.hf_token,
        offline=options.offline or None,  # None: HF_HUB_OFFLINE decides
    )


def json_object(text: str) -> dict[str, Any]:
    """An option's value that is a JSON object; argparse refuses anything else in these words."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"expected a JSON object, got {text!r}")
    return value


def human_integer(text: str) -> int:
    """An argument's type: an integer, or one with a unit as vLLM has them.

    1k is 1000, 1K is 1024, 25.6k is 25600; and so on with m, g, t and M, G, T.
    """
    found = re.fullmatch(r"([+-]?\d+)|(\d{1,18}(?:\.\d{1,18})?)([kmgtKMGT])", text, re.ASCII)
    if found is None:
        raise argparse.ArgumentTypeError(
            f"expected an integer, such as 4096, 4k (4000) or 4K (4096), got {text!r}"
        )
    if found[1] is not None:
        return int(found[1])
    base = 1024 if found[3].isupper() else 1000
    return int(Fraction(found[2]) * base ** ("kmgt".index(found[3].lower()) + 1))


def at_least(least: int) -> Callable[[str], int]:
    """An argument's type: an integer from `least`."""

    def integer(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"expected an integer from {least}, got {text!r}")
        return value

    return integer


def check_plot(path: Path | None) -> None:
    """ConfigError where `--plot` could not be drawn: asked before a measurement, which would
    otherwise be lost."""
    if path is None:
        return
    if not path.resolve().parent.is_dir():
        raise ConfigError(f"--plot {path}: no such folder")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(
            "--plot needs matplotlib, which is not installed: pip install 'pace-nb[bench]'"
        ) from error
    kinds = Figure().canvas.get_supported_filetypes()
    if path.suffix and path.suffix[1:].lower() not in kinds:
        raise ConfigError(f"--plot {path}: expected a name that ends in one of {', '.join(kinds)}")


def set_threads(options: argparse.Namespace) -> None:
    """Let the kernels use `--threads`. ConfigError for a number that this machine cannot have."""
    from pace_nb.kernels import jit

    if options.threads is not None:
        try:
            jit.set_num_threads(options.threads)
        except ValueError as error:
            raise ConfigError(f"--threads: {error}") from error


def engine_options(options: argparse.Namespace) -> dict[str, Any]:
    """Fields of EngineConfig, but for the model, as the command line has them."""
    batching = {
        name: value
        for name in BATCHING_FIELDS
        if (value := getattr(options, name, None)) is not None
    }
    return {
        "dtype": options.dtype,
        "kernels": options.kernels,
        "num_threads": options.threads,
        "max_model_len": options.max_model_len,
        "kv_cache": options.kv_cache,
        "block_size": options.block_size,
        "enable_prefix_caching": options.enable_prefix_caching,
        "speculative_config": options.speculative_config,
        **batching,
    }


def open_llm(options: argparse.Namespace) -> LLM:
    """The LLM that the model and engine options describe."""
    from pace_nb.llm import LLM

    set_threads(options)  # refused before a model is loaded for nothing
    directory = resolve_model(options)  # a download may be interrupted at any time
    with interrupts.deferred():
        return LLM(directory, **engine_options(options))


def sampling_params(options: argparse.Namespace, defaults: SamplingParams) -> SamplingParams:
    """`defaults` with what the command line gave; InvalidRequestError for a value out of range.

    Where no seed is given (-1 is none) one is drawn at random: two calls write two texts.
    """
    from dataclasses import replace

    given: dict[str, Any] = {
        name: value
        for name in SAMPLING_FIELDS
        if (value := getattr(options, name, None)) is not None
    }
    params = replace(defaults, **given)
    return params if params.seed is not None else replace(params, seed=secrets.randbits(32))


def read_prompt(options: argparse.Namespace) -> str:
    """The prompt: the argument, `--prompt`, `--file`, or standard input when it is not a terminal.

    ConfigError when there is none or more than one, InvalidRequestError for text that is not UTF-8.
    """
    given = [p for p in (options.positional_prompt, options.prompt, options.file) if p is not None]
    if len(given) > 1:
        raise ConfigError("give the prompt once: as the argument, with --prompt or with --file")
    if options.file is not None:
        try:
            return _decoded(Path(options.file).read_bytes(), options.file)
        except OSError as error:
            raise ConfigError(f"--file {options.file}: {error.strerror}") from error
    if given and given[0] != "-":
        return utf8(given[0], "prompt")
    if sys.stdin is None:
        raise ConfigError("no prompt: standard input is closed")
    if not given and sys.stdin.isatty():
        raise ConfigError('no prompt: give it as an argument, for example "Once upon a time"')
    return _decoded(sys.stdin.buffer.read(), "standard input")


def utf8(text: str, name: str) -> str:
    """`text`; InvalidRequestError where it came from bytes that are not UTF-8, which Python hands
    on as lone surrogates."""
    try:
        data = text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as error:
        raise InvalidRequestError(f"{name}: no Unicode text at character {error.start}") from error
    return _decoded(data, name)


def _decoded(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequestError(f"{name}: not UTF-8 at byte {error.start}") from error
