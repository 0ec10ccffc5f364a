"""Random numbers that need no state: Philox4x64-10, a function of a key and a counter.

    word(seed, position, stream) = first word of Philox4x64-10,  key (seed, 0),
                                   counter (position + 1, stream, 0, 0),  as NumPy draws it
    u = upper 53 bits of a word / 2^53, in [0, 1)

A token's number depends on its request's seed and on its position in the output alone, so not on
what else runs, nor on how often a step was computed.
Knows: whole numbers of 64 bits. Does not know: what is drawn.
Error: none, integers. Cautions: seed, position and stream are from 0 to 2^64 - 1.
Source: Salmon et al. 2011. Notebook: 18 sampling. Ledger: sampling.
"""

from __future__ import annotations

import numpy as np

from pace_nb.kernels import jit


# ---- definition ----------------------------------------------------------------------------------
def philox_ref(seed: int, position: int, stream: int = 0) -> int:
    """First word of Philox4x64-10 as published, in whole numbers."""
    words, keys = [position + 1, stream, 0, 0], [seed, 0]
    for _ in range(10):
        left, right = words[0] * 0xD2E7470EE14C6C93, words[2] * 0xCA5A826395121157
        words = [
            right >> 64 ^ words[1] ^ keys[0],
            right & (2**64 - 1),
            left >> 64 ^ words[3] ^ keys[1],
            left & (2**64 - 1),
        ]
        keys = [
            (key + step) & (2**64 - 1)
            for key, step in zip(keys, (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B), strict=True)
        ]
    return words[0]


# ---- constants -----------------------------------------------------------------------------------
ROUNDS = 10
MULTIPLIERS = (np.uint64(0xD2E7470EE14C6C93), np.uint64(0xCA5A826395121157))
KEY_STEPS = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBB67AE8584CAA73B))
HALF, LOWER = np.uint64(32), np.uint64(0xFFFFFFFF)
UPPER_53 = np.uint64(0xFFFFFFFFFFFFF800)


# ---- device functions ----------------------------------------------------------------------------
@jit.device_fn
def _high(a, b):
    """Upper 64 bits of the product of two uint64."""
    a0, a1, b0, b1 = a & LOWER, a >> HALF, b & LOWER, b >> HALF
    middle = a1 * b0 + ((a0 * b0) >> HALF)
    other = a0 * b1 + (middle & LOWER)
    return a1 * b1 + (middle >> HALF) + (other >> HALF)


@jit.device_fn
def philox(seed, position, stream):
    """First word of Philox4x64-10: `philox_ref`."""
    w0, w1 = np.uint64(position) + np.uint64(1), np.uint64(stream)
    w2, w3 = np.uint64(0), np.uint64(0)
    k0, k1 = np.uint64(seed), np.uint64(0)
    for _ in range(ROUNDS):
        h0, l0 = _high(w0, MULTIPLIERS[0]), w0 * MULTIPLIERS[0]
        h1, l1 = _high(w2, MULTIPLIERS[1]), w2 * MULTIPLIERS[1]
        w0, w1, w2, w3 = h1 ^ w1 ^ k0, l1, h0 ^ w3 ^ k1, l0
        k0, k1 = k0 + KEY_STEPS[0], k1 + KEY_STEPS[1]
    return w0


@jit.device_fn
def share_of(bits, total):
    """floor(u * total) for u = the upper 53 of 64 bits, as a fraction."""
    return np.int64(_high(bits & UPPER_53, np.uint64(total)))
