"""Solutions of notebooks/02_bf16.ipynb, and likely mistakes that its checks must refuse."""

from pace_nb.kernels.bf16 import from_f32, to_f32


def round_bits(u):
    upper, lower = u >> 16, u & 0xFFFF
    up = lower > 0x8000 or (lower == 0x8000 and upper & 1)
    return upper + 1 if up else upper


def round_bits_wrong(u):
    """Cuts."""
    return u >> 16


def round_bits_wrong_2(u):
    """Ties go up."""
    return (u + 0x8000) >> 16


def exact_up_to(digits):
    return 2**digits


def exact_up_to_wrong(digits):
    """The largest number of so many digits: one less."""
    return 2**digits - 1


def exact_up_to_wrong_2(digits):
    """Forgets that the leading 1 is counted."""
    return 2 ** (digits + 1)


def three_parts(x):
    first = from_f32(x)
    second = from_f32(x - to_f32(first))
    third = from_f32(x - to_f32(first) - to_f32(second))
    return first, second, third


def three_parts_wrong(x):
    """Two, and a zero."""
    first = from_f32(x)
    return first, from_f32(x - to_f32(first)), from_f32(x * 0)


def three_parts_wrong_2(x):
    """The rest of the first only."""
    first = from_f32(x)
    rest = from_f32(x - to_f32(first))
    return first, rest, rest
