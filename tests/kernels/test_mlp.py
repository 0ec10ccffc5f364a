"""mlp.py: to the bit the product and the activation one after the other; errors name arguments."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pace_nb.kernels import jit
from pace_nb.kernels.activation import activation, gated_activation
from pace_nb.kernels.bf16 import from_f32, widen
from pace_nb.kernels.gemm import KC, NR, gemm, pack_weight, pack_weights
from pace_nb.kernels.mlp import (
    mlp,
    mlp_ref,
    new_mlp_weight,
    pack_mlp_rows,
    unpack_mlp_weight,
)

Array = NDArray[Any]
DTYPES = [np.uint16, np.float32]


def normal(rng: np.random.Generator, shape: Any, dtype: Any) -> Array:
    x = rng.standard_normal(shape).astype(np.float32)
    return from_f32(x) if dtype == np.uint16 else x


def case(m: int, f: int, k: int, dtype: Any, parts: int, biased: bool) -> tuple[Any, ...]:
    rng = np.random.default_rng(m + f + k)
    x, weights = normal(rng, (m, k), dtype), [normal(rng, (f, k), dtype) for _ in range(parts)]
    biases = rng.standard_normal((parts, f)).astype(np.float32) if biased else None
    weight = new_mlp_weight(f, k, dtype, gated=parts == 2, biases=biases)
    stacked = np.concatenate(weights)
    middle = (2 * len(stacked)) // 3  # blocks do not end where parts do
    assert pack_mlp_rows(weight, 0, stacked[:middle])
    assert pack_mlp_rows(weight, middle, stacked[middle:])
    return x, weight, weights, biases


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(
    ("m", "f", "k"),
    [(1, 1, 1), (1, 64, 2), (3, 65, 15), (8, 130, 33), (25, 200, 16)]
    + ([] if jit.INTERPRETED else [(8, 70, KC + 7)]),
)
def test_bits_of_product_then_activation(m, f, k, dtype, parts, biased):
    x, weight, weights, biases = case(m, f, k, dtype, parts, biased)
    for kind in ("silu", "gelu", "gelu_tanh", "relu"):
        stacked = None if biases is None else biases.reshape(-1)
        rows = gemm(x, pack_weights(weights), stacked)
        apart = (gated_activation if parts == 2 else activation)(rows, kind, dtype=dtype)
        np.testing.assert_array_equal(mlp(x, weight, kind), apart)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("parts", [1, 2])
def test_against_the_reference(dtype, parts):
    x, weight, weights, biases = case(9, 70, 48, dtype, parts, True)
    expected = mlp_ref(x, weights, "silu", biases)
    bound = (2.0**-8 if dtype == np.uint16 else 1e-4) * np.abs(expected) + 2e-4
    assert (np.abs(widen(mlp(x, weight, "silu")) - expected) <= bound).all()
    with jit.using("reference"):
        reference = mlp(x, weight, "silu")
    assert (np.abs(widen(reference) - expected) <= bound).all()


@pytest.mark.parametrize("parts", [1, 2])
def test_unpacking_gives_what_was_packed(parts):
    _, weight, weights, biases = case(1, 70, 6, np.float32, parts, True)
    found, their_biases = unpack_mlp_weight(weight)
    np.testing.assert_array_equal(found, weights)
    np.testing.assert_array_equal(their_biases, biases)


@pytest.mark.parametrize("m", [1, 5, 7, 8, 20])
def test_a_row_does_not_depend_on_the_batch_or_threads(m):
    x, weight, _, _ = case(20, 300, 64, np.uint16, 2, False)
    out = np.empty((m, 300), np.uint16)
    whole = mlp(x, weight, "silu")
    assert mlp(x[:m], weight, "silu", out) is out
    np.testing.assert_array_equal(out, whole[:m])
    before = jit.num_threads()
    jit.set_num_threads(1)
    try:
        np.testing.assert_array_equal(mlp(x, weight, "silu"), whole)
    finally:
        jit.set_num_threads(before)


def test_strided_rows_and_read_only_out():
    x, weight, _, _ = case(9, 70, 48, np.uint16, 2, False)
    wide = np.repeat(x, 2, axis=1)[:, ::2]
    assert not wide.flags.c_contiguous
    np.testing.assert_array_equal(mlp(wide, weight, "silu"), mlp(x, weight, "silu"))
    out = np.zeros((9, 70), np.uint16)
    out.flags.writeable = False
    with pytest.raises(ValueError, match="mlp: out is not a contiguous, writable array"):
        mlp(x, weight, "silu", out)


def test_no_rows_is_fine():
    _, weight, _, _ = case(1, 5, 4, np.float32, 2, False)
    assert mlp(np.zeros((0, 4), np.float32), weight, "relu").shape == (0, 5)


def test_nan_and_infinity_stay_in_their_row_and_are_found_at_packing():
    x, weight, _, _ = case(4, 70, 8, np.float32, 2, False)
    x[2, 3] = np.nan
    found = np.isnan(mlp(x, weight, "silu"))
    assert found[2].all() and not found[[0, 1, 3]].any()
    assert not pack_mlp_rows(weight, 69, np.full((2, 8), np.inf, np.float32))


W = new_mlp_weight(5, 4, np.float32, gated=True)
ROWS, SIZE = 2 * NR, 8 * NR  # of W, padded
X = np.zeros((2, 4), np.float32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((X[:, :3], W, "silu"), r"x has shape \(2, 3\), expected \(M, 4\)"),
        ((X.astype(np.uint16), W, "silu"), "x has dtype uint16, expected float32"),
        ((X, W, "mish"), "kind is 'mish', expected one of silu"),
        (
            (X, W, "silu", np.zeros((2, 4), np.float32)),
            r"out has shape \(2, 4\), expected \(2, 5\)",
        ),
        ((X, W, "silu", np.zeros((2, 5), np.uint16)), "out has dtype uint16, expected float32"),
        ((X, W._replace(n=65), "silu"), f"weight of {ROWS} rows and 0 biases for F = 65"),
        ((X, W._replace(parts=1), "silu"), f"weight of {ROWS} rows"),
        ((X, W._replace(parts=4, n=20), "silu"), f"weight of {ROWS} rows"),
        (
            (X, W._replace(panels=W.panels._replace(data=W.panels.data[:-1])), "silu"),
            rf"weight.data has shape \({SIZE - 1},\), expected \({SIZE}\)",
        ),
        ((X, W, "silu", np.zeros((2, 10), np.float32)[:, ::2]), "out is not a contiguous"),
        ((X, W._replace(bias=np.zeros(128)), "silu"), "weight.bias has dtype float64"),
        (
            (X, W._replace(bias=np.zeros(5, np.float32)), "silu"),
            f"weight of {ROWS} rows and 5 biases",
        ),
    ],
)
def test_bad_input_names_the_argument(arguments: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"mlp: {message}"):
        mlp(*arguments)


def test_bad_packing():
    with pytest.raises(ValueError, match="pack_mlp_rows: row0 is 9, expected 0 to 8: 2 rows of 10"):
        pack_mlp_rows(W, 9, np.zeros((2, 4), np.float32))
    with pytest.raises(ValueError, match=r"biases has shape \(1, 5\), expected \(2, 5\)"):
        new_mlp_weight(5, 4, np.float32, gated=True, biases=np.zeros((1, 5), np.float32))
    square = np.zeros((64, 64), np.float32)
    weight = new_mlp_weight(64, 64, np.float32, gated=False)
    with pytest.raises(ValueError, match="mlp: out shares memory with x"):
        mlp(square, weight, "relu", square)


def test_weights_of_one_part_are_packed_as_gemm_packs_them():
    w = np.arange(64 * 6, dtype=np.float32).reshape(64, 6)
    weight = new_mlp_weight(64, 6, np.float32, gated=False)
    assert pack_mlp_rows(weight, 0, w)
    np.testing.assert_array_equal(weight.panels.data, pack_weight(w).data)
