"""Memory for what lives long and is read in vectors: packed weights.

Knows cache lines and pages. Does not know what is stored.

NumPy aligns to 16 bytes, so every vector of 64 bytes that is read lies in two cache lines. Large
arrays begin at a huge page: 2 MiB with one entry in the TLB, where the system allows it
(`transparent_hugepage` is `madvise` or `always`; NumPy asks for them from 4 MiB on).
A page costs no memory until it is written, and the first thread to write it is the one it is near.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import DTypeLike

from pace_nb.kernels.arrays import Array

CACHE_LINE = 64
HUGE_PAGE = 2 << 20


def zeros(size: int, dtype: DTypeLike) -> Array:
    """`size` zeros, flat, that begin at a cache line, or a huge page where they fill one.

    MemoryError where the system refuses.
    """
    nbytes = size * np.dtype(dtype).itemsize
    alignment = HUGE_PAGE if nbytes >= HUGE_PAGE else CACHE_LINE
    raw = np.zeros(nbytes + alignment, np.uint8)
    start = -raw.ctypes.data % alignment
    return raw[start : start + nbytes].view(dtype)
