"""Tiny checkpoints in memory, and running a model over its own cache."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from pace_nb.batch import Batch
from pace_nb.config import CacheConfig
from pace_nb.kv_cache.base import BatchKV
from pace_nb.kv_cache.contiguous import ContiguousCache


class MemoryCheckpoint:
    """config.json and named arrays with the protocol of `models/loader.py:Checkpoint`."""

    def __init__(self, config, tensors):
        self.config = config
        self.tensors = dict(tensors)
        self.released: list[str] = []

    def names(self):
        return self.tensors.keys()

    def shape(self, name):
        return self.tensors[name].shape

    def tensor(self, name, shape):
        assert self.tensors[name].shape == tuple(shape), name
        return self.tensors[name]

    def release(self, name):
        self.released.append(name)


def run_model(model, dtype, ids, chunks=None):
    """logits f32[T, V] of every position; `chunks` is how many tokens each step takes."""
    ids = list(ids)
    length = max(len(ids), 16)
    num_tokens = -(-length // 16) * 16
    cache = ContiguousCache(
        model.kv_cache_config(dtype), CacheConfig("contiguous", num_tokens, num_tokens)
    )
    rows, start = [], 0
    for size in chunks or [len(ids)]:
        batch = Batch.from_spans([("r", start, ids[start : start + size], size)])
        assert cache.allocate("r", start + size)
        hidden = model(batch, BatchKV(cache.view(batch), cache))
        rows.append(model.logits(hidden, batch.logits_rows))
        start += size
    return np.concatenate(rows)


@pytest.fixture
def memory_checkpoint():
    return MemoryCheckpoint


@pytest.fixture
def run():
    return run_model


@pytest.fixture
def random_tensors():
    """random_tensors(shapes): BF16 values, as (BF16 bits, float64), scaled by 1/sqrt(fan-in)."""

    def random_tensors(shapes, seed=5):
        rng = np.random.default_rng(seed)
        bits, values = {}, {}
        for name, shape in shapes.items():
            x = rng.standard_normal(shape).astype(np.float32)
            if len(shape) == 2 and "embed" not in name:
                x /= np.sqrt(shape[1])
            x = x.astype(ml_dtypes.bfloat16)
            bits[name], values[name] = x.view(np.uint16), x.astype(np.float64)
        return bits, values

    return random_tensors
