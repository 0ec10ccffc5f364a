"""rope_kv_write.py: to the bit `rope`, then `kv_write`; errors name arguments."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pace_nb.kernels import jit, kv_write
from pace_nb.kernels.bf16 import widen
from pace_nb.kernels.kv_write import new_pool
from pace_nb.kernels.norm import rms_norm
from pace_nb.kernels.rope import rope, rotation
from pace_nb.kernels.rope_kv_write import HeadNorms, rope_kv_write

DTYPES = [np.uint16, np.float32]
TABLE = np.array([[3, 0], [1, 4]])
CONTEXTS, CU = np.array([21, 5], np.int32), np.array([0, 18, 19], np.int32)  # from an odd slot on
TOKENS, HEADS, KV_HEADS = 19, 6, 2


def case(d: int, half: int, seed: int = 0) -> tuple[Any, ...]:
    """Heads as one projection has them, tables and positions."""
    rng = np.random.default_rng(seed)
    heads = rng.standard_normal((TOKENS, HEADS + 2 * KV_HEADS, d)).astype(np.float32)
    cos, sin = (rng.standard_normal((32, half)).astype(np.float32) for _ in range(2))
    positions = rng.integers(0, 32, TOKENS).astype(np.int32)
    return heads, cos, sin, positions


def apart_of(heads: Any) -> list[Any]:
    """q, k, v: views."""
    return np.split(heads, [HEADS, HEADS + KV_HEADS], axis=1)


def planned(pool: kv_write.KVPool) -> kv_write.WritePlan:
    return kv_write.plan(pool.num_units, TOKENS, TABLE, 1, CU, CONTEXTS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("d", "half"), [(2, 1), (24, 12), (64, 32), (80, 16), (40, 0)])
@pytest.mark.parametrize("mode", ["numba", "reference"])
@pytest.mark.parametrize("normed", [False, True])
def test_bits_of_norms_then_rope_then_kv_write(d, half, dtype, interleaved, mode, normed):
    all_heads, cos, sin, positions = case(d, half)
    q, k, v = apart_of(all_heads)
    rng, eps = np.random.default_rng(d), 0.05
    weights = rng.standard_normal((2, d)).astype(np.float32)
    norms = HeadNorms(*weights, eps) if normed else None
    apart, fused = (new_pool(5, KV_HEADS, d, dtype) for _ in range(2))
    for pool in (apart, fused):  # what is there already stays
        pool.k[...] = pool.v[...] = 1
    with jit.using(mode):
        tables = positions, cos, sin
        heads = [
            rms_norm(x.reshape(-1, d), weight, eps).reshape(x.shape) if normed else x
            for x, weight in zip((q, k), weights, strict=True)
        ]
        want, keys = (rope(x, *tables, interleaved=interleaved, dtype=dtype) for x in heads)
        kv_write.write(keys, v, apart, planned(apart))
        turns = rotation(cos, sin, positions, interleaved)
        queries = rope_kv_write(all_heads, turns, fused, planned(fused), norms)
    np.testing.assert_array_equal(queries, want)
    np.testing.assert_array_equal(fused.k, apart.k)
    np.testing.assert_array_equal(fused.v, apart.v)
    assert np.any(fused.k != 1) and np.any(fused.v != 1)


def test_threads_and_nan():
    heads, cos, sin, positions = case(64, 32)
    q, k, _ = apart_of(heads)
    q[3, 2, 5] = k[4, 1, 7] = np.nan
    found = []
    before = jit.num_threads()
    try:
        for threads in {1, before}:
            jit.set_num_threads(threads)
            pool = new_pool(5, KV_HEADS, 64, np.float32)
            turns = rotation(cos, sin, positions)
            found.append((rope_kv_write(heads, turns, pool, planned(pool)), *pool))
    finally:
        jit.set_num_threads(before)
    for one in found[1:]:
        for a, b in zip(found[0], one, strict=True):
            np.testing.assert_array_equal(a, b)
    queries = widen(found[0][0])
    assert np.isnan(queries[3, 2, [5, 37]]).all() and np.isnan(queries).sum() == 2
    assert np.isnan(found[0][1]).sum() == 2  # its key and the partner, in the pool


POOL = new_pool(5, KV_HEADS, 24, np.float32)
ALL, COS, SIN, POSITIONS = case(24, 12)
TURNS, PLAN = rotation(COS, SIN, POSITIONS), planned(POOL)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((ALL[:, :, :23], TURNS, POOL, PLAN), r"heads has shape \(19, 10, 23\), expected \(T, H"),
        (
            (ALL[0], TURNS, POOL, PLAN),
            r"heads has shape \(10, 24\), expected \(T, H \+ 2 KVH, 24\)",
        ),
        ((ALL.astype(np.float64), TURNS, POOL, PLAN), "heads has dtype float64, expected float32"),
        (
            (ALL.astype(np.uint16), TURNS, new_pool(5, KV_HEADS, 24, np.uint16), PLAN),
            "heads has dtype uint16, expected float32",
        ),
        ((ALL[:, :8], TURNS, POOL, PLAN), "heads is not a contiguous array"),
        ((ALL[:, :9].copy(), TURNS, POOL, PLAN), "9 heads, expected 2 of k, 2 of v, a multiple"),
        ((ALL[:, :4].copy(), TURNS, POOL, PLAN), "4 heads, expected 2 of k, 2 of v, a multiple"),
        ((ALL[:, :2].copy(), TURNS, POOL, PLAN), "2 heads, expected 2 of k, 2 of v, a multiple"),
        (
            (ALL, TURNS, new_pool(4, KV_HEADS, 24, np.float32), PLAN),
            "19 tokens and a pool of 4 units, planned 19 and 5",
        ),
        ((ALL[1:], TURNS, POOL, PLAN), "18 tokens and a pool of 5 units, planned 19"),
        ((ALL, rotation(COS, SIN, POSITIONS[1:]), POOL, PLAN), "rotation of 18 tokens"),
        (
            (ALL, rotation(*[np.ones((32, 13), np.float32)] * 2, POSITIONS), POOL, PLAN),
            r"cos has shape \(32, 13\), expected R/2 from 0 to D/2 = 12",
        ),
    ],
)
def test_bad_input_names_the_argument(arguments: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"rope_kv_write: {message}"):
        rope_kv_write(*arguments)
    assert not POOL.k.any() and not POOL.v.any()


@pytest.mark.parametrize(
    ("norms", "message"),
    [
        (HeadNorms(COS[0], COS[0], 1e-6), r"norms.q has shape \(12,\), expected \(24\)"),
        (HeadNorms(ALL[0, 0], ALL[0, 0].astype(np.float64), 1e-6), "norms.k has dtype float64"),
        (HeadNorms(ALL[0, 0], ALL[0, 0], -1.0), "norms.eps is -1.0, expected a finite number >= 0"),
        (HeadNorms(ALL[0, 0], ALL[0, 0], np.nan), "norms.eps is nan"),
    ],
)
def test_bad_norms_are_named(norms: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"rope_kv_write: {message}"):
        rope_kv_write(ALL, TURNS, POOL, PLAN, norms)
    assert not POOL.k.any() and not POOL.v.any()


def test_out_is_filled_and_returned():
    pool, mine = (new_pool(5, KV_HEADS, 24, np.float32) for _ in range(2))
    out = np.full((TOKENS, HEADS, 24), 7, np.float32)
    assert rope_kv_write(ALL, TURNS, pool, PLAN, out=out) is out
    np.testing.assert_array_equal(out, rope_kv_write(ALL, TURNS, mine, PLAN))


@pytest.mark.parametrize(
    ("out", "message"),
    [
        (np.empty((19, 6, 12), np.float32), r"out has shape \(19, 6, 12\), expected \(19, 6, 24\)"),
        (np.empty((19, 6, 24), np.uint16), "out has dtype uint16, expected float32"),
        (np.empty((19, 12, 24), np.float32)[:, ::2], "out is not a contiguous, writable array"),
        (ALL.reshape(-1)[: 19 * 6 * 24].reshape(19, 6, 24), "out shares memory with heads"),
    ],
)
def test_bad_out_is_named(out: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"rope_kv_write: {message}"):
        rope_kv_write(ALL, TURNS, POOL, PLAN, out=out)
    assert not POOL.k.any() and not POOL.v.any()


def test_positions_beyond_the_tables():
    with pytest.raises(ValueError, match="rope: positions holds 32, expected 0 to 31"):
        rotation(COS, SIN, np.array([0, 32]))
    with pytest.raises(ValueError, match="rope: positions holds -1, expected 0 to 31"):
        rotation(COS, SIN, np.array([-1], np.int32))


def test_a_rotation_is_a_copy_of_what_was_checked():
    positions = np.zeros(3, np.int64)
    wide = np.repeat(COS, 2, axis=1)[:, ::2]
    turns = rotation(wide, SIN, positions)
    positions[0] = 99
    assert turns.rows[0] == 0 and turns.cos.flags.c_contiguous
    np.testing.assert_array_equal(turns.cos, COS)
