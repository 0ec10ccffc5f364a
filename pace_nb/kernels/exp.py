"""exp and what is made of it, on 16 lanes: device functions that softmax and activations share.

    exp(x)     = 2^n (1 + r + r^2 p(r)),  n = rint(x log2 e),  r = x - n ln 2,  |r| <= ln 2 / 2
    sigmoid(x) = 1 / (1 + exp(-x))

| Array | Shape | Type   | Layout       |
|-------|-------|--------|--------------|
| x     | [16]  | f32x16 | one register |
| y     | [16]  | f32x16 | one register |

Moves: nothing, operands are registers.
Does: exp 21 operations per vector, 10 of them fma or mul; sigmoid 3 more, one a division.
Error: exp within 1 ULP (polynomial 3.2e-9 relative, the rest is rounding; 1.5 ULP without fma),
    denormal results too. r is exact but for its last rounding: ln 2 is split so that n times its
    upper part needs 17 bits. sigmoid within 2.5 ULP.
Cautions: exp(0) = 1 exactly, exp(-inf) = 0, 0 below -103.98, infinity above 88.7228, NaN stays NaN
    (both clamps keep their second operand where the comparison is unordered). sigmoid is 0 below
    -88.73, where the exact value is a denormal.
Source: Cody and Waite 1980 (two-part reduction); minimax coefficients by weighted least squares
    (Lawson), rounded to f32 one after another. Replaces PACE `csrc/ops/exp_approx.h` (Taylor,
    2 ULP, 0 below -88, no upper clamp).
Notebook: 05 exp and softmax. Ledger: lanes.
"""

from __future__ import annotations

import numpy as np

from pace_nb.kernels import jit
from pace_nb.kernels.arrays import Array
from pace_nb.kernels.bf16 import widen
from pace_nb.kernels.lanes import fma, maximum, minimum, round_half_even, scale_pow2, splat


# ---- definitions ---------------------------------------------------------------------------------
def exp_ref(x: Array) -> Array:
    """e to the power of x, float64."""
    with np.errstate(over="ignore", under="ignore"):
        return np.exp(widen(x))


def sigmoid_ref(x: Array) -> Array:
    """1 / (1 + e to the power of -x), float64."""
    return 1.0 / (1.0 + exp_ref(-widen(x)))


# ---- constants -----------------------------------------------------------------------------------
LOG2_E = 1.4426950408889634
LN2_HIGH = 0.693359375  # 355 / 512: 9 bits, so n * LN2_HIGH is exact for |n| < 2**15
LN2_LOW = -2.1219444005469057e-4  # ln 2 - LN2_HIGH
SMALLEST = -105.0  # n = -151: the result is below half of the smallest denormal, so it rounds to 0
LARGEST = 89.0  # n = 128: the result overflows
# (exp(r) - 1 - r) / r^2 on |r| <= ln 2 / 2, minimax for the relative error of exp: 3.2e-9.
P2, P3, P4 = 0.4999999403953552, 0.1666652113199234, 0.04166826605796814
P5, P6 = 0.008368677459657192, 0.0013820730382576585


# ---- device functions ----------------------------------------------------------------------------
@jit.device_fn
def exp(x):
    """e to the power of x, f32x16."""
    x = minimum(splat(LARGEST), maximum(splat(SMALLEST), x))
    n = round_half_even(x * splat(LOG2_E))
    r = fma(n, splat(-LN2_LOW), fma(n, splat(-LN2_HIGH), x))
    p = fma(fma(splat(P6), r, splat(P5)), r, splat(P4))
    p = fma(fma(p, r, splat(P3)), r, splat(P2))
    p = fma(fma(p, r, splat(1.0)), r, splat(1.0))
    return scale_pow2(p, n)


@jit.device_fn
def sigmoid(x):
    """1 / (1 + exp(-x)), f32x16."""
    return splat(1.0) / (splat(1.0) + exp(-x))
