"""Share of a copy's rate that the norms reach: they move bytes and do little else.

    python -m bench.kernels.bench_norm

16 rows stay in L2, 4096 rows do not fit L3.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from bench import timing
from bench.limits import against_copy
from pace_nb.kernels import jit
from pace_nb.kernels.norm import add_layer_norm, add_rms_norm, rms_norm

E, EPS = 2048, 1e-5


def main() -> None:
    rng = np.random.default_rng(0)
    before, rows = timing.preemptions(), []
    for t in (16, 4096):
        x, residual = (rng.standard_normal((t, E), np.float32) for _ in range(2))
        w, out = np.ones(E, np.float32), np.empty((t, E), np.uint16)
        runs = {
            "rms_norm": (6, partial(rms_norm, x, w, EPS, out)),
            "add_rms_norm": (14, partial(add_rms_norm, x, residual, w, EPS, out)),
            "add_layer_norm": (14, partial(add_layer_norm, x, residual, w, w, EPS, out)),
        }
        for name, (size, run) in runs.items():
            case = f"{name} T={t} E={E}, f32 to bf16"
            rows.append(against_copy(case, run, size * x.size, flops=6.0 * x.size))
    timing.record("norm", jit.num_threads(), rows, timing.preemptions() - before)


if __name__ == "__main__":
    main()
