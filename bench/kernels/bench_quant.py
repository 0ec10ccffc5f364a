"""Share of the limit that the MXFP4 product reaches: its bytes against reading as many.

    python -m bench.kernels.bench_quant

Decode reads 17/32 byte per weight. With more rows the expansion decides; then against the peak.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from bench import timing
from bench.limits import against_peak, against_read
from pace_nb.kernels import jit
from pace_nb.kernels.bf16 import from_f32
from pace_nb.kernels.quant import grouped_gemm_mxfp4, pack_mxfp4

N, K = 16384, 16384  # 143 MB in four bits, four times a 32 MiB L3


def main() -> None:
    rng = np.random.default_rng(0)
    before, rows = timing.preemptions(), []
    blocks = rng.integers(0, 256, (N, K // 32, 16), np.uint8)
    packed = pack_mxfp4([blocks], [rng.integers(118, 130, (N, K // 32)).astype(np.uint8)])
    moved = packed.codes.nbytes + packed.scales.nbytes
    buffer = np.ones(moved // 4, np.float32)
    for m in (1, 4, 64):
        x = from_f32(rng.standard_normal((m, K), np.float32))
        offsets = np.array([0, m])
        run = partial(grouped_gemm_mxfp4, x, packed, offsets)
        case = f"mxfp4 M={m} N={N} K={K}"
        if m < 16:
            rows.append(against_read(case, run, moved, buffer, rounds=7))
        else:
            rows.append(against_peak(case, run, 2.0 * m * N * K, rounds=5))
    timing.record("quant", jit.num_threads(), rows, timing.preemptions() - before)


if __name__ == "__main__":
    main()
