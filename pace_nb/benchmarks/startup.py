"""How long a new process takes until a model is ready and until its first token came.

Knows the process that is started (this file, as a program) and what it says. `cold` starts have an
empty cache of machine code, so they compile every kernel that a prompt needs; `warm` ones find it.
The page cache is as it is: a model that was read once is in it.

    startup       process start to `LLM(...)` returned
    first_token   process start to the first token of a short prompt
    peak_rss      bytes of memory held at most, mapped files counted, from `getrusage`

Source: vllm/benchmarks/startup.py of vLLM 0.32 for the phases and the keys of the JSON.
"""

from __future__ import annotations

import contextlib
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pace_nb import env
from pace_nb.benchmarks.offline import PERCENTAGES
from pace_nb.errors import PaceError

PROMPT = [0] * 16
QUANTITIES = ("startup", "first_token", "peak_rss")


class Start(NamedTuple):
    """What one start took: seconds, seconds, bytes."""

    startup: float
    first_token: float
    peak_rss: float


def start(options: dict[str, Any], cache: Path | None = None) -> Start:
    """Start a process that opens `LLM(**options)` and generates one token.

    cache: folder of its machine code; None is the user's. PaceError with what the process said last
    where it fails.
    """
    environment = env.with_cache_dir(cache) if cache else None
    command = [sys.executable, "-m", "pace_nb.benchmarks.startup", json.dumps(options)]
    begin = time.perf_counter()
    with tempfile.TemporaryFile("w+") as errors, subprocess.Popen(  # noqa: S603  # no shell
        command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
    ) as process:  # fmt: skip
        said = [(time.perf_counter() - begin, line) for line in process.stdout or ()]
        process.wait()
        errors.seek(0)
        last = errors.read().strip().rpartition("\n")[2]
    if process.returncode or len(said) != 2:
        raise PaceError(f"the process that was to start ended with {process.returncode}: {last}")
    (ready, _), (first, peak) = said
    return Start(ready, first, float(peak))


def starts(options: dict[str, Any], phase: str, num: int) -> Iterator[Start]:
    """`num` starts. phase: "cold" or "warm"."""
    for _ in range(num):
        with contextlib.ExitStack() as stack:
            cold = phase == "cold"
            cache = stack.enter_context(tempfile.TemporaryDirectory()) if cold else None
            yield start(options, Path(cache) if cache else None)


def result(phase: str, found: Sequence[Start]) -> dict[str, Any]:
    """vLLM's JSON: `avg_<phase>_<quantity>_time`, `..._times`, `..._percentiles`; bytes for RSS."""
    content: dict[str, Any] = {}
    for index, quantity in enumerate(QUANTITIES):
        values = [one[index] for one in found]
        name = f"{phase}_{quantity}"
        time_ = "" if quantity == "peak_rss" else "_time"
        percentiles = np.percentile(values, PERCENTAGES).tolist()
        content[f"avg_{name}{time_}"] = float(np.mean(values))
        content[f"{name}{time_}s"] = values
        content[f"{name}_percentiles"] = dict(zip(map(str, PERCENTAGES), percentiles, strict=True))
    return content


def _child() -> None:
    """In the new process: a line when the model is ready, and one with the peak RSS at the end."""
    from pace_nb.llm import LLM
    from pace_nb.sampling_params import SamplingParams

    with LLM(**json.loads(sys.argv[1])) as llm:
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        params = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True, detokenize=False)
        prompt = PROMPT[: max(1, llm.max_model_len - 1)]
        llm.generate(prompt, params, use_tqdm=False)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        sys.stdout.write(f"{peak}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    _child()
