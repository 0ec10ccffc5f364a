"""Share of the read rate that sampling reaches: it reads logits and keeps a few numbers.

    python -m bench.kernels.bench_sampling

32 rows of a vocabulary of 128,256 are 16 MB, which stay in many an L3; 4,096 is a small vocabulary.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from bench import timing
from bench.limits import against_read
from pace_nb.kernels import jit, sampling
from pace_nb.kernels.sampling import NEUTRAL, greedy, sample

ROWS = 32
CASES: dict[str, dict[str, float]] = {
    "temperature": {},
    "top_k 50": {"TOP_K": 50},
    "min_p 0.05": {"LOG_MIN_P": float(np.log(0.05))},
    "top_p 0.9": {"TOP_P": 0.9},
    "top_k 50, top_p 0.9": {"TOP_K": 50, "TOP_P": 0.9},
}


def main() -> None:
    rng = np.random.default_rng(0)
    before, rows = timing.preemptions(), []
    seeds, slots = np.arange(ROWS).astype(np.uint64), np.arange(ROWS)
    positions = np.zeros(ROWS, np.int64)
    for v in (4096, 128_256):
        logits = rng.normal(0, 2, (ROWS, v)).astype(np.float32)
        logits[:, 5] = 12  # a likeliest token, and a long tail
        runs = {"greedy": partial(greedy, logits)}
        for name, columns in CASES.items():
            settings = np.tile(np.array(NEUTRAL), (ROWS, 1))
            for column, value in columns.items():
                settings[:, getattr(sampling, column)] = value
            runs[name] = partial(sample, logits, settings, seeds, slots, positions)
        for name, run in runs.items():
            case = f"{name}, {ROWS} x {v}"
            rows.append(against_read(case, run, logits.nbytes, logits.reshape(-1)))
    timing.record("sampling", jit.num_threads(), rows, timing.preemptions() - before)


if __name__ == "__main__":
    main()
