"""A batch for the attention kernels: dense keys and values beside the pool that holds them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pace_nb.kernels import jit
from pace_nb.kernels.attention_rows import SPLIT, attention_ref
from pace_nb.kernels.bf16 import from_f32, widen
from pace_nb.kernels.kv_write import KVPool, new_pool

Array = NDArray[Any]
WHOLE = 2**40  # units per block where each sequence lies in one piece


def stored(x: Array, dtype: Any) -> Array:
    x = x.astype(np.float32)
    return from_f32(x) if dtype == np.uint16 else x


@dataclass(frozen=True)
class Scenario:
    """Sequences with their keys and values, dense and in a pool that is NaN wherever they are not.

    q [T, H, D]; keys[b], values[b] [S, KVH, D], in storage dtype.
    """

    q: Array
    keys: list[Array]
    values: list[Array]
    pool: KVPool
    block_table: Array
    units_per_block: int
    cu_seqlens_q: Array
    context_lens: Array
    scale: float

    @classmethod
    def make(
        cls,
        contexts: Sequence[int],
        query_lens: Sequence[int],
        *,
        heads: tuple[int, int] = (4, 2),
        d: int = 64,
        dtype: Any = np.uint16,
        block: int | None = 16,
        seed: int = 0,
    ) -> Scenario:
        """block: tokens in a block of the (shuffled) block table, None for contiguous sequences."""
        rng = np.random.default_rng(seed)
        keys, values = (
            [stored(rng.standard_normal((n, heads[1], d)), dtype) for n in contexts]
            for _ in range(2)
        )
        q = stored(rng.standard_normal((sum(query_lens), heads[0], d)), dtype)
        cu = np.concatenate(([0], np.cumsum(query_lens))).astype(np.int32)
        lens = np.array(contexts, np.int32)
        empty = np.zeros((0, 0), np.int64)
        pool = new_pool(1, heads[1], d, dtype)
        bare = cls(q, keys, values, pool, empty, 1, cu, lens, d**-0.5)
        return bare.in_blocks_of(block, seed)

    def in_blocks_of(self, block: int | None, seed: int = 0) -> Scenario:
        """The same sequences in another place."""
        per_block = WHOLE if block is None else block // 16
        units = [-(-int(n) // 16) for n in self.context_lens]
        sizes = units if block is None else [per_block] * sum(-(-n // per_block) for n in units)
        order = np.random.default_rng(seed).permutation(len(sizes) + 2)
        starts = np.zeros(len(sizes) + 2, np.int64)
        padded = np.array([*sizes, 1, 2])
        starts[order] = np.cumsum(padded[order]) - padded[order]
        counts = [1 if block is None else -(-n // per_block) for n in units]
        table = np.full((len(units), max(counts, default=0) + 1), -1, np.int64)
        for b, n in enumerate(counts):
            table[b, :n] = starts[sum(counts[:b]) : sum(counts[:b]) + n]
        pool = new_pool(int(padded.sum()), *self.keys[0].shape[1:], self.pool.dtype)
        moved = replace(self, pool=pool, block_table=table, units_per_block=per_block)
        moved.fill()
        return moved

    def fill(self) -> None:
        """Write keys and values into the pool, NaN everywhere else."""
        for x in self.pool:
            x[...] = 0x7FC1 if x.dtype == np.uint16 else np.nan
        s, d = self.pool.k.shape[4], self.q.shape[2]
        for b, (k, v) in enumerate(zip(self.keys, self.values, strict=True)):
            logical, slot = np.divmod(np.arange(len(k)), 16)
            unit = self.block_table[b, logical // self.units_per_block]
            unit = unit + logical % self.units_per_block
            self.pool.k[:, unit, :, slot, :] = k.reshape(len(k), -1, d // s, s)
            self.pool.v[:, unit, slot // s, :d, slot % s] = v

    def with_queries(self, first: Sequence[int], query_lens: Sequence[int]) -> Scenario:
        """The step that has computed `first[b]` tokens of sequence b and has these now.

        Only for scenarios whose query rows are all tokens of their sequences.
        """
        rows = [
            np.arange(self.cu_seqlens_q[b] + start, self.cu_seqlens_q[b] + start + n)
            for b, (start, n) in enumerate(zip(first, query_lens, strict=True))
        ]
        cu = np.concatenate(([0], np.cumsum(query_lens))).astype(np.int32)
        lens = np.array(first, np.int32) + np.array(query_lens, np.int32)
        return replace(self, q=self.q[np.concatenate(rows)], cu_seqlens_q=cu, context_lens=lens)

    def alone(self, b: int) -> Scenario:
        """A batch of sequence b only."""
        rows = slice(self.cu_seqlens_q[b], self.cu_seqlens_q[b + 1])
        return replace(
            self,
            q=self.q[rows],
            keys=self.keys[b : b + 1],
            values=self.values[b : b + 1],
            block_table=self.block_table[b : b + 1],
            cu_seqlens_q=np.array([0, rows.stop - rows.start], np.int32),
            context_lens=self.context_lens[b : b + 1],
        )

    @property
    def arguments(self) -> tuple[Any, ...]:
        """What both kernels take, up to and with scale."""
        return (
            self.q,
            self.pool,
            self.block_table,
            self.units_per_block,
            self.cu_seqlens_q,
            self.context_lens,
            self.scale,
        )

    def exact(self, window: int = 0, sinks: Array | None = None) -> Array:
        """float64 [T, H, D], from the dense keys and values."""
        return self._each(lambda q, k, v, p: attention_ref(q, k, v, p, self.scale, window, sinks))

    def bound(self, window: int = 0, sinks: Array | None = None) -> Array:
        """The error bound that attention_rows.py declares, [T, H, D]."""

        def one(q: Array, k: Array, v: Array, positions: Array) -> Array:
            q, k, v = (widen(x) for x in (q, k, v))
            weighted = attention_ref(
                *(x.astype(np.float32) for x in (q, k)),
                np.abs(v).astype(np.float32),
                positions,
                self.scale,
                window,
                sinks,
            )
            group = q.shape[1] // k.shape[1]
            products = np.einsum("thd,shd->ths", np.abs(q), np.repeat(np.abs(k), group, axis=1))
            e = (q.shape[2] + 2) * 2.0**-24 * self.scale * products.max(axis=2)[..., None]
            s = len(k)
            return weighted * (4 * e + (min(s, SPLIT) + s / 8 + 64) * 2.0**-24 + self.unit)

        return self._each(one) + np.abs(self.exact(window, sinks)) * self.unit + 1e-30

    @property
    def unit(self) -> float:
        """Relative error of a rounding to storage."""
        return 2.0**-8 if self.pool.dtype == np.uint16 else 2.0**-24

    def _each(self, function: Any) -> Array:
        out = np.zeros(self.q.shape)
        for b, context in enumerate(int(n) for n in self.context_lens):
            rows = slice(self.cu_seqlens_q[b], self.cu_seqlens_q[b + 1])
            if rows.start < rows.stop:
                positions = np.arange(context - (rows.stop - rows.start), context)
                k, v = self.keys[b][:context], self.values[b][:context]
                out[rows] = function(self.q[rows], k, v, positions)
        return out

    def assert_close(self, out: Array, window: int = 0, sinks: Array | None = None) -> None:
        """Within the declared bound, and within PACE's tolerance for BF16."""
        exact = self.exact(window, sinks)
        error = np.abs(widen(out) - exact)
        assert np.all(error <= self.bound(window, sinks)), (
            f"{float((error / self.bound(window, sinks)).max())} times the bound"
        )
        assert np.all(error <= 0.016 + 0.016 * np.abs(exact))


@pytest.fixture(scope="session")
def scenario() -> Any:
    """Makes a Scenario."""
    return Scenario.make


@pytest.fixture(autouse=True)
def _every_call_uses_all_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small arrays would be left to one thread (`jit.threads_for`), and races would go unseen."""
    monkeypatch.setattr(jit, "SMALL", 0)
