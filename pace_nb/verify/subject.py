"""Which kernels can be checked: how they are called, their bounds in words, the sizes to try.

Knows kernels; their inputs and what they should give are in case.py. Does not know faults.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from pace_nb.kernels.activation import activation
from pace_nb.kernels.attention_decode import attention_decode
from pace_nb.kernels.attention_prefill import attention_prefill
from pace_nb.kernels.gemm import MR, NR, gemm
from pace_nb.kernels.mlp import mlp
from pace_nb.kernels.moe import combine, grouped_gemm
from pace_nb.kernels.norm import layer_norm, rms_norm
from pace_nb.kernels.quant import NR as QUANT_NR
from pace_nb.kernels.quant import grouped_gemm_mxfp4
from pace_nb.kernels.rope import rope
from pace_nb.kernels.sampling import distribution
from pace_nb.verify.case import (
    VECTOR,
    Array,
    Case,
    Sizes,
    exp_of,
    make_activation,
    make_attention,
    make_combine,
    make_exp,
    make_gemm,
    make_kv_write,
    make_layer_norm,
    make_mlp,
    make_moe,
    make_norm,
    make_quant,
    make_rope,
    make_sampling,
    written,
)  # fmt: skip

Kernel = Callable[..., Array]

DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(np.uint16),
}


class Subject(NamedTuple):
    """A kernel that can be checked. `make(sizes, dtype, rng, nan)` gives a Case of it."""

    kernel: Kernel
    file: str
    formula: str
    bound: str  # as the docstring words it
    axes: tuple[str, ...]  # letters of `sizes`
    dtypes: tuple[str, ...]
    make: Callable[[Sizes, np.dtype[Any], np.random.Generator, bool], Case]
    quick: tuple[Sizes, ...]
    full: tuple[Sizes, ...]  # as well as those of quick
    tiles: dict[str, int]  # axes of the result, and how much of each is one tile


# ---- the table -----------------------------------------------------------------------------------
BOTH = ("float32", "bfloat16")
ATTENTION_BOUND = (
    "w.|v| (4 (D + 2) u max |q|.|k| / sqrt(D) + (min(S, 512) + S/8 + 64) u), u = 2^-24; BF16 adds "
    "2^-8 (w.|v| + |y|)"
)

SUBJECTS: dict[str, Subject] = {
    "gemm": Subject(
        gemm, "pace_nb/kernels/gemm.py", "C = A W^T + bias",
        "(K + 1) (2^-24 (|bias| + sum |A| |W|) + 2^-126)", ("M", "N", "K"), BOTH, make_gemm,
        ((1, 64, 64), (7, 200, 33), (13, 70, 40), (64, 129, 512)),
        ((1, 1, 1), (2, 63, 15), (1, 781, 1823), (25, 100, 4103), (3, 65, 2049), (256, 256, 1024)),
        {"m": MR, "n": NR},
    ),
    "norm": Subject(
        rms_norm, "pace_nb/kernels/norm.py", "y = x / sqrt(mean(x^2) + eps) weight",
        "(E/128 + 7) 2^-24 |y|; BF16 adds 2^-8 |y|", ("T", "E"), BOTH, make_norm,
        ((4, 64), (3, 65), (2, 781), (1, 2048)),
        ((1, 1), (3, 15), (5, 17), (1823, 781), (7, 8192)), {"t": 1, "e": VECTOR},
    ),
    "layer_norm": Subject(
        layer_norm, "pace_nb/kernels/norm.py", "y = (x - mean) / sqrt(var + eps) weight + bias",
        "(E/64 + 9) 2^-24 (|y| + |weight| max|x| / std); BF16 adds 2^-8 |y|", ("T", "E"), BOTH,
        make_layer_norm, ((4, 64), (3, 65), (2, 781), (1, 2048)),
        ((3, 15), (5, 17), (1823, 781), (7, 8192)), {"t": 1, "e": VECTOR},
    ),
    "rope": Subject(
        rope, "pace_nb/kernels/rope.py", "(a, b) -> (a cos - b sin, b cos + a sin)",
        "2^-24 (|b sin| + |y|); BF16 adds 2^-8 |y|", ("T", "H", "D"), BOTH, make_rope,
        ((3, 2, 16), (5, 1, 34), (2, 2, 80)), ((1, 32, 64), (2, 1, 256), (1823, 3, 96)),
        {"t": 1, "h": 1, "d": VECTOR},
    ),
    "exp": Subject(
        exp_of, "pace_nb/kernels/exp.py", "y = e^x", "1 ULP (1.5 without fma)",
        ("N",), ("float32",), make_exp, ((1000,), (4096,)), ((1,), (17,), (1_000_003,)),
        {"n": VECTOR},
    ),
    "activation": Subject(
        activation, "pace_nb/kernels/activation.py", "y = silu(x) = x / (1 + e^-x)",
        "4 ULP; BF16 adds 2^-8 |y|", ("T", "F"), BOTH, make_activation,
        ((3, 15), (4, 33), (2, 2049)), ((1, 1), (1823, 781)), {"t": 1, "f": VECTOR},
    ),
    "attention_decode": Subject(
        attention_decode, "pace_nb/kernels/attention_decode.py", "y = softmax(q k^T / sqrt(D)) v",
        ATTENTION_BOUND, ("T", "S", "H", "KVH", "D"), BOTH, make_attention,
        ((1, 100, 8, 2, 64), (2, 513, 4, 4, 32), (1, 33, 7, 1, 40)),
        ((1, 1, 2, 1, 16), (5, 1100, 8, 2, 80), (1, 4096, 8, 2, 128)),
        {"t": 1, "h": 1, "d": VECTOR},
    ),
    "attention_prefill": Subject(
        attention_prefill, "pace_nb/kernels/attention_prefill.py",
        "y = softmax(q k^T / sqrt(D)) v", ATTENTION_BOUND, ("T", "S", "H", "KVH", "D"), BOTH,
        make_attention, ((33, 33, 4, 2, 64), (40, 100, 7, 1, 32)),
        ((130, 430, 8, 2, 64), (513, 513, 2, 2, 32), (70, 70, 6, 2, 256)),
        {"t": 16, "h": 1, "d": VECTOR},
    ),
    "mlp": Subject(
        mlp, "pace_nb/kernels/mlp.py", "H = silu(X Wg^T + bg) (X Wu^T + bu)",
        "gemm's in both products, then 4 ULP of silu; BF16 adds 2^-8 |H|", ("M", "F", "K"), BOTH,
        make_mlp, ((1, 64, 64), (7, 130, 33), (9, 70, 48)),
        ((1, 1, 1), (3, 65, 15), (25, 200, 4103), (64, 256, 1024)), {"m": MR, "f": NR},
    ),
    "moe": Subject(
        grouped_gemm, "pace_nb/kernels/moe.py", "C[r] = A[r] W[expert(r)]^T + bias[expert(r)]",
        "as gemm", ("X", "R", "N", "K"), BOTH, make_moe,
        ((4, 5, 64, 64), (3, 20, 130, 33), (8, 40, 70, 40)),
        ((1, 1, 1, 1), (32, 128, 65, 17), (2, 50, 100, 4103)), {"r": 1, "n": NR},
    ),
    "combine": Subject(
        combine, "pace_nb/kernels/moe.py", "y[t] = sum over i of scale[t, i] C[place[t, i]]",
        "I 2^-24 sum |scale C|", ("T", "I", "N"), ("float32",), make_combine,
        ((3, 4, 64), (5, 2, 33), (2, 1, 781)), ((1, 1, 1), (1823, 4, 65), (7, 8, 4096)),
        {"t": 1, "n": VECTOR},
    ),
    "quant": Subject(
        grouped_gemm_mxfp4, "pace_nb/kernels/quant.py",
        "C[r] = A[r] W[expert(r)]^T + bias[expert(r)], W = e2m1(code) 2^(scale - 127)", "as gemm",
        ("X", "R", "N", "K"), ("bfloat16",), make_quant,
        ((4, 5, 64, 64), (3, 20, 130, 32), (8, 40, 70, 96)),
        ((1, 1, 1, 32), (32, 128, 65, 64), (2, 50, 100, 4096)), {"r": 1, "n": QUANT_NR},
    ),
    "kv_write": Subject(
        written, "pace_nb/kernels/kv_write.py", "keys and values, written and read again",
        "exact; BF16 2^-8 |y|, one rounding", ("T", "KVH", "D"), BOTH, make_kv_write,
        ((5, 2, 16), (33, 1, 34), (40, 2, 80)), ((1, 1, 2), (16, 8, 128), (1823, 3, 96)),
        {"k or v": 1, "t": 16, "h": 1, "d": VECTOR},
    ),
    "sampling": Subject(
        distribution, "pace_nb/kernels/sampling.py",
        "p = weight / total, weight = floor(2^40 e^x), x = (l - largest) / temperature, top_k 50",
        "of a weight 2^-22 + 2^-23 |x| relative and 2^-40 of the largest, and so of their total",
        ("R", "V"), ("float32",), make_sampling, ((3, 64), (5, 781), (2, 4099)),
        ((1, 1), (17, 50), (4, 128_256)), {"r": 1, "v": VECTOR},
    ),
}  # fmt: skip


MOST = 2**28  # product of all sizes
MOST_ELEMENTS = 2**24  # of a result: float64, several times over
ROWS_OF_HEADS = (("T", "H", "D"), ("T", "KVH", "D"))


def make(subject: Subject, sizes: Sizes, dtype: str, seed: int, nan: bool) -> Case:
    """The case of these sizes. ValueError where they do not fit the kernel, or are too many."""
    if len(sizes) != len(subject.axes):
        raise ValueError(f"{len(sizes)} sizes, expected {len(subject.axes)}")
    if min(sizes) < 1:
        raise ValueError("a size below 1")
    most = MOST if len(sizes) > 2 and subject.axes not in ROWS_OF_HEADS else MOST_ELEMENTS
    if math.prod(sizes) > most:
        raise ValueError(f"too large to be checked: the product of sizes may be {most}")
    if subject.axes == ("T", "H", "D") and sizes[2] % 2:
        raise ValueError("D must be even")
    rng = np.random.default_rng([seed, *sizes])
    with np.errstate(all="ignore"):
        return subject.make(sizes, DTYPES[dtype], rng, nan)
