"""What `verify` runs, and what it refuses."""

from __future__ import annotations

import pytest

from pace_nb.errors import ConfigError
from pace_nb.verify import PLANTS, SUBJECTS, verify
from pace_nb.verify.check import choices


def test_all_is_everything_that_fits():
    found = choices()
    assert {c.kernel for c in found} == set(SUBJECTS)
    assert ("exp", "bfloat16") not in {(c.kernel, c.dtype) for c in found}
    faulty = choices(fault="nnan")
    assert {c.kernel for c in faulty} == {k for k, f in PLANTS if f == "nnan"}
    assert {c.dtype for c in choices(dtype="bfloat16")} == {"bfloat16"}


def test_full_is_quick_and_more():
    for quick, full in zip(choices(), choices(grid="full"), strict=True):
        assert full.sizes[: len(quick.sizes)] == quick.sizes and len(full.sizes) > len(quick.sizes)


def test_one_result_for_each_call():
    results = list(verify("gemm", dtype="float32", grid="2x3x5,1x4x16", seed=3))
    assert [r.sizes for r in results] == [
        {"M": 2, "N": 3, "K": 5},
        {"M": 2, "N": 3, "K": 5},
        {"M": 1, "N": 4, "K": 16},
    ]
    assert [r.has_nan for r in results] == [False, True, False]
    assert all(r.holds for r in results)
    again = next(verify("gemm", dtype="float32", grid="2x3x5", seed=3))
    assert (again.got == results[0].got).all()


def test_gemm_of_bf16_gives_float32_and_norm_gives_bf16():
    (one, _) = verify("gemm", dtype="bfloat16", grid="1x1x4")
    assert (one.dtype, one.unit) == ("bfloat16", "float32")
    (one, _) = verify("norm", dtype="bfloat16", grid="1x4")
    assert (one.dtype, one.unit) == ("bfloat16", "bfloat16")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"kernel": "conv"}, "kernel 'conv': expected all or one of gemm, norm"),
        ({"dtype": "float16"}, "dtype 'float16': expected all, float32 or bfloat16"),
        ({"fault": "gremlin"}, "fault 'gremlin': expected one of none, wrong-mask"),
        ({"kernel": "gemm", "fault": "nnan"}, "fault 'nnan': gemm can have lost-tail"),
        ({"kernel": "exp", "dtype": "bfloat16"}, "dtype 'bfloat16': exp computes in float32"),
        ({"kernel": "gemm", "grid": "huge"}, "grid 'huge': expected quick, full or sizes"),
        ({"kernel": "gemm", "grid": "1x2"}, "grid '1x2': gemm takes MxNxK"),
        ({"grid": "1x2x3"}, "sizes need one kernel"),
    ],
)
def test_what_cannot_be_run_is_refused_at_once(given, message):
    with pytest.raises(ConfigError, match=message):
        verify(**given)


def test_sizes_that_a_kernel_refuses_are_named():
    with pytest.raises(ConfigError, match="grid 1x1x7 for rope: D must be even"):
        list(verify("rope", grid="1x1x7"))
    with pytest.raises(ConfigError, match=r"grid 1x20x2x1x7 for attention_decode: .*even"):
        list(verify("attention_decode", dtype="bfloat16", grid="1x20x2x1x7"))
