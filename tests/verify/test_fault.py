"""Each fault does what it says, and the test that is named for it fails on it and passes without.

The named tests of tests/kernels run as they are, in a process of pytest of their own, with the
fault around the kernel (plant.py): what is proved is their own comparison.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pace_nb.kernels import jit
from pace_nb.kernels.bf16 import from_f32, to_f32
from pace_nb.kernels.gemm import gemm, gemm_ref, pack_weight
from pace_nb.verify import FAULTS, PLANTS, SUBJECTS, verify
from pace_nb.verify import fault as module

REPOSITORY = Path(__file__).resolve().parents[2]
compiled = pytest.mark.skipif(jit.INTERPRETED, reason="some of the named tests need the compiler")


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """{"gemm:lost-tail": outcomes of the cases of its test, up to the first that failed}."""
    path = tmp_path_factory.mktemp("planted") / "outcomes.json"
    tests = sorted({plant.test for plant in PLANTS.values()})
    command = [sys.executable, "-m", "pytest", "-p", "tests.verify.plant", "-q", "--tb=line"]
    command += ["-p", "no:cacheprovider", "--no-header", "-rN", *tests]
    environment = os.environ | {"PACE_NB_PLANTED": str(path)}
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=REPOSITORY, timeout=240
    )
    assert done.returncode == 1, done.stdout + done.stderr  # some failed, and nothing else is off
    return json.loads(path.read_text())


@compiled
@pytest.mark.parametrize("pair", PLANTS, ids=":".join)
def test_the_named_test_fails_on_the_fault(pair, planted):
    assert planted[":".join(pair)][-1] == "failed", planted


@compiled
def test_without_a_fault_the_named_tests_pass_under_the_plugin(planted):
    """So it is the fault that makes them fail."""
    assert planted["none:none"] == ["passed"] * len({plant.test for plant in PLANTS.values()})


def test_the_named_tests_exist():
    for plant in PLANTS.values():
        path, _, name = plant.test.partition("::")
        text = (REPOSITORY / path).read_text()
        assert f"\ndef {name}(" in text, plant.test
        assert re.search(rf"\b{plant.name}\b", text), plant.name


def test_every_fault_and_every_kernel_has_a_plant():
    assert {fault for _, fault in PLANTS} == set(FAULTS) - {"none"}
    assert {kernel for kernel, _ in PLANTS} == set(SUBJECTS)


@pytest.mark.skipif(jit.INTERPRETED, reason="minutes interpreted")
@pytest.mark.parametrize("pair", PLANTS, ids=":".join)
def test_quick_grid_shows_the_fault_and_only_with_it(pair):
    kernel, fault = pair
    dtype = SUBJECTS[kernel].dtypes[0]
    assert all(result.holds for result in verify(kernel, dtype=dtype))
    results = list(verify(kernel, dtype=dtype, fault=fault))
    assert not all(result.holds for result in results)
    assert {result.fault for result in results} == {fault}


def test_a_lost_tail_is_what_is_left_after_whole_vectors():
    x = np.ones((2, 37), np.float32)
    cut = module.without_tail(x)
    assert cut[:, :32].all() and not cut[:, 32:].any() and x.all()
    np.testing.assert_array_equal(module.without_tail(x[:, :32]), x[:, :32])


def test_gemm_in_bf16_is_the_sum_of_rounded_blocks():
    rng = np.random.default_rng(0)
    x, w = (rng.standard_normal((n, 70)).astype(np.float32) for n in (3, 5))
    bias = rng.standard_normal(5).astype(np.float32)
    total = np.broadcast_to(bias, (3, 5)).astype(np.float32)
    for k in (0, 32, 64):
        part = gemm(np.ascontiguousarray(x[:, k : k + 32]), pack_weight(w[:, k : k + 32].copy()))
        total = to_f32(from_f32(total + part))
    got = module.bf16_gemm(gemm)(x, pack_weight(w), bias)
    np.testing.assert_array_equal(got, total)
    assert np.abs(got - gemm_ref(x, w, bias)).max() > 1e-3


def test_the_mask_and_the_tail_in_keys():
    positions = np.array([0, 1, 15, 16, 31])
    np.testing.assert_array_equal(module.own_key_unseen(positions), positions)
    np.testing.assert_array_equal(module.whole_units(positions), [0, 0, 16, 16, 32])


def test_softmax_rows_with_their_faults():
    rng = np.random.default_rng(1)
    scores, v = rng.standard_normal((2, 100)), rng.standard_normal((100, 2, 8))
    weights = np.exp(scores)
    exact = np.einsum("hs,shd->hd", weights, v) / weights.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(module.row_without_nan(scores, v, None), exact, rtol=1e-12)
    rounded = module.bf16_row(scores, v, None)
    assert 1e-5 < np.abs(rounded - exact).max() < 2e-2
    scores[0, 7] = np.nan
    kept = np.arange(100) != 7
    only = np.exp(scores[0, kept])
    expected = np.einsum("s,sd->d", only, v[kept, 0]) / only.sum()
    got = module.row_without_nan(scores, v, None)
    np.testing.assert_allclose(got[0], expected, rtol=1e-12)
    np.testing.assert_allclose(got[1], exact[1], rtol=1e-12)
