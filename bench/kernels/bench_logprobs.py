"""Share of the read rate that log-probabilities reach: one exponential per logit decides.

python -m bench.kernels.bench_logprobs
"""

from __future__ import annotations

from functools import partial

import numpy as np

from bench import timing
from bench.limits import against_read
from pace_nb.kernels import jit
from pace_nb.kernels.logprobs import token_logprobs

ROWS = 32


def main() -> None:
    rng = np.random.default_rng(0)
    before, rows = timing.preemptions(), []
    for v in (4096, 128_256):
        logits = rng.normal(0, 2, (ROWS, v)).astype(np.float32)
        tokens = rng.integers(0, v, ROWS)
        for n in (0, 20):
            run = partial(token_logprobs, logits, tokens, n)
            case = f"token and {n} likeliest, {ROWS} x {v}"
            rows.append(against_read(case, run, logits.nbytes, logits.reshape(-1)))
    timing.record("logprobs", jit.num_threads(), rows, timing.preemptions() - before)


if __name__ == "__main__":
    main()
