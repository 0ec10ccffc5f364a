"""Solutions of notebooks/04_gemv.ipynb, and likely mistakes that its checks must refuse."""

import math

from pace_nb.kernels.tiles import tile_dot, tile_store, tile_zeros


def ridge_rows(peak, rate, n, k):
    m = 1
    while 2 * m * n * k / peak < (2 * n * k + 2 * m * k + 4 * m * n) / rate:
        m += 1
    return m


def ridge_rows_wrong(peak, rate, n, k):
    """Only W counted among the bytes."""
    return math.ceil(peak / rate)


def ridge_rows_wrong_2(peak, rate, n, k):
    """C in BF16."""
    m = 1
    while 2 * m * n * k / peak < (2 * n * k + 2 * m * k + 2 * m * n) / rate:
        m += 1
    return m


def decode_rate(num_weights, bytes_per_weight, kv_bytes, batch, rate):
    return batch * rate / (num_weights * bytes_per_weight + batch * kv_bytes)


def decode_rate_wrong(num_weights, bytes_per_weight, kv_bytes, batch, rate):
    """As if each request read the weights for itself."""
    return rate / (num_weights * bytes_per_weight + kv_bytes)


def decode_rate_wrong_2(num_weights, bytes_per_weight, kv_bytes, batch, rate):
    """As if requests shared their keys and values."""
    return batch * rate / (num_weights * bytes_per_weight + kv_bytes)


def two_rows(x, panel, c, k):
    acc = tile_zeros(2, 4)
    for p in range(k // 2):
        acc = tile_dot(acc, x, 2 * p, k, panel, p * 128, 32)
    tile_store(acc, c, 0, 64)


def two_rows_wrong(x, panel, c, k):
    """Right numbers, but the panel is read once per row."""
    for row in range(2):
        acc = tile_zeros(1, 4)
        for p in range(k // 2):
            acc = tile_dot(acc, x, row * k + 2 * p, k, panel, p * 128, 32)
        tile_store(acc, c, row * 64, 64)


def two_rows_wrong_2(x, panel, c, k):
    """Both rows from the first."""
    acc = tile_zeros(2, 4)
    for p in range(k // 2):
        acc = tile_dot(acc, x, 2 * p, 0, panel, p * 128, 32)
    tile_store(acc, c, 0, 64)
