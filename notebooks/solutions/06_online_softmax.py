"""Solutions of notebooks/06_online_softmax.ipynb, and mistakes that its checks refuse."""

import numpy as np


def merge(first, second):
    (m1, l1, o1), (m2, l2, o2) = first, second
    m = max(m1, m2)
    alpha, beta = np.exp(m1 - m), np.exp(m2 - m)
    return m, alpha * l1 + beta * l2, alpha * o1 + beta * o2


def merge_wrong(first, second):
    """Adds up what was summed against different maxima."""
    (m1, l1, o1), (m2, l2, o2) = first, second
    return max(m1, m2), l1 + l2, o1 + o2


def merge_wrong_2(first, second):
    """Always keeps the first part's maximum: overflows, and m is not the largest."""
    (m1, l1, o1), (m2, l2, o2) = first, second
    beta = np.exp(m2 - m1)
    return m1, l1 + beta * l2, o1 + beta * o2


def with_sink(m, total, o, sink):
    new = max(m, sink)
    alpha = np.exp(m - new)
    return alpha * o / (alpha * total + np.exp(sink - new))


def with_sink_wrong(m, total, o, sink):
    """A sink of 0 is a sink: it does not mean that there is none."""
    return with_sink(m, total, o, sink) if sink else o / total


def with_sink_wrong_2(m, total, o, sink):
    """Overflows where the sink is the largest score."""
    return o / (total + np.exp(sink - m))


def blocks_visited(position, window):
    first = max(0, position + 1 - window) if window else 0
    return position // 64 - first // 64 + 1


def blocks_visited_wrong(position, window):
    """As if the window began at a block."""
    return -(-min(position + 1, window or position + 1) // 64)


def blocks_visited_wrong_2(position, window):
    """One key too far back."""
    first = max(0, position - window) if window else 0
    return position // 64 - first // 64 + 1
