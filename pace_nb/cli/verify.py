"""Check compiled kernels against float64: errors in ULP, where they sit, whether the bound holds.

With --fault a mistake is put around the kernel, to see what it looks like and which test catches
it. Exit code 1 when a bound is broken.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pace_nb
from pace_nb.cli import options as shared
from pace_nb.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to run. Names are judged by `pace_nb.verify`, which is not imported for --help."""
    add = parser.add_argument
    add(
        "--kernel",
        default="all",
        metavar="NAME",
        help="gemm, norm, layer_norm, rope, exp, activation, attention_decode, attention_prefill, "
        "mlp, moe, combine, quant, kv_write, sampling (default: all)",
    )
    add(
        "--dtype",
        default="all",
        metavar="NAME",
        help="float32 or bfloat16: what is stored (default: all)",
    )
    add(
        "--grid",
        default="quick",
        metavar="GRID",
        help="quick, full, or sizes such as 7x200x33,1x64x64 of one kernel (default: quick)",
    )
    add(
        "--fault",
        default="none",
        metavar="NAME",
        help="wrong-mask, lost-tail, bf16-accumulate or nnan (default: none)",
    )
    add("--seed", type=shared.at_least(0), default=0, metavar="N", help="of inputs (default: 0)")
    add("-t", "--threads", type=int, metavar="N", help="threads of the kernels")
    add("--json", type=Path, metavar="FILE", help="write the figures")
    add(
        "--plot",
        type=Path,
        metavar="FILE",
        help="draw histograms and error maps (needs the extra bench)",
    )


def run(options: argparse.Namespace) -> int:
    """Print the report; 1 when a bound is broken."""
    if options.json is not None and not options.json.resolve().parent.is_dir():
        raise ConfigError(f"--json {options.json}: no such folder")
    shared.check_plot(options.plot)
    from pace_nb.kernels import jit
    from pace_nb.verify import report, verify

    shared.set_threads(options)
    found = verify(
        options.kernel,
        dtype=options.dtype,
        grid=options.grid,
        fault=options.fault,
        seed=options.seed,
    )
    with jit.compile_progress():
        results = list(found)
    if not results:
        raise ConfigError(
            f"nothing to run: no kernel has the fault {options.fault} in {options.dtype}"
        )
    for line in report.lines(results):
        print(line)
    print(report.summary(results))
    if options.json is not None:
        content = json.dumps(report.to_json(results, pace_nb.__version__), indent=2)
        try:
            options.json.write_text(content + "\n")
        except OSError as error:
            raise ConfigError(f"--json {options.json}: {error.strerror}") from error
    if options.plot is not None:
        from pace_nb.verify import plots

        plots.draw(results, options.plot)
    return 0 if all(result.holds for result in results) else 1
