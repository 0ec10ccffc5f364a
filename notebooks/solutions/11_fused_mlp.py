"""Solutions of notebooks/11_fused_mlp.ipynb, and likely mistakes that its checks must refuse."""

import numpy as np

from pace_nb.kernels.gemm import NR


def packed_row(part, r):
    return (r // NR * 2 + part) * NR + r % NR


def packed_row_wrong(part, r):
    """Row by row in turn."""
    return 2 * r + part


def packed_row_wrong_2(part, r):
    """All of gate, then all of up."""
    return part * 256 + r


def gelu_tanh(x):
    u = np.float32(np.sqrt(2 / np.pi)) * (x + np.float32(0.044715) * x * x * x)
    return x / (1 + np.exp(-2 * u))


def gelu_tanh_wrong(x):
    """As it is written: 1 + tanh cancels."""
    u = np.float32(np.sqrt(2 / np.pi)) * (x + np.float32(0.044715) * x * x * x)
    return x / 2 * (1 + np.tanh(u))


def gelu_tanh_wrong_2(x):
    """One u too few."""
    u = np.float32(np.sqrt(2 / np.pi)) * (x + np.float32(0.044715) * x * x * x)
    return x / (1 + np.exp(-u))


def bytes_between(m, f, threads):
    return threads * m * 128 * 4 if threads else 2 * m * f * 4


def bytes_between_wrong(m, f, threads):
    """One panel instead of two."""
    return threads * m * 64 * 4 if threads else 2 * m * f * 4


def bytes_between_wrong_2(m, f, threads):
    """As if BF16."""
    return threads * m * 128 * 2 if threads else 2 * m * f * 2
