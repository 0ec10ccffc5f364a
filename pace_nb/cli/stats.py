"""`timed` and `report`: what a generation took, and its share of what the memory allows.

Each new token of a single request reads every weight once, so the rate at which they can be read
bounds the decode rate:

    share = decode rate [tokens/s] * bytes of weights per token / measured read rate [bytes/s]

The read rate is measured in this process, right after the generation, over a buffer as large as the
weights: a small model is read from a cache, a large one from DRAM, and the buffer with it. The
bound counts weights only; reading the KV cache comes on top.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING, NamedTuple

from pace_nb.errors import PaceError

if TYPE_CHECKING:
    from pace_nb.engine.speculative import SpeculativeStats
    from pace_nb.llm import LLM
    from pace_nb.outputs import CompletionOutput, RequestOutput


SMALLEST_BUFFER = 1 << 20  # below, the cost of starting the threads would be what is measured
LARGEST_BUFFER = 1 << 29  # beyond most last-level caches; more would only take longer
READ_IN_ALL = 1 << 31  # bytes: of a small buffer many short readings, of which the best counts


@dataclass
class Stopwatch:
    """Times of one generation, in seconds of `time.monotonic()`, and what was counted."""

    started: float = field(default_factory=time.monotonic)
    first: float | None = None
    last: float | None = None
    num_prompt_tokens: int = 0
    num_tokens: int = 0
    num_compiled: int = 0  # kernels compiled while the clock ran

    def tokens(self, num_new: int) -> None:
        """So many new tokens have just come."""
        if num_new:
            self.last = time.monotonic()
            if self.first is None:
                self.first = self.last
            self.num_tokens += num_new

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


def timed(
    news: Generator[RequestOutput, None, None], watch: Stopwatch
) -> Generator[CompletionOutput, None, None]:
    """The completions in `news`, while `watch` runs; PaceError where the request failed.

    Closing it closes `news`, which ends the request.
    """
    from pace_nb.kernels import jit

    compiled = jit.num_compiled()
    with closing(news):
        for output in news:
            (completion,) = output.outputs
            watch.tokens(len(completion.token_ids))
            watch.num_prompt_tokens = len(output.prompt_token_ids)
            watch.num_compiled = jit.num_compiled() - compiled
            if completion.finish_reason == "error":
                raise PaceError(f"the generation failed: {completion.stop_reason}")
            yield completion


class Tensor(NamedTuple):
    """What counts about a tensor of the model here. itemsize: bytes an element has in memory."""

    name: str
    shape: tuple[int, ...]
    itemsize: int


def weight_bytes_per_token(tensors: Iterable[Tensor], expert_share: float = 1.0) -> int:
    """Bytes of weights that one decoded token reads.

    Of an embedding table with a separate output head only one row is read, and of a layer's experts
    only `expert_share`.
    """
    listed = list(tensors)
    untied = any(tensor.name.endswith("lm_head.weight") for tensor in listed)
    total = 0.0
    for name, shape, itemsize in listed:
        if untied and name.endswith("embed_tokens.weight"):
            shape = shape[1:]
        num_bytes = prod(shape) * itemsize
        total += num_bytes * expert_share if ".experts." in name else num_bytes
    return round(total)


def model_weight_bytes(llm: LLM) -> int:
    """`weight_bytes_per_token` of an open model, from its config.json and headers."""
    from pace_nb.models.loader import Checkpoint
    from pace_nb.models.registry import build_model

    itemsize = 2 if llm.config.storage_dtype == "bfloat16" else 4
    with Checkpoint.open(llm.directory) as checkpoint:
        shell = build_model(checkpoint.config, checkpoint.names())
        tensors = [
            # Vectors are kept as f32; U8 tensors hold quantized weights and stay as they are.
            Tensor(name, shape, 1 if checkpoint.dtype(name) == "U8" else itemsize)
            if len(shape) > 1
            else Tensor(name, shape, 4)
            for name, shape in shell.tensors("")
        ]
        config = checkpoint.config
    config = {**config, **config.get("text_config", {})}
    used, experts = config.get("num_experts_per_tok"), config.get("num_local_experts")
    return weight_bytes_per_token(tensors, used / experts if used and experts else 1.0)


@lru_cache
def read_rate(weight_bytes: int) -> float | None:
    """Bytes per second that the kernels' threads read, over a buffer of so many bytes.

    None where kernels are interpreted, which says nothing about the machine.
    """
    import numpy as np

    from pace_nb.kernels import jit, limits

    if jit.INTERPRETED:
        return None
    num_bytes = min(max(weight_bytes, SMALLEST_BUFFER), LARGEST_BUFFER)
    repeats = max(5, READ_IN_ALL // num_bytes)
    return limits.dram_read_rate(np.ones(num_bytes // 4, np.float32), repeats)


def report_of(llm: LLM, watch: Stopwatch) -> str:
    """`report` for a model, after measuring the read rate."""
    weight_bytes = model_weight_bytes(llm)
    told = report(watch, weight_bytes, read_rate(weight_bytes))
    speculative = llm.get_speculative_stats()
    return told if speculative is None else told + speculation(speculative)


def speculation(stats: SpeculativeStats) -> str:
    """What guesses were worth, on one line; since the model was opened."""
    off = f"off for {stats.num_steps_off} steps"
    if not stats.num_drafts:
        return f"{'guesses':<9} none were made{'; ' + off if stats.num_steps_off else ''}\n"
    rates = " ".join(f"{rate:.2f}" for rate in stats.acceptance_rate_per_pos)
    return (
        f"{'guesses':<9} mean acceptance length {stats.mean_acceptance_length:.2f}, "
        f"{stats.num_accepted_tokens} of {stats.num_draft_tokens} accepted "
        f"({stats.acceptance_rate:.0%}) in {stats.num_drafts} drafts, by position {rates}; {off}\n"
    )


def report(watch: Stopwatch, weight_bytes: int, read_rate: float | None) -> str:
    """Lines for standard error. `read_rate` in bytes/s, None where it was not measured."""
    return "".join(f"{name:<9} {text}\n" for name, text in _lines(watch, weight_bytes, read_rate))


def _lines(
    watch: Stopwatch, weight_bytes: int, read_rate: float | None
) -> Iterator[tuple[str, str]]:
    ttft, rate = watch.time_to_first_token, watch.decode_rate
    yield "prompt", f"{watch.num_prompt_tokens} tokens"
    if ttft is None:
        yield "decode", "no token was generated"
        return
    compiled = f", {watch.num_compiled} kernels compiled meanwhile" if watch.num_compiled else ""
    yield "first", f"{ttft * 1e3:.1f} ms to the first token{compiled}"
    if rate is None:
        yield "decode", f"{watch.num_tokens} token: too few for a rate"
        return
    yield "decode", f"{rate:.1f} tokens/s over {watch.num_tokens} tokens"
    if read_rate is None:
        yield "roofline", "not measured: the kernels are interpreted"
        return
    limit = read_rate / weight_bytes
    yield (
        "roofline",
        f"{rate / limit:.0%} of {limit:.1f} tokens/s, the rate at which this process can read the "
        f"{weight_bytes / 1e6:.1f} MB of weights ({read_rate / 1e9:.1f} GB/s)",
    )
