"""Solutions of notebooks/19_moe_and_mxfp4.ipynb, and likely mistakes that its checks refuse."""

import math

import numpy as np

_MAGNITUDES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
_TABLE = np.array(_MAGNITUDES + [-m for m in _MAGNITUDES])


def decode_block(codes, scale):
    nibbles = np.stack([codes & 15, codes >> 4], axis=1).reshape(-1)
    return _TABLE[nibbles] * 2.0 ** (scale - 127)


def decode_block_wrong(codes, scale):
    """The upper nibble first."""
    nibbles = np.stack([codes >> 4, codes & 15], axis=1).reshape(-1)
    return _TABLE[nibbles] * 2.0 ** (scale - 127)


def decode_block_wrong_2(codes, scale):
    """All lower nibbles, then all upper ones."""
    return _TABLE[np.concatenate([codes & 15, codes >> 4])] * 2.0 ** (scale - 127)


def counting_sort(chosen, num_experts):
    offsets = [0] * (num_experts + 1)
    for experts in chosen:
        for e in experts:
            offsets[e + 1] += 1
    for e in range(num_experts):
        offsets[e + 1] += offsets[e]
    free, token_of_row, place = offsets[:], [0] * offsets[-1], []
    for token, experts in enumerate(chosen):
        place.append([])
        for e in experts:
            token_of_row[free[e]] = token
            place[-1].append(free[e])
            free[e] += 1
    return token_of_row, place, offsets


def counting_sort_wrong(chosen, num_experts):
    """Rows in order of token, as they came."""
    token_of_row = [t for t, experts in enumerate(chosen) for _ in experts]
    count = len(chosen[0])
    place = [[t * count + i for i in range(count)] for t in range(len(chosen))]
    return token_of_row, place, counting_sort(chosen, num_experts)[2]


def counting_sort_wrong_2(chosen, num_experts):
    """Offsets that are counts."""
    token_of_row, place, offsets = counting_sort(chosen, num_experts)
    return token_of_row, place, [0, *np.diff(offsets).tolist()]


def rows_to_fill(bytes_per_weight, peak, rate):
    return math.ceil(bytes_per_weight * peak / (2 * rate))


def rows_to_fill_wrong(bytes_per_weight, peak, rate):
    """A multiply-add is two FLOPs."""
    return math.ceil(bytes_per_weight * peak / rate)


def rows_to_fill_wrong_2(bytes_per_weight, peak, rate):
    """Rounded down."""
    return int(bytes_per_weight * peak / (2 * rate))
