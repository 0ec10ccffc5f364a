"""Share of a copy's rate that the norms reach: they move bytes and do little else.

    python -m bench.kernels.bench_norm

The limit is a copy that reads and writes as many bytes as the norm has to (`limits.copy_probe`),
interleaved with it in this process: 16 rows stay in L2, 4096 rows do not fit L3.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from bench import timing
from pace_nb.kernels import jit
from pace_nb.kernels.limits import copy_probe
from pace_nb.kernels.norm import add_layer_norm, add_rms_norm, rms_norm

E = 2048
ROUNDS = 31
EPS = 1e-5


def cases(rows: int) -> dict[str, tuple[Callable[[], object], int]]:
    """Name -> (run, bytes moved) for f32 rows in and BF16 rows out, as in a model."""
    rng = np.random.default_rng(0)
    x, residual = (rng.standard_normal((rows, E), np.float32) for _ in range(2))
    weight, out = np.ones(E, np.float32), np.empty((rows, E), np.uint16)
    return {
        "rms_norm": (lambda: rms_norm(x, weight, EPS, out), x.size * (4 + 2)),
        "add_rms_norm": (lambda: add_rms_norm(x, residual, weight, EPS, out), x.size * 14),
        "add_layer_norm": (
            lambda: add_layer_norm(x, residual, weight, weight, EPS, out),
            x.size * 14,
        ),
    }


def measure(name: str, rows: int, run: Callable[[], object], moved: int) -> dict[str, Any]:
    copy = copy_probe(moved // 2)
    t = timing.interleave({name: run, "copy": copy.run}, ROUNDS)
    return {
        "case": f"{name} T={rows} E={E}, f32 to bf16",
        "value": moved / t[name].median / 1e9,
        "unit": "GB/s",
        "limit": copy.amount / t["copy"].median / 1e9,
        "limit_unit": "GB/s",
        "share": timing.share(t["copy"], t[name], moved / copy.amount),
    }


def main() -> None:
    before = timing.preemptions()
    rows = [measure(name, t, *case) for t in (16, 4096) for name, case in cases(t).items()]
    timing.record("norm", jit.num_threads(), rows, timing.preemptions() - before)


if __name__ == "__main__":
    main()
