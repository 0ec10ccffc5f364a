"""Cases are right: the bound is the docstring's, a NaN is where it should be, sizes are judged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pace_nb.kernels.attention_rows import attention_ref
from pace_nb.kernels.bf16 import widen
from pace_nb.kernels.gemm import unpack_weight
from pace_nb.verify.subject import DTYPES, SUBJECTS, exp_of, make

REPOSITORY = Path(__file__).resolve().parents[2]
SMALL = {
    "gemm": (3, 5, 7), "norm": (2, 17), "layer_norm": (2, 17), "rope": (2, 2, 6), "exp": (20,),
    "activation": (2, 17), "attention_decode": (1, 20, 4, 2, 8),
    "attention_prefill": (3, 5, 2, 1, 8),
}  # fmt: skip


@pytest.mark.parametrize("name", SUBJECTS)
def test_a_kernel_is_within_its_bound_and_a_nan_where_it_belongs(name):
    subject = SUBJECTS[name]
    assert (REPOSITORY / subject.file).is_file()
    for dtype in subject.dtypes:
        clean = make(subject, SMALL[name], dtype, 0, False)
        assert np.isfinite(clean.exact).all() and np.isfinite(clean.bound).all()
        with_nan = make(subject, SMALL[name], dtype, 0, True)
        assert np.isnan(with_nan.exact).any()
        for case in (clean, with_nan):
            got = widen(subject.kernel(*case.arguments, **case.options))
            assert got.shape == case.exact.shape == case.bound.shape
            assert len(subject.tiles) == got.ndim
            np.testing.assert_array_equal(np.isnan(got), np.isnan(case.exact))
            finite = ~np.isnan(got)
            assert (np.abs(got - case.exact) <= case.bound)[finite].all()


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


def test_one_seed_gives_one_case():
    a, b, c = (make(SUBJECTS["norm"], (2, 5), "float32", seed, False) for seed in (1, 1, 2))
    np.testing.assert_array_equal(a.arguments[0], b.arguments[0])
    assert not np.array_equal(a.arguments[0], c.arguments[0])
    assert DTYPES["bfloat16"] == np.uint16


@pytest.mark.parametrize(
    ("name", "sizes", "message"),
    [
        ("gemm", (1, 2), "2 sizes, expected 3"),
        ("gemm", (0, 2, 3), "a size below 1"),
        ("gemm", (2**10, 2**10, 2**10), "too large"),
        ("norm", (2**13, 2**13), "too large"),
        ("rope", (1, 1, 7), "D must be even"),
        ("attention_decode", (5, 4, 2, 1, 8), "5 tokens of 4 keys"),
        ("attention_decode", (1, 4, 3, 2, 8), "3 heads of 2"),
    ],
)
def test_sizes_that_do_not_fit(name, sizes, message):
    with pytest.raises(ValueError, match=message):
        make(SUBJECTS[name], sizes, "float32", 0, False)
