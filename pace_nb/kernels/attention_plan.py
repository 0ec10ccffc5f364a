"""`Plan`: what an attention kernel has to know of a step, checked once for all layers alike.

    plan = attention_plan.plan(..)                      once per step, window and chunk
    attention_decode.attend(plan, q, pool, scale, ..)   once per layer

Knows which sequences and keys a step has, where the cache put them, how they are cut into tasks,
and the scratch memory that tasks need. Every index that a kernel will follow is checked here. Does
not know the arithmetic (`attention_rows.py`) or the layers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from pace_nb.kernels import jit, memory
from pace_nb.kernels.arrays import STORAGE, Array, ascends, in_range, require, writable
from pace_nb.kernels.attention_rows import (
    KEY_BLOCK,
    PASS,
    ROWS,
    SPLIT,
    WORDS,
    WORK,
    batch_attention_ref,
)
from pace_nb.kernels.exp import LOG2_E
from pace_nb.kernels.kv_write import UNIT, KVPool

# Places in `Plan.sizes`, the numbers that both kernels take as one array.
IN_POOL, TABLE_STRIDE, UNITS_PER_BLOCK, KV_HEADS, GROUP, D, DP = range(7)
TOKENS, ROWS_OF_TASK, WINDOW, CHUNK, WORKERS, NUM_SIZES = range(7, 13)


class Plan(NamedTuple):
    """A checked step. Lengths are int64 and contiguous, as kernels take them."""

    kernel: str  # named in errors
    q_shape: tuple[int, int, int]  # T, H, D
    pool_shapes: tuple[tuple[int, ...], tuple[int, ...]]
    dtype: np.dtype[Any]  # of q, pool and out
    block_table: Array  # [B, X]
    cu_seqlens_q: Array  # [B + 1]
    contexts: Array  # [B]
    sequences: Array  # [N] of the sequences to compute; all have query tokens
    first_split: Array  # [B] number of the first split that a row of the sequence sees
    num_splits: Array  # [B]
    pieces: int  # tasks of decode: (group of query tokens, key/value head, split)
    sizes: Array  # [NUM_SIZES]: see the constants
    key_bytes: int  # of the keys and values that are seen, each once
    top: Array  # scratch f32: m of a task's rows
    total: Array  # l, in 16 partial sums
    values: Array  # o
    storage: Array  # scratch: query rows and weights of each worker, in `dtype` or float32
    work: Array  # scratch f32 [workers, WORK]
    words: Array  # scratch int64 [workers, WORDS]


def plan(
    kernel: str,
    q_shape: tuple[int, ...],
    pool: KVPool,
    block_table: Array,
    units_per_block: int,
    cu_seqlens_q: Array,
    context_lens: Array,
    window: int = 0,
    chunk: int = 0,
    sequences: Array | None = None,
    split_keys: bool = False,
) -> Plan:
    """Check a step and cut it into tasks.

    q_shape (T, H, D) of the queries, all sequences' rows one after the other; block_table int64
    [B, X]; units_per_block >= 1; cu_seqlens_q [B + 1]; context_lens [B] >= the query tokens.
    sequences: indices of the sequences to compute (None: all). window, chunk: at most one is not 0.
    split_keys: splits of the keys are tasks of their own (decode). TypeError or ValueError names
    the argument that does not fit.
    """
    kv_heads, in_pool, d, padded = _check_pool(kernel, pool)
    if len(q_shape) != 3 or q_shape[2] != d:
        raise ValueError(f"{kernel}: q has shape {tuple(q_shape)}, expected (T, H, {d})")
    heads = q_shape[1]
    if heads == 0 or heads % kv_heads:
        raise ValueError(f"{kernel}: q has {heads} heads, expected a multiple of {kv_heads}")
    require(kernel, "block_table", block_table, ("B", "X"), (np.int64,))
    require(kernel, "cu_seqlens_q", cu_seqlens_q, (len(block_table) + 1,), (np.int32, np.int64))
    require(kernel, "context_lens", context_lens, (len(block_table),), (np.int32, np.int64))
    if window < 0:
        raise ValueError(f"{kernel}: window is {window}, expected 0 (none) or more")
    if chunk < 0 or (chunk and window):
        raise ValueError(
            f"{kernel}: chunk is {chunk} and window {window}, expected 0 (none) or more, "
            "and one of them 0"
        )
    if units_per_block < 1:
        raise ValueError(f"{kernel}: units_per_block is {units_per_block}, expected 1 or more")
    if cu_seqlens_q[0] != 0 or cu_seqlens_q[-1] != q_shape[0] or not ascends(cu_seqlens_q):
        raise ValueError(
            f"{kernel}: cu_seqlens_q is not a rising sequence from 0 to T = {q_shape[0]}"
        )
    query_lens = np.diff(cu_seqlens_q).astype(np.int64)
    contexts = context_lens.astype(np.int64)
    if (contexts < query_lens).any():
        b = int((contexts < query_lens).argmax())
        raise ValueError(
            f"{kernel}: context_lens[{b}] is {contexts[b]}, expected {query_lens[b]} or more, "
            "its query tokens"
        )
    if sequences is None:
        sequences = np.flatnonzero(query_lens)
    else:
        require(kernel, "sequences", sequences, ("N",), (np.int32, np.int64))
        in_range(kernel, "sequences", sequences, len(contexts))
        sequences = sequences[query_lens[sequences] > 0].astype(np.int64)
    first = _first_keys(contexts, query_lens, window, chunk)
    _check_table(kernel, block_table, units_per_block, in_pool, first, contexts, sequences)

    group = heads // kv_heads
    tokens = max(1, ROWS // group)  # query tokens of a task: groups are cut at multiples of it
    rows = min(tokens, int(query_lens[sequences].max(initial=0))) * group
    first_split = first // SPLIT
    num_splits = -(-contexts // SPLIT) - first_split
    workers = jit.num_threads()
    tasks = num_splits * -(-query_lens // tokens)
    pieces = int(tasks[sequences].sum()) * kv_heads
    kept = pieces * rows if split_keys else 2 * workers * rows  # rows of m, l, o: see the kernels
    # What is multiplied with keys and values; see tile_dot for why it may be wider than they are.
    factor_dtype = pool.k.dtype if jit.WIDE else np.dtype(np.float32)
    sizes = np.zeros(NUM_SIZES, np.int64)
    sizes[:] = (
        in_pool, block_table.shape[1], units_per_block, kv_heads, group, d, padded,
        tokens, rows, window, chunk, workers,
    )  # fmt: skip
    return Plan(
        kernel,
        (q_shape[0], heads, d),
        (pool.k.shape, pool.v.shape),
        pool.k.dtype,
        ours(block_table),
        cu_seqlens_q.astype(np.int64),
        contexts,
        sequences,
        first_split,
        num_splits,
        pieces,
        sizes,
        int((contexts - first)[sequences].sum()) * kv_heads * 2 * d * pool.k.itemsize,
        memory.empty(kept, np.float32),
        memory.empty(kept * 16, np.float32),
        memory.empty(kept * padded, np.float32),
        memory.empty(workers * (rows * d + PASS * KEY_BLOCK), factor_dtype),
        memory.empty(workers * max(WORK, 32 + padded), np.float32),
        memory.empty(workers * WORDS, np.int64),
    )


class Operands(NamedTuple):
    """The arrays of one layer, checked against a plan."""

    q: Array  # writable, last axis contiguous
    k: Array  # flat
    v: Array  # flat
    sign: float  # of the scale: -1, 1, or 0
    scale: float  # its size times log2 e; 1 where the scale is 0
    sinks: Array  # f32 [H], or of size 0
    out: Array  # [T, H, D] contiguous


def operands(
    given: Plan, q: Array, pool: KVPool, scale: float, sinks: Array | None, out: Array | None
) -> Operands:
    """Check what changes from layer to layer."""
    kernel = given.kernel
    require(kernel, "q", q, given.q_shape, (given.dtype,))
    if (pool.k.shape, pool.v.shape) != given.pool_shapes:
        raise ValueError(f"{kernel}: pool has shape {pool.k.shape}, planned {given.pool_shapes[0]}")
    if pool.k.dtype != given.dtype or pool.v.dtype != given.dtype:
        raise TypeError(f"{kernel}: pool has dtype {pool.k.dtype}, planned {given.dtype}")
    if not (pool.k.flags.c_contiguous and pool.v.flags.c_contiguous):
        raise ValueError(f"{kernel}: pool.k or pool.v is not contiguous")
    if not abs(scale) <= _LARGEST:
        raise ValueError(f"{kernel}: scale is {scale}, expected a finite number")
    if sinks is None:
        sinks = _NO_SINKS
    else:
        require(kernel, "sinks", sinks, (given.q_shape[1],))
        sinks = ours(sinks)
    if out is None:
        # Rows of sequences that are not computed stay 0.
        out = np.zeros(given.q_shape, given.dtype)
    else:
        require(kernel, "out", out, given.q_shape, (given.dtype,))
        writable(kernel, "out", out)
    if not q.flags.writeable:
        q = q.copy()
    sign = float((scale > 0) - (scale < 0))
    return Operands(
        q,
        pool.k.reshape(-1),
        pool.v.reshape(-1),
        sign,
        min(abs(float(scale)) * LOG2_E, _LARGEST) if sign else 1.0,
        sinks,
        out,
    )


def planned_ref(given: Plan, q: Array, pool: KVPool, scale: float, sinks: Array | None) -> Array:
    """attention_rows.attention_ref of each planned sequence over its gathered keys, float64
    [T, H, D]."""
    return batch_attention_ref(
        q,
        pool,
        given.block_table,
        int(given.sizes[UNITS_PER_BLOCK]),
        given.cu_seqlens_q,
        given.contexts,
        scale,
        int(given.sizes[WINDOW]),
        sinks,
        given.sequences,
        int(given.sizes[CHUNK]),
    )


def ours(x: Array) -> Array:
    """x contiguous and writable: read-only is another type, for which a kernel compiles again."""
    return np.array(x) if not x.flags.writeable else np.ascontiguousarray(x)


_LARGEST = float(np.finfo(np.float32).max)
_NO_SINKS = np.empty(0, np.float32)


def _check_pool(kernel: str, pool: KVPool) -> tuple[int, int, int, int]:
    """(KVH, U, D, Dp) of a pool that is what `new_pool` makes."""
    require(kernel, "pool.k", pool.k, ("KVH", "U", "D / S", UNIT, "S"), STORAGE)
    kv_heads, in_pool, words, _, s = pool.k.shape
    d, dtype = words * s, pool.k.dtype
    padded = -(-d // 16) * 16
    if s != 4 // dtype.itemsize or d == 0 or kv_heads == 0:
        raise ValueError(f"{kernel}: pool.k has shape {pool.k.shape}, expected a pool of new_pool")
    require(kernel, "pool.v", pool.v, (kv_heads, in_pool, UNIT // s, padded, s), (dtype,))
    return kv_heads, in_pool, d, padded


def _first_keys(contexts: Array, query_lens: Array, window: int, chunk: int) -> Array:
    """[B] first key that any query token of a sequence sees."""
    positions = contexts - query_lens  # of the first query tokens
    if chunk:
        return positions // chunk * chunk
    return np.maximum(positions + 1 - window, 0) if window else np.zeros_like(contexts)


def _check_table(
    kernel: str,
    block_table: Array,
    units_per_block: int,
    in_pool: int,
    first: Array,
    contexts: Array,
    sequences: Array,
) -> None:
    """The blocks that hold the keys first .. contexts of `sequences` must lie in the pool."""
    if not len(sequences):
        return
    begin, end = first[sequences] // UNIT, -(-contexts[sequences] // UNIT)  # units
    if int(end.max()) > block_table.shape[1] * units_per_block:
        b = int(sequences[end.argmax()])
        raise ValueError(
            f"{kernel}: context_lens[{b}] is {contexts[b]}, expected at most what block_table's "
            f"{block_table.shape[1]} blocks of {units_per_block} units hold"
        )
    column = np.arange(-(-int(end.max()) // units_per_block)) * units_per_block
    table = block_table[sequences, : len(column)]
    used = np.minimum(units_per_block, end[:, None] - column)
    needed = (used > 0) & (column + units_per_block > begin[:, None])
    wrong = needed & ((table < 0) | (table > in_pool - used))
    if wrong.any():
        i, x = (int(n) for n in np.argwhere(wrong)[0])
        raise ValueError(
            f"{kernel}: block_table[{sequences[i]}, {x}] is {table[i, x]}, expected 0 to "
            f"{in_pool - used[i, x]} for a block of which {used[i, x]} units are used"
        )
