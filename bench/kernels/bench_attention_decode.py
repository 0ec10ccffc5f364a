"""Share of the DRAM read rate that decode attention reaches over the bytes of K and V.

    python -m bench.kernels.bench_attention_decode

What a layer costs: a step's plan is made once for all layers, here before the clock starts. The
pool is larger than L3, or as large, and reading the limit's buffer in between leaves none of it.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from bench import timing
from bench.limits import against_read
from pace_nb.kernels import jit
from pace_nb.kernels.attention_decode import attend
from pace_nb.kernels.attention_plan import plan
from pace_nb.kernels.bf16 import from_f32
from pace_nb.kernels.kv_write import UNIT, KVPool, new_pool

H, KVH, D = 32, 8, 128


def filled_pool(tokens: int) -> KVPool:
    """A pool of `tokens` random keys and values."""
    rng = np.random.default_rng(0)
    pool = new_pool(tokens // UNIT, KVH, D, np.uint16)
    for half in pool:
        half[...] = from_f32(rng.standard_normal(half.shape, np.float32))
    return pool


def main() -> None:
    rng = np.random.default_rng(1)
    before, rows = timing.preemptions(), []
    for batch, context, queries in ((1, 8192, 1), (8, 8192, 1), (8, 8192, 4), (32, 1024, 1)):
        pool = filled_pool(batch * context)
        q = from_f32(rng.standard_normal((batch * queries, H, D), np.float32))
        units = context // UNIT
        table = np.arange(batch, dtype=np.int64).reshape(-1, 1) * units
        cu = np.arange(batch + 1, dtype=np.int32) * queries
        lens = np.full(batch, context, np.int32)
        out = np.empty_like(q)
        step = plan(
            "attention_decode", q.shape, pool, table, units, cu, lens, 0, 0, split_keys=True
        )
        run = partial(attend, step, q, pool, D**-0.5, out=out)
        case = f"B={batch} S={context} rows={queries} H={H}/{KVH} D={D}"
        moved = pool.k.nbytes + pool.v.nbytes
        limit = np.ones(max(moved, 1 << 27) // 4, np.float32)
        flops = 4.0 * batch * queries * H * D * context
        rows.append(against_read(case, run, moved, limit, flops=flops))
    timing.record("attention_decode", jit.num_threads(), rows, timing.preemptions() - before)


if __name__ == "__main__":
    main()
