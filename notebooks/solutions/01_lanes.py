"""Solutions of notebooks/01_lanes.ipynb, and likely mistakes that its checks must refuse."""

import numpy as np

from pace_nb.kernels.lanes import load, load_tail, splat, store, store_tail


def chains_needed(latency, units):
    return latency * units


def chains_needed_wrong(latency, units):
    """Forgets the second unit."""
    return latency


def chains_needed_wrong_2(latency, units):
    """More than needed."""
    return latency * units + 1


def scale_row(x, s, out, e):
    whole = e // 16 * 16
    for i in range(0, whole, 16):
        store(out, i, load(x, i) * splat(s))
    if e > whole:
        store_tail(out, whole, load_tail(x, whole, e - whole) * splat(s), e - whole)


def scale_row_wrong(x, s, out, e):
    """Leaves out what does not fill a vector."""
    for i in range(0, e // 16 * 16, 16):
        store(out, i, load(x, i) * splat(s))


def scale_row_wrong_2(x, s, out, e):
    """Element by element."""
    for i in range(e):
        store_tail(out, i, load_tail(x, i, 1) * splat(s), 1)


def scale_row_wrong_3(x, s, out, e):
    """Writes whole vectors, beyond the end."""
    for i in range(0, e, 16):
        store(out, i, load_tail(x, i, min(16, e - i)) * splat(s))


def halving_sum(v):
    for half in (8, 4, 2, 1):
        v = v[:half] + v[half:]
    return v[0]


def halving_sum_wrong(v):
    """One after the other."""
    total = np.float32(0)
    for one in v:
        total += one
    return total


def halving_sum_wrong_2(v):
    """Neighbours first."""
    while len(v) > 1:
        v = v[0::2] + v[1::2]
    return v[0]
