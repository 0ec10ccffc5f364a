"""Windows let go what they have passed, and keep what is seen; what is reserved is enough."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pace_nb.batch import Batch
from pace_nb.config import CacheConfig
from pace_nb.errors import ConfigError
from pace_nb.kv_cache import create_cache
from pace_nb.kv_cache.base import UNIT, KVCacheConfig, LayerGroup
from pace_nb.kv_cache.blocks import blocks_at_once, num_blocks

SIZES = {"num_kv_heads": 1, "head_dim": 2, "dtype": "float32"}
HYBRID = KVCacheConfig(3, **SIZES, windows=(24, 0, 0), chunks=(0, 0, 40))
WINDOWED = KVCacheConfig(2, **SIZES, windows=(24, 24))
MODELS = {"hybrid": HYBRID, "windowed": WINDOWED}
KINDS = [("slab", 16, False), ("slab", 32, False), ("paged", 16, True), ("paged", 32, True)]
STEP = 20  # tokens that a request gets at most in a step
every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(map(str, kind)))
every_model = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)


def make(kind, model, num_tokens=2048, max_num_seqs=4, max_step_tokens=STEP):
    name, block_size, caching = kind
    return create_cache(
        model,
        CacheConfig(name, num_tokens, 4096, block_size, caching, max_num_seqs, max_step_tokens),
    )


def step(cache, request_id, start, end):
    """The request's next tokens, as the engine has them run; its view."""
    return cache.view(Batch.from_spans([(request_id, start, [0] * (end - start), 0)]))


def held(cache, request_id):
    """Blocks that a request has, by group."""
    return [
        sum(block >= 0 for block in group.tables.get(request_id, ())) for group in cache._groups
    ]


def stored(cache, layer, view, positions):
    """What lies in a layer at these positions of a view's only sequence."""
    units = positions // UNIT
    first = view.block_table[0, units // view.units_per_block]
    assert (first >= 0).all(), f"layer {layer} has lost what is seen"
    return cache.layer(layer), first + units % view.units_per_block, positions % UNIT


def run(cache, request_id, tokens, start):
    """Steps from `start` to the end; writes each token's number in every layer and, after every
    step, reads all that a token of the step sees."""
    model = HYBRID if len(cache._group_of) == 3 else WINDOWED
    while start < len(tokens):
        end = min(start + STEP, len(tokens))
        views = step(cache, request_id, start, end)
        cache.check()
        for layer, view in enumerate(views):
            new = np.arange(start, end)
            pool, units, slots = stored(cache, layer, view, new)
            pool.k[:, units, :, slots, :] = np.array(tokens[start:end])[:, None, None, None]
            (group,) = (group for group in model.groups(4096) if layer in group.layers)
            seen = np.arange(group.first_key(start), end)
            pool, units, slots = stored(cache, layer, view, seen)
            assert pool.k[0, units, 0, slots, 0].tolist() == [tokens[p] for p in seen]
        start = end


@every_model
@every_kind
def test_a_long_sequence_keeps_what_its_windows_see(kind, model):
    """However long: bounded, and what went back is room for others."""
    cache = make(kind, model)
    most = [blocks_at_once(group.group, cache_config(kind)) for group in cache._groups]
    tokens = list(range(1500))
    for end in range(100, 1501, 100):
        assert cache.allocate("a", end)
        run(cache, "a", tokens[:end], end - 100)
        for number, blocks in enumerate(held(cache, "a")):
            if most[number] is None:
                assert blocks == -(-end // kind[1])
            else:
                assert blocks <= most[number] <= 1 + (40 + STEP - 2 + kind[1] - 1) // kind[1]
    cache.free("a")
    cache.check()
    assert held(cache, "a") == [0] * len(cache._groups)
    assert cache.num_free_tokens == cache.num_total_tokens == 2048


def cache_config(kind):
    return CacheConfig(kind[0], 2048, 4096, kind[1], kind[2], 4, STEP)


@pytest.mark.parametrize("model", [HYBRID], ids=["hybrid"])
@every_kind
def test_a_windows_pool_is_as_large_as_its_sequences_can_need(kind, model):
    """`max_num_seqs` of any length always find room in it: only the other group may say no."""
    cache = make(kind, model, num_tokens=8192)
    sizes = [group.num_blocks for group in cache._groups]
    assert sizes[0] == 8192 // kind[1] and max(sizes[1:]) <= 4 * (2 + 60 // kind[1])
    for request_id in "abcd":
        assert cache.allocate(request_id, 2000)
        run(cache, request_id, list(range(2000)), 0)
    cache.check()
    assert not cache.allocate("e", 500)
    cache.check()


story = st.tuples(
    st.sampled_from("abcd"),
    st.sampled_from(["grow", "grow", "grow", "commit", "commit", "cut", "free", "fail"]),
    st.integers(1, 70),
    st.sampled_from([0, 0, 1]),
)
TEXTS = [np.random.default_rng(seed).integers(0, 30_000, 600).tolist() for seed in (1, 2)]
TEXTS[1][:130] = TEXTS[0][:130]


@every_model
@every_kind
@settings(max_examples=60, deadline=None)
@given(acts=st.lists(story, min_size=15, max_size=60), num_blocks=st.integers(8, 24))
def test_whatever_happens_a_token_sees_what_was_written(kind, model, acts, num_blocks):
    """Requests grow, share, are cut back to their last step, fail; `run` looks at everything."""
    cache = make(kind, model, num_tokens=num_blocks * 32, max_num_seqs=3)
    requests = {}  # id: tokens, text
    last_start = {}
    for request_id, action, size, which in acts:
        tokens, text = requests.get(request_id, ([], TEXTS[which]))
        if action == "grow":
            wanted = text[: len(tokens) + size]
            found = cache.reuse(request_id, wanted, len(wanted) - 1, None)
            start = max(found, len(tokens))
            if cache.allocate(request_id, len(wanted)):
                run(cache, request_id, wanted, start)
                last_start[request_id] = start + (len(wanted) - start - 1) // STEP * STEP
                requests[request_id] = wanted, text
            elif not tokens:
                cache.free(request_id)
            elif found > len(tokens):
                requests[request_id] = wanted[:found], text
                last_start[request_id] = found
        elif action == "commit" and tokens:
            cache.commit(request_id, tokens, len(tokens) - size % 3, None)
        elif action == "cut" and tokens:
            kept = max(last_start[request_id], len(tokens) - size, 1)
            cache.truncate(request_id, kept)
            requests[request_id] = tokens[:kept], text
        elif action in ("free", "fail"):
            cache.free(request_id, zero=action == "fail")
            requests.pop(request_id, None)
        cache.check()
    for request_id in "abcd":
        cache.free(request_id)
    cache.check()
    assert cache.num_free_tokens == cache.num_total_tokens


# ---- prefixes ----------------------------------------------------------------------------------
@every_model
def test_a_hit_needs_of_a_window_what_is_seen_from_there(model):
    """The beginning is evicted from the windows' pools, and yet the whole prompt is found."""
    cache = make(("paged", 16, True), model)
    tokens = list(range(400))
    assert cache.allocate("a", 400)
    run(cache, "a", tokens, 0)
    cache.commit("a", tokens, 400, None)
    for number in range(8):  # others pass through the windows' pools
        other = list(range(1000 * number + 1000, 1000 * number + 1100))
        assert cache.allocate(str(number), 100)
        run(cache, str(number), other, 0)
        cache.commit(str(number), other, 100, None)
        cache.free(str(number))
    windows = [group for group in cache._groups if group.group.reach]
    assert all(group.tables["a"][0] == -1 for group in windows)
    found = cache.reuse("b", [*tokens, 7], 400, None)
    assert found == 400
    assert cache.allocate("b", 401)
    run(cache, "b", [*tokens, 7], found)
    for group in windows:
        assert sum(block >= 0 for block in group.tables["b"]) <= 4


@every_model
def test_no_hit_where_a_window_has_lost_what_is_seen(model):
    """All of the text is known; of a window, the blocks around position 160 are not there."""
    cache = make(("paged", 16, True), model)
    tokens = list(range(160))
    assert cache.allocate("a", 160)
    run(cache, "a", tokens, 0)
    cache.commit("a", tokens, 160, None)
    (group,) = (group for group in cache._groups if group.group.window)
    cache.free("a")
    for block in list(group.contents):
        group.forget(block)
    assert cache.reuse("b", [*tokens, 7], 160, None) == 0
    cache.check()


# ---- refusals ----------------------------------------------------------------------------------
@every_kind
def test_what_is_gone_cannot_be_asked_for(kind):
    cache = make(kind, HYBRID)
    cache.allocate("a", 300)
    run(cache, "a", list(range(300)), 0)
    with pytest.raises(RuntimeError, match="request a goes back to 100, which sees what is gone"):
        step(cache, "a", 100, 120)
    before = held(cache, "a")
    with pytest.raises(RuntimeError, match="request a is cut to 100 tokens, and what is seen"):
        cache.truncate("a", 100)
    cache.check()
    assert held(cache, "a") == before
    cache.truncate("a", 0)
    cache.check()
    assert held(cache, "a") == [0, 0, 0]
    assert cache.allocate("a", 50)
    run(cache, "a", list(range(50)), 0)


def test_a_step_larger_than_was_said_is_refused():
    cache = make(("slab", 16, False), HYBRID, num_tokens=16 * 64, max_num_seqs=1)
    cache.allocate("a", 500)
    with pytest.raises(RuntimeError, match="request a needs 32 blocks that it did not reserve"):
        step(cache, "a", 0, 500)


def test_groups():
    groups = HYBRID.groups(4096)
    assert groups == (
        LayerGroup((1,), 0, 0),
        LayerGroup((2,), 0, 40),
        LayerGroup((0,), 24, 0),
    )
    assert HYBRID.groups(40) == (LayerGroup((1, 2), 0, 0), LayerGroup((0,), 24, 0))
    assert HYBRID.groups(24) == (LayerGroup((0, 1, 2), 0, 0),)
    by_length = KVCacheConfig(3, **SIZES, keys_by_length=True, windows=(24, 0, 0))
    assert by_length.groups(4096) == (LayerGroup((0, 1, 2), 0, 0),)
    assert [groups[1].first_key(p) for p in (0, 39, 40, 79, 80)] == [0, 0, 40, 40, 80]
    assert [groups[2].first_key(p) for p in (0, 23, 24, 100)] == [0, 0, 1, 77]
    with pytest.raises(ConfigError, match=r"windows is \(1, 2\), expected one number from 0 per"):
        KVCacheConfig(3, **SIZES, windows=(1, 2))


@pytest.mark.parametrize("reach", [1, 2, 16, 17, 24, 40])
@pytest.mark.parametrize("block_size", [16, 32, 48])
@pytest.mark.parametrize("tokens", [1, 2, 15, 16, 17, 100])
def test_blocks_at_once_is_the_most_and_is_reached(reach, block_size, tokens):
    config = CacheConfig("slab", 4800, 4096, block_size, False, 2, tokens)
    group = LayerGroup((0,), reach, 0)
    most = max(
        (start + tokens - 1) // block_size - group.first_key(start) // block_size + 1
        for start in range(500)
    )
    assert blocks_at_once(group, config) == most
    assert num_blocks(group, config) == min(4800 // block_size, 2 * most)
