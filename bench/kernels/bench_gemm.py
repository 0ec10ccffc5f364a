"""Share of the limit that gemm reaches: register peak for large M, DRAM read rate for small M.

    python -m bench.kernels.bench_gemm

Small M reads one weight that is larger than L3; its limit is reading that very buffer.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from bench import timing
from bench.limits import against_peak, against_read
from pace_nb.kernels import jit
from pace_nb.kernels.arrays import Array
from pace_nb.kernels.bf16 import from_f32
from pace_nb.kernels.gemm import gemm, pack_weight

LARGE = [(128, 2048, 2048), (1024, 2048, 2048), (1024, 16384, 2048), (1024, 2048, 8192)]
SMALL = [1, 2, 4, 8, 16, 32]  # rows against one weight of 16384 x 8192, 256 MiB in BF16


def main() -> None:
    rng = np.random.default_rng(0)

    def normal(rows: int, columns: int) -> Array:
        return from_f32(rng.standard_normal((rows, columns), np.float32))

    before, rows = timing.preemptions(), []
    for m, n, k in LARGE:
        x, packed, out = normal(m, k), pack_weight(normal(n, k)), np.empty((m, n), np.float32)
        run = partial(gemm, x, packed, out=out)
        moved = 2 * (m + n) * k + 4 * m * n
        rows.append(against_peak(f"bf16 M={m} N={n} K={k}", run, 2.0 * m * n * k, moved=moved))
    packed = pack_weight(normal(16384, 8192))
    for m in SMALL:
        x, out = normal(m, packed.k), np.empty((m, packed.n), np.float32)
        run = partial(gemm, x, packed, out=out)
        case = f"bf16 M={m}, weight 256 MiB"
        flops = 2.0 * m * packed.n * packed.k
        rows.append(against_read(case, run, packed.data.nbytes, packed.data, flops=flops))
    timing.record("gemm", jit.num_threads(), rows, timing.preemptions() - before)


if __name__ == "__main__":
    main()
