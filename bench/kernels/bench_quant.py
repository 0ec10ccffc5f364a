"""Share of the limit that the MXFP4 product reaches: its bytes against reading as many.

    python -m bench.kernels.bench_quant

Decode reads 17/32 byte per weight; the limit is `limits.read_probes` on a buffer of that size.
With more rows the expansion decides, and the limit is the register peak. Interleaved.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from bench import timing
from pace_nb.kernels import jit
from pace_nb.kernels.bf16 import from_f32
from pace_nb.kernels.limits import flop_probe, read_probes
from pace_nb.kernels.quant import PackedMXFP4, grouped_gemm_mxfp4, pack_mxfp4

N, K = 16384, 16384  # 143 MB in four bits, four times a 32 MiB L3
ROUNDS = 7


def measure(packed: PackedMXFP4, buffer: Any, m: int) -> dict[str, Any]:
    x = from_f32(np.random.default_rng(1).standard_normal((m, K), np.float32))
    offsets = np.array([0, m])
    one, four = read_probes(buffer)
    peak = flop_probe()
    runs = {"mxfp4": lambda: grouped_gemm_mxfp4(x, packed, offsets), "peak": peak.run}
    t = timing.interleave(runs | {"one": one.run, "four": four.run}, ROUNDS)
    read = min(t["one"], t["four"], key=lambda timed: timed.median)
    flops, moved = 2.0 * m * N * K, packed.codes.nbytes + packed.scales.nbytes
    if flops / peak.amount * t["peak"].median > moved / one.amount * read.median:
        return {
            "case": f"mxfp4 M={m} N={N} K={K}",
            "value": flops / t["mxfp4"].median / 1e9,
            "unit": "GFLOP/s",
            "limit": peak.amount / t["peak"].median / 1e9,
            "limit_unit": "GFLOP/s",
            "share": timing.share(t["peak"], t["mxfp4"], flops / peak.amount),
        }
    return {
        "case": f"mxfp4 M={m} N={N} K={K}",
        "value": moved / t["mxfp4"].median / 1e9,
        "unit": "GB/s",
        "limit": one.amount / read.median / 1e9,
        "limit_unit": "GB/s",
        "share": timing.share(read, t["mxfp4"], moved / one.amount),
    }


def main() -> None:
    rng = np.random.default_rng(0)
    before = timing.preemptions()
    blocks = rng.integers(0, 256, (N, K // 32, 16), np.uint8)
    packed = pack_mxfp4([blocks], [rng.integers(118, 130, (N, K // 32)).astype(np.uint8)])
    buffer = np.ones(len(packed.codes) // 4, np.float32)
    rows = [measure(packed, buffer, m) for m in (1, 4, 64)]
    timing.record("quant", jit.num_threads(), rows, timing.preemptions() - before)


if __name__ == "__main__":
    main()
