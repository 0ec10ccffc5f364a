"""Solutions of notebooks/15_continuous_batching.ipynb, and mistakes that its checks must refuse."""


def group_steps(wanted, places):
    return sum(max(wanted[i : i + places]) for i in range(0, len(wanted), places))


def group_steps_wrong(wanted, places):
    """As if all places were always busy."""
    return -(-sum(wanted) // places)


def group_steps_wrong_2(wanted, places):
    """Groups of the longest first."""
    ordered = sorted(wanted, reverse=True)
    return sum(max(ordered[i : i + places]) for i in range(0, len(ordered), places))


def joined_steps(wanted, places):
    free = [0] * places
    for length in wanted:
        place = free.index(min(free))
        free[place] += length
    return max(free)


def joined_steps_wrong(wanted, places):
    """The lower bound, which is not always reached."""
    return max(max(wanted), -(-sum(wanted) // places))


def joined_steps_wrong_2(wanted, places):
    """Each place has its own line."""
    return max(sum(wanted[i::places]) for i in range(places))


def free_rows(peak, rate, bits):
    return int(peak * bits / 16 / rate + 1e-6)


def free_rows_wrong(peak, rate, bits):
    """For weights of 16 bits only."""
    return int(peak / rate)


def free_rows_wrong_2(peak, rate, bits):
    """One FLOP per weight."""
    return int(peak * bits / 8 / rate + 1e-6)
