"""memory.py: zeros that begin where they should, and belong to themselves."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pace_nb.kernels.memory import CACHE_LINE, HUGE_PAGE, empty, keep_freed, zeros


@pytest.mark.parametrize("dtype", [np.uint16, np.float32, np.uint8])
@pytest.mark.parametrize("nbytes", [64, 4096 + 64, HUGE_PAGE - 64, HUGE_PAGE, HUGE_PAGE + 64])
def test_zeros_begin_at_a_cache_line_or_a_huge_page(nbytes, dtype):
    size = nbytes // np.dtype(dtype).itemsize
    for _ in range(3):
        x = zeros(size, dtype)
        assert x.shape == (size,) and x.dtype == dtype and x.flags.c_contiguous
        assert x.flags.writeable and not x.any()
        assert x.ctypes.data % (HUGE_PAGE if nbytes >= HUGE_PAGE else CACHE_LINE) == 0


@pytest.mark.parametrize("nbytes", [64, 4096 + 64, HUGE_PAGE - 64, HUGE_PAGE + 64])
def test_scratch_begins_at_a_cache_line_or_a_huge_page_too(nbytes):
    for _ in range(3):
        x = empty(nbytes // 4, np.float32)
        assert x.shape == (nbytes // 4,) and x.dtype == np.float32 and x.flags.writeable
        assert x.ctypes.data % (HUGE_PAGE if nbytes >= HUGE_PAGE else CACHE_LINE) == 0
        x[:] = 1.0  # all of it is there


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


# The arrays of a layer, made and freed as a prefill of 1024 tokens does; prints page faults.
LAYERS = """
import resource, sys
import numpy as np
from pace_nb.kernels.memory import keep_freed
kept = keep_freed() if "keep" in sys.argv else None
def layers(n):
    for _ in range(n):
        x = np.empty(12_600_000, np.uint8); x.fill(1)
        y = np.empty(8_400_000, np.uint8); y.fill(1)
        z = np.empty(8_400_000, np.uint8); z.fill(1)
        del x, y, z
layers(3)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
layers(10)
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(*arguments: str) -> tuple[str, int]:
    code = [sys.executable, "-c", LAYERS, *arguments]
    run = subprocess.run(code, check=True, capture_output=True)
    kept, count = run.stdout.decode().split()
    return kept, int(count)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_what_is_freed_is_there_again_without_page_faults():
    kept, count = faults("keep")
    if kept == "False":
        pytest.skip("not glibc")
    assert count < 100 < faults()[1]


def test_another_library_is_left_alone(monkeypatch):
    monkeypatch.setattr("ctypes.CDLL", lambda name: object())
    assert keep_freed() is False
