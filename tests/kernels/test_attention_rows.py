"""What both attention kernels promise: the reference within the bound, and one result per row.

A row's bits may depend on its query, its position and the keys it sees, and on nothing else.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from numba import prange
from numpy.typing import NDArray

from pace_nb.kernels import attention_decode as decode_module
from pace_nb.kernels import attention_prefill as prefill_module
from pace_nb.kernels import jit
from pace_nb.kernels.attention_decode import attention_decode, attention_decode_ref
from pace_nb.kernels.attention_prefill import attention_prefill, attention_prefill_ref
from pace_nb.kernels.attention_rows import attention_ref, has_turn, unit_number
from pace_nb.kernels.bf16 import narrow, to_f32, widen

Array = NDArray[Any]
F32, BF16 = np.float32, np.uint16
KERNELS = [attention_decode, attention_prefill]
SMALL = jit.INTERPRETED
HEADS = [(8, 8), (32, 8), (8, 2), (7, 1), (8, 1), (16, 2), (6, 2)]  # G 1, 4, 7, 8, 3
HEAD_DIMS = [32, 40, 64, 80, 96, 112, 128, 256]
LENGTHS = [1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 100, 127, 129]
if not SMALL:
    LENGTHS += [500, 511, 512, 513, 576, 577, 1023, 1025, 1100]
WINDOWS = [0, 0, 1, 2, 8, 16, 17, 64, 65, 4096]
SINKS = [None, None, 0.0, -5.0, 3.0, 20.0]
BLOCKS = [16, 32, 64, 128, None]


def bits(x: Array) -> Array:
    return np.ascontiguousarray(x).view(np.uint16)


def assert_same(a: Array, b: Array) -> None:
    np.testing.assert_array_equal(bits(a), bits(b))


# ---- the definition ------------------------------------------------------------------------------
def test_the_reference_is_the_textbook_formula() -> None:
    rng = np.random.default_rng(0)
    q = rng.standard_normal((2, 2, 3)).astype(F32)
    k, v = (rng.standard_normal((5, 1, 3)).astype(F32) for _ in range(2))
    sinks = np.array([0.5, -1.0], F32)
    for window, seen in ((0, range(5)), (2, range(3, 5))):
        out = attention_ref(q, k, v, np.array([2, 4]), 0.7, window, sinks)
        for h in range(2):
            scores = [
                0.7 * sum(float(q[1, h, i]) * float(k[j, 0, i]) for i in range(3)) for j in seen
            ]
            total = sum(math.exp(s) for s in scores) + math.exp(sinks[h])
            expected = sum(
                math.exp(s) / total * v[j, 0].astype(float)
                for s, j in zip(scores, seen, strict=True)
            )
            np.testing.assert_allclose(out[1, h], expected, rtol=1e-12)


def test_one_visible_key_is_its_value_and_a_sink_of_zero_is_a_sink() -> None:
    q, k = np.ones((1, 1, 4), F32), np.full((1, 1, 4), 0.25, F32)
    v = np.array([[[1.0, -2.0, 3.0, 0.0]]], F32)
    np.testing.assert_allclose(attention_ref(q, k, v, np.array([0]), 0.5), v)
    with_sink = attention_ref(q, k, v, np.array([0]), 0.5, sinks=np.zeros(1, F32))
    np.testing.assert_allclose(with_sink, v * math.exp(0.5) / (math.exp(0.5) + 1.0))


def test_query_heads_share_key_value_heads_in_order() -> None:
    rng = np.random.default_rng(0)
    q = rng.standard_normal((3, 6, 8)).astype(F32)
    k, v = (rng.standard_normal((3, 2, 8)).astype(F32) for _ in range(2))
    out = attention_ref(q, k, v, np.arange(3), 1.0)
    for h in range(6):
        mine = slice(h // 3, h // 3 + 1)
        alone = attention_ref(q[:, h : h + 1], k[:, mine], v[:, mine], np.arange(3), 1.0)
        np.testing.assert_allclose(out[:, h : h + 1], alone)


# ---- against the definition ----------------------------------------------------------------------
def sampled(seed: int, dtype: Any) -> tuple[dict[str, Any], int, Array | None]:
    """A point of the grid: arguments of `scenario`, window, sinks."""
    rng = np.random.default_rng(seed)

    def one(options: list[Any]) -> Any:
        return options[int(rng.integers(len(options)))]

    heads = one(HEADS[2:] if SMALL else HEADS)
    contexts = [one(LENGTHS) for _ in range(1 if SMALL else one([1, 2, 4]))]
    most = 5 if SMALL else one([1, 5, 13, 40, 64])
    query_lens = [int(rng.integers(1, min(n, most) + 1)) for n in contexts]
    level = one(SINKS)
    sinks = None if level is None else (level + np.linspace(-1, 1, heads[0])).astype(F32)
    if level == 0.0:
        sinks = np.zeros(heads[0], F32)
    made = {
        "contexts": contexts,
        "query_lens": query_lens,
        "heads": heads,
        "d": one(HEAD_DIMS),
        "dtype": dtype,
        "block": one(BLOCKS),
        "seed": seed,
    }
    return made, one(WINDOWS), sinks


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("seed", range(5 if SMALL else 60))
def test_both_kernels_match_the_reference_and_each_other(
    scenario: Any, seed: int, dtype: Any
) -> None:
    made, window, sinks = sampled(seed, dtype)
    case = scenario(**made)
    decoded = attention_decode(*case.arguments, window, sinks)
    case.assert_close(decoded, window, sinks)
    assert_same(attention_prefill(*case.arguments, window, sinks), decoded)
    if case.pool.dtype == F32:
        np.testing.assert_allclose(decoded, case.exact(window, sinks), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("window", [0, 20])
def test_references_of_the_kernels_read_the_pool(scenario: Any, window: int) -> None:
    case = scenario([40, 17, 3], [3, 17, 1], block=32, d=40)
    sinks = np.linspace(-1, 2, 4).astype(F32)
    for reference in (attention_decode_ref, attention_prefill_ref):
        out = reference(*case.arguments, window, sinks)
        np.testing.assert_array_equal(out, case.exact(window, sinks))
        some = reference(*case.arguments, window, sinks, sequences=np.array([1]))
        np.testing.assert_array_equal(some[3:20], out[3:20])
        assert not some[:3].any() and not some[20:].any()


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_large_scores_and_other_scales(scenario: Any, dtype: Any) -> None:
    """Scores of some hundreds: nothing overflows, the softmax becomes a maximum."""
    case = scenario([70], [2], dtype=dtype)
    q, *rest = case.arguments
    for scale in (10.0, -10.0, 1e-3, 0.0):
        for kernel in KERNELS:
            out = widen(kernel(q, *rest[:-1], scale))
            exact = attention_ref(q, case.keys[0], case.values[0], np.array([68, 69]), scale)
            np.testing.assert_allclose(out, exact, atol=0.016, rtol=0.016)


# ---- one result per row --------------------------------------------------------------------------
def sinks_for(case: Any) -> Array:
    return np.linspace(-2, 3, case.q.shape[1]).astype(F32)


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize(("heads", "window"), [((4, 4), 0), ((4, 1), 0), ((7, 1), 9), ((8, 1), 70)])
def test_chunks_and_single_tokens_give_the_bits_of_the_whole(
    scenario: Any, heads: tuple[int, int], window: int, dtype: Any
) -> None:
    n = 24 if SMALL else 590
    case = scenario([n, 7], [n, 7], heads=heads, d=32 if SMALL else 80, dtype=dtype, block=32)
    sinks = sinks_for(case)
    whole = attention_prefill(*case.arguments, window, sinks)
    start = 0
    for size in (5, 1, 11, 7) if SMALL else (13, 65, 1, 200, 64, 3, 96, 148):
        some = case.with_queries([start, 0], [size, 0])
        for kernel in KERNELS if size <= 96 else KERNELS[1:]:
            assert_same(kernel(*some.arguments, window, sinks), whole[start : start + size])
        start += size
    assert start == n
    for t in (0, 1, 15, 16, 22) if SMALL else (0, 1, 15, 16, 63, 64, 127, 510, 511, 512, 588):
        step = case.with_queries([t, min(t, 6)], [1, 1])
        token = attention_decode(*step.arguments, window, sinks)
        assert_same(token, whole[[t, n + min(t, 6)]])


def test_a_sequence_gives_the_same_bits_alone_and_in_any_batch(scenario: Any) -> None:
    contexts, lens = ([20, 33, 9, 1], [3, 1, 9, 1])
    if not SMALL:
        contexts, lens = [600, 1030, 64, 70, 1, 5], [3, 1, 64, 17, 1, 5]
    case = scenario(contexts, lens, heads=(8, 2), d=64)
    for window in (0, 40):
        together = [kernel(*case.arguments, window, sinks_for(case)) for kernel in KERNELS]
        assert_same(*together)
        for b in range(len(contexts)):
            alone = case.alone(b)
            mine = slice(case.cu_seqlens_q[b], case.cu_seqlens_q[b + 1])
            for kernel in KERNELS:
                out = kernel(*alone.arguments, window, sinks_for(case))
                assert_same(out, together[0][mine])


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_where_the_units_lie_does_not_matter(scenario: Any, dtype: Any) -> None:
    case = scenario([50, 18] if SMALL else [700, 130], [3, 18], dtype=dtype, d=40)
    expected = attention_decode(*case.arguments)
    for block in (32, 64, 128, None):
        moved = case.in_blocks_of(block, seed=3)
        for kernel in KERNELS:
            assert_same(kernel(*moved.arguments), expected)


@pytest.mark.skipif(SMALL, reason="one thread when interpreted")
def test_threads_do_not_matter(scenario: Any) -> None:
    case = scenario([1500, 700, 40], [1, 64, 40], heads=(8, 2), d=64)
    threads = jit.num_threads()
    results = []
    try:
        for n in {1, threads}:
            jit.set_num_threads(n)
            results += [kernel(*case.arguments, 600, sinks_for(case)) for kernel in KERNELS]
    finally:
        jit.set_num_threads(threads)
    for out in results[1:]:
        assert_same(out, results[0])


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("window", [0, 5])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_key_or_value_reaches_the_rows_that_see_it_and_no_other(
    scenario: Any, bad: float, window: int, dtype: Any
) -> None:
    n = 20 if SMALL else 80
    case = scenario([n], [n], heads=(3, 1), d=32, dtype=dtype)
    clean = attention_prefill(*case.arguments, window)
    pattern = narrow(np.array([bad]), dtype)[0]
    for position in (0, 7, n - 3):
        for dense in (case.keys, case.values):
            kept = dense[0][position].copy()
            dense[0][position] = pattern
            case.fill()
            for kernel in KERNELS:
                out = widen(kernel(*case.arguments, window))
                last = n if window == 0 else min(n, position + window)
                hit = np.zeros(n, bool)
                hit[position:last] = True
                np.testing.assert_array_equal(out[~hit], widen(clean[~hit]))
                if np.isnan(bad):
                    assert np.isnan(out[hit]).all()
                else:
                    assert (out[hit] != widen(clean[hit])).any(axis=-1).all()
            dense[0][position] = kept
    case.fill()
    assert_same(attention_decode(*case.arguments, window), clean)


@pytest.mark.parametrize("kernel", KERNELS)
def test_blocks_before_the_window_need_not_exist(scenario: Any, kernel: Any) -> None:
    case = scenario([90], [3], block=16)
    expected = kernel(*case.arguments, 20)  # sees keys 68 to 89: blocks 4 and 5
    case.block_table[0, :4] = -1
    assert_same(kernel(*case.arguments, 20), expected)
    with pytest.raises(ValueError, match=r"block_table\[0, 3\] is -1, expected 0 to "):
        kernel(*case.arguments, 25)


# ---- chunks of positions -------------------------------------------------------------------------
CHUNKS = [1, 7, 16, 24, 64] + ([] if SMALL else [65, 100, 512, 700, 4096])


def chunked(case: Any, chunk: int, sinks: Array | None = None) -> Array:
    """float64 [T, H, D]: each row over the keys of its own chunk, as a sequence of their own."""

    def one(q: Array, k: Array, v: Array, positions: Array) -> Array:
        out = np.empty(q.shape)
        for t, position in enumerate(positions):
            first = next(j for j in range(position + 1) if j // chunk == position // chunk)
            seen = slice(first, position + 1)
            last = np.array([position - first])
            out[t] = attention_ref(q[t : t + 1], k[seen], v[seen], last, case.scale, 0, sinks)[0]
        return out

    return case._each(one)


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("chunk", CHUNKS)
def test_a_row_sees_the_keys_of_its_own_chunk(scenario: Any, chunk: int, dtype: Any) -> None:
    contexts, lens = ([40, 17, 3], [30, 1, 3]) if SMALL else ([700, 130, 1100], [90, 1, 64])
    case = scenario(contexts, lens, heads=(6, 2), d=32, dtype=dtype, block=32)
    for sinks in (None, np.linspace(-2, 3, 6).astype(F32)):
        exact = chunked(case, chunk, sinks)
        for reference in (attention_decode_ref, attention_prefill_ref):
            found = reference(*case.arguments, sinks=sinks, chunk=chunk)
            np.testing.assert_allclose(found, exact, rtol=1e-12, atol=1e-14)
        decoded = attention_decode(*case.arguments, sinks=sinks, chunk=chunk)
        assert_same(attention_prefill(*case.arguments, sinks=sinks, chunk=chunk), decoded)
        bound = 1e-5 if dtype == F32 else 0.016
        np.testing.assert_allclose(widen(decoded), exact, atol=bound, rtol=bound)


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("chunk", CHUNKS)
def test_steps_across_a_chunk_give_the_bits_of_the_whole(
    scenario: Any, chunk: int, dtype: Any
) -> None:
    n = 30 if SMALL else 590
    case = scenario([n], [n], heads=(4, 1), d=32, dtype=dtype, block=16)
    whole = attention_prefill(*case.arguments, chunk=chunk)
    for start, size in [(0, 5), (5, 1), (6, 17), (23, 7)] + (
        [] if SMALL else [(90, 64), (480, 65)]
    ):
        some = case.with_queries([start], [size])
        for kernel in KERNELS:
            out = kernel(*some.arguments, chunk=chunk)
            assert_same(out, whole[start : start + size])


@pytest.mark.parametrize("kernel", KERNELS)
def test_what_is_before_a_chunk_is_neither_needed_nor_used(scenario: Any, kernel: Any) -> None:
    case = scenario([90], [3], block=16)  # rows 87 to 89; chunk 40 begins at key 80
    expected = kernel(*case.arguments, chunk=40)
    case.block_table[0, :5] = -1
    assert_same(kernel(*case.arguments, chunk=40), expected)
    with pytest.raises(ValueError, match=r"block_table\[0, 4\] is -1, expected 0 to "):
        kernel(*case.arguments, chunk=39)  # begins at key 78, in block 4
    case = scenario([21], [21], heads=(3, 1), d=32)
    clean = kernel(*case.arguments, chunk=10)
    for dense in (case.keys, case.values):
        kept = dense[0][8].copy()
        dense[0][8] = narrow(np.array([np.nan]), case.pool.dtype)[0]
        case.fill()
        out = widen(kernel(*case.arguments, chunk=10))
        np.testing.assert_array_equal(np.isnan(out).all(axis=(1, 2)).nonzero()[0], [8, 9])
        kept_rows = [*range(8), *range(10, 21)]
        np.testing.assert_array_equal(out[kept_rows], widen(clean)[kept_rows])
        dense[0][8] = kept


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_chunk_and_a_window_exclude_each_other(scenario: Any, kernel: Any) -> None:
    case = scenario([20], [2])
    for window, chunk in ((4, 8), (0, -1)):
        with pytest.raises(ValueError, match=f"chunk is {chunk} and window {window}, expected 0"):
            kernel(*case.arguments, window, chunk=chunk)


# ---- calling -------------------------------------------------------------------------------------
@pytest.mark.parametrize("kernel", KERNELS)
def test_only_the_chosen_sequences_are_written(scenario: Any, kernel: Any) -> None:
    case = scenario([20, 33, 9], [2, 1, 3])
    whole = kernel(*case.arguments)
    out = np.full_like(case.q, 7)
    assert kernel(*case.arguments, out=out, sequences=np.array([2, 0], np.int32)) is out
    assert_same(out[[0, 1, 3, 4, 5]], whole[[0, 1, 3, 4, 5]])
    assert (out[2] == 7).all()
    other = kernel(*case.arguments, sequences=np.array([1]))
    assert_same(other[2], whole[2])
    assert not other[[0, 1, 3, 4, 5]].any()
    assert not kernel(*case.arguments, sequences=np.array([], np.int64)).any()


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_strided_q_gives_the_same_bits(scenario: Any, kernel: Any) -> None:
    """q as a slice of a fused projection."""
    case = scenario([20, 5], [2, 3])
    fused = np.zeros((5, 9, 64), case.q.dtype)
    fused[:, 2:6] = case.q
    out = kernel(fused[:, 2:6], *case.arguments[1:])
    assert_same(out, kernel(*case.arguments))


@pytest.mark.parametrize("module", [decode_module, prefill_module])
def test_read_only_arguments_compile_nothing_new(scenario: Any, module: Any) -> None:
    case = scenario([20, 5], [2, 3])
    kernel = getattr(module, module.__name__.rsplit(".", 1)[1])
    sinks = sinks_for(case)
    expected = kernel(*case.arguments, 0, sinks)
    kernels = [x for name, x in vars(module).items() if name.endswith("_kernel")]
    compiled = [getattr(x, "signatures", []).copy() for x in kernels]
    for x in (case.q, case.block_table, case.cu_seqlens_q, case.context_lens, sinks):
        x.flags.writeable = False
    assert_same(kernel(*case.arguments, 0, sinks), expected)
    assert [getattr(x, "signatures", []) for x in kernels] == compiled


@pytest.mark.parametrize("kernel", KERNELS)
def test_sequences_without_rows_and_empty_batches(scenario: Any, kernel: Any) -> None:
    case = scenario([20, 5, 7], [2, 0, 3])
    case.assert_close(kernel(*case.arguments))
    none = scenario([20], [0])
    assert kernel(*none.arguments).shape == (0, 4, 64)


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("kernel", KERNELS)
def test_reference_mode_runs_the_reference(scenario: Any, kernel: Any, dtype: Any) -> None:
    case = scenario([20, 33], [2, 1], dtype=dtype)
    sinks = sinks_for(case)
    with jit.using("reference"):
        out = kernel(*case.arguments, 9, sinks)
    assert_same(out, narrow(case.exact(9, sinks), dtype))


# ---- small device functions ----------------------------------------------------------------------
@jit.kernel
def _turns_kernel(owner, workers):
    for w in prange(workers):
        for turn in range(len(owner)):
            if has_turn(turn, w, workers):
                owner[turn] += w + 1


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_each_turn_has_one_owner_and_growing_pieces_are_shared_evenly(workers: int) -> None:
    owner = np.zeros(36, np.int64)
    _turns_kernel(owner, workers)
    shares = [int((np.arange(36) * (owner == w + 1)).sum()) for w in range(workers)]
    assert sum(shares) == 35 * 18
    assert max(shares) - min(shares) <= 1


@jit.kernel
def _numbers_kernel(table, t0, per_block, out):
    for i in prange(len(out)):
        out[i] = unit_number(table, t0, per_block, i)


def test_unit_number() -> None:
    table = np.array([[3, 9, 5], [40, 20, 0]])
    out = np.zeros(4, np.int64)
    _numbers_kernel(table.reshape(-1), 3, 2, out)
    np.testing.assert_array_equal(out, [40, 41, 20, 21])
    _numbers_kernel(table.reshape(-1), 0, 2**40, out)
    np.testing.assert_array_equal(out, [3, 4, 5, 6])


def test_bf16_output_is_rounded_once(scenario: Any) -> None:
    """Equal values: whatever the weights are, the result is that value to the bit."""
    case = scenario([30], [2])
    case.values[0][...] = case.values[0][:1, :1, :1]
    case.fill()
    for kernel in KERNELS:
        out = to_f32(kernel(*case.arguments))
        value = to_f32(case.values[0][:1, :1, :1])
        assert np.all(np.abs(out - value) <= np.abs(value) * 2.0**-7)
