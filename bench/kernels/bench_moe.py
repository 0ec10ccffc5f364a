"""Share of the limit that the grouped product of a mixture of experts reaches.

    python -m bench.kernels.bench_moe

Decode: bytes of the experts that are read, against reading that very buffer. Prefill: FLOPs against
the register peak. Interleaved, in this process.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from bench import timing
from pace_nb.kernels import jit
from pace_nb.kernels.bf16 import from_f32
from pace_nb.kernels.limits import flop_probe, read_probes
from pace_nb.kernels.moe import PackedExperts, grouped_gemm, pack_experts

NUM_EXPERTS, N, K = 32, 2048, 1024  # 128 MiB in BF16, four times a 32 MiB L3
ROUNDS = 11


def measure(packed: PackedExperts, rows_per_expert: int) -> dict[str, Any]:
    rng = np.random.default_rng(1)
    rows = NUM_EXPERTS * rows_per_expert
    x = from_f32(rng.standard_normal((rows, K), np.float32))
    offsets = np.arange(NUM_EXPERTS + 1, dtype=np.int64) * rows_per_expert
    one, four = read_probes(packed.data)
    peak = flop_probe()
    runs = {"moe": lambda: grouped_gemm(x, packed, offsets), "peak": peak.run}
    t = timing.interleave(runs | {"one": one.run, "four": four.run}, ROUNDS)
    read = min(t["one"], t["four"], key=lambda timed: timed.median)
    flops = 2.0 * rows * N * K
    case = f"bf16 {NUM_EXPERTS} experts of {N} x {K}, {rows_per_expert} rows each"
    if flops / peak.amount * t["peak"].median > read.median:
        return {
            "case": case,
            "value": flops / t["moe"].median / 1e9,
            "unit": "GFLOP/s",
            "limit": peak.amount / t["peak"].median / 1e9,
            "limit_unit": "GFLOP/s",
            "share": timing.share(t["peak"], t["moe"], flops / peak.amount),
        }
    return {
        "case": case,
        "value": packed.data.nbytes / t["moe"].median / 1e9,
        "unit": "GB/s",
        "limit": one.amount / read.median / 1e9,
        "limit_unit": "GB/s",
        "share": timing.share(read, t["moe"], packed.data.nbytes / one.amount),
    }


def main() -> None:
    rng = np.random.default_rng(0)
    before = timing.preemptions()
    weights = [from_f32(rng.standard_normal((N, K), np.float32)) for _ in range(NUM_EXPERTS)]
    packed = pack_experts(weights)
    rows = [measure(packed, n) for n in (1, 8, 64)]
    timing.record("moe", jit.num_threads(), rows, timing.preemptions() - before)


if __name__ == "__main__":
    main()
