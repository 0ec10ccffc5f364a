"""Share of the limit that the grouped product of a mixture of experts reaches.

    python -m bench.kernels.bench_moe

Decode reads every expert once: against reading that very buffer. Prefill: against the peak.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from bench import timing
from bench.limits import against_peak, against_read
from pace_nb.kernels import jit
from pace_nb.kernels.bf16 import from_f32
from pace_nb.kernels.moe import grouped_gemm, pack_experts

NUM_EXPERTS, N, K = 32, 2048, 1024  # 128 MiB in BF16, four times a 32 MiB L3


def main() -> None:
    rng = np.random.default_rng(0)
    before, rows = timing.preemptions(), []
    weights = [from_f32(rng.standard_normal((N, K), np.float32)) for _ in range(NUM_EXPERTS)]
    packed = pack_experts(weights)
    for per_expert in (1, 4, 64):
        m = NUM_EXPERTS * per_expert
        x = from_f32(rng.standard_normal((m, K), np.float32))
        offsets = np.arange(NUM_EXPERTS + 1, dtype=np.int64) * per_expert
        run = partial(grouped_gemm, x, packed, offsets)
        case = f"bf16 {NUM_EXPERTS} experts of {N} x {K}, {per_expert} rows each"
        if per_expert < 16:
            rows.append(against_read(case, run, packed.data.nbytes, packed.data))
        else:
            rows.append(against_peak(case, run, 2.0 * m * N * K))
    timing.record("moe", jit.num_threads(), rows, timing.preemptions() - before)


if __name__ == "__main__":
    main()
