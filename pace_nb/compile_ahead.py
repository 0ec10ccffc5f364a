"""Compile in a second process what the first will need later, while the first compiles the rest.

Knows which kernels a short greedy prompt does without (prefill attention and sampling: half of all
the compiling), and that the cache of machine code is shared between processes. Does not know the
model: the signatures of these depend on the dtype alone.

Numba compiles one kernel at a time in a process. Two processes on two cores are done in little more
than half the time. Nothing depends on the second one: what it has not left in the cache, the first
compiles.
"""

from __future__ import annotations

import subprocess
import sys
from types import TracebackType

from pace_nb.kernels import jit
from pace_nb.layers.weights import StorageDtype

# Files of the cache: module._kernel-signature.nbc
AHEAD = (
    "attention_prefill._attend_kernel",
    "sampling._sample_kernel",
)


class CompileAhead:
    """`with CompileAhead(dtype) as ahead:` other kernels, `ahead.wait()`, then these.

    Does nothing where they are in the cache, where there is no cache, or on one CPU.
    """

    def __init__(self, dtype: StorageDtype) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        if sys.executable and jit.allowed_threads() > 1 and not all(map(jit.is_cached, AHEAD)):
            self._process = subprocess.Popen(  # noqa: S603 (this very module)
                [sys.executable, "-m", "pace_nb.compile_ahead", dtype],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )

    def wait(self) -> None:
        """Until the second process has ended, however it did."""
        if self._process is not None:
            self._process.wait()

    def __enter__(self) -> CompileAhead:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()


def compile_kernels(dtype: StorageDtype) -> None:
    """Run each kernel once, on the smallest arrays that they take."""
    import numpy as np

    from pace_nb.kernels.attention_prefill import attention_prefill
    from pace_nb.kernels.kv_write import UNIT, new_pool
    from pace_nb.kernels.sampling import NEUTRAL, sample
    from pace_nb.layers.weights import storage_dtype

    pool = new_pool(1, 1, 2, storage_dtype(dtype))
    q = np.zeros((1, 1, 2), pool.dtype)
    lens = np.array([0, 1], np.int32), np.array([1], np.int32)
    attention_prefill(q, pool, np.zeros((1, 1), np.int64), UNIT, *lens, 1.0)
    settings = np.array([NEUTRAL])
    zero = np.zeros(1, np.int64)
    logits = np.zeros((1, 2), np.float32)
    sample(logits, settings, np.zeros(1, np.uint64), zero, zero)


if __name__ == "__main__":
    compile_kernels("float32" if sys.argv[1:] == ["float32"] else "bfloat16")
