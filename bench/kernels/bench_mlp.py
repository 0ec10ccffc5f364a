"""Share of the DRAM rate (1 and 8 tokens) and of the register peak (128 and 256) of `mlp`.

    python -m bench.kernels.bench_mlp

Gate and up of llama-3.2-1b, BF16: 64 MiB of weights, twice what L3 holds.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from bench import timing
from bench.limits import against_peak, against_read
from pace_nb.kernels import jit
from pace_nb.kernels.bf16 import from_f32
from pace_nb.kernels.mlp import mlp, new_mlp_weight, pack_mlp_rows

K, F = 2048, 8192


def main() -> None:
    rng = np.random.default_rng(0)
    before, rows = timing.preemptions(), []
    weight = new_mlp_weight(F, K, np.uint16, gated=True)
    pack_mlp_rows(weight, 0, from_f32(rng.standard_normal((2 * F, K), np.float32)))
    for m in (1, 8, 128, 256):
        x = from_f32(rng.standard_normal((m, K), np.float32))
        run = partial(mlp, x, weight, "silu", np.empty((m, F), np.uint16))
        case = f"bf16 gated silu M={m} F={F} K={K}"
        data = weight.panels.data
        if m < 128:
            rows.append(against_read(case, run, data.nbytes, data, flops=4.0 * m * F * K))
        else:
            rows.append(against_peak(case, run, 4.0 * m * F * K))
    timing.record("mlp", jit.num_threads(), rows, timing.preemptions() - before)


if __name__ == "__main__":
    main()
