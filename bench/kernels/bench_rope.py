"""Share of a copy's rate that rope reaches: f32 in, BF16 out.

python -m bench.kernels.bench_rope
"""

from __future__ import annotations

from functools import partial

import numpy as np

from bench import timing
from bench.limits import against_copy
from pace_nb.kernels import jit
from pace_nb.kernels.rope import rope

H, D = 32, 64


def main() -> None:
    rng = np.random.default_rng(0)
    cos, sin = (rng.standard_normal((4096, D // 2), np.float32) for _ in range(2))
    before, rows = timing.preemptions(), []
    for t in (16, 4096):
        x, out = rng.standard_normal((t, H, D), np.float32), np.empty((t, H, D), np.uint16)
        positions = np.arange(t, dtype=np.int32)
        for interleaved in (False, True):
            run = partial(rope, x, positions, cos, sin, out, interleaved)
            case = f"{'neighbours' if interleaved else 'halves'} T={t} H={H} D={D}, f32 to bf16"
            rows.append(against_copy(case, run, 6 * x.size))
    timing.record("rope", jit.num_threads(), rows, timing.preemptions() - before)


if __name__ == "__main__":
    main()
