"""limits.py: what is timed does the work it claims, and the rates are rates (never their speed)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pace_nb.kernels import jit, limits
from pace_nb.kernels.bf16 import from_f32
from pace_nb.kernels.llvm_body import W
from pace_nb.kernels.tiles import NV


@pytest.mark.parametrize("streams", [1, 4])
@pytest.mark.parametrize("dtype", [np.float32, np.uint16])
def test_every_element_is_read_once(dtype: Any, streams: int) -> None:
    n = 512 * jit.num_threads()
    values = np.random.default_rng(0).integers(-8, 9, n).astype(np.float32)
    buffer = from_f32(values) if dtype == np.uint16 else values
    assert limits.stream_sum(buffer, streams) == values.sum() == limits.stream_sum_ref(buffer)
    with jit.using("reference"):
        assert limits.stream_sum(buffer, streams) == values.sum()


def test_bad_input_names_the_argument() -> None:
    with pytest.raises(ValueError, match="streams is 3, expected 1 or 4"):
        limits.stream_sum(np.zeros(256, np.float32), 3)
    with pytest.raises(TypeError, match="buffer has dtype float64"):
        limits.stream_sum(np.zeros(256))


def test_copy_copies() -> None:
    threads, share = jit.num_threads(), 4 * W
    x = np.random.default_rng(1).standard_normal(share * threads).astype(np.float32)
    y = np.zeros_like(x)
    limits._copy_kernel(x, y, threads, share)
    np.testing.assert_array_equal(x, y)


def test_turns_accumulate(monkeypatch: pytest.MonkeyPatch) -> None:
    """The peak kernel does its dot products: with ones for operands each turn adds one product."""
    threads, turns = jit.num_threads(), 5
    c = np.zeros(threads * 6 * 16 * NV, np.float32)
    limits._dot_turns_kernel(np.ones(2, np.float32), np.ones(128, np.float32), c, threads, turns)
    assert (c == turns).all()


def test_rates_are_positive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "TURNS", 4)
    buffer = np.zeros(512 * jit.num_threads(), np.float32)
    assert limits.flop_peak(np.uint16, repeats=1) > 0
    assert limits.flop_peak(np.float32, repeats=1) > 0
    assert limits.dram_read_rate(buffer, repeats=1) > 0
    assert limits.copy_rate(4096, repeats=1) > 0
