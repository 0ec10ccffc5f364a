"""rope.py against its float64 reference, and as the rotation it is."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pace_nb.kernels import jit
from pace_nb.kernels.bf16 import from_f32, narrow, widen
from pace_nb.kernels.rope import rope, rope_ref

Array = NDArray[Any]
F32, BF16 = np.float32, np.uint16
POSITIONS = 40
# (T, H, D, R): R / 2 below, at and above a vector; partial and whole; copies of 1 to 33 dims.
SHAPES = [
    (1, 1, 2, 2),
    (3, 2, 16, 16),
    (2, 3, 34, 30),
    (5, 1, 33, 32),
    (4, 2, 65, 32),
    (2, 2, 80, 80),
    (3, 2, 100, 34),
    (1, 32, 64, 64),
    (2, 1, 257, 256),
]
if not jit.INTERPRETED:
    SHAPES += [(1823, 3, 96, 24)]


def sample(shape: tuple[int, int, int, int], seed: int = 0) -> tuple[Array, Array, Array, Array]:
    """x, positions, cos, sin."""
    tokens, heads, d, rotated = shape
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((tokens, heads, d)).astype(F32)
    positions = rng.integers(0, POSITIONS, tokens).astype(np.int32)
    frequencies = 10000.0 ** (-2.0 * np.arange(rotated // 2) / rotated)
    angles = np.arange(POSITIONS)[:, None] * frequencies
    return x, positions, np.cos(angles).astype(F32), np.sin(angles).astype(F32)


def pair_size(x: Array, positions: Array, cos: Array, sin: Array, interleaved: bool) -> Array:
    """|x_a cos| + |x_b sin| at dim a, the same of its own at dim b; |x| at the dims beyond R."""
    x, cos, sin = (np.abs(widen(t)) for t in (x, cos, sin))
    at_a, at_b = (rope_ref(x, positions, cos, s, interleaved) for s in (-sin, sin))
    return np.maximum(np.abs(at_a), np.abs(at_b))


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_reference(shape: Any, interleaved: bool, dtype: Any) -> None:
    x, *angle = sample(shape)
    ref = rope_ref(x, *angle, interleaved)
    y = rope(x, *angle, interleaved=interleaved, dtype=dtype)
    assert y.dtype == dtype
    error = np.abs(widen(y) - ref)
    rounding = 2.0**-8 * np.abs(ref) if dtype == BF16 else 0.0
    assert np.all(error <= 2.0**-23 * pair_size(x, *angle, interleaved) + rounding)
    copied = slice(shape[3], None)
    np.testing.assert_array_equal(y[..., copied], narrow(widen(x[..., copied]), dtype))


def test_reference_is_the_complex_product() -> None:
    x, positions, cos, sin = sample((4, 2, 12, 8))
    turn = (cos + 1j * sin.astype(complex))[positions][:, None, :]
    half = (x[..., :4] + 1j * x[..., 4:8]) * turn
    np.testing.assert_allclose(
        rope_ref(x, positions, cos, sin),
        np.concatenate((half.real, half.imag, x[..., 8:]), axis=-1),
        atol=1e-12,
    )
    near = (x[..., 0:8:2] + 1j * x[..., 1:8:2]) * turn
    y = rope_ref(x, positions, cos, sin, interleaved=True)
    np.testing.assert_allclose(y[..., 0:8:2] + 1j * y[..., 1:8:2], near, atol=1e-12)
    np.testing.assert_array_equal(y[..., 8:], x[..., 8:])


@pytest.mark.parametrize("interleaved", [False, True])
def test_scores_depend_on_distance_only(interleaved: bool) -> None:
    """What rotary embedding is for: q at p and k at p + 3 give one score for all p."""
    q, _, cos, sin = sample((1, 1, 32, 32))
    k = sample((1, 1, 32, 32), seed=1)[0]
    at = np.arange(POSITIONS - 3, dtype=np.int32)
    q, k = (np.repeat(t, len(at), axis=0) for t in (q, k))
    turned_q = rope(q, at, cos, sin, interleaved=interleaved)
    turned_k = rope(k, at + np.int32(3), cos, sin, interleaved=interleaved)
    scores = np.einsum("thd,thd->t", widen(turned_q), widen(turned_k))
    np.testing.assert_allclose(scores, scores[0], atol=1e-5)


@pytest.mark.parametrize("interleaved", [False, True])
def test_strided_rows_give_the_same_bits(interleaved: bool) -> None:
    x, *angle = sample((6, 4, 40, 36))
    plain = rope(x, *angle, interleaved=interleaved)
    fused = np.zeros((6, 7 * 40 + 3), F32)  # rows of q, k, v one after another, and padding
    fused[:, 40 : 5 * 40] = x.reshape(6, -1)
    views = [
        fused[:, 40 : 5 * 40].reshape(6, 4, 40),
        np.concatenate((x, x), axis=2)[:, :, :40],
        np.asfortranarray(x),
        x[::-1].copy()[::-1],
    ]
    for view in views:
        assert not view.flags.c_contiguous
        np.testing.assert_array_equal(rope(view, *angle, interleaved=interleaved), plain)
    broadcast = np.broadcast_to(x[:, :1], x.shape)
    y = rope(broadcast, *angle, interleaved=interleaved)
    np.testing.assert_array_equal(y, plain[:, [0, 0, 0, 0]])


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("shape", [(3, 2, 40, 36), (2, 2, 80, 80)])
def test_out_may_be_x_itself(shape: Any, interleaved: bool) -> None:
    x, *angle = sample(shape)
    expected = rope(x, *angle, interleaved=interleaved)
    assert rope(x, *angle, out=x, interleaved=interleaved) is x
    np.testing.assert_array_equal(x, expected)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dim", [0, 17, 35, 39])
def test_nan_and_infinity_reach_their_partner_only(dim: int, interleaved: bool, bad: float) -> None:
    x, positions, cos, sin = sample((2, 2, 40, 36))
    clean = rope(x, positions, cos, sin, interleaved=interleaved)
    x[1, 1, dim] = bad
    y = rope(x, positions, cos, sin, interleaved=interleaved)
    changed = y.view(np.uint32) != clean.view(np.uint32)
    partner = dim if dim >= 36 else dim ^ 1 if interleaved else (dim + 18) % 36
    assert not np.isfinite(y[1, 1, dim])
    allowed = np.zeros_like(changed)
    allowed[1, 1, [dim, partner]] = True
    assert not (changed & ~allowed).any()


def test_a_token_does_not_depend_on_the_others_or_on_threads() -> None:
    x, *angle = sample((37, 3, 48, 32))
    threads = jit.num_threads()
    results = []
    try:
        for n in (1, threads):
            jit.set_num_threads(n)
            results.append(rope(x, *angle, dtype=BF16))
    finally:
        jit.set_num_threads(threads)
    np.testing.assert_array_equal(*results)
    one = rope(x[9:10], angle[0][9:10], *angle[1:], dtype=BF16)
    np.testing.assert_array_equal(one, results[0][9:10])


def test_reference_mode_runs_the_reference() -> None:
    x, *angle = sample((3, 2, 20, 12))
    with jit.using("reference"):
        y = rope(x, *angle, interleaved=True, dtype=BF16)
    np.testing.assert_array_equal(y, narrow(rope_ref(x, *angle, True), BF16))


def test_no_tokens_is_fine() -> None:
    _, _, cos, sin = sample((1, 1, 8, 8))
    empty = np.zeros((0, 3, 8), F32)
    assert rope(empty, np.zeros(0, np.int32), cos, sin).shape == (0, 3, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": np.zeros((2, 1, 8))}, "x has dtype float64, expected float32"),
        ({"x": np.zeros((2, 8), F32)}, r"x has shape \(2, 8\), expected \(T, H, D\)"),
        ({"positions": np.zeros(2)}, "positions has dtype float64, expected int32"),
        ({"positions": np.zeros(3, np.int32)}, r"positions has shape \(3,\), expected \(2\)"),
        ({"positions": np.array([0, 40], np.int32)}, "positions holds 40, expected 0 to 39"),
        ({"positions": np.array([0, -1], np.int32)}, "positions holds -1"),
        ({"sin": np.zeros((39, 4), F32)}, r"sin has shape \(39, 4\), expected \(40, 4\)"),
        ({"cos": np.zeros((40, 4))}, "cos has dtype float64"),
        ({"x": np.zeros((2, 1, 7), F32)}, r"cos has shape \(40, 4\), expected R/2 from 0 to D/2"),
        ({"out": np.zeros((2, 1, 9), F32)}, r"out has shape \(2, 1, 9\), expected \(2, 1, 8\)"),
        ({"out": np.zeros((2, 1, 16), F32)[..., ::2]}, "out is not a contiguous"),
        ({"dtype": np.float64}, "out has dtype float64, expected uint16 or float32"),
    ],
)
def test_bad_input_names_the_argument(change: dict[str, Any], message: str) -> None:
    x, positions, cos, sin = sample((2, 1, 8, 8))
    arguments = {"x": x, "positions": positions, "cos": cos, "sin": sin} | change
    with pytest.raises((TypeError, ValueError), match=f"^rope: {message}"):
        rope(**arguments)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", [F32, np.uint16])
def test_without_rotated_dims_it_stores(interleaved: bool, dtype: Any) -> None:
    """What models without rotary positions do with queries and keys."""
    x = np.random.default_rng(5).standard_normal((3, 4, 50)).astype(F32)[:, 1:3, :24]
    none = np.empty((1, 0), F32)
    out = rope(x, np.zeros(3, np.int32), none, none, interleaved=interleaved, dtype=dtype)
    np.testing.assert_array_equal(out, from_f32(x) if dtype == np.uint16 else x)
