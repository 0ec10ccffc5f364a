"""memory.py: zeros that begin where they should, and belong to themselves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pace_nb.kernels.memory import CACHE_LINE, HUGE_PAGE, zeros


@pytest.mark.parametrize("dtype", [np.uint16, np.float32, np.uint8])
@pytest.mark.parametrize("nbytes", [64, 4096 + 64, HUGE_PAGE - 64, HUGE_PAGE, HUGE_PAGE + 64])
def test_zeros_begin_at_a_cache_line_or_a_huge_page(nbytes, dtype):
    size = nbytes // np.dtype(dtype).itemsize
    for _ in range(3):
        x = zeros(size, dtype)
        assert x.shape == (size,) and x.dtype == dtype and x.flags.c_contiguous
        assert x.flags.writeable and not x.any()
        assert x.ctypes.data % (HUGE_PAGE if nbytes >= HUGE_PAGE else CACHE_LINE) == 0


def test_nothing_at_all():
    assert zeros(0, np.float32).shape == (0,)


def test_pages_that_are_not_written_cost_no_memory():
    statm = Path("/proc/self/statm")
    if not statm.exists():
        pytest.skip("no /proc")
    before = int(statm.read_text().split()[1])
    x = zeros(1 << 30, np.uint8)
    x[5] = 1
    pages = int(statm.read_text().split()[1]) - before
    assert pages * 4096 < 64 << 20
