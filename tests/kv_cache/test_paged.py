"""What is special about pages: who shares, who keeps what for how long, what check() sees."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from pace_nb.batch import Batch
from pace_nb.config import CacheConfig
from pace_nb.kv_cache import paged
from pace_nb.kv_cache.base import KVCacheConfig
from pace_nb.kv_cache.paged import PagedCache

MODEL = KVCacheConfig(num_layers=2, num_kv_heads=2, head_dim=2, dtype="float32")
SIZE = 16
TEXT = np.random.default_rng(0).integers(0, 50_000, 1000).tolist()


def make(num_blocks=10, block_size=SIZE, *, model=MODEL, enable=True):
    config = CacheConfig("paged", num_blocks * block_size, 1000, block_size, enable)
    return PagedCache(model, config)


def blocks(cache, request_id, num_tokens=1):
    view = cache.view(Batch.from_spans([(request_id, num_tokens - 1, [0], 0)]))[0]
    return view.block_table[0].tolist()


def run(cache, request_id, token_ids, *, salt=None, commit=True):
    """As the engine does: reuse, allocate, compute, commit. Returns how much was reused."""
    found = cache.reuse(request_id, token_ids, len(token_ids) - 1, salt)
    assert cache.allocate(request_id, len(token_ids))
    for block in blocks(cache, request_id)[found // SIZE :]:
        for pool in (cache.layer(index) for index in range(MODEL.num_layers)):
            pool.k[:, block] = pool.v[:, block] = block + 1
    if commit:
        cache.commit(request_id, token_ids, len(token_ids), salt)
    cache.check()
    return found


def free(cache, *request_ids, zero=False):
    for request_id in request_ids:
        cache.free(request_id, zero=zero)
        cache.check()


# ---- hits --------------------------------------------------------------------------------------
def test_a_beginning_is_shared_as_far_as_it_is_the_same():
    cache = make()
    assert run(cache, "a", TEXT[:50]) == 0
    assert run(cache, "b", TEXT[:40] + TEXT[:20]) == 32
    assert blocks(cache, "b")[:2] == blocks(cache, "a")[:2]
    assert set(blocks(cache, "b")[2:]).isdisjoint(blocks(cache, "a"))
    assert cache.num_free_tokens == (10 - 4 - 2) * SIZE
    free(cache, "a", "b")
    assert cache.num_free_tokens == 10 * SIZE
    assert run(cache, "c", TEXT[:50]) == 48


@pytest.mark.parametrize("length, found", [(16, 0), (17, 16), (32, 16), (33, 32), (64, 48)])
def test_only_full_blocks_before_the_last_token_are_reused(length, found):
    cache = make()
    run(cache, "a", TEXT[:64])
    assert run(cache, "b", TEXT[:length]) == found


def test_the_same_tokens_elsewhere_or_after_others_are_not_the_same():
    cache = make()
    run(cache, "a", TEXT[:64])
    assert run(cache, "b", TEXT[16:64]) == 0
    free(cache, "b")
    assert run(cache, "b", [*TEXT[:15], 7, *TEXT[16:64]]) == 0


def test_what_was_not_committed_is_not_found():
    cache = make()
    run(cache, "a", TEXT[:50], commit=False)
    assert cache.reuse("b", TEXT, 64, None) == 0
    cache.commit("a", TEXT, 31, None)
    assert cache.reuse("b", TEXT, 64, None) == 16
    cache.commit("a", TEXT, 50, None)
    assert cache.reuse("b", TEXT, 64, None) == 48
    free(cache, "a", "b")


def test_what_was_generated_is_found_too():
    """The conversation so far comes back with the next question."""
    cache = make()
    run(cache, "a", TEXT[:20])
    for length in range(21, 70):
        assert cache.allocate("a", length)
        cache.commit("a", TEXT, length, None)
        cache.check()
    free(cache, "a")
    assert run(cache, "b", TEXT[:80]) == 64


def test_a_request_that_is_behind_takes_what_has_come_since():
    """Both began at the same time. What the second computed itself goes back."""
    cache = make()
    run(cache, "a", TEXT[:80], commit=False)
    run(cache, "b", TEXT[:80], commit=False)
    assert cache.num_free_tokens == 0
    cache.commit("a", TEXT, 80, None)
    own = blocks(cache, "b")[-1]
    assert cache.reuse("b", TEXT[:80], 79, None) == 64
    cache.check()
    assert blocks(cache, "b", 80) == [*blocks(cache, "a")[:4], own]
    assert cache.num_free_tokens == 4 * SIZE


def test_equal_blocks_become_one_when_they_are_committed():
    cache = make()
    run(cache, "a", TEXT[:70], commit=False)
    run(cache, "b", TEXT[:70], commit=False)
    for request_id in "ba":
        cache.commit(request_id, TEXT, 70, None)
        cache.check()
    assert blocks(cache, "a")[:4] == blocks(cache, "b")[:4]
    assert blocks(cache, "a")[4] != blocks(cache, "b")[4]
    free(cache, "b")
    assert run(cache, "c", TEXT[:70]) == 64


def test_a_salt_separates():
    cache = make(20)
    run(cache, "a", TEXT[:40], salt="x")
    for number, salt in enumerate([None, "y", "x ", "\ud800"]):
        assert run(cache, str(number), TEXT[:40], salt=salt) == 0
    for number, salt in enumerate([None, "x", "\ud800"]):
        assert cache.reuse(f"again {number}", TEXT, 39, salt) == 32


def test_a_salt_separates_even_where_digests_collide(monkeypatch):
    monkeypatch.setattr(paged, "_digest", lambda before, token_ids: b"")
    cache = make()
    run(cache, "a", TEXT[:20], salt="x")
    assert run(cache, "b", TEXT[:20], salt="y") == 0
    assert run(cache, "c", TEXT[:20], salt="x") == 0  # b's took its place
    assert run(cache, "d", TEXT[:20], salt="x") == 16


def test_off_nothing_is_shared():
    for cache in (make(enable=False), make(model=replace(MODEL, keys_by_length=True))):
        run(cache, "a", TEXT[:50])
        assert run(cache, "b", TEXT[:50]) == 0
        free(cache, "a", "b")
        (group,) = cache._groups
        assert len(group._free) == 10 and not group.contents


def test_a_long_chain_of_blocks_is_no_deep_recursion():
    cache = make(20_000)
    token_ids = np.arange(16 * 20_000).tolist()
    cache.allocate("a", len(token_ids))
    cache.commit("a", token_ids, len(token_ids), None)
    assert cache.reuse("b", token_ids, len(token_ids) - 1, None) == len(token_ids) - 16
    cache.check()
    del cache


# ---- who goes first ----------------------------------------------------------------------------
def test_free_blocks_go_before_cached_ones_and_of_those_the_longest_unused():
    cache = make(6)
    run(cache, "a", TEXT[:32])
    run(cache, "b", TEXT[100:132])
    free(cache, "a", "b")
    cache.allocate("c", 2 * SIZE)
    assert cache.reuse("a", TEXT, 32, None) == 32  # used again, so b's are the longest unused
    free(cache, "a")
    cache.allocate("c", 4 * SIZE)
    assert cache.reuse("b", TEXT[100:], 32, None) == 0
    assert cache.reuse("a", TEXT, 32, None) == 32
    assert not cache.allocate("c", 5 * SIZE)


def test_the_end_of_a_sequence_goes_before_its_beginning():
    cache = make(4)
    run(cache, "a", TEXT[:64])
    free(cache, "a")
    cache.allocate("b", SIZE)
    assert cache.reuse("a", TEXT, 64, None) == 48
    free(cache, "a")
    cache.allocate("b", 3 * SIZE)
    assert cache.reuse("a", TEXT, 64, None) == 16


def test_cached_blocks_are_room():
    cache = make(4)
    run(cache, "a", TEXT[:64])
    free(cache, "a")
    assert cache.num_free_tokens == 64
    assert cache.allocate("b", 64)
    assert cache.reuse("c", TEXT, 64, None) == 0


# ---- copy on write -----------------------------------------------------------------------------
def stored(cache, request_id, num_tokens):
    """What `run` stored: the number of the block that it was stored in, plus 1."""
    return [cache.layer(1).v[0, block, 0, 0, 0] for block in blocks(cache, request_id, num_tokens)]


def test_a_shared_block_that_is_written_to_is_copied_first():
    cache = make()
    run(cache, "a", TEXT[:49])
    run(cache, "b", TEXT[:49])
    cache.truncate("b", 20)
    assert blocks(cache, "b") == [0, 1]
    assert cache.allocate("b", 40)
    cache.check()
    assert blocks(cache, "a") == [0, 1, 2, 3]
    zero, copy, new = blocks(cache, "b")
    assert zero == 0 and {copy, new}.isdisjoint([0, 1, 2, 3])
    assert stored(cache, "b", 40)[:2] == [1, 2]
    other = [*TEXT[:20], *TEXT[200:220]]
    cache.commit("b", other, 40, None)
    free(cache, "b")
    assert cache.reuse("c", other, 40, None) == 32
    assert cache.reuse("d", TEXT, 48, None) == 48


def test_a_copy_for_which_there_is_no_room_is_refused_and_changes_nothing():
    cache = make(5)
    run(cache, "a", TEXT[:49])
    run(cache, "b", TEXT[:49])
    cache.truncate("b", 20)
    assert cache.allocate("c", 1)
    assert not cache.allocate("b", 32)
    cache.check()
    assert blocks(cache, "b") == [0, 1]
    free(cache, "c")
    assert cache.allocate("b", 32)
    cache.check()


def test_a_block_of_ones_own_is_not_copied_but_no_longer_found():
    cache = make(3)
    run(cache, "a", TEXT[:48])
    cache.truncate("a", 20)
    assert cache.reuse("b", TEXT, 48, None) == 48
    free(cache, "b")
    assert cache.allocate("a", 40)
    assert blocks(cache, "a", 40) == [0, 1, 2]
    cache.check()
    assert cache.reuse("b", TEXT, 48, None) == 16


def test_truncating_at_a_boundary_needs_no_copy():
    cache = make(5)
    run(cache, "a", TEXT[:49])
    run(cache, "b", TEXT[:49])
    cache.truncate("b", 32)
    assert cache.num_free_tokens == SIZE
    assert cache.allocate("b", 40)
    assert blocks(cache, "b") == [0, 1, 4]


# ---- what fails --------------------------------------------------------------------------------
def test_nobody_reuses_what_a_failed_request_had():
    cache = make()
    run(cache, "a", TEXT[:70])
    assert run(cache, "b", TEXT[:70]) == 64
    free(cache, "b", zero=True)
    assert stored(cache, "a", 70) == [1, 2, 3, 4, 5]  # who shares it, keeps it as it was
    assert cache.reuse("c", TEXT, 70, None) == 0
    cache.allocate("a", 90)
    cache.commit("a", TEXT, 90, None)  # the chain is broken, so nothing after it is found either
    assert cache.reuse("c", TEXT, 90, None) == 0
    assert cache.reuse("c", TEXT[64:], 26, None) == 0  # nor as if it were a beginning
    free(cache, "a")
    assert run(cache, "c", TEXT[:90]) == 0
    assert run(cache, "d", TEXT[:90]) == 80


def test_a_block_that_a_failed_request_was_cut_back_into_is_not_found_either():
    cache = make()
    run(cache, "a", TEXT[:48])
    cache.truncate("a", 20)
    free(cache, "a", zero=True)
    assert cache.reuse("b", TEXT, 48, None) == 0


def test_only_what_nobody_else_has_is_overwritten():
    cache = make()
    run(cache, "a", TEXT[:32])
    run(cache, "b", TEXT[:70], commit=False)
    own = blocks(cache, "b")[2:]
    free(cache, "b", zero=True)
    for index in range(MODEL.num_layers):
        for array_ in cache.layer(index):
            assert not array_[:, own].any() and array_[:, [0, 1]].all()


# ---- check -------------------------------------------------------------------------------------
def damage_table(cache):
    cache._groups[0].tables["a"][1] = 0


def damage_refs(cache):
    cache._groups[0]._refs[0] = 1


def damage_length(cache):
    cache._num_tokens["a"] = 48


def damage_committed(cache):
    cache._contents["a"] *= 2


def lose_block(cache):
    cache._groups[0]._free.pop()


def free_used(cache):
    cache._groups[0]._free[-1] = 0


def free_cached(cache):
    cache._groups[0]._free.append(cache._groups[0]._cached.popitem()[0])


def forget_half(cache):
    group = cache._groups[0]
    del group.block_of[group.contents[0]]


def condemn_half(cache):
    cache._groups[0].contents[0].sound = False


def take_foreign(cache):
    cache._groups[0].tables["a"][3] = 9


def take_unknown(cache):
    cache._groups[0].tables["a"][3] = 10


def lose_table(cache):
    del cache._groups[0].tables["a"]


@pytest.mark.parametrize(
    "damage, message",
    [
        (damage_table, "request a has a block twice"),
        (damage_refs, "refs of a block"),
        (damage_length, "request a: 48 tokens in 4 blocks"),
        (damage_committed, "request a: 50 tokens, 6 blocks committed"),
        (lose_block, "a block is lost"),
        (free_used, "in two states"),
        (free_cached, "a free one with content"),
        (forget_half, "disagree"),
        (condemn_half, "what a failed request had"),
        (take_foreign, "refs of a block"),
        (take_unknown, "block 10 is not one of the pool's"),
        (lose_table, "requests with blocks and requests with a length differ"),
    ],
)
def test_check_sees_damage(damage, message):
    cache = make()
    run(cache, "a", TEXT[:50])
    run(cache, "b", TEXT[:40])
    run(cache, "c", TEXT[100:140])
    free(cache, "c")
    damage(cache)
    with pytest.raises(RuntimeError, match=message):
        cache.check()
