"""Share of a copy's rate that rotating q and k and writing k and v reach, as slices of one product.

python -m bench.kernels.bench_rope_kv_write
"""

from __future__ import annotations

from functools import partial

import numpy as np

from bench import timing
from bench.limits import against_copy
from pace_nb.kernels import jit, kv_write
from pace_nb.kernels.rope import rotation
from pace_nb.kernels.rope_kv_write import rope_kv_write

HEADS, KV_HEADS, D = 32, 8, 64


def main() -> None:
    rng = np.random.default_rng(0)
    before, rows = timing.preemptions(), []
    for tokens in (1, 32, 4096):  # of one sequence each
        heads = rng.standard_normal((tokens, HEADS + 2 * KV_HEADS, D), np.float32)
        cos, sin = (rng.standard_normal((tokens, D // 2), np.float32) for _ in range(2))
        pool = kv_write.new_pool(-(-tokens // kv_write.UNIT), KV_HEADS, D, np.uint16)
        table = np.arange(pool.num_units)[None]
        lens = np.array([0, tokens]), np.array([tokens])
        planned = kv_write.plan(pool.num_units, tokens, table, 1, *lens)
        turns = rotation(cos, sin, np.arange(tokens))
        # Given: new pages each time would be the system's work.
        out = np.empty((tokens, HEADS, D), pool.k.dtype)
        run = partial(rope_kv_write, heads, turns, pool, planned, out=out)
        case = f"T={tokens} H={HEADS}/{KV_HEADS} D={D}, f32 to bf16"
        rows.append(against_copy(case, run, 6 * heads.size))
    timing.record("rope_kv_write", jit.num_threads(), rows, timing.preemptions() - before)


if __name__ == "__main__":
    main()
