"""Memory for what lives long and is read in vectors, packed weights, and for what every step needs
again.

Knows cache lines, pages and the C library's allocator. Does not know what is stored.

NumPy aligns to 16 bytes, so every vector of 64 bytes that is read lies in two cache lines. Large
arrays begin at a huge page: 2 MiB with one entry in the TLB, where the system allows it
(`transparent_hugepage` is `madvise` or `always`; NumPy asks for them from 4 MiB on).
A page costs no memory until it is written, and the first thread to write it is the one it is near.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import numpy as np
from numpy.typing import DTypeLike

from pace_nb.kernels.arrays import Array

CACHE_LINE = 64
HUGE_PAGE = 2 << 20
# Bytes at the heap's end that are kept when they are freed: the activations of a step of 2048
# tokens of a 1B model. glibc would give them back from 25 MB on, and clear new pages at the next
# layer: 25,000 page faults, 5 % of a prefill of 1024 tokens (ledger: memory).
KEPT = 128 << 20
OWN_MAPPING = 32 << 20  # the most it takes: from so many bytes on an array has pages of its own
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # <malloc.h>


def keep_freed() -> bool:
    """Have the C library keep what a step frees for the next one, for the whole process.

    True if it is glibc, which alone is asked; other libraries are left to their own ways.
    """
    try:
        libc = ctypes.CDLL(None)
        libc.gnu_get_libc_version  # noqa: B018  musl has a mallopt that does nothing
        mallopt = libc.mallopt
    except (AttributeError, OSError, TypeError):  # macOS, musl, Windows
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, OWN_MAPPING) and mallopt(M_TRIM_THRESHOLD, KEPT))


def zeros(size: int, dtype: DTypeLike) -> Array:
    """`size` zeros, flat, that begin at a cache line, or a huge page where they fill one.

    MemoryError where the system refuses.
    """
    return _aligned(np.zeros, size, dtype)


def empty(size: int, dtype: DTypeLike) -> Array:
    """As `zeros`, but what the memory holds is what was there before: for scratch."""
    return _aligned(np.empty, size, dtype)


def _aligned(made: Callable[..., Array], size: int, dtype: DTypeLike) -> Array:
    nbytes = size * np.dtype(dtype).itemsize
    alignment = HUGE_PAGE if nbytes >= HUGE_PAGE else CACHE_LINE
    raw = made(nbytes + alignment, np.uint8)
    start = -raw.ctypes.data % alignment
    return raw[start : start + nbytes].view(dtype)
