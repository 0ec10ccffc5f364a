"""What is special about the slab: its block size, its stack of free blocks, what check() sees."""

from __future__ import annotations

from array import array

import pytest

from pace_nb.batch import Batch
from pace_nb.config import CacheConfig
from pace_nb.kv_cache.base import UNIT, KVCacheConfig
from pace_nb.kv_cache.slab import SlabCache, tuned_block_size

MODEL = KVCacheConfig(num_layers=1, num_kv_heads=1, head_dim=2, dtype="float32")
LLAMA_8B = KVCacheConfig(num_layers=32, num_kv_heads=8, head_dim=128, dtype="bfloat16")


def make(num_blocks=6, block_size=32):
    return SlabCache(MODEL, CacheConfig("slab", num_blocks * block_size, 64, block_size))


def blocks(cache, request_id):
    table, units_per_block = cache.view(Batch.from_spans([(request_id, 0, [0], 0)]))[0]
    assert units_per_block == 2
    return table[0].tolist()


@pytest.mark.parametrize(
    "l2, model, block_size",
    [
        ("1024K\n", LLAMA_8B, 64),  # 4 KiB per token: 64 of them are a quarter
        ("2048K\n", LLAMA_8B, 128),
        ("1023K\n", LLAMA_8B, 32),
        ("256K\n", LLAMA_8B, 32),  # not even 32 fit, and there is nothing smaller
        ("2048K\n", MODEL, 256),
        ("2048K\n", KVCacheConfig(32, 8, 128, "float32"), 64),
        ("huge", LLAMA_8B, 64),
        (None, LLAMA_8B, 64),
    ],
)
def test_a_block_takes_a_quarter_of_l2(tmp_path, l2, model, block_size):
    folder = tmp_path / "sys/devices/system/cpu/cpu0/cache/index2"
    folder.mkdir(parents=True)
    if l2 is not None:
        (folder / "size").write_text(l2)
    assert tuned_block_size(model, tmp_path) == block_size


def test_this_machine():
    assert tuned_block_size(MODEL) in (32, 64, 128, 256)


def test_what_was_given_back_last_is_given_away_first():
    cache = make()
    for request_id in "abc":
        assert cache.allocate(request_id, 33)
    assert [blocks(cache, request_id) for request_id in "abc"] == [[0, 2], [4, 6], [8, 10]]
    cache.free("c")
    cache.free("a")
    assert cache.allocate("d", 3 * 32)
    assert blocks(cache, "d") == [0, 2, 8]
    cache.check()


def test_blocks_stay_where_they_are_while_a_sequence_grows():
    cache = make()
    cache.allocate("a", 10)
    cache.allocate("b", 10)
    for size in (32, 33, 64, 65, 128):
        assert cache.allocate("a", size)
        assert blocks(cache, "a") == [0, 4, 6, 8][: -(-size // 32)]
    assert blocks(cache, "b") == [2]


def test_truncating_gives_whole_blocks_back():
    cache = make()
    cache.allocate("a", 5 * 32)
    cache.truncate("a", 3 * 32 + 1)
    assert cache.num_free_tokens == 2 * 32
    cache.truncate("a", 3 * 32)
    assert cache.num_free_tokens == 3 * 32
    cache.truncate("a", 0)
    assert cache.num_free_tokens == cache.num_total_tokens == 6 * 32
    cache.check()


def test_only_the_blocks_of_the_request_are_overwritten():
    cache = make()
    cache.allocate("a", 40)
    cache.allocate("b", 40)
    k, v = cache.layer(0)
    k.fill(1.0)
    v.fill(1.0)
    cache.free("a", zero=True)
    for array_ in (k, v):
        assert not array_[:, 0 : 2 * 2].any() and (array_[:, 2 * 2 :] == 1).all()
    assert UNIT == 16


@pytest.mark.parametrize(
    "parts, message",
    [
        ({"_free": [10, 8]}, "a block is lost"),
        ({"_free": [10, 8, 6, 4]}, "two states"),
        ({"_free": [10, 8, 7]}, "not one of the pool's"),
        ({"_free": [10, 8, 8]}, "two states"),
        ({"tables": {"a": array("q", [0]), "b": array("q", [0]), "c": array("q", [4])}}, "refs"),
        ({"tables": {"a": array("q", [0]), "b": array("q", [2])}}, "differ"),
        ({"tables": {"a": array("q"), "b": array("q", [2]), "c": array("q", [4])}}, "32 tokens"),
    ],
)
def test_check_sees_damage(parts, message):
    cache = make()
    for request_id in "abc":
        cache.allocate(request_id, 32)
    cache.check()
    for name, value in parts.items():
        setattr(cache._groups[0], name, value)
    with pytest.raises(RuntimeError, match=message):
        cache.check()


@pytest.mark.parametrize("num_tokens", [33, 0])
def test_check_sees_a_length_that_does_not_fit(num_tokens):
    cache = make()
    cache.allocate("b", 32)
    cache._num_tokens["b"] = num_tokens
    with pytest.raises(RuntimeError, match=f"request b: {num_tokens} tokens in 1 blocks"):
        cache.check()
