"""Share of the register peak that prefill attention reaches over the FLOPs of unmasked scores.

python -m bench.kernels.bench_attention_prefill
"""

from __future__ import annotations

from functools import partial

import numpy as np

from bench import timing
from bench.kernels.bench_attention_decode import KVH, D, H, filled_pool
from bench.limits import against_peak
from pace_nb.kernels import jit
from pace_nb.kernels.attention_prefill import attention_prefill
from pace_nb.kernels.bf16 import from_f32
from pace_nb.kernels.kv_write import UNIT


def main() -> None:
    rng = np.random.default_rng(1)
    before, rows = timing.preemptions(), []
    for queries, context, window in (
        (512, 512, 0),
        (4096, 4096, 0),
        (512, 4096, 0),
        (4096, 4096, 512),
    ):
        pool = filled_pool(context)
        q = from_f32(rng.standard_normal((queries, H, D), np.float32))
        table, units = np.zeros((1, 1), np.int64), context // UNIT
        cu, lens = np.array([0, queries], np.int32), np.array([context], np.int32)
        out = np.empty_like(q)
        run = partial(
            attention_prefill,
            q,
            pool,
            table,
            units,
            cu,
            lens,
            D**-0.5,
            window=window,
            out=out,
        )
        seen = np.arange(context - queries, context) + 1
        seen = np.minimum(seen, window) if window else seen
        case = f"T={queries} S={context} window={window} H={H}/{KVH} D={D}"
        flops, moved = 4.0 * H * D * float(seen.sum()), pool.k.nbytes + pool.v.nbytes + 2 * q.nbytes
        rows.append(against_peak(case, run, flops, rounds=5, moved=moved))
    timing.record("attention_prefill", jit.num_threads(), rows, timing.preemptions() - before)


if __name__ == "__main__":
    main()
