"""Share of the limit that gemm reaches: register peak for large M, DRAM read rate for small M.

    python -m bench.kernels.bench_gemm

Large M: FLOPs against `limits.flop_probe`. Small M: bytes of the packed weight, larger than L3,
against reading that very buffer (`limits.read_probes`). Each pair interleaved, in this process.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from bench import timing
from pace_nb.kernels import jit
from pace_nb.kernels.bf16 import from_f32
from pace_nb.kernels.gemm import PackedWeight, gemm, pack_weight
from pace_nb.kernels.limits import flop_probe, read_probes

LARGE = [(128, 2048, 2048), (1024, 2048, 2048), (1024, 16384, 2048), (1024, 2048, 8192)]
SMALL = [1, 2, 4, 8, 16, 32]  # rows against one weight of 16384 x 8192, 256 MiB in BF16
ROUNDS = 11


def normal(rng: np.random.Generator, shape: tuple[int, int]) -> Any:
    return from_f32(rng.standard_normal(shape, np.float32))


def large(rng: np.random.Generator, m: int, n: int, k: int) -> dict[str, Any]:
    x, packed = normal(rng, (m, k)), pack_weight(normal(rng, (n, k)))
    out = np.empty((m, n), np.float32)
    peak = flop_probe()
    t = timing.interleave({"gemm": lambda: gemm(x, packed, out=out), "peak": peak.run}, ROUNDS)
    flops = 2.0 * m * n * k
    return {
        "case": f"bf16 M={m} N={n} K={k}",
        "value": flops / t["gemm"].median / 1e9,
        "unit": "GFLOP/s",
        "limit": peak.amount / t["peak"].median / 1e9,
        "limit_unit": "GFLOP/s",
        "share": timing.share(t["peak"], t["gemm"], flops / peak.amount),
    }


def small(rng: np.random.Generator, packed: PackedWeight, m: int) -> dict[str, Any]:
    x, out = normal(rng, (m, packed.k)), np.empty((m, packed.n), np.float32)
    one, four = read_probes(packed.data)
    runs = {"gemm": lambda: gemm(x, packed, out=out), "one": one.run, "four": four.run}
    t = timing.interleave(runs, ROUNDS)
    limit = min(t["one"], t["four"], key=lambda timed: timed.median)
    return {
        "case": f"bf16 M={m}, weight 256 MiB",
        "value": packed.data.nbytes / t["gemm"].median / 1e9,
        "unit": "GB/s",
        "limit": one.amount / limit.median / 1e9,
        "limit_unit": "GB/s",
        "share": timing.share(limit, t["gemm"], packed.data.nbytes / one.amount),
    }


def main() -> None:
    rng = np.random.default_rng(0)
    before = timing.preemptions()
    rows = [large(rng, *shape) for shape in LARGE]
    packed = pack_weight(normal(rng, (16384, 8192)))
    rows += [small(rng, packed, m) for m in SMALL]
    timing.record("gemm", jit.num_threads(), rows, timing.preemptions() - before)


if __name__ == "__main__":
    main()
