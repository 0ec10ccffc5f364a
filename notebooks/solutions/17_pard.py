"""Solutions of notebooks/17_pard.ipynb, and likely mistakes that its checks must refuse."""

import numpy as np


def best_k(a, t0, t1, d0, d1):
    def rate(k):
        seconds = t0 + t1 * (k + 1) + (d0 + d1 * k if k else 0)
        return sum(a**i for i in range(k + 1)) / seconds

    return max(range(65), key=rate)


def best_k_wrong(a, t0, t1, d0, d1):
    """Pays for the draft even where it is not asked."""

    def rate(k):
        return sum(a**i for i in range(k + 1)) / (t0 + t1 * (k + 1) + d0 + d1 * k)

    return max(range(65), key=rate)


def best_k_wrong_2(a, t0, t1, d0, d1):
    """The most tokens per step, whatever they cost."""
    return 64


def pard_reads(tokens, done, k, mask):
    return done, tokens[done:] + [mask] * (k - 1), k


def pard_reads_wrong(tokens, done, k, mask):
    """A mask for every guess."""
    return done, tokens[done:] + [mask] * k, k


def pard_reads_wrong_2(tokens, done, k, mask):
    """Reads everything again."""
    return 0, tokens + [mask] * (k - 1), k


def after_refusal(p, q):
    missing = np.maximum(p - q, 0)
    return missing / missing.sum()


def after_refusal_wrong(p, q):
    """The model's own, as if nothing had been tried."""
    return p


def after_refusal_wrong_2(p, q):
    """Not made to sum to 1."""
    return np.maximum(p - q, 0)
