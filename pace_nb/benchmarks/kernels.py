"""Each kernel on the shapes of one model, held against what this machine can do.

Knows how to find a model's products and how many heads it has. Does not know text or requests. The
weights are the model's own, where they lie in memory after loading: a product of few rows is run
over all layers that have it, so that its weights come from where they come from in a step.

    gemm, 1 to 32 rows     against reading as many bytes
    gemm, 1024 rows        against the peak of the dot products, one layer's weight
    attention, decode      against reading as many bytes of keys and values
    attention, prefill     against the peak, over the scores that the causal mask leaves
    norm                   against copying as many bytes

`make bench` in a checkout measures every kernel on shapes of its own, with more rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pace_nb.benchmarks.limits import against_copy, against_peak, against_read
from pace_nb.kernels.attention_decode import attention_decode
from pace_nb.kernels.attention_prefill import attention_prefill
from pace_nb.kernels.bf16 import from_f32
from pace_nb.kernels.kv_write import UNIT, new_pool
from pace_nb.kernels.norm import add_rms_norm
from pace_nb.layers.embedding import Embedding
from pace_nb.layers.linear import Linear
from pace_nb.layers.module import Module
from pace_nb.layers.weights import StorageDtype
from pace_nb.models.loader import Checkpoint
from pace_nb.models.registry import load_model

FEW_ROWS = (1, 8, 32)
MANY_ROWS = 1024
CONTEXT = 4096  # keys in the attention rows, or what the model was made for
LARGEST_BUFFER = 1 << 29  # bytes of the buffer that a limit reads
ROUNDS = 7

Product = Callable[[NDArray[Any]], NDArray[Any]]
Row = dict[str, Any]


def products(model: Module) -> dict[tuple[int, int], list[tuple[str, Product]]]:
    """(N, K) -> (checkpoint name, product) of every Linear, and of the head where it is tied.

    Experts are not among them: they are not Linear.
    """
    found: dict[tuple[int, int], list[tuple[str, Product]]] = {}
    tied = not isinstance(getattr(model, "lm_head", None), Module)

    def walk(name: str, module: Module) -> None:
        if isinstance(module, Linear):
            shape = module.out_features, module.in_features
            found.setdefault(shape, []).append((name, module))
        elif isinstance(module, Embedding) and tied and name.endswith("embed_tokens"):
            found.setdefault((module.num_embeddings, module.size), []).append(
                (name, module.project)
            )
        for part_name, part in module.parts(name):
            walk(part_name, part)

    walk("", model)
    return found


def random(shape: tuple[int, ...], dtype: np.dtype[Any], seed: int = 0) -> NDArray[Any]:
    """Standard normal, in storage dtype."""
    drawn = np.random.default_rng(seed).standard_normal(shape, np.float32)
    return from_f32(drawn) if dtype == np.uint16 else drawn


def gemm_rows(model: Module, dtype: np.dtype[Any]) -> Iterator[Row]:
    """Every shape of product that the model has, for few rows and for many."""
    for (n, k), group in products(model).items():
        name = group[0][0].rpartition(".")[2]
        moved = len(group) * n * k * dtype.itemsize
        buffer = np.ones(min(moved, LARGEST_BUFFER) // dtype.itemsize, dtype)
        for m in FEW_ROWS:
            x = random((m, k), dtype)

            def all_layers(x: NDArray[Any] = x, group: list[tuple[str, Product]] = group) -> None:
                for _, product in group:
                    product(x)

            case = f"gemm {name} M={m} N={n} K={k}, {len(group)} of them"
            flops = 2.0 * m * n * k * len(group)
            yield against_read(case, all_layers, moved, buffer, ROUNDS, flops)
        x = random((MANY_ROWS, k), dtype)
        case = f"gemm {name} M={MANY_ROWS} N={n} K={k}"
        flops = 2.0 * MANY_ROWS * n * k
        touched = (n * k + MANY_ROWS * k) * dtype.itemsize + 4.0 * MANY_ROWS * n
        yield against_peak(case, partial(group[0][1], x), flops, dtype, ROUNDS, touched)


def attention_row(
    num_heads: int, num_kv_heads: int, head_dim: int, dtype: np.dtype[Any], batch: int, context: int
) -> Row:
    """Decode: `batch` sequences of `context` keys, one new token each."""
    units = max(context // UNIT, 1)
    pool = new_pool(batch * units, num_kv_heads, head_dim, dtype)
    for half in pool:
        half[...] = random(half.shape, dtype)
    q = random((batch, num_heads, head_dim), dtype, 1)
    table = np.arange(batch, dtype=np.int64).reshape(-1, 1) * units
    cu = np.arange(batch + 1, dtype=np.int32)
    lens = np.full(batch, units * UNIT, np.int32)
    run = partial(attention_decode, q, pool, table, units, cu, lens, head_dim**-0.5)
    moved = pool.k.nbytes + pool.v.nbytes
    buffer = np.ones(max(moved, 1 << 20) // 4, np.float32)
    flops = 4.0 * batch * num_heads * head_dim * units * UNIT
    case = f"attention decode B={batch} S={units * UNIT} H={num_heads}/{num_kv_heads} D={head_dim}"
    return against_read(case, run, moved, buffer, ROUNDS, flops)


def prefill_row(
    num_heads: int, num_kv_heads: int, head_dim: int, dtype: np.dtype[Any], length: int
) -> Row:
    """Prefill: one prompt of `length` tokens, causal."""
    units = max(length // UNIT, 1)
    length = units * UNIT
    pool = new_pool(units, num_kv_heads, head_dim, dtype)
    for half in pool:
        half[...] = random(half.shape, dtype)
    q = random((length, num_heads, head_dim), dtype, 1)
    table, cu = np.zeros((1, 1), np.int64), np.array([0, length], np.int32)
    lens = np.array([length], np.int32)
    run = partial(attention_prefill, q, pool, table, units, cu, lens, head_dim**-0.5)
    flops = 4.0 * num_heads * head_dim * (length * (length + 1) / 2)
    moved = pool.k.nbytes + pool.v.nbytes + 2 * q.nbytes
    case = f"attention prefill T={length} H={num_heads}/{num_kv_heads} D={head_dim}"
    return against_peak(case, run, flops, dtype, ROUNDS, moved)


def norm_row(hidden_size: int, dtype: np.dtype[Any]) -> Row:
    """The norm between layers, over a prefill's rows."""
    x, residual = (random((MANY_ROWS, hidden_size), np.dtype(np.float32), i) for i in range(2))
    weight, out = np.ones(hidden_size, np.float32), np.empty((MANY_ROWS, hidden_size), dtype)
    run = partial(add_rms_norm, x, residual, weight, 1e-5, out)
    moved = x.size * (3 * 4 + dtype.itemsize)  # x, residual in, residual out, normed out
    case = f"add_rms_norm T={MANY_ROWS} E={hidden_size}"
    return against_copy(case, run, moved, ROUNDS, 6.0 * x.size)


def rows(directory: Path, storage_dtype: StorageDtype) -> Iterator[Row]:
    """One row per kernel and shape of the model in `directory`, each as soon as it was measured."""
    with Checkpoint.open(directory) as checkpoint:
        model: Any = load_model(checkpoint, storage_dtype)
        config = checkpoint.config
    cache = model.kv_cache_config(storage_dtype)
    dtype = cache.storage_dtype
    fields = {**config, **(config.get("text_config") or {})}
    num_heads = fields.get("num_attention_heads") or fields["n_head"]
    hidden_size = fields.get("hidden_size") or fields["n_embd"]
    context = min(CONTEXT, model.max_position_embeddings)
    heads = num_heads, cache.num_kv_heads, cache.head_dim
    yield from gemm_rows(model, dtype)
    for batch in (1, 8):
        yield attention_row(*heads, dtype, batch, context)
    yield prefill_row(*heads, dtype, context)
    yield norm_row(hidden_size, dtype)
