"""Compile every kernel that a model needs and keep the machine code for later runs."""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING

from pace_nb.cli import options as shared

if TYPE_CHECKING:
    from pace_nb.llm import LLM


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which model, and how it will be run."""
    shared.add_model_arguments(parser, positional=True)
    shared.add_engine_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Run a few tokens through the model; say what was compiled and where it is kept."""
    from pace_nb.kernels import jit

    with shared.open_llm(options) as llm:
        print(warm_up(llm))
    print(f"kept: {jit.cache_state()}")
    return 0


def warm_up(llm: LLM) -> str:
    """Compile or load every kernel of the model; what that took, in words."""
    from pace_nb.kernels import jit

    compiled, start = jit.num_compiled(), time.perf_counter()
    llm.warm_up()
    seconds = time.perf_counter() - start
    return f"kernels ready in {seconds:.1f} s, {jit.num_compiled() - compiled} of them compiled now"
