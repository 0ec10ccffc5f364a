"""Solutions of notebooks/18_sampling.ipynb, and likely mistakes that its checks must refuse."""

import numpy as np


def key(bits):
    return bits if bits >= 0 else -(bits + 2**31)


def key_wrong(bits):
    """The bits as they are: negative floats come in reverse."""
    return bits


def key_wrong_2(bits):
    """-0 below 0."""
    return bits + 2**31 if bits >= 0 else -1 - bits


def head_size(weights, needed):
    reached = np.cumsum(np.sort(weights)[::-1])
    return int(np.searchsorted(reached, needed)) + 1


def head_size_wrong(weights, needed):
    """One too many where the sum is exact."""
    reached = np.cumsum(np.sort(weights)[::-1])
    return int(np.searchsorted(reached, needed, side="right")) + 1


def head_size_wrong_2(weights, needed):
    """From the lightest on."""
    return int(np.searchsorted(np.cumsum(np.sort(weights)), needed)) + 1


def residual(p, q):
    missing = np.maximum(p - q, 0)
    return missing / missing.sum() if missing.any() else p


def residual_wrong(p, q):
    """Draw from p again: what q likes comes out too often."""
    return p


def residual_wrong_2(p, q):
    """The absolute difference."""
    missing = np.abs(p - q)
    return missing / missing.sum() if missing.any() else p
