"""Share of a copy's rate that the gated activations reach: f32 gate and up in, BF16 out.

python -m bench.kernels.bench_activation
"""

from __future__ import annotations

from functools import partial

import numpy as np

from bench import timing
from bench.limits import against_copy
from pace_nb.kernels import jit
from pace_nb.kernels.activation import gated_activation

F = 8192


def main() -> None:
    rng = np.random.default_rng(0)
    before, rows = timing.preemptions(), []
    for t in (4, 1024):
        x, out = rng.standard_normal((t, 2 * F), np.float32), np.empty((t, F), np.uint16)
        for kind in ("silu", "gelu", "gelu_tanh"):
            run = partial(gated_activation, x, kind, out)
            rows.append(against_copy(f"gated {kind} T={t} F={F}, f32 to bf16", run, 10 * out.size))
    timing.record("activation", jit.num_threads(), rows, timing.preemptions() - before)


if __name__ == "__main__":
    main()
