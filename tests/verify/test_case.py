"""Cases are right: what is exact, and a bound that is the docstring's, element by element."""

from __future__ import annotations

import numpy as np
import pytest

from pace_nb.kernels.attention_rows import attention_ref
from pace_nb.kernels.bf16 import from_f32, to_f32, widen
from pace_nb.kernels.gemm import unpack_weight
from pace_nb.kernels.mlp import unpack_mlp_weight
from pace_nb.kernels.quant import dequantize_mxfp4_ref, unpack_mxfp4
from pace_nb.verify.case import exp_of, is_fused, offsets_of, written
from pace_nb.verify.subject import SUBJECTS, make

ULPS = 1 if is_fused() else 2


def test_gemm_is_bounded_by_its_magnitudes():
    case = make(SUBJECTS["gemm"], (3, 5, 7), "float32", 0, False)
    x, weight, bias = case.arguments
    w = unpack_weight(weight)
    sizes = abs(bias[4]) + sum(abs(float(x[2, k]) * float(w[4, k])) for k in range(7))
    assert case.bound[2, 4] == pytest.approx(8 * 2.0**-24 * sizes, rel=1e-6) or case.bound[
        2, 4
    ] == pytest.approx(16 * 2.0**-24 * sizes, rel=1e-6)


def test_attention_is_given_the_keys_of_one_sequence():
    case = make(SUBJECTS["attention_prefill"], (3, 20, 2, 1, 8), "float32", 0, False)
    q, pool, table, _, _, lens, scale = case.arguments
    k = np.stack([pool.k[0, table[0, j // 16], :, j % 16, 0] for j in range(20)])[:, None, :]
    v = np.stack([pool.v[0, table[0, j // 16], j % 16, :8, 0] for j in range(20)])[:, None, :]
    np.testing.assert_allclose(case.exact, attention_ref(q, k, v, np.arange(17, 20), scale))
    assert int(lens[0]) == 20 and np.isnan(pool.k[0, table[0, 1], :, 4:]).all()


def test_exp_of_any_length():
    for n in (1, 16, 17):
        x = np.linspace(-2, 2, n).astype(np.float32)
        np.testing.assert_allclose(exp_of(x), np.exp(x), rtol=1e-6)


def test_an_experts_row_is_bounded_by_the_magnitudes_of_its_own_expert():
    for name, sizes in (("moe", (3, 9, 5, 32)), ("quant", (3, 9, 5, 32))):
        case = make(SUBJECTS[name], sizes, "bfloat16", 1, False)
        x, weight, offsets, bias = case.arguments
        assert len(offsets) == 4 and offsets[0] == 0 and offsets[-1] == 9
        row = 6
        e = int(np.searchsorted(offsets, row, side="right")) - 1
        if name == "moe":
            w = widen(unpack_weight(weight.expert(e)))
        else:
            w = dequantize_mxfp4_ref(*unpack_mxfp4(weight, e))
        products = [float(widen(x)[row, k]) * w[4, k] for k in range(32)]
        assert case.exact[row, 4] == pytest.approx(bias[e, 4] + sum(products), rel=1e-12)
        size = abs(bias[e, 4]) + sum(map(abs, products))
        assert case.bound[row, 4] == pytest.approx(33 * 2.0**-24 * size * ULPS, rel=1e-6)


def test_experts_without_rows_are_among_them():
    offsets = offsets_of(5, 32, np.random.default_rng(0))
    assert (np.diff(offsets) == 0).any() and (np.diff(offsets) > 0).any()


def test_mlp_is_its_formula_and_the_bound_grows_with_the_other_factor():
    case = make(SUBJECTS["mlp"], (2, 3, 5), "float32", 0, False)
    x, packed, _ = case.arguments
    (wg, wu), (bg, bu) = unpack_mlp_weight(packed)
    gate, up = (
        float(b[1]) + sum(float(x[1, k]) * float(w[1, k]) for k in range(5))
        for w, b in ((wg, bg), (wu, bu))
    )
    act = gate / (1 + np.exp(-gate))
    assert case.exact[1, 1] == pytest.approx(act * up, rel=1e-12)
    sizes = (
        abs(float(b[1])) + sum(abs(float(x[1, k] * w[1, k])) for k in range(5))
        for w, b in ((wg, bg), (wu, bu))
    )
    gate_off, up_off = (6 * 2.0**-24 * size * ULPS for size in sizes)
    least = 1.1 * gate_off * abs(up) + abs(act) * up_off
    assert least < case.bound[1, 1] < least + 10 * 2.0**-24 * abs(act * up)


def test_what_is_written_is_read_again():
    rng = np.random.default_rng(0)
    for tokens in (1, 16, 37):
        k, v = rng.standard_normal((2, tokens, 3, 10)).astype(np.float32)
        np.testing.assert_array_equal(written(k, v, np.dtype(np.float32)), [k, v])
        rounded = written(k, v, np.dtype(np.uint16))
        np.testing.assert_array_equal(rounded, from_f32(np.stack([k, v])))
        assert (np.abs(to_f32(rounded) - np.stack([k, v])) <= 2.0**-8 * np.abs([k, v])).all()


def test_probabilities_are_of_the_fifty_largest():
    case = make(SUBJECTS["sampling"], (2, 70), "float32", 0, False)
    logits = case.arguments[0].astype(float)
    kept = np.argsort(-logits[1])[:50]
    weights = np.exp(logits[1, kept] / np.float32(0.8))
    np.testing.assert_allclose(case.exact[1, kept], weights / weights.sum(), rtol=1e-12)
    assert np.count_nonzero(case.exact[1]) == 50 and case.bound[1].max() < 1e-5
    assert (case.bound[1] > 2.0**-24 * case.exact[1])[kept].all()
    with_nan = make(SUBJECTS["sampling"], (3, 70), "float32", 0, True)
    assert np.isnan(with_nan.exact).all(axis=1).sum() == 1
