"""Solutions of notebooks/05_exp_and_softmax.ipynb, and mistakes that its checks refuse."""

import math

import numpy as np


def power_of_two(n):
    return np.uint32((n + 127) << 23).view(np.float32)


def power_of_two_wrong(n):
    """Forgets the 127."""
    return np.uint32(max(n, 0) << 23).view(np.float32)


def power_of_two_wrong_2(n):
    """A bit too far."""
    return np.uint32(((n + 127) << 24) % 2**32).view(np.float32)


def upper_part(bits):
    return round(math.log(2) * 2**bits) / 2**bits


def upper_part_wrong(bits):
    """One bit too many."""
    return round(math.log(2) * 2 ** (bits + 1)) / 2 ** (bits + 1)


def upper_part_wrong_2(bits):
    """Cut off, not rounded."""
    return math.floor(math.log(2) * 2**bits) / 2**bits


def safe_softmax(x):
    top = x.max(axis=1, keepdims=True)
    e = np.exp(x - np.where(np.isneginf(top), 0, top))
    total = e.sum(axis=1, keepdims=True)
    return e / np.where(total == 0, 1, total)


def safe_softmax_wrong(x):
    """No maximum: overflows."""
    e = np.exp(x)
    return e / e.sum(axis=1, keepdims=True)


def safe_softmax_wrong_2(x):
    """One maximum for all rows: the low ones vanish."""
    e = np.exp(x - x.max())
    total = e.sum(axis=1, keepdims=True)
    return e / np.where(total == 0, 1, total)
