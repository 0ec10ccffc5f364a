"""Attention over the cache against dense NumPy attention, and which kernel serves a sequence."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pace_nb.batch import Batch
from pace_nb.config import CacheConfig
from pace_nb.kernels.kv_write import new_pool
from pace_nb.kv_cache.base import BatchKV, KVCacheConfig, KVView
from pace_nb.kv_cache.contiguous import ContiguousCache
from pace_nb.layers.attention import Attention, Sees, Step, choose_kernel
from pace_nb.layers.module import Module
from pace_nb.layers.rope import RopeParameters, RotaryEmbedding

H, KVH, D = 4, 2, 16
SCALE = 0.3


def new_cache(dtype):
    return ContiguousCache(KVCacheConfig(2, KVH, D, dtype), CacheConfig("contiguous", 512, 256))


def step_of(cache, spans):
    """spans: (request id, start, number of tokens)."""
    batch = Batch.from_spans([(name, start, [0] * n, 0) for name, start, n in spans])
    for name, start, n in spans:
        assert cache.allocate(name, start + n)
    return Step(batch, BatchKV(cache.view(batch), cache))


def dense(q, k, v, window=0, sinks=None):
    """Causal attention of one sequence, float64. q [T, H, D], k and v [T, KVH, D]."""
    out = np.empty(q.shape)
    for h in range(H):
        keys, values = k[:, h // (H // KVH)], v[:, h // (H // KVH)]
        for t in range(len(q)):
            first = max(0, t - window + 1) if window else 0
            scores = keys[first : t + 1] @ q[t, h] * SCALE
            extra = [] if sinks is None else [sinks[h]]
            weights = np.exp(np.concatenate([scores, extra]) - scores.max())
            weights = weights[: len(scores)] / weights.sum()
            out[t, h] = weights @ values[first : t + 1]
    return out.reshape(len(q), -1)


def rotated(x, theta=10000.0):
    """The first half of each head is x, the second y of the rotated points; float64."""
    positions = np.arange(len(x))[:, None, None]
    angle = positions * theta ** (-np.arange(0, D, 2) / D)
    a, b = x[..., : D // 2], x[..., D // 2 :]
    return np.concatenate(
        [a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1
    )


def sequence(rng, length):
    """q, k, v of one fused projection."""
    heads = rng.standard_normal((length, H + 2 * KVH, D)).astype(np.float32)
    return np.split(heads, (H, H + KVH), axis=1)


def fused(q, k, v):
    """As a fused projection has them."""
    return np.concatenate((q, k, v), axis=1).reshape(len(q), -1)


def run(attention, cache, qkv, spans, rotary=None):
    """Feed slices of whole sequences, {name: (q, k, v)}, as one batch."""
    step = step_of(cache, spans)
    parts = [[qkv[name][i][start : start + n] for name, start, n in spans] for i in range(3)]
    q, k, v = (np.concatenate(part) for part in parts)
    rotation = rotary(step.batch.positions, step.sequence_lens) if rotary else None
    return attention(fused(q, k, v), step, rotation)


@pytest.mark.parametrize("window", [0, 1, 5])
@pytest.mark.parametrize("rotate", [False, True])
def test_one_sequence_at_once(rng, dtype, value, window, rotate):
    q, k, v = sequence(rng, 40)
    rotary = RotaryEmbedding(RopeParameters(D, 256)) if rotate else None
    attention = Attention(1, SCALE, window=window)
    out = run(attention, new_cache(dtype), {"a": (q, k, v)}, [("a", 0, 40)], rotary)
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    if rotate:
        q, k = rotated(q), rotated(k)
    bound = 1e-5 if dtype == "float32" else 0.03
    np.testing.assert_allclose(value(out), dense(q, k, v, window), atol=bound)


def test_sinks_enter_the_denominator(rng, dtype, value):
    q, k, v = sequence(rng, 20)
    sinks = np.array([0.0, 3.0, -5.0, 20.0], np.float32)
    cache = new_cache(dtype)
    step = step_of(cache, [("a", 0, 20)])
    out = Attention(0, SCALE)(fused(q, k, v), step, None, sinks)
    bound = 1e-5 if dtype == "float32" else 0.03
    np.testing.assert_allclose(value(out), dense(q, k, v, sinks=sinks), atol=bound)


def test_a_token_sees_its_own_chunk(rng, dtype, value):
    """As if each chunk of positions were a sequence of its own, in any schedule."""
    qkv = {"a": sequence(rng, 40)}
    attention = Attention(0, SCALE, chunk=15)
    out = run(attention, new_cache(dtype), qkv, [("a", 0, 40)])
    parts = [[x[first : first + 15] for x in qkv["a"]] for first in (0, 15, 30)]
    expected = np.concatenate([dense(*part) for part in parts])
    bound = 1e-5 if dtype == "float32" else 0.03
    np.testing.assert_allclose(value(out), expected, atol=bound)
    cache = new_cache(dtype)
    for start, n in ((0, 20), (20, 1), (21, 19)):
        some = run(attention, cache, qkv, [("a", start, n)])
        np.testing.assert_array_equal(some, out[start : start + n])


def test_any_schedule_gives_the_same_bits(rng, dtype):
    """Prefill at once, in chunks, token by token, mixed with others: one arithmetic per row."""
    lengths = {"a": 41, "b": 23, "c": 3}
    qkv = {name: sequence(rng, length) for name, length in lengths.items()}
    rotary = RotaryEmbedding(RopeParameters(D, 256))
    attention = Attention(0, SCALE)
    alone = {
        name: run(attention, new_cache(dtype), qkv, [(name, 0, length)], rotary)
        for name, length in lengths.items()
    }
    schedule = [
        [("a", 0, 1), ("b", 0, 20), ("c", 0, 2)],
        [("b", 20, 1), ("a", 1, 30)],
        [("c", 2, 1), ("b", 21, 1), ("a", 31, 7)],
        [("a", 38, 1), ("b", 22, 1)],
        [("a", 39, 2)],
    ]
    cache, mixed = new_cache(dtype), {name: [] for name in lengths}
    for spans in schedule:
        out = run(attention, cache, qkv, spans, rotary)
        bounds = np.cumsum([0, *(n for _, _, n in spans)])
        for (name, _, _), first, end in zip(spans, bounds[:-1], bounds[1:], strict=True):
            mixed[name].append(out[first:end])
    for name in lengths:
        np.testing.assert_array_equal(np.concatenate(mixed[name]), alone[name])


def test_the_cache_keeps_layers_apart(rng):
    q, k, v = sequence(rng, 8)
    cache = new_cache("float32")
    step = step_of(cache, [("a", 0, 8)])
    first = Attention(0, SCALE)(fused(q, k, v), step, None)
    Attention(1, SCALE)(fused(q, -k, 2 * v), step, None)
    again = Attention(0, SCALE)(fused(q, k, v), step, None)
    np.testing.assert_array_equal(first, again)
    assert math.isfinite(float(np.abs(cache.layer(1).v).max()))
    assert not np.array_equal(cache.layer(0).v, cache.layer(1).v)


def test_the_kernel_is_chosen_by_rows():
    assert choose_kernel(1, 4) == choose_kernel(3, 4) == "attention_decode"
    assert choose_kernel(4, 4) == "attention_prefill"
    assert choose_kernel(12, 1) == "attention_decode"
    assert choose_kernel(13, 1) == "attention_prefill"
    assert choose_kernel(1, 16) == "attention_decode", "a token's keys are always split"


def test_tokens_know_the_length_of_their_whole_sequence():
    """Not only of what is in the cache by now: a chunk must rotate as the whole prompt does."""
    batch = Batch.from_spans([("a", 4, [0, 0], 0), ("b", 8, [0], 1)], [30, 9])
    assert Step(batch, None).sequence_lens.tolist() == [30, 30, 9]


def test_each_kernel_is_called_once_with_its_sequences():
    long = 21
    spans = [("a", 9, 1), ("b", 0, 2), ("c", 4, long), ("d", 0, long), ("e", 30, 1)]

    pool = new_pool(8, 1, 32, np.float32)

    def calls(chosen):
        batch = Batch.from_spans([(name, start, [0] * n, 0) for name, start, n in chosen])
        view = KVView(np.zeros((len(chosen), 1), np.int64), 8)
        step = Step(batch, BatchKV((view,), None))
        assert step.sequence_lens.tolist() == [s + n for _, s, n in chosen for _ in range(n)]
        shape = (len(batch.token_ids), 2, 32)
        planned = step.calls(shape, view, pool, 0, 0)
        assert planned is step.calls(shape, view, pool, 0, 0), "planned again for the next layer"
        assert planned is not step.calls(shape, view, pool, 5, 0)
        assert planned is not step.calls(shape, KVView(*view), pool, 0, 0), "another table"
        return [None if plan is None else plan.sequences.tolist() for plan in planned]

    assert calls(spans) == [[0, 1, 4], [2, 3]]
    assert calls(spans[:2]) == [[0, 1], None]
    assert calls(spans[2:4]) == [None, [0, 1]]


def test_how_far_layers_see_is_read_off_them():
    class Layer(Module):
        """Its attention is a part of a part."""

        def __init__(self, *attention):
            self._norm, self.part = 1, Module()
            for one in attention:
                self.part._attend = one

    layers = [
        Layer(Attention(0, 1.0, window=5)),
        Layer(Attention(1, 1.0)),
        Layer(),
        Layer(Attention(3, 1.0, chunk=7)),
    ]
    assert Sees.of(layers) == ((5, 0, 0, 0), (0, 0, 0, 7))
    assert Sees.of(layers[1:3]) == Sees.of([]) == ((), ())
