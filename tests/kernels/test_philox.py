"""philox.py: the words that NumPy draws; shares of a total."""

from __future__ import annotations

import numpy as np
from numba import prange

from pace_nb.kernels import jit
from pace_nb.kernels.philox import philox, philox_ref, share_of


def test_the_words_of_the_reference_are_those_of_numpy() -> None:
    for seed in (0, 5, 2**64 - 1):
        for position in (0, 1, 1000):
            for stream in (0, 1, 7):
                counter = position + stream * 2**64
                numpys = np.random.Philox(key=seed, counter=counter).random_raw()
                assert philox_ref(seed, position, stream) == int(numpys)


@jit.kernel
def _words_kernel(seeds, positions, streams, words, n):
    for i in prange(n):
        words[i] = philox(seeds[i], positions[i], streams[i])


@jit.kernel
def _shares_kernel(words, totals, shares, n):
    for i in prange(n):
        shares[i] = share_of(words[i], totals[i])


def test_words_are_those_of_the_reference() -> None:
    rng = np.random.default_rng(0)
    seeds = rng.integers(0, 2**64, 50, np.uint64, endpoint=False)
    seeds[:2] = 0, 2**64 - 1
    positions, streams = rng.integers(0, 2**40, 50), rng.integers(0, 8, 50)
    positions[2:4] = 0, 2**62
    words = np.empty(50, np.uint64)
    _words_kernel(seeds, positions, streams, words, 50)
    given = zip(seeds.tolist(), positions.tolist(), streams.tolist(), strict=True)
    assert words.tolist() == [philox_ref(*each) for each in given]


def test_a_share_is_the_floor_of_u_times_the_total() -> None:
    """u has 53 bits, so a share is below its total; whole numbers say what the floor is."""
    words = np.array([0, 2**11 - 1, 2**11, 2**63, 2**64 - 1, 0x123456789ABCDEF0], np.uint64)
    totals = np.array([1, 2**62, 2**53, 3, 2**62, 2**40 + 12345])
    shares = np.empty(6, np.int64)
    _shares_kernel(words, totals, shares, 6)
    exact = [(w >> 11) * t >> 53 for w, t in zip(words.tolist(), totals.tolist(), strict=True)]
    assert shares.tolist() == exact
    assert (shares < totals).all() and shares[1] == 0 and shares[2] == 1
