"""gemm.py against its float64 reference: shapes around tile edges, dtypes, order, NaN, threads."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pace_nb.kernels import gemm as gemm_module
from pace_nb.kernels import jit, mlp, moe
from pace_nb.kernels.bf16 import from_f32, widen
from pace_nb.kernels.gemm import (
    KC,
    NR,
    PackedWeight,
    gather_rows,
    gemm,
    gemm_ref,
    new_weight,
    pack_rows,
    pack_rows_ref,
    pack_weight,
    pack_weights,
    pack_weights_ref,
    unpack_weight,
)
from tests.kernels.bodies import guarded

Array = NDArray[Any]
DTYPES = [np.uint16, np.float32]
SHAPES = [(1, 1, 1), (1, 64, 2), (2, 63, 15), (3, 65, 16), (4, 130, 17), (5, 16, 3), (6, 64, 64)]
SHAPES += [(7, 200, 33), (13, 70, 40)]
if not jit.INTERPRETED:
    SHAPES += [(1, 781, 1823), (25, 100, 2 * KC + 7), (64, 129, 512), (3, 65, KC + 1)]


def normal(rng: np.random.Generator, shape: Any, dtype: Any) -> Array:
    x = rng.standard_normal(shape).astype(np.float32)
    return from_f32(x) if dtype == np.uint16 else x


def assert_within_bound(c: Array, x: Array, w: Array, bias: Array | None) -> None:
    """The docstring's bound: (K + 1) 2^-24 times the sum of magnitudes, twice that without fma."""
    sizes = np.abs(widen(x)) @ np.abs(widen(w)).T
    sizes += 0 if bias is None else np.abs(bias)
    fused = jit.INTERPRETED or bool({"fma", "avx512f"} & jit.cpu_features())
    bound = (x.shape[1] + 1) * 2.0**-24 * sizes * (1 if fused else 2) + 1e-37
    error = np.abs(c - gemm_ref(x, w, bias))
    assert np.all(error <= bound), float((error / bound).max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_reference(shape: tuple[int, int, int], dtype: Any) -> None:
    m, n, k = shape
    rng = np.random.default_rng(m + n + k)
    x, w = normal(rng, (m, k), dtype), normal(rng, (n, k), dtype)
    bias = rng.standard_normal(n).astype(np.float32)
    packed = pack_weight(w)
    assert_within_bound(gemm(x, packed), x, w, None)
    surrounded = np.full((m + 2, n), 7.0, np.float32)
    assert_within_bound(gemm(x, packed, bias, out=surrounded[1:-1]), x, w, bias)
    assert (surrounded[[0, -1]] == 7.0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (64, 2), (65, 3), (129, 31), (200, 18)])
def test_packing(shape: tuple[int, int], dtype: Any) -> None:
    w = normal(np.random.default_rng(1), shape, dtype)
    packed = pack_weight(w)
    np.testing.assert_array_equal(packed.data, pack_weights_ref([w]))
    np.testing.assert_array_equal(unpack_weight(packed), w)
    assert (packed.n, packed.k) == shape


@pytest.mark.parametrize("dtype", DTYPES)
def test_stacked_parts_are_the_stacked_weight(dtype: Any) -> None:
    rng = np.random.default_rng(2)
    parts = [normal(rng, (n, 20), dtype) for n in (70, 1, 64, 9)]
    np.testing.assert_array_equal(pack_weights(parts).data, pack_weights_ref(parts))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [20, 21])
def test_rows_are_packed_into_their_place(dtype: Any, k: int) -> None:
    """In pieces that begin and end within panels, of views that are read-only or misplaced."""
    w = normal(np.random.default_rng(6), (200, k), dtype)
    weight = new_weight(200, k, dtype)
    shifted = np.empty(w.size + 1, dtype)[1:].reshape(w.shape)  # half a pair off
    shifted[...] = w
    w.flags.writeable = False
    for first, end, source in ((70, 135, w), (0, 1, shifted), (135, 200, shifted), (1, 70, w)):
        expected = pack_rows_ref(weight, first, source[first:end])
        assert pack_rows(weight, first, source[first:end])
        np.testing.assert_array_equal(weight.data, expected)
    assert pack_rows(weight, 200, w[:0])
    np.testing.assert_array_equal(weight.data, pack_weights_ref([w]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [(0, 0), (63, 20), (64, 1), (134, 19)])
def test_packing_tells_what_is_not_finite(place: Any, bad: float, dtype: Any) -> None:
    w = np.full((135, 21), -3e38, np.float32)
    w[1::2] = 1e-40
    weight = new_weight(300, 21, dtype)
    stored = from_f32(w) if dtype == np.uint16 else w
    assert pack_rows(weight, 100, stored)
    w[place] = bad
    stored = from_f32(w) if dtype == np.uint16 else w
    assert not pack_rows(weight, 100, stored)


@pytest.mark.parametrize("row0", [-1, 2])
def test_rows_beyond_the_weight_are_refused(row0: int) -> None:
    weight = new_weight(5, 8, np.float32)
    with pytest.raises(ValueError, match=f"pack_rows: row0 is {row0}, expected 0 to 1: 4 rows"):
        pack_rows(weight, row0, np.zeros((4, 8), np.float32))
    with pytest.raises(ValueError, match=r"new_weight: \(0, 8\) of float32"):
        new_weight(0, 8, np.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_do_not_depend_on_the_batch_or_on_threads(dtype: Any) -> None:
    """Batch invariance: a row has the same bits alone and in any batch, place or thread."""
    rng = np.random.default_rng(3)
    k = 70 if jit.INTERPRETED else KC + 70
    x, w = normal(rng, (21, k), dtype), normal(rng, (130, k), dtype)
    packed, threads = pack_weight(w), jit.num_threads()
    whole = gemm(x, packed)
    for first, last in [(0, 1), (20, 21), (3, 5), (2, 7), (5, 13), (1, 21)]:
        np.testing.assert_array_equal(gemm(x[first:last], packed), whole[first:last])
    try:
        jit.set_num_threads(1)
        np.testing.assert_array_equal(gemm(x, packed), whole)
    finally:
        jit.set_num_threads(threads)


@pytest.mark.parametrize("dtype", DTYPES)
def test_columns_do_not_depend_on_what_is_stacked_beside_them(dtype: Any) -> None:
    rng = np.random.default_rng(4)
    x, a, b = (
        normal(rng, (3, 40), dtype),
        normal(rng, (70, 40), dtype),
        normal(rng, (50, 40), dtype),
    )
    both = gemm(x, pack_weights([a, b]))
    np.testing.assert_array_equal(both[:, :70], gemm(x, pack_weight(a)))
    np.testing.assert_array_equal(both[:, 70:], gemm(x, pack_weight(b)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_and_infinity_stay_in_their_row_and_column(bad: float, dtype: Any) -> None:
    rng = np.random.default_rng(5)
    x, w = rng.standard_normal((9, 21)), rng.standard_normal((70, 21))
    to_storage = (lambda a: from_f32(a.astype(np.float32))) if dtype == np.uint16 else np.float32
    clean = gemm(to_storage(x), pack_weight(to_storage(w)))
    x[4, 20], w[66, 3] = bad, bad
    c = gemm(to_storage(x), pack_weight(to_storage(w)))
    touched = np.zeros(c.shape, bool)
    touched[4, :], touched[:, 66] = True, True
    assert not np.isfinite(c[touched]).any()
    np.testing.assert_array_equal(c[~touched], clean[~touched])


def test_strided_x_gives_the_same_bits() -> None:
    rng = np.random.default_rng(6)
    x, w = normal(rng, (8, 60), np.uint16), normal(rng, (66, 30), np.uint16)
    packed = pack_weight(w)
    expected = gemm(np.ascontiguousarray(x[:, ::2]), packed)
    np.testing.assert_array_equal(gemm(x[:, ::2], packed), expected)
    np.testing.assert_array_equal(gemm(x[::-1, ::2], packed), expected[::-1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_gather_rows_reads_the_packed_copy(dtype: Any) -> None:
    w = normal(np.random.default_rng(7), (150, 21), dtype)
    ids = np.array([149, 0, 64, 63, 64], np.int32)
    rows = gather_rows(pack_weight(w), ids)
    assert rows.dtype == np.float32
    np.testing.assert_array_equal(rows, widen(w)[ids])
    with jit.using("reference"):
        np.testing.assert_array_equal(gather_rows(pack_weight(w), ids), rows)


def test_reference_mode_runs_the_reference() -> None:
    rng = np.random.default_rng(8)
    x, w = normal(rng, (3, 40), np.uint16), normal(rng, (5, 40), np.uint16)
    bias = rng.standard_normal(5).astype(np.float32)
    with jit.using("reference"):
        c = gemm(x, pack_weight(w), bias)
    np.testing.assert_array_equal(c, gemm_ref(x, w, bias).astype(np.float32))


def test_no_rows_is_fine() -> None:
    packed = pack_weight(np.ones((3, 4), np.float32))
    assert gemm(np.zeros((0, 4), np.float32), packed).shape == (0, 3)


X, W = np.zeros((2, 8), np.float32), pack_weight(np.zeros((3, 8), np.float32))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((X[:, :7], W), r"x has shape \(2, 7\), expected \(M, 8\)"),
        ((X.astype(np.uint16), W), "x has dtype uint16, expected float32"),
        ((X, W, np.zeros(4, np.float32)), r"bias has shape \(4,\), expected \(3\)"),
        ((X, W, None, np.zeros((2, 4), np.float32)), r"out has shape \(2, 4\), expected \(2, 3\)"),
        ((X, W, None, np.zeros((2, 6), np.float32)[:, ::2]), "out is not a contiguous"),
        ((X, PackedWeight(np.repeat(W.data, 2)[::2], 3, 8)), "weight.data is not a contiguous"),
        ((X, PackedWeight(W.data, np.int64(3), np.int64(7))), r"weight.data has shape"),
        (
            (X, PackedWeight(W.data[:-1], 3, 8)),
            rf"weight.data has shape \({8 * NR - 1},\), expected \({8 * NR}\)",
        ),
    ],
)
def test_bad_input_names_the_argument(arguments: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"gemm: {message}"):
        gemm(*arguments)


def test_out_must_be_writable() -> None:
    out = np.zeros((2, 3), np.float32)
    out.flags.writeable = False
    with pytest.raises(ValueError, match="gemm: out is not a contiguous, writable array"):
        gemm(X, W, out=out)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs mprotect")
@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
@pytest.mark.parametrize(
    ("m", "n", "k"),
    [(1, 1, 1), (1, 64, 33), (1, 80, 6), (2, 48, 2), (3, 17, 5), (8, 130, 7), (14, 96, 3)],
)
def test_nothing_beyond_the_arrays_is_touched(m: int, n: int, k: int, dtype: Any) -> None:
    """A read or write of one element too many ends this process."""
    rng = np.random.default_rng(0)
    x, packed = normal(rng, (m, k), dtype), pack_weight(normal(rng, (n, k), dtype))
    bias = rng.standard_normal(n).astype(np.float32)
    kept = [guarded(a.size, a.dtype) for a in (x, packed.data, bias)]
    for (_, ours), a in zip(kept, (x, packed.data, bias), strict=True):
        ours[:] = a.reshape(-1)
    kept.append(guarded(m * n, np.float32))
    (_, x_end), (_, data), (_, bias_end), (_, out) = kept
    gemm(x_end.reshape(m, k), PackedWeight(data, n, k), bias_end, out.reshape(m, n))
    np.testing.assert_array_equal(out.reshape(m, n), gemm(x, packed, bias))


def test_lanes_of_panels_do_not_meet() -> None:
    n = 3 * NR
    with pytest.raises(ValueError, match=f"pack_rows: lane 1 of 2 in a weight of {n} rows"):
        pack_rows(new_weight(n, 8, np.float32), 3, np.zeros((1, 8), np.float32), lane=1, lanes=2)
    with pytest.raises(ValueError, match="pack_rows: lane 2 of 2"):
        pack_rows(new_weight(128, 8, np.float32), 0, np.zeros((1, 8), np.float32), lane=2, lanes=2)


def test_out_may_not_overlap_x() -> None:
    square = np.zeros((8, 8), np.float32)
    with pytest.raises(ValueError, match="gemm: out shares memory with x"):
        gemm(square, pack_weight(square), out=square)


def test_out_may_not_overlap_the_bias() -> None:
    out = np.zeros((8, 64), np.float32)
    packed = pack_weight(np.zeros((64, 8), np.float32))
    with pytest.raises(ValueError, match="gemm: out shares memory with bias"):
        gemm(np.zeros((8, 8), np.float32), packed, out[3], out)


@pytest.mark.parametrize(("n", "k"), [(3, 0), (0, 4)])
def test_a_weight_has_a_row_and_a_column(n: int, k: int) -> None:
    nothing = np.empty(0, np.float32)
    with pytest.raises(ValueError, match=rf"packed_size: \({n}, {k}\), expected at least one"):
        gemm(np.zeros((2, k), np.float32), PackedWeight(nothing, n, k))
    with pytest.raises(ValueError, match=rf"packed_size: \({n}, {k}\), expected at least one"):
        moe.grouped_gemm(
            np.zeros((2, k), np.float32), moe.PackedExperts(nothing, 1, n, k), np.array([0, 2])
        )


def test_bad_ids_and_parts() -> None:
    with pytest.raises(ValueError, match="gather_rows: ids holds 3, expected 0 to 2"):
        gather_rows(W, np.array([0, 3], np.int32))
    with pytest.raises(ValueError, match=r"parts\[1\] has shape \(3, 7\), expected \(N, 8\)"):
        pack_weights([np.zeros((3, 8), np.float32), np.zeros((3, 7), np.float32)])
    with pytest.raises(ValueError, match="parts is empty"):
        pack_weights([])


DOT = jit.cpu_features() & {"avx512bf16", "fma"}  # what a dot product is made of


@pytest.mark.skipif(
    jit.INTERPRETED or not DOT or (jit.WIDE and "avx512bf16" not in DOT),
    reason="the CPU has neither vdpbf16ps nor tiles for fused multiply-add of BF16",
)
@pytest.mark.parametrize("name", ["gemm", "mlp", "moe"])
def test_assembly_has_the_dot_product_and_no_spills(name: str) -> None:
    x, w = np.zeros((2, 64), np.uint16), np.zeros((64, 64), np.uint16)
    if name == "gemm":
        gemm(x, pack_weight(w))
        kernel = gemm_module._gemm_kernel
    elif name == "mlp":
        mlp.mlp(x, mlp.new_mlp_weight(64, 64, np.uint16, gated=True), "silu")
        kernel = mlp._mlp_kernel
    else:
        moe.grouped_gemm(x, moe.pack_experts([w]), np.array([0, 2]))
        kernel = moe._grouped_gemm_kernel
    word, register = ("vdpbf16ps", "zmm") if "avx512bf16" in DOT else ("vfmadd", "[yz]mm")
    spilled, kept = [], []  # dot products of the loops over k
    for block in re.split(r"^\.?\w+:", jit.assembly(kernel), flags=re.M):
        dots = [line for line in block.splitlines() if word in line]
        if len(dots) >= 4 and all(re.search(register, line) for line in dots):
            spills = re.search(rf"\(%rsp\).*{register}|{register}.*\(%rsp\)", block)
            (spilled if spills else kept).append(len(dots))
    if word == "vdpbf16ps":
        assert 4 * gemm_module.MR in kept
        assert set(spilled) <= {4 * gemm_module.TALL}, "a spilled accumulator"
    else:  # the odd elements of the pairs, then the even ones, each in two registers
        whole = 2 * gemm_module.MR * 2
        assert whole in kept and whole not in spilled, "a spilled accumulator"


@pytest.mark.skipif(not jit.INTERPRETED, reason="looks at what is asked for, interpreted")
@pytest.mark.parametrize("m", [9, 12, 48, 49, 64, 100, 128])
def test_the_next_block_is_asked_for(monkeypatch: pytest.MonkeyPatch, m: int) -> None:
    asked: set[int] = set()
    monkeypatch.setattr(gemm_module, "prefetch", lambda b, at: asked.add(at // 32))
    k = 64
    gemm(np.zeros((m, k), np.uint16), pack_weight(np.zeros((NR, k), np.uint16)))
    lines = NR * k // 32  # of a panel, 64 bytes each
    missing = set(range(lines, 2 * lines)) - asked
    assert len(missing) <= (0.2 * lines if m < 12 else 2)


@pytest.mark.skipif(not jit.INTERPRETED, reason="looks at what is asked for, interpreted")
@pytest.mark.parametrize("m", [1, 2, 3, 4, 5, 6, 8])
def test_a_block_that_is_read_once_is_asked_for_once_or_not_at_all(
    monkeypatch: pytest.MonkeyPatch, m: int
) -> None:
    asked: dict[str, list[int]] = {"prefetch": [], "prefetch_once": []}
    for name, lines in asked.items():
        monkeypatch.setattr(gemm_module, name, lambda b, at, to=lines: to.append(at // 32))
    k = 150
    gemm(np.zeros((m, k), np.uint16), pack_weight(np.zeros((NR, k), np.uint16)))

    def panel(ahead: int) -> list[int]:
        first = ahead * NR * 2 // 32
        return list(range(first, first + NR * k // 32))

    assert asked["prefetch_once"] == (panel(gemm_module.AHEAD) if m == 1 else [])
    assert asked["prefetch"] == (panel(gemm_module.FURTHER) if m == 8 else [])  # 5 rows are 6


@pytest.mark.skipif(not jit.INTERPRETED, reason="looks at what is asked for, interpreted")
def test_seven_rows_of_an_expert_ask_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    for name in ("prefetch", "prefetch_once"):
        monkeypatch.setattr(gemm_module, name, lambda b, at: asked.append(at))
    x, w = np.zeros((7, 150), np.uint16), np.zeros((NR, 150), np.uint16)
    moe.grouped_gemm(x, moe.pack_experts([w]), np.array([0, 7]))
    assert not asked  # tiles of 6 and 1


@pytest.mark.skipif(not jit.INTERPRETED, reason="calls a device function")
@pytest.mark.parametrize(
    ("m", "cut"),
    [(8, [8]), (14, [6, 4, 4]), (20, [6, 6, 4, 4]), (32, [6, 6, 6, 6, 4, 4]), (10, [6, 4])],
)
def test_eight_rows_left_are_two_tiles_of_four(m: int, cut: list[int]) -> None:
    left, tiles = m, []
    while left:
        tiles.append(min(gemm_module._height(left, m), left))
        left -= tiles[-1]
    assert tiles == cut


def test_uneven_rows_are_one_tile() -> None:
    for m in range(14):
        added = gemm_module.operand(np.zeros((m, 4), np.uint16))[1]
        assert added == (m in (3, 5, 7) if jit.WIDE else m > 1 and m % 2)


def test_an_operand_has_the_values_of_x() -> None:
    x = normal(np.random.default_rng(0), (3, 70), np.uint16)
    flat, added, k = gemm_module.operand(x)
    assert (added, k) == (1, 70)
    rows = flat.reshape(4, 70) if jit.WIDE else flat.reshape(70, 4).T
    np.testing.assert_array_equal(widen(rows), widen(np.pad(x, ((0, 1), (0, 0)))))


@pytest.mark.skipif(jit.WIDE, reason="only 16 registers have rows packed")
@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
def test_rows_are_packed_in_the_tiles_that_read_them(dtype: Any) -> None:
    x = normal(np.random.default_rng(0), (8 + 7 + 1 + 98, 10), dtype)
    offsets = np.array([0, 8, 15, 15, 16, 114])
    flat, added, _ = gemm_module.operand(x, offsets)
    assert added == 0
    np.testing.assert_array_equal(flat, gemm_module.operand_ref(x, offsets))
    np.testing.assert_array_equal(flat[40:80].reshape(10, 4).T, widen(x[4:8]))


@pytest.mark.skipif(jit.INTERPRETED, reason="minutes, and there are no blocks of rows")
@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
def test_every_number_of_rows_around_a_block_of_them(dtype: Any) -> None:
    rng = np.random.default_rng(0)
    x, w = (normal(rng, (rows, 18), dtype) for rows in (210, 70))
    packed = pack_weight(w)
    alone = np.concatenate([gemm(x[i : i + 1], packed) for i in range(len(x))])
    for m in (*range(90, 112), *range(186, 211)):
        np.testing.assert_array_equal(gemm(x[:m], packed), alone[:m])


@pytest.mark.parametrize("m", range(1, 26))
@pytest.mark.parametrize("given", [False, True])
def test_every_number_of_rows(m: int, given: bool) -> None:
    rng = np.random.default_rng(m)
    x, w = (normal(rng, (rows, 18), np.uint16) for rows in (25, 70))
    packed, out = pack_weight(w), np.full((m, 70), np.nan, np.float32)
    result = gemm(x[:m], packed, out=out if given else None)
    assert result.shape == (m, 70) and (result is out or not given)
    np.testing.assert_array_equal(result, gemm(x, packed)[:m])
    np.testing.assert_allclose(result, gemm_ref(x[:m], w), rtol=1e-4, atol=1e-4)
