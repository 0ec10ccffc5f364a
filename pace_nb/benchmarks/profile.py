"""`Profile`: seconds, bytes and FLOPs of each operation while an engine runs, beside the limits.

    with Profile() as profile:
        llm.generate(..)
    rows = profile.rows(read_rate, flop_peak)

Knows what each kernel moves and does, from the arguments it is called with (its docstring's Moves
and Does). Does not know models or terminals.

What lies between two kernels is Python: checks, allocations, the scheduler; it is the row `between
kernels`. The time that counting takes is left out.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

from pace_nb.kernels import jit
from pace_nb.kernels.attention_plan import CHUNK, DP, GROUP, KV_HEADS, WINDOW, D

Cost = tuple[str, float, float]  # what tells calls of one kernel apart, bytes moved, FLOPs done
BETWEEN = "between kernels"


class Operation(NamedTuple):
    """All calls of one kernel on one shape."""

    name: str
    calls: int
    seconds: float
    moved: float  # bytes
    flops: float
    share_of_time: float
    share_of_limit: float | None  # None where nothing is known of its bytes


class Profile:
    """Times every kernel inside the block; may be entered again and goes on adding."""

    def __init__(self) -> None:
        self.seconds = 0.0  # of the block, without what counting took
        self._calls: dict[str, list[float]] = {}  # name -> calls, seconds, bytes, FLOPs
        self._began = 0.0
        self._watched: list[tuple[dict[str, Any], str]] = []

    def __enter__(self) -> Profile:
        self._watched = list(jit.kernels())  # one that is imported later is not
        for where, name in self._watched:
            where[name] = _Timed(where[name], f"{where['__name__'].rsplit('.')[-1]}.{name}", self)
        self._began = time.perf_counter()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.seconds += time.perf_counter() - self._began
        for where, name in self._watched:
            where[name] = where[name].kernel

    def add(self, name: str, given: Arguments, seconds: float) -> None:
        """One call."""
        shape, moved, flops = _COSTS.get(name, _elementwise)(given)
        module, kernel = name.split(".")
        label = kernel.strip("_").removesuffix("_kernel")
        label = module if label in ("attend", "attend_few") else label
        total = self._calls.setdefault(f"{label} {shape}".strip(), [0, 0.0, 0.0, 0.0])
        for i, x in enumerate((1, seconds, moved, flops)):
            total[i] += x

    def rows(self, read_rate: float, flop_peak: float) -> list[Operation]:
        """Slowest first, `between kernels` last. read_rate in bytes/s, flop_peak in FLOP/s."""
        found = [
            Operation(
                name,
                int(calls),
                seconds,
                moved,
                flops,
                seconds / self.seconds,
                max(moved / read_rate, flops / flop_peak) / seconds,
            )
            for name, (calls, seconds, moved, flops) in self._calls.items()
        ]
        found.sort(key=lambda row: -row.seconds)
        rest = self.seconds - sum(row.seconds for row in found)
        return [*found, Operation(BETWEEN, 0, rest, 0.0, 0.0, rest / self.seconds, None)]


class _Timed:
    """Stands in for a kernel."""

    def __init__(self, kernel: Callable[..., Any], name: str, profile: Profile) -> None:
        self.kernel = kernel
        self._name = name
        self._profile = profile
        self._parameters = tuple(inspect.signature(getattr(kernel, "py_func", kernel)).parameters)

    def __call__(self, *arguments: Any) -> None:
        start = time.perf_counter()
        self.kernel(*arguments)
        end = time.perf_counter()
        self._profile.add(
            self._name, dict(zip(self._parameters, arguments, strict=True)), end - start
        )
        self._profile.seconds -= time.perf_counter() - end


# ---- what a call moves and does, by the kernel's own parameter names -----------------------------
Arguments = Mapping[str, Any]


def _elementwise(given: Arguments) -> Cost:
    """Every array is read or written once."""
    return "", float(sum(x.nbytes for x in given.values() if isinstance(x, np.ndarray))), 0.0


def _factor(given: Arguments) -> int:
    """Bytes of the rows that are multiplied, as they were given: a kernel may have them widened."""
    return int(given["a"].size * given.get("b", given["a"]).itemsize)


def _gemm(given: Arguments) -> Cost:
    m, n, k = given["m"], given["n"], given["k"]
    moved = _factor(given) + given["b"].nbytes + given["c"].nbytes
    return f"M={m} N={n} K={k}", moved, 2.0 * m * n * k


def _mlp(given: Arguments) -> Cost:
    m, n, k = given["m"], given["parts"] * given["f"], given["k"]
    moved = _factor(given) + given["b"].nbytes + given["h"].nbytes
    return f"M={m} N={n} K={k}", moved, 2.0 * m * n * k


def _grouped_gemm(given: Arguments) -> Cost:
    n, k, offsets = given["n"], given["k"], given["offsets"]
    weights = sum(x.nbytes for name, x in given.items() if name in ("b", "codes", "scales"))
    busy = len(given["busy"]) / (len(offsets) - 1)
    moved = weights * busy + _factor(given) + given["c"].nbytes
    return f"N={n} K={k}", moved, 2.0 * float(offsets[-1]) * n * k


def _gather_rows(given: Arguments) -> Cost:
    return "", 2.0 * given["out"].nbytes, 0.0


def _rope(given: Arguments) -> Cost:
    return "", float(given["out"].size * 4 + given["out"].nbytes), 0.0


def _kv_write(given: Arguments) -> Cost:
    rows = given["rows"].reshape(-1, 4)
    elements = float((rows[:, 2] - rows[:, 1]).sum()) * given["heads"] * given["d"]
    each = given["k"].itemsize + given["v"].itemsize + 2 * given["pool_k"].itemsize
    return "", elements * each, 0.0


def _rope_kv_write(given: Arguments) -> Cost:
    rows = given["tokens"] * (given["heads"] + 2 * given["kv_heads"])
    return "", float(rows * given["d"] * (4 + given["queries"].itemsize)), 0.0


def _attend(given: Arguments) -> Cost:
    """Keys and values once per sequence; FLOPs of the keys that each row sees."""
    cu, contexts, sizes = given["cu_seqlens_q"], given["contexts"], given["sizes"]
    window, chunk, d = int(sizes[WINDOW]), int(sizes[CHUNK]), int(sizes[D])
    keys = seen = 0
    for b in given["sequences"]:
        end = int(contexts[b])
        positions = np.arange(end - int(cu[b + 1] - cu[b]), end)
        first = np.zeros_like(positions)
        if chunk:
            first = positions // chunk * chunk
        elif window:
            first = np.maximum(positions + 1 - window, 0)
        keys += end - int(first[0])
        seen += int((positions + 1 - first).sum())
    kv_heads = int(sizes[KV_HEADS])
    moved = float(keys * kv_heads * (d + int(sizes[DP])) * given["k"].itemsize)
    return "", moved, 4.0 * kv_heads * int(sizes[GROUP]) * d * seen


_COSTS: dict[str, Callable[[Arguments], Cost]] = {
    "gemm._gemm_kernel": _gemm,
    "mlp._mlp_kernel": _mlp,
    "moe._grouped_gemm_kernel": _grouped_gemm,
    "quant._grouped_gemm_mxfp4_kernel": _grouped_gemm,
    "gemm._gather_rows_kernel": _gather_rows,
    "rope._rope_kernel": _rope,
    "kv_write._kv_write_kernel": _kv_write,
    "rope_kv_write._rope_kv_write_kernel": _rope_kv_write,
    "attention_decode._attend_few_kernel": _attend,
    "attention_decode._attend_kernel": _attend,
    "attention_prefill._attend_kernel": _attend,
}
