"""norm.py against its float64 references: shapes, dtypes, strides, NaN, aliasing, threads."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pace_nb.kernels import jit
from pace_nb.kernels.bf16 import from_f32, widen
from pace_nb.kernels.norm import (
    add_layer_norm,
    add_layer_norm_ref,
    add_rms_norm,
    add_rms_norm_ref,
    layer_norm,
    layer_norm_ref,
    rms_norm,
    rms_norm_ref,
)

Array = NDArray[Any]
EPS = 1e-5
SHAPES = [(1, 1), (3, 15), (2, 16), (5, 17), (4, 63), (4, 64), (3, 65), (2, 781), (1, 2048)]
if not jit.INTERPRETED:
    SHAPES += [(1823, 781), (7, 8192)]


def sample(shape: tuple[int, int], dtype: Any, offset: float = 0.0) -> tuple[Array, ...]:
    """x, residual, weight, bias; `offset` moves x away from zero mean."""
    rng = np.random.default_rng(sum(shape))
    x = (rng.standard_normal(shape) + offset).astype(np.float32)
    residual = rng.standard_normal(shape).astype(np.float32)
    weight, bias = (rng.standard_normal(shape[1]).astype(np.float32) for _ in range(2))
    return (from_f32(x) if dtype == np.uint16 else x), residual, weight, bias


def assert_rms_close(y: Array, ref: Array, x: Array) -> None:
    """Within the bound that the docstring declares for RMSNorm."""
    bound = (x.shape[1] / 128 + 7) * 2.0**-24 + (2.0**-8 if y.dtype == np.uint16 else 0)
    error = np.abs(widen(y) - ref)
    assert np.all(error <= bound * np.abs(ref) + 1e-37), float((error / np.abs(ref)).max() / bound)


def assert_close(y: Array, ref: Array, x: Array, weight: Array) -> None:
    """Within the bound that the docstring declares for LayerNorm."""
    e, x = x.shape[1], widen(x)
    spread = np.abs(x).max(-1, keepdims=True) / np.sqrt(x.var(-1, keepdims=True) + EPS)
    bound = (e / 64 + 9) * 2.0**-24 * (np.abs(ref) + np.abs(weight) * spread)
    bound += np.abs(ref) * (2.0**-8 if y.dtype == np.uint16 else 0) + 1e-37
    error = np.abs(widen(y) - ref)
    assert np.all(error <= bound), float((error / bound).max())


@pytest.mark.parametrize("out_dtype", [np.float32, np.uint16])
@pytest.mark.parametrize("x_dtype", [np.float32, np.uint16])
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_reference(shape: tuple[int, int], x_dtype: Any, out_dtype: Any) -> None:
    x, residual, weight, bias = sample(shape, x_dtype)
    assert_rms_close(rms_norm(x, weight, EPS, dtype=out_dtype), rms_norm_ref(x, weight, EPS), x)
    for b in (bias, None):
        assert_close(
            layer_norm(x, weight, b, EPS, dtype=out_dtype),
            layer_norm_ref(x, weight, b, EPS),
            x,
            weight,
        )
    total, ref = add_rms_norm_ref(x, residual, weight, EPS)
    r = residual.copy()
    assert_rms_close(add_rms_norm(x, r, weight, EPS, dtype=out_dtype), ref, total)
    np.testing.assert_array_equal(r, total)
    total, ref = add_layer_norm_ref(x, residual, weight, bias, EPS)
    r = residual.copy()
    assert_close(add_layer_norm(x, r, weight, bias, EPS, dtype=out_dtype), ref, total, weight)
    np.testing.assert_array_equal(r, total)


@pytest.mark.parametrize("mode", ["numba", "reference"])
@pytest.mark.parametrize("out_dtype", [np.float32, np.uint16])
@pytest.mark.parametrize("x_dtype", [np.float32, np.uint16])
@pytest.mark.parametrize("shape", SHAPES[:8])
def test_a_norm_of_what_is_added_has_the_bits_of_both(
    shape: tuple[int, int], x_dtype: Any, out_dtype: Any, mode: Any
) -> None:
    x, residual, weight, inner = sample(shape, x_dtype)
    wide = np.zeros((shape[0], shape[1] + 3), x_dtype)[:, 1:-2]  # rows apart and off a line
    wide[...] = x
    with jit.using(mode):
        total, fused = residual.copy(), residual.copy()
        want = add_rms_norm(rms_norm(x, inner, EPS), total, weight, EPS, dtype=out_dtype)
        found = add_rms_norm(wide, fused, weight, EPS, dtype=out_dtype, inner=inner)
    np.testing.assert_array_equal(fused, total)
    np.testing.assert_array_equal(found, want)
    assert not np.array_equal(fused, residual + widen(x))


def test_a_nan_in_what_is_added_stays_in_its_row() -> None:
    x, residual, weight, inner = sample((3, 40), np.float32)
    x[1, 17] = np.nan
    total = residual.copy()
    y = add_rms_norm(x, total, weight, EPS, inner=inner)
    assert np.isnan(y[1]).all() and np.isnan(total[1]).all()
    assert np.isfinite(y[[0, 2]]).all() and np.isfinite(total[[0, 2]]).all()


@pytest.mark.parametrize("eps", [0.0, 1e-5])
def test_a_row_of_zeros(eps: float) -> None:
    x, residual, weight, bias = sample((3, 20), np.float32)
    x[1] = residual[1] = 0
    for y, of_zeros in (
        (rms_norm(x, weight, eps), 0),
        (add_rms_norm(x, residual, weight, eps, inner=weight), 0),
        (layer_norm(x, weight, bias, eps), bias),
    ):
        np.testing.assert_array_equal(y[1], of_zeros if eps else np.nan)  # 0 / 0
        assert np.isfinite(y[[0, 2]]).all()


def test_references_agree_with_plain_formulas() -> None:
    x, _, weight, bias = sample((2, 5), np.float32)
    row, w, b = x[1].astype(float), weight.astype(float), bias.astype(float)
    np.testing.assert_allclose(
        rms_norm_ref(x, weight, EPS)[1], row / (sum(row**2) / 5 + EPS) ** 0.5 * w
    )
    mean = sum(row) / 5
    std = (sum((row - mean) ** 2) / 5 + EPS) ** 0.5
    np.testing.assert_allclose(layer_norm_ref(x, weight, bias, EPS)[1], (row - mean) / std * w + b)


def test_layer_norm_far_from_zero_mean_does_not_cancel() -> None:
    x, _, weight, bias = sample((3, 300), np.float32, offset=1000.0)
    assert_close(layer_norm(x, weight, bias, EPS), layer_norm_ref(x, weight, bias, EPS), x, weight)


@pytest.mark.parametrize("x_dtype", [np.float32, np.uint16])
def test_strided_and_misaligned_rows_give_the_same_bits(x_dtype: Any) -> None:
    x, _, weight, _ = sample((6, 40), x_dtype)
    wide = np.zeros((6, 57), x_dtype)
    wide[:, 1:41] = x
    plain = rms_norm(x, weight, EPS)
    np.testing.assert_array_equal(rms_norm(wide[:, 1:41], weight, EPS), plain)
    np.testing.assert_array_equal(rms_norm(x[::2], weight, EPS), plain[::2])
    np.testing.assert_array_equal(rms_norm(x[::-1], weight, EPS), plain[::-1])
    np.testing.assert_array_equal(rms_norm(np.asfortranarray(x), weight, EPS), plain)
    np.testing.assert_array_equal(
        rms_norm(np.broadcast_to(x[:1], (4, 40)), weight, EPS), plain[[0] * 4]
    )


def test_many_small_elements_after_few_large_ones() -> None:
    """The worst order for a running sum: it stays within the declared bound."""
    x = np.full((1, 2048), np.float32(0.9**0.5 * 2.0**-12))
    x[:, :64] = 1
    weight = np.ones(2048, np.float32)
    assert_rms_close(rms_norm(x, weight, 1e-6), rms_norm_ref(x, weight, 1e-6), x)


def test_out_may_be_x_itself() -> None:
    x, _, weight, bias = sample((5, 33), np.float32)
    expected = layer_norm(x, weight, bias, EPS)
    assert layer_norm(x, weight, bias, EPS, out=x) is x
    np.testing.assert_array_equal(x, expected)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("column", [0, 16, 39])
def test_nan_and_infinity_stay_in_their_row(bad: float, column: int) -> None:
    x, residual, weight, bias = sample((3, 40), np.float32)
    clean = [f(x, weight, EPS) for f in (rms_norm, partial(layer_norm_with, bias))]
    x[1, column] = bad
    for f, before in zip((rms_norm, partial(layer_norm_with, bias)), clean, strict=True):
        y = f(x, weight, EPS)
        np.testing.assert_array_equal(y[[0, 2]], before[[0, 2]])
        assert np.isnan(y[1, column])
        others = np.delete(y[1], column)
        assert (others == 0).all() if f is rms_norm and np.isinf(bad) else np.isnan(others).all()
    assert np.isnan(add_rms_norm(x, residual, weight, EPS)[1, column])


def layer_norm_with(bias: Array, x: Array, weight: Array, eps: float) -> Array:
    return layer_norm(x, weight, bias, eps)


def test_a_row_does_not_depend_on_the_others_or_on_threads() -> None:
    x, _, weight, bias = sample((37, 130), np.float32)
    threads = jit.num_threads()
    try:
        results = []
        for n in {1, threads}:
            jit.set_num_threads(n)
            results.append((rms_norm(x, weight, EPS), layer_norm(x, weight, bias, EPS)))
    finally:
        jit.set_num_threads(threads)
    for r in results:
        np.testing.assert_array_equal(r[0], results[0][0])
        np.testing.assert_array_equal(r[1], results[0][1])
    np.testing.assert_array_equal(rms_norm(x[5:6], weight, EPS), results[0][0][5:6])


@pytest.mark.skipif(jit.INTERPRETED, reason="needs both a compiled and an interpreted body")
def test_compiled_and_interpreted_agree() -> None:
    """One source, two executions: they differ only where NumPy rounds an fma twice."""
    code = (
        "import sys, numpy as np; from pace_nb.kernels.norm import rms_norm; "
        "d = np.load(sys.argv[1]); np.save(sys.argv[2], rms_norm(d['x'], d['weight'], 1e-5))"
    )
    x, _, weight, _ = sample((3, 100), np.float32)
    with tempfile.TemporaryDirectory() as folder:
        given, result = Path(folder, "in.npz"), Path(folder, "out.npy")
        np.savez(given, x=x, weight=weight)
        environment = os.environ | {"NUMBA_DISABLE_JIT": "1"}
        subprocess.run([sys.executable, "-c", code, given, result], check=True, env=environment)
        np.testing.assert_array_almost_equal_nulp(np.load(result), rms_norm(x, weight, EPS), 2)


def test_reference_mode_runs_the_reference() -> None:
    x, residual, weight, bias = sample((3, 20), np.uint16)
    with jit.using("reference"):
        y = rms_norm(x, weight, EPS, dtype=np.uint16)
        r = residual.copy()
        z = add_layer_norm(x, r, weight, bias, EPS)
    assert y.dtype == np.uint16
    np.testing.assert_array_equal(
        widen(y), widen(from_f32(rms_norm_ref(x, weight, EPS).astype(np.float32)))
    )
    np.testing.assert_array_equal(
        z, add_layer_norm_ref(x, residual, weight, bias, EPS)[1].astype(np.float32)
    )
    np.testing.assert_array_equal(r, add_layer_norm_ref(x, residual, weight, bias, EPS)[0])


def test_no_rows_is_fine() -> None:
    weight = np.ones(8, np.float32)
    assert rms_norm(np.zeros((0, 8), np.float32), weight, EPS).shape == (0, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": np.zeros((2, 8))}, "x has dtype float64, expected uint16 or float32"),
        ({"x": np.zeros(8, np.float32)}, r"x has shape \(8,\), expected \(T, E\)"),
        ({"weight": np.ones(7, np.float32)}, r"weight has shape \(7,\), expected \(8\)"),
        ({"out": np.zeros((3, 8), np.float32)}, r"out has shape \(3, 8\), expected \(2, 8\)"),
        ({"out": np.zeros((2, 16), np.float32)[:, ::2]}, "out is not a contiguous, writable array"),
        ({"dtype": np.float64}, "out has dtype float64, expected uint16 or float32"),
        ({"eps": float("nan")}, "eps is nan"),
        (
            {"x": np.zeros((2, 0), np.float32), "weight": np.zeros(0, np.float32)},
            "x has shape .*one column",
        ),
        ({"x": [[1.0]]}, "x is list, expected numpy.ndarray"),
    ],
)
def test_bad_input_names_the_argument(change: dict[str, Any], message: str) -> None:
    arguments = {
        "x": np.zeros((2, 8), np.float32),
        "weight": np.ones(8, np.float32),
        "eps": EPS,
    } | change
    with pytest.raises((TypeError, ValueError), match=f"rms_norm: {message}"):
        rms_norm(**arguments)


@pytest.mark.parametrize("add_norm", [add_rms_norm, add_layer_norm])
@pytest.mark.parametrize(
    ("residual", "message"),
    [
        (np.zeros((3, 8), np.float32), r"residual has shape \(3, 8\), expected \(2, 8\)"),
        (np.zeros((2, 8)), "residual has dtype float64, expected float32"),
        (np.zeros((2, 16), np.float32)[:, ::2], "residual is not a contiguous, writable array"),
    ],
)
def test_a_bad_residual_is_named(add_norm: Any, residual: Array, message: str) -> None:
    x, weight = np.ones((2, 8), np.float32), np.ones(8, np.float32)
    arguments = (weight, EPS) if add_norm is add_rms_norm else (weight, None, EPS)
    with pytest.raises((TypeError, ValueError), match=f"{add_norm.__name__}: {message}"):
        add_norm(x, residual, *arguments)
    assert not residual.any()


@pytest.mark.parametrize(
    ("inner", "message"),
    [
        (np.ones(7, np.float32), r"inner has shape \(7,\), expected \(8\)"),
        (np.ones(8), "inner has dtype float64, expected float32"),
    ],
)
def test_a_bad_weight_of_what_is_added_is_named(inner: Array, message: str) -> None:
    x, weight = np.ones((2, 8), np.float32), np.ones(8, np.float32)
    residual = np.zeros_like(x)
    with pytest.raises((TypeError, ValueError), match=f"add_rms_norm: {message}"):
        add_rms_norm(x, residual, weight, EPS, inner=inner)
    assert not residual.any()
