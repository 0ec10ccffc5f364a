"""Mistakes that kernels have had, put around a kernel from outside, and the test that catches each.

    wrong-mask       a token does not see its own key: j < position where it should be j <= position
    lost-tail        what lies beyond the last whole vector of 16 is not read
    bf16-accumulate  the running sum is rounded to BF16 after every block, as if kept in BF16
    nnan             LLVM's flag "there are no NaNs": a clamp or a maximum loses the NaN it is given

A fault is a function that takes a kernel and gives one with the same arguments, which is wrong: it
changes what goes in, what comes out, or calls a faulty variant of the reference. `pace_nb/kernels`
knows nothing of it. Each `Plant` names a test of tests/kernels that fails on it;
tests/verify/test_fault.py runs those tests with the fault planted, so the claim is proved.
Knows the kernels' arguments. Source of the faults: docs/adr/0011 (nnan), PACE's rounding of C.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pace_nb.kernels.activation import activation_ref, gated_activation_ref
from pace_nb.kernels.bf16 import from_f32, narrow, to_f32, widen
from pace_nb.kernels.exp import SMALLEST
from pace_nb.kernels.gemm import gemm, pack_weight, unpack_weight
from pace_nb.kernels.kv_write import kv_gather_ref
from pace_nb.kernels.mlp import GATE_AND_UP, MLPWeight, unpack_mlp_weight
from pace_nb.kernels.moe import PackedExperts
from pace_nb.kernels.quant import PackedMXFP4, dequantize_mxfp4_ref, unpack_mxfp4

Array = NDArray[Any]
Kernel = Callable[..., Array]

FAULTS = {
    "none": "the kernel as it is",
    "wrong-mask": "a token does not see its own key",
    "lost-tail": "what lies beyond the last whole vector of 16 is not read",
    "bf16-accumulate": "running sums are rounded to BF16 after every block",
    "nnan": "a clamp or a maximum loses the NaN that it is given",
}

VECTOR = 16
PRODUCTS = 32  # of a `vdpbf16ps` per accumulator lane pair: a block of gemm's running sum
KEYS = 64  # a block of keys


def in_bf16(x: Array) -> Array:
    """f32 rounded to BF16 and back."""
    rounded: Array = to_f32(from_f32(np.asarray(x, np.float32)))
    return rounded


def without_tail(x: Array) -> Array:
    """A copy whose last axis is 0 beyond the last whole vector."""
    x = x.copy()
    x[..., x.shape[-1] // VECTOR * VECTOR :] = 0
    return x


def given(out: Array | None, values: Array, dtype: Any = np.float32) -> Array:
    """Values in `out`, or in a new array of `dtype`."""
    if out is None:
        return narrow(values, dtype)
    out[...] = narrow(values, out.dtype)
    return out


# ---- the first argument is what loses its tail ---------------------------------------------------
def lost_tail(kernel: Kernel) -> Kernel:
    """The last axis of the first argument counts as 0 beyond its last whole vector."""

    def faulty(x: Array, *arguments: Any, **options: Any) -> Array:
        return kernel(without_tail(x), *arguments, **options)

    return faulty


# ---- gemm ----------------------------------------------------------------------------------------
def bf16_gemm(kernel: Kernel) -> Kernel:
    """C is rounded to BF16 after every 32 products, and the next are added to that."""

    def faulty(x: Array, weight: Any, bias: Array | None = None, out: Array | None = None) -> Array:
        w = unpack_weight(weight)
        total = np.zeros((len(x), len(w)), np.float32)
        total += np.float32(0) if bias is None else bias
        for k in range(0, x.shape[1], PRODUCTS):
            block = slice(k, k + PRODUCTS)
            part = kernel(np.ascontiguousarray(x[:, block]), pack_weight(w[:, block].copy()))
            total = in_bf16(total + part)
        return given(out, total.astype(float))

    return faulty


def bf16_grouped_gemm(expand: Callable[[Any], Sequence[Array]]) -> Callable[[Kernel], Kernel]:
    """The same for rows that are sorted by expert; `expand` gives the experts' [N, K]."""

    def fault(kernel: Kernel) -> Kernel:
        def faulty(x: Array, weight: Any, offsets: Array, bias: Array | None = None) -> Array:
            return np.concatenate(
                [
                    bf16_gemm(gemm)(
                        x[offsets[e] : offsets[e + 1]],
                        pack_weight(w),
                        None if bias is None else bias[e],
                    )
                    for e, w in enumerate(expand(weight))
                ]
            )

        return faulty

    return fault


def experts_of(weight: PackedExperts) -> list[Array]:
    """[N, K] of each expert."""
    return [unpack_weight(weight.expert(e)) for e in range(weight.num_experts)]


def expanded(weight: PackedMXFP4) -> list[Array]:
    """[N, K] of each expert in BF16, which holds MXFP4 exactly."""
    each = (dequantize_mxfp4_ref(*unpack_mxfp4(weight, e)) for e in range(weight.num_experts))
    return [from_f32(w.astype(np.float32)) for w in each]


def bf16_combine(kernel: Kernel) -> Kernel:
    """The sum over a token's experts is rounded to BF16 after each of them."""

    def faulty(c: Array, place: Array, scale: Array) -> Array:
        total = np.zeros((len(place), c.shape[1]), np.float32)
        for i in range(place.shape[1]):
            total = in_bf16(total + scale[:, i, None] * c[place[:, i]])
        return total

    return faulty


def bf16_mlp(kernel: Kernel) -> Kernel:
    """Gate and up as `bf16_gemm` gives them."""

    def faulty(x: Array, weight: MLPWeight, kind: str, out: Array | None = None) -> Array:
        weights, biases = unpack_mlp_weight(weight)
        rows = np.concatenate(
            [
                bf16_gemm(gemm)(x, pack_weight(w), None if biases is None else biases[i])
                for i, w in enumerate(weights)
            ],
            axis=1,
        )
        act = gated_activation_ref if weight.parts == GATE_AND_UP else activation_ref
        return given(out, act(rows, kind), x.dtype)

    return faulty


# ---- norms ---------------------------------------------------------------------------------------
def bf16_mean(x: Array) -> Array:
    """Mean of the rows of float64 x, summed in 16 lanes that hold BF16."""
    lanes = np.zeros((len(x), VECTOR), np.float32)
    for i in range(0, x.shape[1], VECTOR):
        piece = x[:, i : i + VECTOR]
        lanes[:, : piece.shape[1]] = in_bf16(lanes[:, : piece.shape[1]] + piece)
    mean: Array = lanes.sum(axis=1, keepdims=True).astype(float) / x.shape[1]
    return mean


def bf16_rms_norm(kernel: Kernel) -> Kernel:
    """RMSNorm with the sum of squares in BF16."""

    def faulty(
        x: Array, weight: Array, eps: float, out: Array | None = None, dtype: Any = np.float32
    ) -> Array:
        wide = widen(x)
        return given(out, wide / np.sqrt(bf16_mean(wide * wide) + eps) * weight, dtype)

    return faulty


def bf16_layer_norm(kernel: Kernel) -> Kernel:
    """LayerNorm with both sums in BF16."""

    def faulty(
        x: Array, weight: Array, bias: Array | None, eps: float,
        out: Array | None = None, dtype: Any = np.float32,
    ) -> Array:  # fmt: skip
        wide = widen(x)
        centred = wide - bf16_mean(wide)
        scaled = centred / np.sqrt(bf16_mean(centred * centred) + eps) * weight
        return given(out, scaled + (0 if bias is None else bias), dtype)

    return faulty


# ---- exp -----------------------------------------------------------------------------------------
def exp_without_nan(kernel: Kernel) -> Kernel:
    """The lower clamp gives its constant for a NaN."""

    def faulty(x: Array) -> Array:
        return kernel(np.where(np.isnan(x), np.float32(SMALLEST), x))

    return faulty


# ---- probabilities -------------------------------------------------------------------------------
def row_that_lost_its_nan(kernel: Kernel) -> Kernel:
    """The maximum drops a NaN, and its weight becomes 0: the token is not there."""

    def faulty(logits: Array, *arguments: Any, **options: Any) -> Array:
        dropped = np.where(np.isnan(logits), np.float32(-np.inf), logits)
        return kernel(dropped, *arguments, **options)

    return faulty


# ---- attention: each token becomes a sequence of its own, with the keys that it is to see --------
def other_contexts(contexts: Callable[[Array], Array]) -> Callable[[Kernel], Kernel]:
    """A fault that shows a token at position p the first contexts(p) keys, where p + 1 is right."""

    def fault(kernel: Kernel) -> Kernel:
        def faulty(
            q: Array, pool: Any, block_table: Array, units_per_block: int,
            cu_seqlens_q: Array, context_lens: Array, scale: float, *rest: Any, **options: Any,
        ) -> Array:  # fmt: skip
            owner = np.repeat(np.arange(len(context_lens)), np.diff(cu_seqlens_q))
            last = context_lens[owner] - cu_seqlens_q[owner + 1]
            seen = np.maximum(contexts(last + np.arange(len(q))), 1)
            return kernel(
                q, pool, block_table[owner], units_per_block,
                np.arange(len(q) + 1, dtype=np.int32), seen.astype(np.int32), scale,
                *rest, **options,
            )  # fmt: skip

        return faulty

    return fault


def own_key_unseen(position: Array) -> Array:
    """Keys seen where the mask says j < position."""
    return position


def whole_units(position: Array) -> Array:
    """Keys seen where the last unit is dropped unless it is full."""
    return (position + 1) // VECTOR * VECTOR


# ---- attention: a faulty variant of the reference ------------------------------------------------
Row = Callable[[Array, Array, Array | None], Array]


def row_by_row(attend: Row) -> Callable[[Kernel], Kernel]:
    """A fault that computes each token by `attend(scores [H, S], v [S, H, D], sinks)`."""

    def fault(kernel: Kernel) -> Kernel:
        def faulty(
            q: Array, pool: Any, block_table: Array, units_per_block: int,
            cu_seqlens_q: Array, context_lens: Array, scale: float,
            window: int = 0, sinks: Array | None = None,
        ) -> Array:  # fmt: skip
            result = np.zeros(q.shape)
            for b, context in enumerate(int(n) for n in context_lens):
                k, v = kv_gather_ref(pool, block_table[b], units_per_block, context)
                group = q.shape[1] // k.shape[1]
                k, v = (np.repeat(widen(x), group, axis=1) for x in (k, v))
                for t in range(cu_seqlens_q[b], cu_seqlens_q[b + 1]):
                    position = context - int(cu_seqlens_q[b + 1]) + t
                    seen = slice(max(0, position + 1 - window) if window else 0, position + 1)
                    scores = scale * np.einsum("hd,shd->hs", widen(q[t]), k[seen])
                    with np.errstate(invalid="ignore"):
                        result[t] = attend(scores, v[seen], sinks)
            return given(None, result, q.dtype)

        return faulty

    return fault


def bf16_row(scores: Array, v: Array, sinks: Array | None) -> Array:
    """Online softmax whose sums are rounded to BF16 after every 64 keys."""
    top = scores.max(axis=1, keepdims=True)
    if sinks is not None:
        top = np.maximum(top, sinks[:, None])
    total = np.zeros_like(top) if sinks is None else np.exp(sinks[:, None] - top)
    values = np.zeros((len(scores), v.shape[2]))
    for j in range(0, scores.shape[1], KEYS):
        weights = np.exp(scores[:, j : j + KEYS] - top)
        total = in_bf16(total + weights.sum(axis=1, keepdims=True)).astype(float)
        values = in_bf16(values + np.einsum("hs,shd->hd", weights, v[j : j + KEYS])).astype(float)
    row: Array = values / total
    return row


def row_without_nan(scores: Array, v: Array, sinks: Array | None) -> Array:
    """The maximum drops a NaN, and the clamp of exp makes its weight 0: a NaN key is not there."""
    lost = np.isnan(scores)
    scores = np.where(lost, -np.inf, scores)
    top = np.maximum(scores.max(axis=1, keepdims=True), -1e30)
    if sinks is not None:
        top = np.maximum(top, sinks[:, None])
    weights = np.exp(scores - top)
    total = weights.sum(axis=1, keepdims=True)
    if sinks is not None:
        total = total + np.exp(sinks[:, None] - top)
    row: Array = np.einsum("hs,shd->hd", weights, v) / total
    return row


# ---- which fault fits which kernel, and which test sees it ---------------------------------------
class Plant(NamedTuple):
    """A fault of a kernel; `test` (an id of pytest) fails on it; `name` is what the test calls."""

    fault: Callable[[Kernel], Kernel]
    test: str
    name: str


GEMM = ("tests/kernels/test_gemm.py::test_matches_reference", "gemm")
NORM = "tests/kernels/test_norm.py::test_matches_reference"
EXP = ("tests/kernels/test_exp.py::test_exp_of_special_values", "apply")
SPLITS = "tests/kernels/test_attention_decode.py::test_around_the_ends_of_splits"
BOTH = "tests/kernels/test_attention_rows.py::test_both_kernels_match_the_reference_and_each_other"
RAGGED = "tests/kernels/test_attention_prefill.py::test_a_ragged_batch"
BAD_KEY = (
    "tests/kernels/test_attention_rows.py"
    "::test_a_bad_key_or_value_reaches_the_rows_that_see_it_and_no_other"
)
MLP = ("tests/kernels/test_mlp.py::test_bits_of_product_then_activation", "mlp")
MOE = ("tests/kernels/test_moe.py::test_matches_reference", "grouped_gemm")
COMBINE = ("tests/kernels/test_moe.py::test_combine_matches_reference", "combine")
QUANT = (
    "tests/kernels/test_quant.py::test_has_the_bits_of_the_expanded_bf16_product",
    "grouped_gemm_mxfp4",
)
SAMPLING = "tests/kernels/test_sampling.py"
DECODE, PREFILL = "attention_decode", "attention_prefill"
TAIL, MASK = other_contexts(whole_units), other_contexts(own_key_unseen)
BF16, NNAN = row_by_row(bf16_row), row_by_row(row_without_nan)

PLANTS: dict[tuple[str, str], Plant] = {
    ("gemm", "lost-tail"): Plant(lost_tail, *GEMM),
    ("gemm", "bf16-accumulate"): Plant(bf16_gemm, *GEMM),
    ("norm", "lost-tail"): Plant(lost_tail, NORM, "rms_norm"),
    ("norm", "bf16-accumulate"): Plant(bf16_rms_norm, NORM, "rms_norm"),
    ("layer_norm", "lost-tail"): Plant(lost_tail, NORM, "layer_norm"),
    ("layer_norm", "bf16-accumulate"): Plant(bf16_layer_norm, NORM, "layer_norm"),
    ("rope", "lost-tail"): Plant(
        lost_tail, "tests/kernels/test_rope.py::test_matches_reference", "rope"
    ),
    ("exp", "lost-tail"): Plant(lost_tail, *EXP),
    ("exp", "nnan"): Plant(exp_without_nan, *EXP),
    ("activation", "lost-tail"): Plant(
        lost_tail, "tests/kernels/test_activation.py::test_matches_reference", "activation"
    ),
    ("attention_decode", "wrong-mask"): Plant(MASK, SPLITS, DECODE),
    ("attention_decode", "lost-tail"): Plant(TAIL, SPLITS, DECODE),
    ("attention_decode", "bf16-accumulate"): Plant(BF16, BOTH, DECODE),
    ("attention_decode", "nnan"): Plant(NNAN, BAD_KEY, DECODE),
    ("attention_prefill", "wrong-mask"): Plant(MASK, RAGGED, PREFILL),
    ("attention_prefill", "lost-tail"): Plant(TAIL, RAGGED, PREFILL),
    ("attention_prefill", "bf16-accumulate"): Plant(BF16, RAGGED, PREFILL),
    ("attention_prefill", "nnan"): Plant(NNAN, BAD_KEY, PREFILL),
    ("mlp", "lost-tail"): Plant(lost_tail, *MLP),
    ("mlp", "bf16-accumulate"): Plant(bf16_mlp, *MLP),
    ("moe", "lost-tail"): Plant(lost_tail, *MOE),
    ("moe", "bf16-accumulate"): Plant(bf16_grouped_gemm(experts_of), *MOE),
    ("combine", "lost-tail"): Plant(lost_tail, *COMBINE),
    ("combine", "bf16-accumulate"): Plant(bf16_combine, *COMBINE),
    ("quant", "bf16-accumulate"): Plant(bf16_grouped_gemm(expanded), *QUANT),
    ("kv_write", "lost-tail"): Plant(
        lost_tail, "tests/kernels/test_kv_write.py::test_matches_reference", "kv_write"
    ),
    ("sampling", "lost-tail"): Plant(
        lost_tail,
        f"{SAMPLING}::test_tokens_and_distributions_are_those_of_the_references", "distribution",
    ),
    ("sampling", "nnan"): Plant(
        row_that_lost_its_nan,
        f"{SAMPLING}::test_a_bad_row_has_no_token_and_touches_no_other", "distribution",
    ),
}  # fmt: skip
