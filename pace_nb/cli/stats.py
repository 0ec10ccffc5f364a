"""`Stopwatch` and `report`: what a generation took, and its share of what the memory allows.

Each new token of a single request reads every weight once, so the rate at which they can be read
bounds the decode rate:

    share = decode rate [tokens/s] * bytes of weights per token / measured read rate [bytes/s]

The read rate is measured in this process, right after the generation, over a buffer as large as the
weights: a small model is read from a cache, a large one from DRAM, and the buffer with it. The
bound counts weights only; reading the KV cache comes on top.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from math import prod

SMALLEST_BUFFER = 1 << 20  # below, the cost of starting the threads would be what is measured
LARGEST_BUFFER = 1 << 29  # beyond any last-level cache here; more would only take longer


@dataclass
class Stopwatch:
    """Times of one generation, in seconds of `time.monotonic()`."""

    started: float = field(default_factory=time.monotonic)
    first: float | None = None
    last: float | None = None
    num_tokens: int = 0

    def tokens(self, num_tokens: int) -> None:
        """So many tokens have come so far."""
        self.last = time.monotonic()
        if self.first is None:
            self.first = self.last
        self.num_tokens = num_tokens

    @property
    def time_to_first_token(self) -> float | None:
        """Seconds until the first token, None before it came."""
        return None if self.first is None else self.first - self.started

    @property
    def decode_rate(self) -> float | None:
        """Tokens per second after the first token, None with fewer than two."""
        if self.first is None or self.last is None or self.num_tokens < 2:
            return None
        return (self.num_tokens - 1) / max(self.last - self.first, 1e-9)


def weight_bytes_per_token(tensors: Iterable[tuple[str, tuple[int, ...]]], itemsize: int) -> int:
    """Bytes of weights that one decoded token reads, from the names and shapes of all tensors.

    Matrices are stored with `itemsize` bytes an element, vectors (norms, biases) as f32. Of an
    embedding table with a separate output head only one row is read.
    """
    shapes = dict(tensors)
    total = 0
    untied = any(name.endswith("lm_head.weight") for name in shapes)
    for name, shape in shapes.items():
        if untied and name.endswith("embed_tokens.weight"):
            shape = shape[1:]
        total += prod(shape) * (itemsize if len(shape) > 1 else 4)
    return total


def read_rate(weight_bytes: int) -> float | None:
    """Bytes per second that the kernels' threads read, over a buffer of so many bytes.

    None where kernels are interpreted, which says nothing about the machine.
    """
    import numpy as np

    from pace_nb.kernels import jit, limits

    if jit.INTERPRETED:
        return None
    num_bytes = min(max(weight_bytes, SMALLEST_BUFFER), LARGEST_BUFFER)
    return limits.dram_read_rate(np.ones(num_bytes // 4, np.float32))


def report(
    watch: Stopwatch,
    *,
    num_prompt_tokens: int,
    num_compiled: int,
    weight_bytes: int,
    read_rate: float | None,
) -> str:
    """Lines for standard error. `read_rate` in bytes/s, None where it was not measured."""
    ttft, rate = watch.time_to_first_token, watch.decode_rate
    lines = [f"prompt    {num_prompt_tokens} tokens"]
    if ttft is None:
        return "\n".join([*lines, "decode    no token was generated"])
    compiled = f", {num_compiled} kernels compiled meanwhile" if num_compiled else ""
    lines.append(f"first     {ttft * 1e3:.1f} ms to the first token{compiled}")
    if rate is None:
        return "\n".join([*lines, f"decode    {watch.num_tokens} token: too few for a rate"])
    lines.append(f"decode    {rate:.1f} tokens/s over {watch.num_tokens} tokens")
    if read_rate is None:
        return "\n".join([*lines, "roofline  not measured: the kernels are interpreted"])
    limit = read_rate / weight_bytes
    return "\n".join(
        [
            *lines,
            f"roofline  {rate / limit:.0%} of {limit:.1f} tokens/s, the rate at which this process "
            f"can read the {weight_bytes / 1e6:.1f} MB of weights ({read_rate / 1e9:.1f} GB/s)",
        ]
    )
