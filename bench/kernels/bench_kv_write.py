"""Share of a copy's rate that writing keys and values into the pool reaches.

python -m bench.kernels.bench_kv_write
"""

from __future__ import annotations

from functools import partial

import numpy as np

from bench import timing
from bench.limits import against_copy
from pace_nb.kernels import jit
from pace_nb.kernels.kv_write import UNIT, kv_write, new_pool

KVH, D = 8, 64


def main() -> None:
    rng = np.random.default_rng(0)
    before, rows = timing.preemptions(), []
    for sequences, queries in ((1, 2048), (32, 1)):
        t = sequences * queries
        k, v = (rng.standard_normal((t, KVH, D), np.float32) for _ in range(2))
        units = -(-queries // UNIT)
        pool = new_pool(sequences * units, KVH, D, np.uint16)
        table = np.arange(sequences, dtype=np.int64).reshape(-1, 1) * units
        cu = np.arange(sequences + 1, dtype=np.int32) * queries
        lens = np.full(sequences, queries, np.int32)
        run = partial(kv_write, k, v, pool, table, units, cu, lens)
        case = f"{sequences} x {queries} tokens KVH={KVH} D={D}, f32 to bf16"
        rows.append(against_copy(case, run, 12 * k.size))
    timing.record("kv_write", jit.num_threads(), rows, timing.preemptions() - before)


if __name__ == "__main__":
    main()
