"""Solutions of notebooks/09_rope.ipynb, and mistakes that its checks refuse."""

import math

from pace_nb.kernels.rope import rope_ref


def longest_turn(r, base):
    return int(2 * math.pi * base ** ((r - 2) / r))


def longest_turn_wrong(r, base):
    """As if the last pair were i = R / 2."""
    return int(2 * math.pi * base)


def longest_turn_wrong_2(r, base):
    """Radians, not turns."""
    return int(base ** ((r - 2) / r))


def unrotate(y, positions, cos, sin, interleaved):
    return rope_ref(y, positions, cos, -sin, interleaved)


def unrotate_wrong(y, positions, cos, sin, interleaved):
    """Both signs: half a turn too much."""
    return rope_ref(y, positions, -cos, -sin, interleaved)


def unrotate_wrong_2(y, positions, cos, sin, interleaved):
    """Only for halves."""
    return rope_ref(y, positions, cos, -sin)


def order_of_dims(d):
    return [*range(0, d, 2), *range(1, d, 2)]


def order_of_dims_wrong(d):
    """The other way round: from halves to neighbours."""
    return [i // 2 + (i % 2) * (d // 2) for i in range(d)]


def order_of_dims_wrong_2(d):
    """As it was."""
    return list(range(d))
