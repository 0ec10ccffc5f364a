"""Solutions of notebooks/10_fused_norm.ipynb, and likely mistakes that its checks must refuse."""

import numpy as np


def bytes_moved(rows, e, x_size, y_size):
    return rows * e * (x_size + 4 + 4 + y_size)


def bytes_moved_wrong(rows, e, x_size, y_size):
    """Forgets that the residual is written, too."""
    return rows * e * (x_size + 4 + y_size)


def bytes_moved_wrong_2(rows, e, x_size, y_size):
    """Everything in float32."""
    return 16 * rows * e


def variance(row):
    centred = row - row.mean(dtype=np.float32)
    return np.mean(centred * centred, dtype=np.float32)


def variance_wrong(row):
    """The shortcut: two large numbers that are nearly equal."""
    return np.mean(row * row, dtype=np.float32) - np.square(row.mean(dtype=np.float32))


def variance_wrong_2(row):
    """The variance of a sample, over E - 1."""
    return np.float32(row.astype(np.float64).var(ddof=1))


def which_sum(i, e):
    return i // 16 % 4 if i < e // 64 * 64 else 0


def which_sum_wrong(i, e):
    """The rest goes on in turn."""
    return i // 16 % 4


def which_sum_wrong_2(i, e):
    """Neighbours to different sums."""
    return i % 4
