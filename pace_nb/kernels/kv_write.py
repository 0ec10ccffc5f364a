"""Writing keys and values into the cache, in the layout that the attention kernels multiply with.

    p = context_lens[b] - (cu_seqlens_q[b + 1] - t)            position of row t, of sequence b
    u = block_table[b, p // 16 // units_per_block] + p // 16 % units_per_block    unit of p
    pool.k[h, u, :, p % 16, :] = k[t, h]
    pool.v[h, u, p % 16 // S, :D, p % 16 % S] = v[t, h]

| Array        | Shape                   | Type     | Layout                                       |
|--------------|-------------------------|----------|----------------------------------------------|
| k, v         | [T, KVH, D]             | f32, BF16| last axis contiguous (slices of fused q k v) |
| pool.k       | [KVH, U, D / S, 16, S]  | f32, BF16| contiguous; S = 2 for BF16, 1 for f32        |
| pool.v       | [KVH, U, 16 / S, Dp, S] | f32, BF16| contiguous; Dp = D rounded up to 16          |
| block_table  | [B, X]                  | int64    | number of a block's first unit               |
| cu_seqlens_q | [B + 1]                 | int32, 64| first row of each sequence, then T           |
| context_lens | [B]                     | int32, 64| keys of each sequence, those written here too|

A dot product of a query with 16 keys reads words (S elements of one key) of 16 neighbouring slots,
so K has the slot beside the pair of dims; a row of probabilities times V reads S neighbouring slots
of 16 dims, so V has the dims beside the pair of slots. Each is one load of 64 bytes.

Moves: T KVH D (2 size(pool) + size(k) + size(v)) bytes.
Does: no FLOPs; bound by memory.
Error: BF16 rounds to nearest even, once; otherwise none. A NaN stays a NaN (made quiet).
Cautions: writing the even half of a pair of BF16 values also zeroes its odd half: the next position
    is not written yet, and what was left there (a NaN of a request that is gone) times a
    probability of 0 would be NaN. The columns of V beyond D are written as 0 for the same reason.
    Slots beyond that pair keep what they held. No unit may belong to two sequences (not checked).
Source: the units and pairs are this package's own; the role is that of PACE
    `csrc/ops/attention/slab` `cache_update` and vLLM `reshape_and_cache`.
Notebook: 12 KV cache. Ledger: kv_write.
"""

from __future__ import annotations

from math import prod
from typing import NamedTuple

import numpy as np
from numba import prange
from numpy.typing import DTypeLike

from pace_nb.kernels import jit
from pace_nb.kernels.arrays import STORAGE, Array, ascends, flat_heads, in_range, require, writable
from pace_nb.kernels.bf16 import narrow, widen
from pace_nb.kernels.lanes import load, load_tail, splat
from pace_nb.kernels.memory import zeros
from pace_nb.kernels.words import copy_word, first_of_words, store_words

INTEGERS = (np.int32, np.int64)
# Tokens in a unit: a vector of scores is 16 keys, and 8 pairs of values feed 8 dot products.
UNIT = 16


class KVPool(NamedTuple):
    """Keys and values of one layer; layouts are in the module docstring."""

    k: Array
    v: Array

    @property
    def num_kv_heads(self) -> int:
        """KVH."""
        return int(self.k.shape[0])

    @property
    def num_units(self) -> int:
        """U: units of 16 tokens that the pool holds."""
        return int(self.k.shape[1])

    @property
    def head_dim(self) -> int:
        """D."""
        return int(self.k.shape[2] * self.k.shape[4])

    @property
    def dtype(self) -> np.dtype[np.generic]:
        """uint16 (BF16) or float32."""
        return self.k.dtype


def new_pool(num_units: int, num_kv_heads: int, head_dim: int, dtype: DTypeLike) -> KVPool:
    """A pool of zeros; pages that are never written cost no memory.

    dtype uint16 (BF16, head_dim must be even) or float32. ValueError names what does not fit.
    """
    if np.dtype(dtype) not in [np.dtype(d) for d in STORAGE]:
        raise ValueError(f"new_pool: dtype is {np.dtype(dtype)}, expected uint16 or float32")
    s = _pair(dtype)
    if min(num_units, num_kv_heads, head_dim) < 1 or head_dim % s:
        raise ValueError(
            f"new_pool: num_units {num_units}, num_kv_heads {num_kv_heads}, head_dim {head_dim}: "
            "expected at least 1 each, head_dim even for uint16"
        )
    shapes = (
        (num_kv_heads, num_units, head_dim // s, UNIT, s),
        (num_kv_heads, num_units, UNIT // s, _padded(head_dim), s),
    )
    return KVPool(*(zeros(prod(shape), dtype).reshape(shape) for shape in shapes))


def _pair(dtype: DTypeLike) -> int:
    """S: elements in a word of 4 bytes."""
    return 2 if np.dtype(dtype) == np.uint16 else 1


def _padded(head_dim: int) -> int:
    """Dp: D rounded up to whole vectors."""
    return -(-head_dim // 16) * 16


# ---- definitions ---------------------------------------------------------------------------------
def kv_write_ref(
    k: Array,
    v: Array,
    pool: KVPool,
    block_table: Array,
    units_per_block: int,
    cu_seqlens_q: Array,
    context_lens: Array,
) -> None:
    """Write the rows of k and v [T, KVH, D] one by one, as the module docstring says."""
    d, s, dtype = k.shape[2], pool.k.shape[4], pool.k.dtype
    for b, context in enumerate(context_lens):
        for t in range(cu_seqlens_q[b], cu_seqlens_q[b + 1]):
            logical, slot = divmod(int(context - cu_seqlens_q[b + 1]) + t, UNIT)
            unit = block_table[b, logical // units_per_block] + logical % units_per_block
            pool.k[:, unit, :, slot, :] = narrow(widen(k[t]), dtype).reshape(-1, d // s, s)
            pool.v[:, unit, slot // s, :, slot % s :] = 0
            pool.v[:, unit, slot // s, :d, slot % s] = narrow(widen(v[t]), dtype)


def write_ref(k: Array, v: Array, pool: KVPool, planned: WritePlan) -> None:
    """`kv_write_ref` of the rows of a plan."""
    for unit, slot, end, first in planned.rows:
        # A sequence of its own that lies in this unit alone and whose last tokens these are.
        tokens, lens = slice(int(first), int(first + end - slot)), np.array([0, end - slot])
        kv_write_ref(k[tokens], v[tokens], pool, np.array([[unit]]), 1, lens, np.array([end]))


def kv_gather_ref(
    pool: KVPool, block_table_row: Array, units_per_block: int, length: int
) -> tuple[Array, Array]:
    """(K, V) [length, KVH, D] of one sequence in storage dtype: what `kv_write` wrote."""
    d, s = pool.k.shape[2] * pool.k.shape[4], pool.k.shape[4]
    logical, slot = np.divmod(np.arange(length), UNIT)
    unit = block_table_row[logical // units_per_block] + logical % units_per_block
    k = pool.k[:, unit, :, slot, :].reshape(length, -1, d)
    return k, pool.v[:, unit, slot // s, :d, slot % s]


# ---- one unit of one head ------------------------------------------------------------------------
@jit.device_fn
def write_keys(k, k0, row, pool_k, p0, slot, end, d, s):
    """Rows of k [end - slot, D], `row` elements apart, into slots slot .. end - 1 of one unit."""
    for t in range(slot, end):
        for w in range(d // s):
            copy_word(pool_k, p0 + (w * 16 + t) * s, k, k0 + (t - slot) * row + w * s)


@jit.device_fn
def write_values(v, v0, row, pool_v, p0, slot, end, d, dp, s):
    """The same for values: a line of Dp words holds the S slots of a pair."""
    for line in range(slot // s, (end + s - 1) // s):
        t0, t1 = line * s, line * s + s - 1
        for i in range(0, dp, 16):
            n = min(16, d - i)
            at = p0 + (line * dp + i) * s
            first, second = splat(0.0), splat(0.0)
            if t0 < slot:
                first = first_of_words(pool_v, at)
            elif n == 16:
                first = load(v, v0 + (t0 - slot) * row + i)
            else:
                first = load_tail(v, v0 + (t0 - slot) * row + i, n)
            if t1 < end and n == 16:
                second = load(v, v0 + (t1 - slot) * row + i)
            elif t1 < end:
                second = load_tail(v, v0 + (t1 - slot) * row + i, n)
            store_words(pool_v, at, first, second)


# ---- kernel --------------------------------------------------------------------------------------
@jit.kernel
def _kv_write_kernel(
    k, k_row, k_head, v, v_row, v_head, pool_k, pool_v, heads, d, dp, s, units, in_pool, rows
):
    # One unit of one head per task: a pair lies in one unit, so no two tasks write the same word.
    # `rows` [units, 4]: number of the unit in the pool, first slot, last slot + 1, first row of k.
    for task in prange(units * heads):
        i, h = task // heads, task % heads
        unit, slot, end, t = rows[4 * i], rows[4 * i + 1], rows[4 * i + 2], rows[4 * i + 3]
        p = (h * in_pool + unit) * 16
        write_keys(k, t * k_row + h * k_head, k_row, pool_k, p * d, slot, end, d, s)
        write_values(v, t * v_row + h * v_head, v_row, pool_v, p * dp, slot, end, d, dp, s)


# ---- public wrappers -----------------------------------------------------------------------------
class WritePlan(NamedTuple):
    """Where a step's keys and values go, checked once for all layers alike."""

    rows: Array  # [N, 4] int64, one per unit to write: see the kernel
    num_tokens: int  # T
    num_units: int  # U of the pools it was checked for
    longest: int  # the most tokens that one unit gets


def plan(
    num_units: int,
    num_tokens: int,
    block_table: Array,
    units_per_block: int,
    cu_seqlens_q: Array,
    context_lens: Array,
) -> WritePlan:
    """Check a step: T = num_tokens new tokens, a cache of num_units units.

    block_table int64 [B, X]; units_per_block >= 1; cu_seqlens_q [B + 1] and context_lens [B] int32
    or int64; context_lens counts the new tokens. ValueError or TypeError names the argument that
    does not fit; only the blocks that will be written to are looked at.
    """
    name = "kv_write"
    require(name, "block_table", block_table, ("B", "X"), (np.int64,))
    require(name, "cu_seqlens_q", cu_seqlens_q, (len(block_table) + 1,), INTEGERS)
    require(name, "context_lens", context_lens, (len(block_table),), INTEGERS)
    if units_per_block < 1:
        raise ValueError(f"{name}: units_per_block is {units_per_block}, expected at least 1")
    cu, ctx = cu_seqlens_q.astype(np.int64), context_lens.astype(np.int64)
    if cu[0] != 0 or cu[-1] != num_tokens or not ascends(cu):
        raise ValueError(
            f"{name}: cu_seqlens_q is not a rising sequence from 0 to T = {num_tokens}"
        )
    query_lens = np.diff(cu)
    starts = ctx - query_lens  # position of the first row of each sequence
    if (starts < 0).any():
        b = int((starts < 0).argmax())
        raise ValueError(
            f"{name}: context_lens[{b}] is {ctx[b]}, expected at least its {query_lens[b]} rows"
        )
    first = starts // UNIT
    touched = np.where(query_lens > 0, -(-ctx // UNIT) - first, 0)
    owner = np.repeat(np.arange(len(ctx)), touched)  # sequence of each unit that is written to
    logical = np.arange(len(owner)) - (np.cumsum(touched) - touched - first)[owner]
    column = logical // units_per_block
    if len(owner) and int(column.max()) >= block_table.shape[1]:
        worst = int(owner[column.argmax()])
        raise ValueError(
            f"{name}: context_lens[{worst}] is {ctx[worst]}, expected at most what block_table's "
            f"{block_table.shape[1]} blocks of {units_per_block} units hold"
        )
    block = block_table[owner, column]
    in_range(name, "block_table", block, num_units)
    unit = block + logical % units_per_block
    in_range(name, "block_table + unit in block", unit, num_units)
    begin = logical * UNIT
    slot = np.maximum(starts[owner] - begin, 0)
    end = np.minimum(ctx[owner] - begin, UNIT)
    rows = np.stack((unit, slot, end, cu[owner] + begin + slot - starts[owner]), axis=1)
    return WritePlan(rows, num_tokens, num_units, int((end - slot).max(initial=0)))


def write(k: Array, v: Array, pool: KVPool, planned: WritePlan) -> None:
    """Write the keys and values of a planned step into one layer's pool.

    k, v [T, KVH, D] f32 or the pool's dtype, any strides with a contiguous last axis. ValueError or
    TypeError names the argument that does not fit, before anything is written.
    """
    heads, d, s = check_rows("kv_write", k, v, pool)
    check_plan("kv_write", planned, len(k), pool)
    if jit.use_reference():
        write_ref(k, v, pool, planned)
        return
    with jit.threads_for(2 * k.nbytes):
        _kv_write_kernel(
            *flat_heads(k),
            *flat_heads(v),
            pool.k.reshape(-1),
            pool.v.reshape(-1),
            heads,
            d,
            pool.v.shape[3],
            s,
            len(planned.rows),
            pool.num_units,
            planned.rows.reshape(-1),
        )


def check_pool(name: str, pool: KVPool) -> tuple[int, int, int]:
    """(KVH, D, S) of a pool whose arrays fit each other."""
    require(name, "pool.k", pool.k, ("KVH", "U", "D / S", UNIT, "S"), STORAGE)
    heads, in_pool, words, _, s = pool.k.shape
    if s != _pair(pool.k.dtype):
        raise ValueError(f"{name}: pool.k has shape {pool.k.shape}, expected a last axis of S")
    d = words * s
    require(name, "pool.v", pool.v, (heads, in_pool, UNIT // s, _padded(d), s), (pool.k.dtype,))
    writable(name, "pool.k", pool.k)
    writable(name, "pool.v", pool.v)
    return heads, d, s


def check_plan(name: str, planned: WritePlan, num_tokens: int, pool: KVPool) -> None:
    """The step must be the one that was planned."""
    if (num_tokens, pool.num_units) != (planned.num_tokens, planned.num_units):
        raise ValueError(
            f"{name}: {num_tokens} tokens and a pool of {pool.num_units} units, planned "
            f"{planned.num_tokens} and {planned.num_units}"
        )


def check_rows(name: str, k: Array, v: Array, pool: KVPool) -> tuple[int, int, int]:
    """(KVH, D, S) of arrays that fit each other."""
    heads, d, s = check_pool(name, pool)
    given = (np.float32,) if pool.k.dtype == np.float32 else STORAGE
    require(name, "k", k, ("T", heads, d), given)
    require(name, "v", v, k.shape, given)
    return heads, d, s


def kv_write(
    k: Array,
    v: Array,
    pool: KVPool,
    block_table: Array,
    units_per_block: int,
    cu_seqlens_q: Array,
    context_lens: Array,
) -> None:
    """`plan` and `write` in one: the keys and values of one step into one pool."""
    check_rows("kv_write", k, v, pool)
    planned = plan(pool.num_units, len(k), block_table, units_per_block, cu_seqlens_q, context_lens)
    write(k, v, pool, planned)
