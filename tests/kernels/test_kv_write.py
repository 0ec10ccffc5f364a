"""kv_write.py: bit for bit as the reference, in every layout, and back again through the gather."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pace_nb.kernels import jit
from pace_nb.kernels.bf16 import from_f32, narrow, to_f32, widen
from pace_nb.kernels.kv_write import (
    UNIT,
    KVPool,
    kv_gather_ref,
    kv_write,
    kv_write_ref,
    new_pool,
    plan,
)

Array = NDArray[Any]
F32, BF16 = np.float32, np.uint16
WHOLE = 2**40  # units per block where each sequence lies in one piece
DTYPES = [(F32, F32, F32), (BF16, F32, BF16), (F32, F32, BF16), (BF16, BF16, BF16)]
# (context_lens, query_lens): decode, prefill, both, continued prefill, a sequence without rows.
BATCHES = {
    "decode": ([1, 2, 16, 17, 40], [1, 1, 1, 1, 1]),
    "prefill": ([1, 15, 16, 33], [1, 15, 16, 33]),
    "mixed": ([50, 3, 7, 21, 64], [1, 3, 0, 14, 31]),
}


def rows(shape: tuple[int, ...], dtype: Any, seed: int = 0) -> Array:
    x = np.random.default_rng(seed).standard_normal(shape).astype(F32)
    return from_f32(x) if dtype == BF16 else x


def garbage(pool: KVPool) -> KVPool:
    """A pool that held anything at all before, NaN included."""
    rng = np.random.default_rng(9)
    for x in pool:
        bits = x.view(np.uint16)
        bits[...] = rng.integers(0, 2**16, bits.shape, np.uint16) | 0x40  # each NaN a quiet one
    return pool


def tables(contexts: list[int], per_block: int) -> tuple[Array, int]:
    """(a block table whose blocks are scattered, units in the pool); -1 where nothing is needed."""
    units = [-(-max(1, n) // UNIT) for n in contexts]
    if per_block == WHOLE:
        ends = np.cumsum(np.array(units) + 1)
        return (ends - units)[:, None].astype(np.int64), int(ends[-1]) + 1
    blocks = [-(-n // per_block) for n in units]
    free = np.random.default_rng(1).permutation(sum(blocks) + 2)
    table = np.full((len(units), max(blocks)), -1, np.int64)
    for b, n in enumerate(blocks):
        table[b, :n], free = free[:n] * per_block, free[n:]
    return table, (sum(blocks) + 2) * per_block


def cumulative(lens: list[int]) -> Array:
    return np.concatenate(([0], np.cumsum(lens))).astype(np.int32)


def case(batch: str, per_block: int, heads: int, d: int, dtypes: Any) -> tuple[Any, ...]:
    """k, v, an empty pool, and the other arguments of kv_write."""
    contexts, lens = BATCHES[batch]
    table, units = tables(contexts, per_block)
    k, v = (rows((sum(lens), heads, d), t, n) for n, t in enumerate(dtypes[:2]))
    pool = new_pool(units, heads, d, dtypes[2])
    return k, v, pool, table, per_block, cumulative(lens), np.array(contexts, np.int32)


def assert_same(a: KVPool, b: KVPool) -> None:
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(x.view(np.uint8), y.view(np.uint8))


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("d", [2, 16, 30, 80])
@pytest.mark.parametrize("per_block", [1, 4, WHOLE])
@pytest.mark.parametrize("batch", BATCHES)
def test_matches_reference(batch: str, per_block: int, d: int, dtypes: Any) -> None:
    """The whole pool, so nothing else is touched either."""
    k, v, pool, *where = case(batch, per_block, 2, d, dtypes)
    garbage(pool)
    expected = KVPool(pool.k.copy(), pool.v.copy())
    kv_write_ref(k, v, expected, *where)
    kv_write(k, v, pool, *where)
    assert_same(pool, expected)


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("per_block", [2, WHOLE])
def test_gather_returns_what_was_written(per_block: int, dtypes: Any) -> None:
    """Token by token, so the gather checks the written layout against the plain rows."""
    length, heads, d = 37, 3, 20
    k, v = (rows((length, heads, d), t, n) for n, t in enumerate(dtypes[:2]))
    table, units = tables([length], per_block)
    pool = garbage(new_pool(units, heads, d, dtypes[2]))
    for t in range(length):
        step = (cumulative([1]), np.array([t + 1], np.int32))
        kv_write(k[t : t + 1], v[t : t + 1], pool, table, per_block, *step)
    got = kv_gather_ref(pool, table[0], per_block, length)
    for x, y in zip(got, (k, v), strict=True):
        assert x.dtype == dtypes[2]
        np.testing.assert_array_equal(x, narrow(widen(y), dtypes[2]))
    at_once = garbage(new_pool(units, heads, d, dtypes[2]))
    step = (cumulative([length]), np.array([length], np.int32))
    kv_write(k, v, at_once, table, per_block, *step)
    assert_same(pool, at_once)


def test_the_layout_is_the_one_in_the_docstring() -> None:
    """One token at position 21, by hand."""
    pool = new_pool(4, 2, 6, BF16)
    k, v = rows((1, 2, 6), BF16), rows((1, 2, 6), BF16, 1)
    table = np.array([[3, 1]], np.int64)
    kv_write(k, v, pool, table, 1, cumulative([1]), np.array([22], np.int32))
    assert pool.k.shape == (2, 4, 3, 16, 2) and pool.v.shape == (2, 4, 8, 16, 2)
    for h in range(2):
        for dim in range(6):
            assert pool.k[h, 1, dim // 2, 5, dim % 2] == k[0, h, dim]
            assert pool.v[h, 1, 2, dim, 1] == v[0, h, dim]
    assert np.count_nonzero(pool.k) == np.count_nonzero(pool.v) == 12


@pytest.mark.parametrize("d", [16, 20])
def test_no_unwritten_value_shares_a_pair(d: int) -> None:
    """After position p, an even one, position p + 1 of V is zero; so are the columns beyond D."""
    for length in (1, 3, 16, 17):
        table, units = tables([length], WHOLE)
        pool = garbage(new_pool(units, 1, d, BF16))
        k = rows((length, 1, d), BF16)
        kv_write(k, k, pool, table, WHOLE, cumulative([length]), np.array([length], np.int32))
        pairs = -(-length // 2)
        line = pool.v[0, table[0, 0] :].reshape(-1, pool.v.shape[3], 2)[:pairs]
        assert not np.isnan(to_f32(line)).any()
        assert not line[:, d:].any()
        if length % 2:
            assert not line[-1, :, 1].any()


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_strided_rows_give_the_same_bits(dtype: Any) -> None:
    k, v, pool, *where = case("mixed", 2, 2, 24, (dtype, dtype, dtype))
    expected = KVPool(pool.k.copy(), pool.v.copy())
    kv_write(k, v, expected, *where)
    fused = np.concatenate((k, k, v), axis=1)  # [T, H + 2 KVH, D], as one projection gives it
    views = [
        (fused[:, 2:4], fused[:, 4:]),
        (k[::-1].copy()[::-1], np.asfortranarray(v)),
        (np.repeat(k, 2, axis=1)[:, ::2], np.repeat(v, 2, axis=0)[::2]),
    ]
    for x, y in views:
        pool.k[...], pool.v[...] = 0, 0
        kv_write(x, y, pool, *where)
        assert_same(pool, expected)


def test_nan_and_infinity_are_stored_as_they_are() -> None:
    k, v, pool, *where = case("prefill", WHOLE, 1, 16, (F32, F32, BF16))
    k[2, 0, :3] = v[2, 0, :3] = [np.nan, np.inf, -np.inf]
    kv_write(k, v, pool, *where)
    for x in kv_gather_ref(pool, where[0][1], WHOLE, 15):
        x = to_f32(x)
        assert np.isnan(x[1, 0, 0]) and x[1, 0, 1] == np.inf and x[1, 0, 2] == -np.inf
        assert np.isfinite(x).sum() == x.size - 3


def test_one_and_all_threads_write_the_same() -> None:
    threads = jit.num_threads()
    results = []
    try:
        for n in (1, threads):
            jit.set_num_threads(n)
            k, v, pool, *where = case("mixed", 1, 2, 20, (F32, F32, BF16))
            kv_write(k, v, garbage(pool), *where)
            results.append(pool)
    finally:
        jit.set_num_threads(threads)
    assert_same(*results)


@pytest.mark.parametrize(
    ("contexts", "lens", "longest"),
    [
        ([1, 17, 40], [1, 1, 1], 1),
        ([21, 5], [7, 2], 5),  # 14 and 15, 16 to 20
        ([50, 3], [31, 0], 16),
        ([5], [0], 0),
    ],
)
def test_a_plan_knows_the_most_tokens_of_a_unit(
    contexts: list[int], lens: list[int], longest: int
) -> None:
    """`rope_kv_write` has so much room for each unit's rotated keys."""
    table, units = tables(contexts, 1)
    planned = plan(units, sum(lens), table, 1, cumulative(lens), np.array(contexts))
    assert (
        planned.longest == longest == int((planned.rows[:, 2] - planned.rows[:, 1]).max(initial=0))
    )


def test_a_step_without_rows_writes_nothing() -> None:
    pool = garbage(new_pool(2, 1, 4, BF16))
    before = KVPool(pool.k.copy(), pool.v.copy())
    none = np.zeros((0, 1, 4), F32)
    for table, contexts in (
        (np.zeros((0, 0), np.int64), np.zeros(0, np.int32)),
        (np.full((1, 1), -1, np.int64), np.array([5], np.int32)),
    ):
        kv_write(none, none, pool, table, 1, np.zeros(len(table) + 1, np.int32), contexts)
    assert_same(pool, before)


@pytest.mark.skipif(jit.INTERPRETED, reason="about 64-bit offsets in machine code")
def test_offsets_beyond_two_to_the_31() -> None:
    """A pool of 2**32 elements: only the pages that are written to exist."""
    units = 2**22
    try:
        pool = new_pool(units, 1, 64, BF16)
    except MemoryError:
        pytest.skip("8 GiB of addresses are not to be had here")
    assert pool.k.size == 2**32
    k, v = rows((1, 1, 64), BF16), rows((1, 1, 64), BF16, 1)
    table = np.array([[units - 1]], np.int64)
    kv_write(k, v, pool, table, WHOLE, cumulative([1]), np.array([1], np.int32))
    got = kv_gather_ref(pool, table[0], WHOLE, 1)
    np.testing.assert_array_equal(got[0], k)
    np.testing.assert_array_equal(got[1], v)


def test_reference_mode_runs_the_reference() -> None:
    k, v, pool, *where = case("mixed", 1, 2, 20, (F32, F32, BF16))
    expected = KVPool(pool.k.copy(), pool.v.copy())
    kv_write_ref(k, v, expected, *where)
    compiled = jit.num_compiled()
    with jit.using("reference"):
        kv_write(k, v, pool, *where)
    assert_same(pool, expected)
    assert jit.num_compiled() == compiled


def test_a_pool_knows_its_sizes() -> None:
    pool = new_pool(5, 3, 20, BF16)
    assert (pool.num_units, pool.num_kv_heads, pool.head_dim, pool.dtype) == (5, 3, 20, BF16)
    assert not pool.k.any() and not pool.v.any()
    with pytest.raises(ValueError, match=r"new_pool: .*head_dim 5: expected .* even"):
        new_pool(1, 1, 5, BF16)
    with pytest.raises(ValueError, match="new_pool: num_units 0"):
        new_pool(0, 1, 4, F32)
    with pytest.raises(ValueError, match="new_pool: dtype is float64"):
        new_pool(1, 1, 4, np.float64)


def _int32(*x: int) -> Array:
    return np.array(x, np.int32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": np.zeros((3, 2, 4))}, "k has dtype float64, expected uint16 or float32"),
        ({"k": np.zeros((3, 1, 4), F32)}, r"k has shape \(3, 1, 4\), expected \(T, 2, 4\)"),
        ({"v": np.zeros((4, 2, 4), F32)}, r"v has shape \(4, 2, 4\), expected \(3, 2, 4\)"),
        ({"pool": KVPool(np.zeros((2, 3, 2, 16), BF16), np.zeros(1))}, "pool.k has shape"),
        ({"pool": KVPool(np.zeros((2, 3, 4, 16, 1), BF16), np.zeros(1))}, "pool.k .* last axis"),
        ({"pool": KVPool(new_pool(3, 2, 4, BF16).k, np.zeros(1, BF16))}, "pool.v has shape"),
        ({"block_table": np.zeros((1, 1), np.int32)}, "block_table has dtype int32"),
        ({"block_table": np.array([[-1]])}, "block_table holds -1, expected 0 to 2"),
        ({"block_table": np.array([[3]])}, "block_table holds 3, expected 0 to 2"),
        ({"block_table": np.array([[2]]), "units_per_block": 2}, "block_table .* holds 3"),
        ({"block_table": np.array([[0]]), "units_per_block": 1}, "context_lens.0. is 19"),
        ({"units_per_block": 0}, "units_per_block is 0"),
        ({"cu_seqlens_q": _int32(0, 4)}, "cu_seqlens_q .* to T = 3"),
        ({"cu_seqlens_q": _int32(1, 3)}, "cu_seqlens_q"),
        ({"cu_seqlens_q": _int32(0, 2, 3)}, r"cu_seqlens_q has shape \(3,\), expected \(2\)"),
        ({"context_lens": _int32(2)}, r"context_lens\[0\] is 2, expected at least its 3 rows"),
        ({"context_lens": np.array([19.0])}, "context_lens has dtype float64, expected int32 or"),
    ],
)
def test_bad_input_names_the_argument_and_writes_nothing(
    change: dict[str, Any], message: str
) -> None:
    pool = garbage(new_pool(3, 2, 4, BF16))
    before = KVPool(pool.k.copy(), pool.v.copy())
    arguments: dict[str, Any] = {
        "k": np.zeros((3, 2, 4), F32),
        "v": np.zeros((3, 2, 4), F32),
        "pool": pool,
        "block_table": np.array([[0]]),
        "units_per_block": 2,
        "cu_seqlens_q": _int32(0, 3),
        "context_lens": _int32(19),
    }
    with pytest.raises((TypeError, ValueError), match=f"^kv_write: {message}"):
        kv_write(**(arguments | change))
    assert_same(pool, before)


def test_read_only_or_mixed_pools_are_refused() -> None:
    k, v, pool, *where = case("decode", 1, 2, 4, (F32, F32, F32))
    with pytest.raises(TypeError, match="kv_write: k has dtype uint16, expected float32"):
        kv_write(from_f32(k), v, pool, *where)
    pool.v.flags.writeable = False
    with pytest.raises(ValueError, match=r"kv_write: pool\.v is not a contiguous, writable array"):
        kv_write(k, v, pool, *where)
