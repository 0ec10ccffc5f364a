"""A scripted model: logits that depend on a request's own tokens, read back through the KV pool.

What it computes for a token is a hash of all tokens up to it. The tokens before are not taken from
the batch but from the cache, where an earlier step has put them (in every layer, head and dim): in
keys the token, in values a hash of it and all before it, which goes into the result as well. So a
scheduler or a cache that loses, mixes up or forgets a token, or hands out a block of the right
tokens after the wrong ones, changes what comes out, and whatever gives the same tokens as a request
alone is right. With `windows` it has two layers more, which see a part of what is before: a window,
and a chunk of positions. What they have of a token takes part in what comes out for each that sees
it; where it is gone, that is an error.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from pace_nb.config import CacheConfig, EngineConfig
from pace_nb.engine.engine import Engine
from pace_nb.engine.request import Request
from pace_nb.kv_cache import create_cache
from pace_nb.kv_cache.base import UNIT, KVCacheConfig
from pace_nb.outputs import RequestMetrics
from pace_nb.sampling_params import SamplingParams

VOCAB_SIZE = 40
POISON = 39  # the token after which logits, keys and values are NaN
EOS = 38
STORED = KVCacheConfig(num_layers=2, num_kv_heads=2, head_dim=2, dtype="float32")
WINDOWED = replace(STORED, num_layers=4, windows=(0, 0, 24, 0), chunks=(0, 0, 0, 40))


class ScriptedModel:
    """`registry.Model`. `before_run(batch)` is called first and may raise. In a sequence of more
    tokens than `switch_length` every token leaves other keys and values, as with longrope."""

    vocab_size = VOCAB_SIZE
    max_position_embeddings = 10_000

    def __init__(self, switch_length: int | None = None, windows: bool = False) -> None:
        self.stored = WINDOWED if windows else STORED
        self.switch_length = switch_length
        self.before_run = lambda batch: None
        self.batches: list[Any] = []

    def kv_cache_config(self, dtype):
        return replace(self.stored, keys_by_length=self.switch_length is not None)

    def __call__(self, batch, kv):
        self.before_run(batch)
        self.batches.append(batch)
        hidden = np.empty((batch.num_tokens, 4), np.float32)
        for b in range(batch.num_requests):
            new = slice(batch.cu_seqlens_q[b], batch.cu_seqlens_q[b + 1])
            positions = np.arange(batch.context_lens[b])
            blocks = kv.views[0].block_table[b, positions // UNIT // kv.views[0].units_per_block]
            units = blocks + positions // UNIT % kv.views[0].units_per_block
            slots = positions % UNIT
            here = batch.positions[new]
            tokens = batch.token_ids[new].astype(np.float32)
            tokens[tokens == POISON] = np.nan
            if self.switch_length is not None and batch.seq_lens[b] > self.switch_length:
                tokens += VOCAB_SIZE
            keys, values = np.zeros((2, len(positions)))
            for index, dim in np.ndindex(STORED.num_layers, STORED.head_dim):
                k = kv.layer(index).k
                k[:, units[here], dim, slots[here], 0] = tokens + 100 * index + dim
                keys += (1 + 7 * index + 3 * dim) * k[:, units, dim, slots, 0].sum(axis=0)
            spread = np.uint64(0x9E3779B97F4A7C15) * (2 * positions.astype(np.uint64) + 1)
            prefix = np.cumsum(mix(np.nan_to_num(keys).astype(np.uint64) + spread))  # wraps
            hashed = (prefix >> np.uint64(44)).astype(np.float32)  # 20 bits
            hashed[np.maximum.accumulate(np.isnan(keys))] = np.nan
            for index, dim in np.ndindex(STORED.num_layers, STORED.head_dim):
                v = kv.layer(index).v
                v[:, units[here], slots[here], dim, 0] = hashed[here] + 100 * index + dim
                values += (5 + 9 * index + 2 * dim) * v[:, units, slots, dim, 0].sum(axis=0)
            bad = np.maximum.accumulate(np.isnan(values))
            whole = prefix + np.cumsum(mix(np.nan_to_num(values).astype(np.uint64) + spread))
            whole = whole[here]
            for index in range(STORED.num_layers, self.stored.num_layers):
                whole += self._seen(kv, index, b, here, hashed[here])
            words = mix(whole)[:, None] >> np.arange(0, 64, 16, dtype=np.uint64)
            hidden[new] = words & np.uint64(0xFFFF)
            hidden[new][bad[here]] = np.nan
        return hidden

    @staticmethod
    def _seen(kv, index, b, here, new):
        """uint64 of each position `here` in a layer that sees a part: of all that it sees there."""
        window, chunk = WINDOWED.windows[index], WINDOWED.chunks[index]
        first = here // chunk * chunk if chunk else np.maximum(here + 1 - window, 0)
        positions = np.arange(first[0], here[-1] + 1)
        table, units_per_block = kv.views[index]
        blocks = table[b, positions // UNIT // units_per_block]
        assert (blocks >= 0).all(), "what a token sees is gone"
        units, slots = blocks + positions // UNIT % units_per_block, positions % UNIT
        pool, is_new = kv.layer(index), positions >= here[0]
        pool.k[:, units[is_new], :, slots[is_new], :] = new[:, None, None, None]
        pool.v[:, units[is_new], slots[is_new], :2] = new[:, None, None]
        stored = [pool.k[:, units, :, slots, 0], pool.v[:, units, slots, :2, 0]]
        numbers = np.nan_to_num(np.concatenate(stored, axis=1).reshape(len(positions), -1))
        assert (numbers == numbers[:, :1]).all()
        hashed = mix(
            numbers[:, 0].astype(np.uint64) + np.uint64(0x51ED27) * positions.astype(np.uint64)
        )
        until = np.concatenate([np.zeros(1, np.uint64), np.cumsum(hashed)])  # wraps
        return until[here + 1 - first[0]] - until[first - first[0]]

    def logits(self, hidden, rows):
        chosen = hidden[rows]
        bad = np.isnan(chosen).any(axis=1)
        words = np.nan_to_num(chosen).astype(np.uint64) << np.arange(0, 64, 16, dtype=np.uint64)
        column = np.arange(1, self.vocab_size + 1, dtype=np.uint64)
        random = mix(words.sum(axis=1, dtype=np.uint64)[:, None] * column)
        logits = (random >> np.uint64(58)).astype(np.float32) / 8  # 64 values, so ties are common
        logits[bad] = np.nan
        return logits


def mix(x):
    """splitmix64's finalizer."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@dataclass
class Setup:
    """An engine on a scripted model, with what is needed to look inside."""

    engine: Engine
    model: ScriptedModel
    cache: Any

    def step(self):
        """One step: the cache must be sound, the running requests in order of age, the budget kept,
        and who waits must have no guesses."""
        num_batches = len(self.model.batches)
        progress = self.engine.step()
        self.cache.check()
        scheduler = self.engine._scheduler
        if scheduler._chunked_prefill:
            budget = scheduler._max_num_batched_tokens
            assert all(batch.num_tokens <= budget for batch in self.model.batches[num_batches:])
        assert not any(request.draft_token_ids for request in scheduler.waiting)
        if not scheduler.by_priority:
            ages = [request.arrival for request in scheduler.running]
            assert ages == sorted(ages)
        return progress

    def run(self, *requests):
        """Add the requests and step until all have ended."""
        for request in requests:
            self.engine.add(request)
        steps = 0
        while self.engine.num_unfinished:
            self.step()
            steps += 1
            assert steps < 5000, "no progress"
        self.expect_idle()

    def expect_idle(self):
        assert self.cache.num_free_tokens == self.cache.num_total_tokens
        scheduler = self.engine._scheduler
        assert not scheduler.waiting and not scheduler.running and not self.engine._requests


class Scripted:
    """Makes setups and requests."""

    VOCAB_SIZE, POISON, EOS = VOCAB_SIZE, POISON, EOS

    @staticmethod
    def setup(
        *,
        num_units=64,
        max_model_len=512,
        switch_length=None,
        windows=False,
        drafter=None,
        **options,
    ) -> Setup:
        model = ScriptedModel(switch_length, windows)
        if "speculative_config" in options:  # what is adaptive hangs on time
            options["speculative_config"] = {"adaptive": False, **options["speculative_config"]}
        config = EngineConfig(**options)
        block_size = config.block_size or UNIT
        cache = create_cache(
            model.kv_cache_config("float32"),
            CacheConfig(
                config.kv_cache,
                num_units * UNIT // block_size * block_size,
                max_model_len,
                block_size,
                config.prefix_caching,
                config.max_num_seqs,
                config.max_num_batched_tokens if config.enable_chunked_prefill else None,
            ),
        )
        engine = Engine(model, cache, config, max_model_len, drafter)
        return Setup(engine, model, cache)

    @staticmethod
    def request(
        request_id, prompt, *, max_tokens=8, bad_words=(), cache_salt=None, **params
    ) -> Request:
        params = {"temperature": 0.0, **params}
        return Request(
            request_id=request_id,
            prompt_token_ids=list(prompt),
            params=SamplingParams(max_tokens=max_tokens, **params),
            max_tokens=max_tokens,
            metrics=RequestMetrics(arrival_time=0.0),
            eos_token_ids=frozenset({EOS}),
            bad_words_token_ids=bad_words,
            cache_salt=cache_salt,
        )

    @staticmethod
    def result(request):
        """All that a user can see of a finished request."""
        return (
            request.generated_token_ids,
            request.logprobs,
            request.prompt_logprobs,
            request.finish_reason,
            request.stop_reason,
            request.error,
        )


@pytest.fixture(scope="session")
def scripted() -> type[Scripted]:
    return Scripted
