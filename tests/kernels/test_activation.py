"""activation.py against its float64 references: bounds, special values, strides, threads."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pace_nb.kernels import jit
from pace_nb.kernels.activation import (
    COLUMNS,
    KINDS,
    activation,
    activation_ref,
    clamped_swiglu,
    clamped_swiglu_ref,
    gated_activation,
    gated_activation_ref,
)
from pace_nb.kernels.bf16 import narrow, widen

Array = NDArray[Any]
F32, BF16 = np.float32, np.uint16
FUSED = jit.INTERPRETED or bool({"fma", "avx512f"} & jit.cpu_features())
SHAPES = [(1, 1), (3, 15), (2, 16), (2, 17), (4, 33), (1, COLUMNS), (2, COLUMNS + 1)]
if not jit.INTERPRETED:
    SHAPES += [(1823, 781), (1, 2 * COLUMNS + 40)]


def sample(shape: tuple[int, int], scale: float = 3.0) -> Array:
    rng = np.random.default_rng(sum(shape))
    return (rng.standard_normal(shape) * scale).astype(F32)


def bound(x: Array, ref: Array, kind: str) -> Array:
    """The docstring's bound for an f32 activation of x, float64."""
    x = widen(x)
    twice_u = 2.0 * math.sqrt(2 / math.pi) * np.abs(x + 0.044715 * x**3)
    ulps = {
        "silu": 4.0,
        "gelu": 9.0 if FUSED else 9.0 + x**2 / 2,
        "gelu_tanh": 4.0 + (2.0 if FUSED else 3.0) * twice_u,
        "relu": 0.0,
    }[kind]
    tiny = 0.0 if kind == "relu" else 1.2e-38 * np.maximum(1.0, np.abs(x))
    return ulps * np.spacing(np.abs(ref).astype(F32)) + tiny


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_reference(shape: tuple[int, int], kind: str) -> None:
    x, ref = sample(shape), activation_ref(sample(shape), kind)
    assert np.all(np.abs(activation(x, kind) - ref) <= bound(x, ref, kind))
    y = activation(x, kind, dtype=BF16)
    assert np.all(np.abs(widen(y) - ref) <= bound(x, ref, kind) + 2.0**-8 * np.abs(ref))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_gated_matches_reference(shape: tuple[int, int], kind: str) -> None:
    t, f = shape
    gate, up = sample(shape), sample((t, f + 1))[:, 1:]
    gate_up = np.concatenate((gate, up), axis=1)
    ref = gated_activation_ref(gate_up, kind)
    act = activation_ref(gate, kind)
    error = bound(gate, act, kind) * np.abs(up) + 2.0**-24 * np.abs(ref) + 1e-44
    assert np.all(np.abs(gated_activation(gate_up, kind) - ref) <= error)
    y = gated_activation(gate_up, kind, dtype=BF16)
    assert np.all(np.abs(widen(y) - ref) <= error + 2.0**-8 * np.abs(ref))


@pytest.mark.parametrize("kind", KINDS)
def test_the_whole_range(kind: str) -> None:
    """Tails too, where a formula with 1 + tanh or 1 + erf has no digits left."""
    n = 2000 if jit.INTERPRETED else 200_000
    x = np.concatenate((np.linspace(-30, 30, n), np.geomspace(1e-38, 1e38, n))).astype(F32)
    x = np.concatenate((x, -x))[None]
    ref = activation_ref(x, kind)
    assert np.all(np.abs(activation(x, kind) - ref) <= bound(x, ref, kind))


@pytest.mark.parametrize(("alpha", "limit"), [(1.702, 7.0), (0.5, 1.25)])
@pytest.mark.parametrize("shape", SHAPES)
def test_clamped_swiglu_matches_reference(
    shape: tuple[int, int], alpha: float, limit: float
) -> None:
    t, f = shape
    gate_up = np.concatenate((sample(shape, 6.0), sample((t, f + 1), 6.0)[:, 1:]), axis=1)
    ref = clamped_swiglu_ref(gate_up, alpha, limit)
    ulps = 6.0 + 2.0 * alpha * np.abs(np.minimum(widen(gate_up[:, :f]), limit))
    error = ulps * np.spacing(np.abs(ref).astype(F32)) + 1e-37
    assert np.all(np.abs(clamped_swiglu(gate_up, alpha, limit) - ref) <= error)
    y = clamped_swiglu(gate_up, alpha, limit, dtype=BF16)
    assert np.all(np.abs(widen(y) - ref) <= error + 2.0**-8 * np.abs(ref))
    with jit.using("reference"):
        again = clamped_swiglu(gate_up, alpha, limit, dtype=BF16)
    np.testing.assert_array_equal(again, narrow(ref, BF16))


def test_clamped_swiglu_clamps_one_side_of_the_gate_and_both_of_up() -> None:
    gate = np.float32([7.0, 9.0, -9.0, 1.0, 1.0, 1.0, 1.0, 0.0])
    up = np.float32([1.0, 1.0, 1.0, 7.0, 9.0, -7.0, -9.0, 5.0])

    def unit(g: float, u: float) -> float:
        return g * (0.5 + 0.5 * math.tanh(1.702 * g / 2)) * (u + 1)

    expected = [
        unit(*pair) for pair in [(7, 1), (7, 1), (-9, 1), (1, 7), (1, 7), (1, -7), (1, -7), (0, 5)]
    ]
    gate_up = np.concatenate((gate, up))[None]
    np.testing.assert_allclose(clamped_swiglu_ref(gate_up, 1.702, 7.0)[0], expected, rtol=1e-9)
    y = clamped_swiglu(gate_up, 1.702, 7.0)[0]
    np.testing.assert_allclose(y, expected, rtol=2e-6)
    assert y[0] == y[1] and y[3] == y[4] and y[5] == y[6]


@pytest.mark.parametrize("column", [0, 15, 16, 39])
def test_clamped_swiglu_keeps_a_nan_in_its_element(column: int) -> None:
    gate_up = sample((3, 80))
    clean = clamped_swiglu(gate_up, 1.702, 7.0)
    for at in (column, 40 + column):  # a clamp must not hide it
        bad = gate_up.copy()
        bad[1, at] = np.nan
        y = clamped_swiglu(bad, 1.702, 7.0)
        changed = np.argwhere(y.view(np.uint32) != clean.view(np.uint32))
        np.testing.assert_array_equal(changed, [[1, column]])
        assert np.isnan(y[1, column]) and np.isnan(clamped_swiglu_ref(bad, 1.702, 7.0)[1, column])
    with np.errstate(invalid="ignore"):
        infinite = np.float32([[math.inf, -math.inf, 1.0, -1.0, 0.0, math.inf]])
        y, ref = clamped_swiglu(infinite, 1.702, 7.0), clamped_swiglu_ref(infinite, 1.702, 7.0)
    np.testing.assert_allclose(y, ref, rtol=1e-6)


def test_clamped_swiglu_of_an_element_does_not_depend_on_the_others() -> None:
    f = 2 * COLUMNS + 32
    gate_up = sample((3, 2 * f))
    whole = clamped_swiglu(gate_up, 1.702, 7.0)
    part = gate_up[1:2, [7, f - 1, f + 7, 2 * f - 1]]
    np.testing.assert_array_equal(clamped_swiglu(part, 1.702, 7.0), whole[1:2, [7, f - 1]])
    wide = np.zeros((3, 2 * f + 5), F32)
    wide[:, 2:-3] = gate_up
    np.testing.assert_array_equal(clamped_swiglu(wide[:, 2:-3], 1.702, 7.0), whole)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gate_up": np.zeros((2, 8))}, "gate_up has dtype float64, expected float32"),
        ({"gate_up": np.zeros((2, 7), F32)}, r"gate_up has shape \(2, 7\), expected an even"),
        ({"limit": 0.0}, r"alpha is 1\.702 and limit is 0\.0, expected finite numbers"),
        ({"alpha": math.nan}, "alpha is nan"),
        ({"out": np.zeros((2, 8), F32)}, r"out has shape \(2, 8\), expected \(2, 4\)"),
    ],
)
def test_bad_input_of_clamped_swiglu(change: dict[str, Any], message: str) -> None:
    arguments = {"gate_up": np.zeros((2, 8), F32), "alpha": 1.702, "limit": 7.0} | change
    with pytest.raises((TypeError, ValueError), match=f"^clamped_swiglu: {message}"):
        clamped_swiglu(**arguments)


def test_references_are_the_textbook_formulas() -> None:
    x = np.linspace(-4.0, 4.0, 33).astype(F32)[None]
    t = widen(x)
    erf = np.vectorize(math.erf)
    expected = {
        "silu": t * (0.5 + 0.5 * np.tanh(t / 2)),
        "gelu": t * (0.5 + 0.5 * erf(t / math.sqrt(2))),
        "gelu_tanh": 0.5 * t * (1 + np.tanh(math.sqrt(2 / math.pi) * (t + 0.044715 * t**3))),
        "relu": np.where(t > 0, t, 0),
    }
    assert list(expected) == list(KINDS)
    for kind, y in expected.items():
        np.testing.assert_allclose(activation_ref(x, kind), y, rtol=1e-12, atol=1e-13)
        gated = gated_activation_ref(np.concatenate((x, 2 * x), axis=1), kind)
        np.testing.assert_allclose(gated, y * 2 * t, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_special_values(kind: str) -> None:
    inf, nan = math.inf, math.nan
    x = np.float32([[0.0, -0.0, inf, -inf, nan, -nan, 1e30, -1e30]])
    at_minus_infinity = 0.0 if kind == "relu" else nan
    y = activation(x, kind)
    expected = [0.0, 0.0, inf, at_minus_infinity, nan, nan, np.float32(1e30), 0.0]
    np.testing.assert_array_equal(y, np.float32([expected]))
    np.testing.assert_array_equal(y, activation_ref(x, kind).astype(F32))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("column", [0, 15, 16, 39])
def test_nan_stays_in_its_element(column: int, kind: str) -> None:
    gate_up = sample((3, 80))
    clean = gated_activation(gate_up, kind)
    for at in (column, 40 + column):
        bad = gate_up.copy()
        bad[1, at] = np.nan
        y = gated_activation(bad, kind)
        changed = np.argwhere(y.view(np.uint32) != clean.view(np.uint32))
        np.testing.assert_array_equal(changed, [[1, column]])
        assert np.isnan(y[1, column])


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_strided_rows_give_the_same_bits(dtype: Any) -> None:
    x = sample((6, 44))
    wide = np.zeros((6, 61), F32)
    wide[:, 3:47] = x
    for f in (activation, gated_activation):
        plain = f(x, "silu", dtype=dtype)
        for view in (wide[:, 3:47], np.asfortranarray(x), x[::-1].copy()[::-1]):
            np.testing.assert_array_equal(f(view, "silu", dtype=dtype), plain)
        np.testing.assert_array_equal(f(x[::2], "silu", dtype=dtype), plain[::2])


@pytest.mark.parametrize("kind", KINDS)
def test_out_may_be_x_itself(kind: str) -> None:
    x = sample((3, 50))
    expected = activation(x, kind)
    assert activation(x, kind, out=x) is x
    np.testing.assert_array_equal(x, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_an_element_does_not_depend_on_the_others_or_on_threads(kind: str) -> None:
    gate_up = sample((3, 2 * COLUMNS + 64))
    threads = jit.num_threads()
    results = []
    try:
        for n in (1, threads):
            jit.set_num_threads(n)
            results.append(gated_activation(gate_up, kind))
    finally:
        jit.set_num_threads(threads)
    np.testing.assert_array_equal(*results)
    f = COLUMNS + 32
    part = gate_up[1:2, [7, f - 1, f + 7, 2 * f - 1]]  # two elements of row 1, gate then up
    np.testing.assert_array_equal(gated_activation(part, kind), results[0][1:2, [7, f - 1]])


@pytest.mark.parametrize("kind", KINDS)
def test_reference_mode_runs_the_reference(kind: str) -> None:
    x = sample((3, 20))
    with jit.using("reference"):
        y = activation(x, kind, dtype=BF16)
        z = gated_activation(x, kind)
    np.testing.assert_array_equal(y, narrow(activation_ref(x, kind), BF16))
    np.testing.assert_array_equal(z, gated_activation_ref(x, kind).astype(F32))


def test_no_rows_is_fine() -> None:
    assert activation(np.zeros((0, 8), F32), "silu").shape == (0, 8)
    assert gated_activation(np.zeros((0, 8), F32), "gelu").shape == (0, 4)
    assert activation(np.zeros((2, 0), F32), "relu").shape == (2, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gate_up": np.zeros((2, 8))}, "gate_up has dtype float64, expected float32"),
        ({"gate_up": np.zeros((2, 8), BF16)}, "gate_up has dtype uint16"),
        ({"gate_up": np.zeros(8, F32)}, r"gate_up has shape \(8,\), expected \(T, 2F\)"),
        ({"gate_up": np.zeros((2, 7), F32)}, r"gate_up has shape \(2, 7\), expected an even"),
        ({"kind": "mish"}, "kind is 'mish', expected one of silu, gelu, gelu_tanh, relu"),
        ({"out": np.zeros((2, 8), F32)}, r"out has shape \(2, 8\), expected \(2, 4\)"),
        ({"out": np.zeros((2, 8), F32)[:, ::2]}, "out is not a contiguous, writable array"),
        ({"dtype": np.float64}, "out has dtype float64, expected uint16 or float32"),
    ],
)
def test_bad_input_names_the_argument(change: dict[str, Any], message: str) -> None:
    arguments = {"gate_up": np.zeros((2, 8), F32), "kind": "silu"} | change
    with pytest.raises((TypeError, ValueError), match=f"^gated_activation: {message}"):
        gated_activation(**arguments)
    if "gate_up" not in change and "out" not in change:
        arguments["x"] = arguments.pop("gate_up")
        with pytest.raises((TypeError, ValueError), match=f"^activation: {message}"):
            activation(**arguments)
