"""The law of every KV cache: what is stored for a request is there until it is given up.

One suite for all kinds, with large and small blocks and with sharing on and off. It writes and
reads through the view, at the addresses that base.py documents, as the kernels do.
"""

from __future__ import annotations

import hashlib
import zlib
from unittest import mock

import numpy as np
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from pace_nb.batch import Batch
from pace_nb.config import KV_CACHE_KINDS, CacheConfig
from pace_nb.errors import ConfigError, OutOfMemoryError
from pace_nb.kv_cache import create_cache, paged
from pace_nb.kv_cache.base import UNIT, BatchKV, KVCacheConfig

MODEL = KVCacheConfig(num_layers=2, num_kv_heads=2, head_dim=6, dtype="bfloat16")
NUM_TOKENS = 12 * UNIT
NAN = 0x7FC0  # in BF16
KINDS = [  # kind, block size, prefix caching
    ("contiguous", 16, False),
    ("slab", 16, False),
    ("slab", 64, False),
    ("paged", 16, False),
    ("paged", 16, True),
    ("paged", 32, True),
]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(map(str, kind)))
assert {kind for kind, _, _ in KINDS} == set(KV_CACHE_KINDS)


def make(kind, num_tokens=NUM_TOKENS, model=MODEL, max_model_len=NUM_TOKENS):
    name, block_size, prefix_caching = kind
    config = CacheConfig(name, num_tokens, max_model_len, block_size, prefix_caching)
    return create_cache(model, config)


def view_of_one(cache, request_id, num_tokens):
    return cache.view(Batch.from_spans([(request_id, num_tokens - 1, [0], 0)]))[0]


def slots(cache, request_id, num_tokens):
    """(unit, slot) of each of the first `num_tokens` tokens of a request."""
    view = view_of_one(cache, request_id, num_tokens)
    assert view.block_table.dtype == np.int64 and view.block_table.ndim == 2
    units = np.arange(num_tokens) // UNIT
    firsts = view.block_table[0, units // view.units_per_block]
    assert (firsts >= 0).all()
    return firsts + units % view.units_per_block, np.arange(num_tokens) % UNIT


def write(cache, request_id, start, values):
    """Store values[start:], one number per token, in every layer, head and dim."""
    unit, slot = (place[start:] for place in slots(cache, request_id, len(values)))
    value = np.array(values[start:])[:, None, None]
    for index in range(MODEL.num_layers):
        k, v = cache.layer(index)
        k[:, unit, :, slot, :] = value[..., None] + index
        v[:, unit, slot // MODEL.pair, : MODEL.head_dim, slot % MODEL.pair] = value - index


def read(cache, request_id, num_tokens):
    """The numbers that `write` stored; asserts that all layers, heads and dims agree."""
    unit, slot = slots(cache, request_id, num_tokens)
    stored = []
    for index in range(MODEL.num_layers):
        k, v = cache.layer(index)
        stored.append(k[:, unit, :, slot, :].reshape(num_tokens, -1) - index)
        value = v[:, unit, slot // MODEL.pair, : MODEL.head_dim, slot % MODEL.pair]
        stored.append(value.reshape(num_tokens, -1) + index)
    numbers = np.concatenate(stored, axis=1)
    assert (numbers == numbers[:, :1]).all()
    return numbers[:, 0].tolist()


def keys_of(token_ids):
    """What a model would store for tokens: a number that depends on all tokens up to each."""
    data = bytes(token_ids)
    return [zlib.crc32(data[: end + 1]) % 50_000 + 100 for end in range(len(data))]


ONE, TWO = (np.random.default_rng(seed).integers(0, 200, 300).tolist() for seed in (1, 2))
TEXTS = [ONE, TWO, ONE[:40] + TWO[40:]]  # two of which begin alike


class Story:
    """Requests that come, grow, are cut back, shared, given up; after each act all is checked."""

    def __init__(self, kind):
        self.cache = make(kind)
        for index in range(MODEL.num_layers):
            for array in self.cache.layer(index):
                array.fill(NAN)
        self.tokens = {}  # request: those that are stored for it
        self.salts = {}
        self.hits = 0

    def act(self, request_id, action, size, text, salt):
        getattr(self, action)(request_id, size, text, salt)
        self.cache.check()
        for other, tokens in self.tokens.items():
            assert read(self.cache, other, len(tokens)) == keys_of(tokens)

    def grow(self, request_id, size, text, salt):
        """More tokens: as far as possible from the cache, the rest is computed."""
        cache, old = self.cache, self.tokens.get(request_id, [])
        salt = self.salts.setdefault(request_id, salt)
        tokens = old + text[len(old) : len(old) + size]
        found = cache.reuse(request_id, tokens, len(tokens) - 1, salt)
        cache.check()
        assert 0 <= found < len(tokens)
        if found > len(old):
            self.hits += 1
            assert read(cache, request_id, found) == keys_of(tokens[:found])
        free = cache.num_free_tokens
        if cache.allocate(request_id, len(tokens)):
            write(cache, request_id, max(found, len(old)), keys_of(tokens))
            self.tokens[request_id] = tokens
            return
        assert cache.num_free_tokens == free
        assert len(self.tokens) > (request_id in self.tokens) or len(tokens) > NUM_TOKENS
        if not old:
            self.free(request_id, size, text, salt)
        elif found > len(old):
            self.tokens[request_id] = tokens[:found]

    def truncate(self, request_id, size, text, salt):
        if request_id in self.tokens:
            tokens = self.tokens[request_id]
            self.tokens[request_id] = tokens[: max(1, len(tokens) - size)]
            self.cache.truncate(request_id, len(self.tokens[request_id]))

    def commit(self, request_id, size, text, salt):
        if request_id in self.tokens:
            tokens = self.tokens[request_id]
            self.cache.commit(request_id, tokens, len(tokens) - size % 3, self.salts[request_id])

    def free(self, request_id, size, text, salt):
        self.cache.free(request_id)
        self.tokens.pop(request_id, None)
        self.salts.pop(request_id, None)

    def fail(self, request_id, size, text, salt):
        self.cache.free(request_id, zero=True)
        self.tokens.pop(request_id, None)
        self.salts.pop(request_id, None)

    def end(self):
        for request_id in list(self.tokens):
            self.free(request_id, 0, [], None)
        self.cache.check()
        assert self.cache.num_free_tokens == self.cache.num_total_tokens == NUM_TOKENS


def acts_of(number, seed):
    """So many acts, at random. Drawn one by one they would be few, and nothing would be shared."""
    rng = np.random.default_rng(seed)
    actions = ["grow"] * 5 + ["commit"] * 5 + ["truncate", "truncate", "free", "free", "fail"]
    return [
        (
            str(rng.choice(list("abcde"))),
            str(rng.choice(actions)),
            int(rng.integers(1, 60)),
            TEXTS[rng.choice([0, 0, 1, 2, 2])],
            rng.choice([None, None, None, "salt"]),
        )
        for _ in range(number)
    ]


many_stories = settings(max_examples=80, deadline=None)
stories = given(number=st.integers(30, 60), seed=st.integers(0, 2**32))


@every_kind
@many_stories
@stories
def test_whatever_happens_every_request_reads_what_it_wrote(kind, number, seed):
    story = Story(kind)
    for act in acts_of(number, seed):
        story.act(*act)
    event(f"hits: {story.hits}")
    story.end()


@pytest.mark.parametrize("bits", [0, 4])
@many_stories
@stories
def test_digests_that_collide_mislead_nobody(bits, number, seed):
    """A digest of 4 bits, or of none: blocks are still told apart by what they hold."""

    def short(before, token_ids):
        whole = hashlib.blake2b(before + token_ids, digest_size=1).digest()[0]
        return bytes([whole % 2**bits])

    with mock.patch.object(paged, "_digest", short):
        story = Story(("paged", 16, True))
        for act in acts_of(number, seed):
            story.act(*act)
        story.end()


@every_kind
def test_one_request_can_have_it_all_whatever_was_there_before(kind):
    """The engine's promise of progress rests on this."""
    cache = make(kind)
    names = [name for name in "abcdefgh" if cache.allocate(name, 2 * UNIT)]
    assert len(names) >= 3 and not cache.allocate("z", UNIT)
    one = names[2]
    write(cache, one, 0, keys_of([1] * 2 * UNIT))
    for name in names:
        if name != one:
            cache.commit(name, [2] * 2 * UNIT, 2 * UNIT, None)
            cache.free(name)

    assert cache.allocate(one, NUM_TOKENS)
    cache.check()
    assert cache.num_free_tokens == 0
    assert read(cache, one, 2 * UNIT) == keys_of([1] * 2 * UNIT)
    assert not cache.allocate(one, NUM_TOKENS + 1)


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
    write(cache, "a", 0, [NAN] * 3 * UNIT)
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
def test_a_refusal_changes_nothing(kind):
    """The N-th request for room is denied, whichever that is; everybody keeps what they have."""
    cache = make(kind)
    sizes = [60, 40, 30]
    for number, size in enumerate(sizes):
        assert cache.allocate("abc"[number], size)
        write(cache, "abc"[number], 0, keys_of([number] * size))
    before = [view_of_one(cache, *pair) for pair in zip("abc", sizes, strict=True)]
    free = cache.num_free_tokens
    for request_id in ("a", "b", "c", "d"):
        assert not cache.allocate(request_id, NUM_TOKENS - 10)
        cache.check()
        assert cache.num_free_tokens == free
    for number, size in enumerate(sizes):
        view = view_of_one(cache, "abc"[number], size)
        assert view.block_table.tolist() == before[number].block_table.tolist()
        assert read(cache, "abc"[number], size) == keys_of([number] * size)
    with pytest.raises(RuntimeError, match="request d needs room for 1 tokens, has 0"):
        view_of_one(cache, "d", 1)


@every_kind
@pytest.mark.parametrize("size", [1, 15, 16, 17, 47, 48, 49, 63, 64, 65, 96, 128, 129])
def test_truncate_keeps_what_is_before_and_gives_room_for_others(kind, size):
    cache = make(kind)
    cache.allocate("a", 130)
    write(cache, "a", 0, keys_of([1] * 130))
    cache.truncate("a", size)
    cache.check()
    assert read(cache, "a", size) == keys_of([1] * size)
    _, block_size, _ = kind
    if kind[0] != "contiguous":  # which gives back whole segments
        assert cache.num_free_tokens == NUM_TOKENS - -(-size // block_size) * block_size
    cache.truncate("a", 130)  # not a way to grow
    with pytest.raises(RuntimeError, match=f"needs room for {size + 1} tokens, has {size}"):
        view_of_one(cache, "a", size + 1)
    assert cache.allocate("a", 130)
    write(cache, "a", size, keys_of([1] * size + [2] * (130 - size)))
    assert read(cache, "a", 130) == keys_of([1] * size + [2] * (130 - size))
    cache.free("a")
    cache.check()
    assert cache.num_free_tokens == NUM_TOKENS


@every_kind
def test_what_a_request_left_behind_is_never_seen(kind):
    """It was full of NaN, and was not committed: the next one stores its own, or sees zeros."""
    cache = make(kind)
    tokens = [5] * NUM_TOKENS
    cache.allocate("a", NUM_TOKENS)
    write(cache, "a", 0, [NAN] * NUM_TOKENS)
    cache.free("a")
    assert cache.reuse("b", tokens, NUM_TOKENS - 1, None) == 0
    assert cache.allocate("b", NUM_TOKENS)
    write(cache, "b", 0, keys_of(tokens))
    assert read(cache, "b", NUM_TOKENS) == keys_of(tokens)


@every_kind
def test_requests_of_no_tokens_own_nothing(kind):
    cache = make(kind)
    assert cache.allocate("a", 0)
    cache.check()
    with pytest.raises(RuntimeError, match="needs room for 1 tokens, has 0"):
        view_of_one(cache, "a", 1)
    cache.free("a")
    assert cache.num_free_tokens == NUM_TOKENS


@every_kind
def test_a_batch_of_sequences_of_different_lengths(kind):
    cache = make(kind)
    sizes = {"a": 60, "b": 3, "c": 40}
    for request_id, size in sizes.items():
        cache.allocate(request_id, size)
    batch = Batch.from_spans([(name, size - 1, [0], 0) for name, size in sizes.items()])
    table, units_per_block = cache.view(batch)[0]
    assert len(table) == 3 and table.flags.c_contiguous
    for row, (request_id, size) in zip(table, sizes.items(), strict=True):
        alone = view_of_one(cache, request_id, size)
        assert alone.units_per_block == units_per_block
        assert row[row >= 0].tolist() == alone.block_table[0].tolist()
        assert (row[alone.block_table.shape[1] :] == -1).all()


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
