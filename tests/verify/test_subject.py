"""Every kernel that can be checked is within its bound, a NaN is where it should be, sizes fit."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pytest

from pace_nb.cli import verify as cli
from pace_nb.kernels.bf16 import widen
from pace_nb.verify.subject import DTYPES, SUBJECTS, make

REPOSITORY = Path(__file__).resolve().parents[2]
SMALL = {
    "gemm": (3, 5, 7), "norm": (2, 17), "layer_norm": (2, 17), "rope": (2, 2, 6), "exp": (20,),
    "activation": (2, 17), "attention_decode": (1, 20, 4, 2, 8),
    "attention_prefill": (3, 5, 2, 1, 8), "mlp": (3, 5, 7), "moe": (3, 7, 5, 9),
    "combine": (3, 2, 17), "quant": (2, 5, 7, 32), "kv_write": (19, 2, 6), "sampling": (3, 70),
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


def test_one_seed_gives_one_case():
    a, b, c = (make(SUBJECTS["norm"], (2, 5), "float32", seed, False) for seed in (1, 1, 2))
    np.testing.assert_array_equal(a.arguments[0], b.arguments[0])
    assert not np.array_equal(a.arguments[0], c.arguments[0])
    assert DTYPES["bfloat16"] == np.uint16


def test_the_help_of_the_command_names_every_kernel():
    """It does not import this package, so the names stand there a second time."""
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    (kernel,) = (action for action in parser._actions if action.dest == "kernel")
    assert kernel.help == f"{', '.join(SUBJECTS)} (default: all)"


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
        ("quant", (1, 1, 1, 33), "K must be a multiple of 32"),
        ("kv_write", (2**12, 2**7, 2**7), "too large"),
    ],
)
def test_sizes_that_do_not_fit(name, sizes, message):
    with pytest.raises(ValueError, match=message):
        make(SUBJECTS[name], sizes, "float32", 0, False)
