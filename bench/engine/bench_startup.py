"""Start-up of the engine: from the start of a process to a loaded model and to its first token.

    python -m bench.engine.bench_startup llama-3.2-1b --checkpoints /tmp/checkpoints

Every round is a process of its own. The page cache and the kernels' machine code are warm: one
unmeasured process runs first. The limit of a time is that of reading the file into new memory, as
this process does it in each round; that of the memory is the checkpoint's size.

Trap: on a virtual machine whose host takes free memory back, clearing a page that the host has to
find first costs ten times as much. Then the first process of several is slow and the others, which
get the pages that it let go, are not; the median of rounds shows the latter.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from bench import timing
from bench.engine.bench_offline import ROUNDS, row
from bench.make_checkpoint import SHAPES, write
from pace_nb.kernels import jit

PROCESS = """
import json, sys, time
begin = float(sys.argv[2])
from pace_nb import LLM, SamplingParams
llm = LLM(sys.argv[1])
ready = time.clock_gettime(time.CLOCK_MONOTONIC) - begin
params = SamplingParams(max_tokens=1, temperature=0, detokenize=False)
llm.generate([[1, 2, 3, 4, 5]], params, use_tqdm=False)
first = time.clock_gettime(time.CLOCK_MONOTONIC) - begin
status = open("/proc/self/status").read()
peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
print(json.dumps([ready, first, peak]))
"""


def start(directory: Path) -> tuple[float, float, float]:
    """Seconds to ready and to the first token, and peak RSS in bytes, of a new process."""
    begin = time.clock_gettime(time.CLOCK_MONOTONIC)
    command = [sys.executable, "-c", PROCESS, str(directory), str(begin)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    ready, first, peak = json.loads(output)
    return ready, first, peak


def read(directory: Path) -> float:
    """Seconds that the file's bytes take from the page cache to new memory, in one thread."""
    begin = time.perf_counter()
    with open(directory / "model.safetensors", "rb") as file:
        file.readinto(np.empty(directory.joinpath("model.safetensors").stat().st_size, np.uint8))
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="+", choices=sorted(SHAPES))
    parser.add_argument(
        "--checkpoints", type=Path, required=True, help="a folder with some GB free"
    )
    options = parser.parse_args()
    for name in options.names:
        directory = options.checkpoints / name
        if not (directory / "model.safetensors").exists():
            write(name, directory)
        nbytes = (directory / "model.safetensors").stat().st_size
        start(directory)
        before = timing.preemptions()
        rounds = np.array([(read(directory), *start(directory)) for _ in range(ROUNDS)])
        limit, runs = rounds[:, 0], rounds[:, 1:]
        rows = []
        for case, seconds in zip(("ready", "first token"), runs.T[:2], strict=True):
            shares = list(limit / seconds)
            rows.append(row(f"{name} {case}", list(seconds), list(limit), shares) | {"unit": "s"})
            rows[-1] |= {"limit_unit": "s", "best": float(seconds.min())}
        peaks = list(runs.T[2] / 1e9)
        shares = [nbytes / 1e9 / peak for peak in peaks]
        rows.append(row(f"{name} peak RSS", peaks, [nbytes / 1e9], shares) | {"unit": "GB"})
        rows[-1] |= {"limit_unit": "GB", "best": min(peaks)}
        preempted = timing.preemptions() - before
        timing.record(f"startup_{name}", jit.num_threads(), rows, preempted)


if __name__ == "__main__":
    main()
