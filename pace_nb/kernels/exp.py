"""exp and what is made of it, on 16 lanes: device functions that softmax and activations share.

    exp(x)     = 2^n (1 + r + r^2 p(r)),  n = rint(x log2 e),  r = x - n ln 2,  |r| <= ln 2 / 2
    exp2(x)    = 2^n (1 + r e(r)),  n = rint(x),  r = x - n,  |r| <= 1 / 2
    sigmoid(x) = 1 / (1 + exp(-x))
    normal_cdf(x) = 1 - q(x) for x > 0, q(-x) else,  q(a) = exp(-a^2 / 2) t R(t),  t = 1 / (1 + k a)

| Array | Shape | Type   | Layout       |
|-------|-------|--------|--------------|
| x     | [16]  | f32x16 | one register |
| y     | [16]  | f32x16 | one register |

Moves: nothing, operands are registers.
Does: exp 13 operations per vector, 8 of them fma: 21 FLOPs per element. exp2 9, 5 of them fma.
    sigmoid 3 more than exp, normal_cdf 17 more (26 FLOPs), one a division each.
Error: exp within 1 ULP (polynomial 3.2e-9 relative, the rest is rounding; 1.5 ULP without fma),
    denormal results too. r is exact but for its last rounding: ln 2 is split so that n times its
    upper part needs 17 bits. exp2 within 3 ULP (polynomial 9.3e-8 relative), whole powers exactly.
    sigmoid within 2.5 ULP. normal_cdf within 8 ULP in both tails (R is good to 2.5e-8; a^2
    is not rounded: an fma takes n times ln 2's upper part from it; without fma it is 8 + x^2 / 2
    ULP).
Cautions: exp(0) = 1 exactly, exp(-inf) = 0, 0 below -103.98, infinity above 88.7228, NaN stays NaN
    (both clamps keep their second operand where the comparison is unordered). sigmoid is 0 below
    -88.73, where the exact value is a denormal. Use normal_cdf, not 0.5 + 0.5 erf: that loses all
    its digits below -4.
Source: Cody and Waite 1980 (two-part reduction); minimax coefficients by weighted least squares
    (Lawson), rounded to f32 one after another. Replaces PACE `csrc/ops/exp_approx.h` (Taylor,
    2 ULP, 0 below -88, no upper clamp). normal_cdf: the form of Hastings 1955, refitted.
Notebook: 05 exp and softmax. Ledger: lanes.
"""

from __future__ import annotations

import math

import numpy as np

from pace_nb.kernels import jit
from pace_nb.kernels.arrays import Array
from pace_nb.kernels.bf16 import widen
from pace_nb.kernels.lanes import (
    absolute,
    fma,
    maximum,
    minimum,
    round_half_even,
    scale_pow2,
    select_above,
    splat,
)


# ---- definitions ---------------------------------------------------------------------------------
def exp_ref(x: Array) -> Array:
    """e to the power of x, float64."""
    with np.errstate(over="ignore", under="ignore"):
        return np.exp(widen(x))


def exp2_ref(x: Array) -> Array:
    """2 to the power of x, float64."""
    with np.errstate(over="ignore", under="ignore"):
        return np.exp2(widen(x))


def sigmoid_ref(x: Array) -> Array:
    """1 / (1 + e to the power of -x), float64."""
    return 1.0 / (1.0 + exp_ref(-widen(x)))


def normal_cdf_ref(x: Array) -> Array:
    """P(Z <= x) for a standard normal Z, float64: (1 + erf(x / sqrt 2)) / 2, exact in the tail."""
    halved_erfc = np.vectorize(lambda t: 0.5 * math.erfc(-t / math.sqrt(2.0)), otypes=[float])
    values: Array = halved_erfc(widen(x))
    return values


# ---- constants -----------------------------------------------------------------------------------
LOG2_E = 1.4426950408889634
LN2_HIGH = 0.693359375  # 355 / 512: 9 bits, so n * LN2_HIGH is exact for |n| < 2**15
LN2_LOW = -2.1219444005469057e-4  # ln 2 - LN2_HIGH
SMALLEST = -105.0  # n = -151: the result is below half of the smallest denormal, so it rounds to 0
SMALLEST_POWER = -151.0  # 2**-151 rounds to 0
LARGEST = 89.0  # n = 128: the result overflows
# (exp(r) - 1 - r) / r^2 on |r| <= ln 2 / 2, minimax for the relative error of exp: 3.2e-9.
P2, P3, P4 = 0.4999999403953552, 0.1666652113199234, 0.04166826605796814
P5, P6 = 0.008368677459657192, 0.0013820730382576585
# (2^r - 1) / r on |r| <= 1 / 2, minimax for the relative error of 2^r: 9.3e-8.
E1, E2, E3 = 0.6931470036506653, 0.24022246897220612, 0.0555071122944355
E4, E5 = 0.009671294130384922, 0.0013269406044855714
# q(a) / exp(-a^2 / 2) = t (R0 + R1 t + .. + R8 t^8) with t = 1 / (1 + CDF_K a), 0 <= a <= 14.5.
CDF_K = 0.27000001072883606
R0, R1, R2 = 0.10772065818309784, 0.10754293203353882, 0.10181018710136414
R3, R4, R5 = 0.07205143570899963, 0.10782096534967422, -0.06920347362756729
R6, R7, R8 = 0.16977931559085846, -0.12648235261440277, 0.028960343450307846
FARTHEST = 14.49  # its square, halved, is just below -SMALLEST: beyond it all is 0


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
def exp2(x):
    """2 to the power of x <= 127, f32x16: for weights that are divided by their sum."""
    x = maximum(splat(SMALLEST_POWER), x)
    n = round_half_even(x)
    r = x - n
    p = fma(fma(splat(E5), r, splat(E4)), r, splat(E3))
    p = fma(fma(p, r, splat(E2)), r, splat(E1))
    return scale_pow2(fma(p, r, splat(1.0)), n)


@jit.device_fn
def sigmoid(x):
    """1 / (1 + exp(-x)), f32x16."""
    return splat(1.0) / (splat(1.0) + exp(-x))


@jit.device_fn
def normal_cdf(x):
    """P(Z <= x) for a standard normal Z, f32x16."""
    a = minimum(splat(FARTHEST), absolute(x))
    # exp(-a^2 / 2), as `exp` does it without clamps, but that the power is rounded where it is
    # small: after n ln 2 has been taken from it.
    half = a * splat(-0.5)
    n = round_half_even(half * a * splat(LOG2_E))
    r = fma(n, splat(-LN2_LOW), fma(half, a, n * splat(-LN2_HIGH)))
    p = fma(fma(splat(P6), r, splat(P5)), r, splat(P4))
    p = fma(fma(p, r, splat(P3)), r, splat(P2))
    p = fma(fma(p, r, splat(1.0)), r, splat(1.0))
    tail = scale_pow2(p, n)
    t = splat(1.0) / fma(splat(CDF_K), a, splat(1.0))
    r = fma(fma(fma(splat(R8), t, splat(R7)), t, splat(R6)), t, splat(R5))
    r = fma(fma(fma(r, t, splat(R4)), t, splat(R3)), t, splat(R2))
    q = fma(fma(r, t, splat(R1)), t, splat(R0)) * t * tail
    return select_above(x, splat(0.0), splat(1.0) - q, q)
