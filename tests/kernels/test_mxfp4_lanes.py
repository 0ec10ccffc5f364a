"""mxfp4_lanes.py: every code at every scale, in both bodies, against the format's definition."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numba import prange

from pace_nb.kernels import jit, mxfp4_lanes
from pace_nb.kernels.lanes import splat, store
from pace_nb.kernels.mxfp4_lanes import mxfp4_exponents, mxfp4_pairs
from pace_nb.kernels.words import dot_pairs, load_pairs
from tests.kernels.bodies import BF16, F32, both, untested


def quarter_kernel(quarter: int) -> Any:
    @jit.kernel
    def _quarter_kernel(y, codes, scales, ones, count):
        for i in prange(count):
            pairs = mxfp4_pairs(codes, 64 * i, quarter, mxfp4_exponents(scales, 16 * i))
            for half in range(2):  # 1 times one half of each pair, 0 times the other
                at = 16 * (2 * i + half)
                store(y, at, dot_pairs(splat(0.0), pairs, load_pairs(ones, 32 * half)))

    return _quarter_kernel


@pytest.mark.parametrize("quarter", range(4))
def test_mxfp4_expands_every_code_at_every_scale(quarter: int) -> None:
    scales = np.repeat(np.arange(2, 253, dtype=np.uint8), 16)
    count = len(scales) // 16
    pairs = np.resize(np.arange(256, dtype=np.uint8) * 17, len(scales))
    pairs[::2] = np.roll(pairs, 5)[::2] ^ 0x5A
    words = np.random.default_rng(0).integers(0, 2**16, (count, 16, 2), np.uint16)  # other quarters
    words &= np.uint16(0xFFFF ^ (15 << 4 * quarter))
    for half in range(2):
        codes = (pairs >> 4 * half & 15).reshape(count, 16).astype(np.uint16)
        words[..., half] |= codes << np.uint16(4 * quarter)
    lines = words.reshape(-1).view(np.uint8)
    ones = np.zeros(64, BF16)
    ones[0:32:2] = ones[33::2] = 0x3F80
    kernel = quarter_kernel(quarter)
    y, expected = both(kernel, np.empty(32 * count, F32), lines, scales, ones, count)
    magnitudes = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    table = np.concatenate((magnitudes, -magnitudes))
    exact = np.stack((table[pairs & 15], table[pairs >> 4])).reshape(2, count, 16)
    exact = exact.swapaxes(0, 1) * 2.0 ** (scales.reshape(count, 1, 16) - 127.0)
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_array_equal(y.reshape(exact.shape), exact.astype(F32))


def test_every_operation_is_tested_here() -> None:
    assert untested(mxfp4_lanes, __file__) == set()
