"""Measure latency, throughput, startup and serving as `vllm bench` does; kernels by their limits.

Flags, output lines and JSON keys of all but the kernels are vLLM's; defaults that suit
a CPU are smaller. Prefix caching is off, as there, because the same prompts come again. Every
measurement compiles or loads the kernels before its clock starts, but for startup, which is about
that.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pace_nb.cli import bench_serve
from pace_nb.cli import options as shared
from pace_nb.errors import ConfigError

if TYPE_CHECKING:
    from pace_nb.benchmarks.profile import Operation
    from pace_nb.benchmarks.startup import Start
    from pace_nb.layers.weights import StorageDtype
    from pace_nb.llm import LLM

KINDS = {
    "latency": "seconds for one batch of prompts that arrive together",
    "throughput": "tokens per second for many prompts at once",
    "serve": "a running server, seen from a client's side",
    "startup": "seconds until a new process is ready, and until its first token",
    "kernels": "each kernel on the model's shapes, as a share of what the machine can do",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One parser per kind of measurement."""
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND", title="kinds")
    for kind, text in KINDS.items():
        add_kind(kind, kinds.add_parser(kind, help=text, description=text, allow_abbrev=False))


def add_kind(kind: str, parser: argparse.ArgumentParser) -> None:
    """The arguments of one kind."""
    if kind == "serve":
        bench_serve.add_arguments(parser)
        return

    def number(name: str, default: int, help: str, least: int = 1) -> None:
        parser.add_argument(
            name, type=shared.at_least(least), default=default, metavar="N",
            help=f"{help} (default: %(default)s)",
        )  # fmt: skip

    if kind in ("latency", "throughput"):
        number("--input-len", 32 if kind == "latency" else 128, "tokens of each prompt")
        number("--output-len", 128, "tokens generated for each")
        number("--n", 1, "completions of each prompt")
        number("--seed", 0, "of the prompts", 0)
        parser.add_argument(
            "--disable-detokenize", action="store_true", help="leave the text out of the time"
        )
    if kind == "latency":
        number("--batch-size", 8, "prompts that arrive together")
        number("--num-iters-warmup", 3, "iterations that do not count", 0)
        number("--num-iters", 10, "iterations that count")
        parser.add_argument(
            "--profile",
            action="store_true",
            help="print time, bytes, FLOPs and share of the limit of each operation",
        )
    elif kind == "throughput":
        number("--num-prompts", 32, "prompts in all")
        number("--num-warmups", 0, "prompts that are done before the clock starts", 0)
    elif kind == "startup":
        number("--num-iters-cold", 1, "starts with an empty cache of machine code", 0)
        number("--num-iters-warmup", 1, "starts that fill the cache and do not count", 0)
        number("--num-iters-warm", 3, "starts with a filled cache", 0)
    parser.add_argument("--output-json", type=Path, metavar="FILE", help="write the results")
    if kind in ("latency", "kernels"):
        what = "iterations" if kind == "latency" else "rooflines"
        parser.add_argument(
            "--plot", type=Path, metavar="FILE", help=f"draw the {what} (needs the extra bench)"
        )
    shared.add_model_arguments(parser)
    shared.add_engine_arguments(parser, prefix_caching="off")
    if kind != "kernels":
        shared.add_batching_arguments(parser)
    parser.set_defaults(enable_prefix_caching=False)


def run(options: argparse.Namespace) -> int:
    """Measure one kind and report it."""
    if options.kind == "serve":
        return bench_serve.run(options)
    if options.output_json is not None and not options.output_json.resolve().parent.is_dir():
        raise ConfigError(f"--output-json {options.output_json}: no such folder")
    shared.check_plot(getattr(options, "plot", None))
    measure = {
        "latency": run_latency,
        "throughput": run_throughput,
        "startup": run_startup,
        "kernels": run_kernels,
    }[options.kind]
    result = measure(options)
    if options.output_json is not None:
        try:
            options.output_json.write_text(json.dumps(result, indent=4) + "\n")
        except OSError as error:
            raise ConfigError(f"--output-json {options.output_json}: {error.strerror}") from error
    return 0


def model_id(options: argparse.Namespace) -> str:
    """The model as it was named."""
    return str(options.model or "demo")


def run_latency(options: argparse.Namespace) -> dict[str, Any]:
    """vLLM's `bench latency`."""
    from tqdm import tqdm

    from pace_nb.benchmarks import offline

    def ticks(iterations: Iterable[int]) -> Iterable[int]:
        return tqdm(iterations, desc="iterations")

    with shared.open_llm(options) as llm:
        llm.warm_up()
        latencies = offline.latency(
            llm,
            input_len=options.input_len,
            output_len=options.output_len,
            batch_size=options.batch_size,
            n=options.n,
            num_iters_warmup=options.num_iters_warmup,
            num_iters=options.num_iters,
            detokenize=not options.disable_detokenize,
            seed=options.seed,
            ticks=ticks,
        )
        rows = profiled(llm, options) if options.profile else []
    result = offline.latency_result(model_id(options), latencies)
    if rows:
        result["profile"] = [row._asdict() for row in rows]
    print(f"Avg latency: {result['avg_latency']} seconds")
    for percentage, seconds in result["percentiles"].items():
        print(f"{percentage}% percentile latency: {seconds} seconds")
    if options.plot is not None:
        from pace_nb.benchmarks import plots

        title = (
            f"{model_id(options)}: {options.batch_size} x "
            f"{options.input_len} tokens in, {options.output_len} out"
        )
        plots.latencies(latencies, title, options.plot)
    return result


def profiled(llm: LLM, options: argparse.Namespace) -> list[Operation]:
    """One more iteration, operation by operation; prints it as a table."""
    from pace_nb.benchmarks import offline
    from pace_nb.benchmarks.profile import Profile
    from pace_nb.kernels import limits

    read, peak = limits.dram_read_rate(), limits.flop_peak()
    with Profile() as profile:
        offline.latency(
            llm,
            input_len=options.input_len,
            output_len=options.output_len,
            batch_size=options.batch_size,
            n=options.n,
            num_iters_warmup=0,
            num_iters=1,
            detokenize=not options.disable_detokenize,
            seed=options.seed,
        )
    rows = profile.rows(read, peak)
    print(f"limits: {read / 1e9:.1f} GB/s read from DRAM, {peak / 1e9:.0f} GFLOP/s in registers")
    print(f"{'operation':<36} {'calls':>6} {'ms':>9} {'time':>6} {'GB':>8} {'GFLOP':>8} limit")
    for row in rows:
        limit = "" if row.share_of_limit is None else f"{row.share_of_limit:.0%}"
        print(
            f"{row.name:<36} {row.calls:>6} {row.seconds * 1e3:>9.2f} {row.share_of_time:>6.1%} "
            f"{row.moved / 1e9:>8.2f} {row.flops / 1e9:>8.1f} {limit:>5}"
        )
    return rows


def run_throughput(options: argparse.Namespace) -> dict[str, Any]:
    """vLLM's `bench throughput` with its random data."""
    from pace_nb.benchmarks import offline

    with shared.open_llm(options) as llm:
        llm.warm_up()
        elapsed, prompt_tokens, output_tokens = offline.throughput(
            llm,
            input_len=options.input_len,
            output_len=options.output_len,
            num_prompts=options.num_prompts,
            n=options.n,
            num_warmups=options.num_warmups,
            detokenize=not options.disable_detokenize,
            seed=options.seed,
        )
    result = offline.throughput_result(
        model_id(options), options.num_prompts, elapsed, prompt_tokens, output_tokens
    )
    print(
        f"Throughput: {result['requests_per_second']:.2f} requests/s, "
        f"{result['tokens_per_second']:.2f} total tokens/s, "
        f"{output_tokens / elapsed:.2f} output tokens/s"
    )
    print(f"Total num prompt tokens:  {prompt_tokens}")
    print(f"Total num output tokens:  {output_tokens}")
    return result


def run_startup(options: argparse.Namespace) -> dict[str, Any]:
    """vLLM's `bench startup`, and the first token and the memory."""
    from pace_nb.benchmarks import startup

    engine = {"model": str(shared.resolve_model(options)), **shared.engine_options(options)}
    result: dict[str, Any] = {"model_id": model_id(options)}
    for phase, num in (("cold", options.num_iters_cold), ("warm", options.num_iters_warm)):
        if not num:
            continue
        if phase == "warm":
            list(startup.starts(engine, phase, options.num_iters_warmup))
        found = list(startup.starts(engine, phase, num))
        result |= startup.result(phase, found)
        print(startup_lines(phase, found), end="")
    return result


def startup_lines(phase: str, found: list[Start]) -> str:
    """The averages of one phase."""
    ready, first, peak = (sum(values) / len(found) for values in zip(*found, strict=True))
    return (
        f"{phase.upper()} STARTUP, {len(found)} times:\n"
        f"Avg startup time: {ready:.2f} seconds\n"
        f"Avg time to first token: {first:.2f} seconds\n"
        f"Avg peak RSS: {peak / 1e9:.2f} GB\n"
    )


def run_kernels(options: argparse.Namespace) -> dict[str, Any]:
    """Each kernel's share of its limit."""
    from pace_nb.benchmarks import kernels, timing
    from pace_nb.kernels import jit

    if options.kernels != "numba" or jit.INTERPRETED:
        raise ConfigError("bench kernels: measures compiled kernels, expected --kernels numba")
    shared.set_threads(options)
    before, rows = timing.preemptions(), []
    dtype: StorageDtype = "float32" if options.dtype == "float32" else "bfloat16"
    for row in kernels.rows(shared.resolve_model(options), dtype):
        rows.append(row)
        print(
            f"{row['case']:<56} {row['value']:>9.4g} {row['unit']:<7} of {row['limit']:>9.4g} "
            f"{row['share']:>6.1%}",
            flush=True,
        )
    preempted = timing.preemptions() - before
    facts = timing.machine(jit.num_threads())
    print(f"{facts['cpu']}, {facts['threads']} threads, preempted {preempted} times")
    if options.plot is not None:
        from pace_nb.benchmarks import plots

        plots.roofline(rows, f"{model_id(options)} on {facts['cpu']}", options.plot)
    return {
        "bench": "kernels",
        "model_id": model_id(options),
        "machine": facts,
        "preempted": preempted,
        "rows": rows,
    }
