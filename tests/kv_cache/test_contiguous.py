"""What is special about ranges: where they grow, when they move, what check() sees."""

from __future__ import annotations

import pytest

from pace_nb.batch import Batch
from pace_nb.config import CacheConfig
from pace_nb.kv_cache.base import UNIT, KVCacheConfig
from pace_nb.kv_cache.contiguous import ContiguousCache

MODEL = KVCacheConfig(num_layers=1, num_kv_heads=1, head_dim=2, dtype="float32")


def make(num_units=12, max_model_len=64):
    """Segments of one unit: 64 // isqrt(64) = 8 tokens, and less than a unit is a unit."""
    return ContiguousCache(MODEL, CacheConfig("contiguous", num_units * UNIT, max_model_len))


def first_unit(cache, request_id):
    view = cache.view(Batch.from_spans([(request_id, 0, [0], 0)]))[0]
    assert view.block_table.shape == (1, 1) and view.units_per_block == 2**40
    return int(view.block_table[0, 0])


def test_grows_in_place_while_it_can_then_moves_to_the_first_fit():
    cache = make()
    cache.allocate("a", UNIT)
    assert cache.allocate("a", 2 * UNIT) and first_unit(cache, "a") == 0
    cache.allocate("b", UNIT)
    assert cache.allocate("a", 3 * UNIT) and first_unit(cache, "a") == 3
    cache.allocate("c", 2 * UNIT)
    assert first_unit(cache, "c") == 0
    cache.check()


def test_a_move_may_overlap_itself():
    cache = make(num_units=6)
    cache.allocate("a", 2 * UNIT)
    cache.allocate("b", 3 * UNIT)
    k, v = cache.layer(0)
    k[0, 2:5] = [[[[1.0]]], [[[2.0]]], [[[3.0]]]]
    v[0, 2:5] = [[[[4.0]]], [[[5.0]]], [[[6.0]]]]
    cache.free("a")
    assert cache.allocate("b", 5 * UNIT) and first_unit(cache, "b") == 0
    assert [k[0, unit].max() for unit in range(3)] == [1, 2, 3]
    assert [v[0, unit].min() for unit in range(3)] == [4, 5, 6]


def test_room_comes_in_segments_unless_only_less_is_left():
    cache = make(num_units=7, max_model_len=4096)  # segments of 64 tokens, 4 units
    cache.allocate("a", 1)
    assert cache.num_free_tokens == 3 * UNIT
    assert cache.allocate("b", 2 * UNIT)
    assert cache.num_free_tokens == UNIT
    assert not cache.allocate("c", 2 * UNIT)
    cache.check()


def test_truncating_gives_whole_segments_back():
    cache = make(num_units=16, max_model_len=4096)
    cache.allocate("a", 12 * UNIT)
    cache.truncate("a", 5 * UNIT)
    assert cache.num_free_tokens == 8 * UNIT
    cache.truncate("a", 0)
    assert cache.num_free_tokens == 12 * UNIT
    cache.check()


def damaged(**parts):
    cache = make()
    for request_id in "abc":
        cache.allocate(request_id, UNIT)
    for name, value in parts.items():
        setattr(cache, name, value)
    return cache


@pytest.mark.parametrize(
    "parts, message",
    [
        ({"_free": []}, "lost"),
        ({"_free": [range(2, 12)]}, "two owners"),
        ({"_free": [range(4, 12)]}, "lost or have"),
        ({"_free": [range(3, 7), range(7, 12)]}, "not coalesced"),
        ({"_ranges": {"a": range(1), "b": range(1), "c": range(2, 3)}}, "two owners"),
        ({"_num_tokens": {"a": 1, "b": 1}}, "differ"),
        ({"_num_tokens": {"a": 1, "b": 1, "c": 17}}, "request c: 17 tokens in 1 units"),
    ],
)
def test_check_sees_damage(parts, message):
    with pytest.raises(RuntimeError, match=message):
        damaged(**parts).check()
