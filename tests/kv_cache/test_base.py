"""The law of every KV cache: what is stored for a request is there until it is given up.

One suite for all kinds. It writes and reads through the view, at the addresses that base.py
documents, as the kernels do.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pace_nb.batch import Batch
from pace_nb.config import KV_CACHE_KINDS, CacheConfig
from pace_nb.errors import ConfigError, OutOfMemoryError
from pace_nb.kv_cache import create_cache
from pace_nb.kv_cache.base import UNIT, BatchKV, KVCacheConfig

MODEL = KVCacheConfig(num_layers=2, num_kv_heads=2, head_dim=6, dtype="bfloat16")
NUM_TOKENS = 12 * UNIT
every_kind = pytest.mark.parametrize("kind", KV_CACHE_KINDS)


def make(kind, num_tokens=NUM_TOKENS, model=MODEL, max_model_len=NUM_TOKENS):
    return create_cache(model, CacheConfig(kind, num_tokens, max_model_len))


def slots(cache, request_id, num_tokens):
    """(unit, slot) of each of the first `num_tokens` tokens of a request."""
    view = cache.view(Batch.from_spans([(request_id, num_tokens - 1, [0], 0)]))
    assert view.block_table.dtype == np.int64 and view.block_table.ndim == 2
    units = np.arange(num_tokens) // UNIT
    firsts = view.block_table[0, units // view.units_per_block]
    return zip(firsts + units % view.units_per_block, np.arange(num_tokens) % UNIT, strict=True)


def write(cache, request_id, start, values):
    """Store values[start:], one number per token, in every layer, head and dim."""
    places = list(slots(cache, request_id, len(values)))[start:]
    for index in range(MODEL.num_layers):
        k, v = cache.layer(index)
        for (unit, slot), value in zip(places, values[start:], strict=True):
            k[:, unit, :, slot, :] = value + index
            v[:, unit, slot // MODEL.pair, : MODEL.head_dim, slot % MODEL.pair] = value - index


def read(cache, request_id, num_tokens):
    """The numbers that `write` stored; asserts that all layers, heads and dims agree."""
    values = []
    for unit, slot in slots(cache, request_id, num_tokens):
        stored = set()
        for index in range(MODEL.num_layers):
            k, v = cache.layer(index)
            stored |= set((k[:, unit, :, slot, :] - index).ravel().tolist())
            value = v[:, unit, slot // MODEL.pair, : MODEL.head_dim, slot % MODEL.pair]
            stored |= set((value + index).ravel().tolist())
        assert len(stored) == 1
        values.append(stored.pop())
    return values


@every_kind
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_whatever_happens_every_request_reads_what_it_wrote(kind, data):
    cache = make(kind)
    stored = {}
    next_value = 100
    for _ in range(data.draw(st.integers(1, 25))):
        request_id = data.draw(st.sampled_from("abcde"))
        action = data.draw(st.sampled_from(["grow", "grow", "grow", "truncate", "free", "zero"]))
        values = stored.get(request_id, [])
        if action == "grow":
            size = len(values) + data.draw(st.integers(1, 50))
            before = cache.num_free_tokens
            if cache.allocate(request_id, size):
                new = list(range(next_value, next_value + size - len(values)))
                next_value += len(new)
                stored[request_id] = values + new
                write(cache, request_id, len(values), stored[request_id])
            else:
                assert cache.num_free_tokens == before
                assert len(stored) > (request_id in stored) or size > NUM_TOKENS
        elif action == "truncate" and values:
            size = data.draw(st.integers(1, len(values)))
            cache.truncate(request_id, size)
            stored[request_id] = values[:size]
        elif action in ("free", "zero"):
            cache.free(request_id, zero=action == "zero")
            stored.pop(request_id, None)
        cache.check()
        for other, expected in stored.items():
            assert read(cache, other, len(expected)) == expected

    for request_id in stored:
        cache.free(request_id)
    cache.check()
    assert cache.num_free_tokens == cache.num_total_tokens == NUM_TOKENS


@every_kind
def test_one_request_can_have_it_all_whatever_was_there_before(kind):
    """The engine's promise of progress rests on this."""
    cache = make(kind)
    for request_id in "abcdef":
        assert cache.allocate(request_id, 2 * UNIT)
    write(cache, "d", 0, list(range(100, 100 + 2 * UNIT)))
    assert not cache.allocate("g", UNIT)
    for request_id in "abcef":
        cache.free(request_id)

    assert cache.allocate("d", NUM_TOKENS)
    cache.check()
    assert cache.num_free_tokens == 0
    assert read(cache, "d", 2 * UNIT) == list(range(100, 100 + 2 * UNIT))
    assert not cache.allocate("d", NUM_TOKENS + 1)


@every_kind
def test_asking_again_for_what_one_has_changes_nothing(kind):
    cache = make(kind)
    assert cache.allocate("a", 3 * UNIT)
    before = cache.num_free_tokens
    assert cache.allocate("a", 3 * UNIT) and cache.allocate("a", 1)
    assert cache.num_free_tokens == before
    cache.view(Batch.from_spans([("a", 0, [0] * 3 * UNIT, 0)]))


@every_kind
def test_freeing_with_zero_leaves_nothing_behind(kind):
    cache = make(kind)
    cache.allocate("a", 3 * UNIT)
    write(cache, "a", 0, [0x7FC0] * 3 * UNIT)  # a NaN in BF16
    cache.free("a", zero=True)
    cache.check()
    for index in range(MODEL.num_layers):
        assert not cache.layer(index).k.any() and not cache.layer(index).v.any()


@every_kind
def test_freeing_twice_or_unknown_is_nothing(kind):
    cache = make(kind)
    cache.allocate("a", 5)
    cache.free("a")
    cache.free("a")
    cache.free("never", zero=True)
    cache.check()
    assert cache.num_free_tokens == NUM_TOKENS


@every_kind
def test_a_batch_must_have_room(kind):
    cache = make(kind)
    cache.allocate("a", 5)
    cache.view(Batch.from_spans([("a", 4, [0], 0)]))
    with pytest.raises(RuntimeError, match="request a needs room for 6 tokens, has 5"):
        cache.view(Batch.from_spans([("a", 5, [0], 0)]))
    with pytest.raises(RuntimeError, match="request b needs room for 1 tokens, has 0"):
        cache.view(Batch.from_spans([("b", 0, [0], 0)]))
    cache.truncate("a", 2)
    with pytest.raises(RuntimeError, match="needs room for 3 tokens, has 2"):
        cache.view(Batch.from_spans([("a", 2, [0], 0)]))


@every_kind
def test_a_batch_reaches_its_layers(kind):
    cache = make(kind)
    cache.allocate("a", 5)
    kv = BatchKV(cache.view(Batch.from_spans([("a", 0, [0], 0)])), cache)
    assert kv.layer(1).k is cache.layer(1).k


@pytest.mark.parametrize(
    "dtype, k_shape, v_shape, itemsize",
    [
        ("bfloat16", (3, 5, 10, 16, 2), (3, 5, 8, 32, 2), 2),
        ("float32", (3, 5, 20, 16, 1), (3, 5, 16, 32, 1), 4),
    ],
)
def test_the_storage_format(dtype, k_shape, v_shape, itemsize):
    model = KVCacheConfig(num_layers=2, num_kv_heads=3, head_dim=20, dtype=dtype)
    layers = model.allocate_layers(5)
    assert len(layers) == 2
    for k, v in layers:
        assert k.shape == k_shape and v.shape == v_shape
        assert k.itemsize == v.itemsize == itemsize and not k.any() and not v.any()
    assert sum(k.nbytes + v.nbytes for k, v in layers) == 5 * model.bytes_per_unit


@pytest.mark.parametrize("sizes", [(0, 1, 16), (1, 0, 16), (1, 1, 0), (1, 1, 15), (1, 1, -2)])
def test_a_model_that_cannot_be_cached(sizes):
    with pytest.raises(ConfigError, match="KV cache"):
        KVCacheConfig(*sizes, dtype="bfloat16")
    with pytest.raises(ConfigError, match="float16"):
        KVCacheConfig(1, 1, 16, dtype="float16")


def test_more_than_the_system_gives():
    with pytest.raises(OutOfMemoryError, match="no memory for a KV cache of"):
        KVCacheConfig(1, 1, 64, "float32").allocate_layers(2**44)
