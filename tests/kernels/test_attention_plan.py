"""attention_plan.py: what does not fit is named, in the step or in a layer's arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pace_nb.kernels import attention_decode as decode_module
from pace_nb.kernels import attention_prefill as prefill_module
from pace_nb.kernels.attention_decode import attention_decode
from pace_nb.kernels.attention_plan import WORKERS, plan
from pace_nb.kernels.attention_prefill import attention_prefill
from pace_nb.kernels.kv_write import KVPool

F32, BF16 = np.float32, np.uint16
KERNELS = [attention_decode, attention_prefill]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": np.zeros((3, 4, 64), F32)}, TypeError, "q has dtype float32, expected uint16"),
        ({"q": np.zeros((3, 4, 32), BF16)}, ValueError, r"q has shape \(3, 4, 32\), expected"),
        ({"q": np.zeros((3, 3, 64), BF16)}, ValueError, "q has 3 heads, expected a multiple of 2"),
        ({"q": np.zeros((2, 4, 64), BF16)}, ValueError, "cu_seqlens_q is not .* to T = 2"),
        ({"cu_seqlens_q": np.array([0, 4, 3], np.int32)}, ValueError, "cu_seqlens_q is not a ris"),
        ({"cu_seqlens_q": np.array([1, 2, 3], np.int32)}, ValueError, "cu_seqlens_q is not a ris"),
        ({"cu_seqlens_q": np.array([0, 3], np.int32)}, ValueError, "cu_seqlens_q has shape"),
        (
            {"context_lens": np.array([1, 33], np.int32)},
            ValueError,
            r"context_lens\[0\] is 1, expected 2 or more",
        ),
        (
            {"context_lens": np.array([20, 99], np.int32)},
            ValueError,
            r"context_lens\[1\] is 99, expected at most what block_table's 4 blocks of 1 units",
        ),
        ({"context_lens": np.array([20.0, 33.0])}, TypeError, "context_lens has dtype float64"),
        (
            {"block_table": np.array([[0, 9, 0, 0], [1, 2, 3, -1]])},
            ValueError,
            r"block_table\[0, 1\] is 9, expected 0 to 7",
        ),
        (
            {"block_table": np.array([[0, 0, 0, 0], [1, -1, 3, 0]])},
            ValueError,
            r"block_table\[1, 1\] is -1, expected 0 to 7",
        ),
        ({"units_per_block": 0}, ValueError, "units_per_block is 0, expected 1 or more"),
        ({"scale": float("nan")}, ValueError, "scale is nan, expected a finite number"),
        ({"window": -1}, ValueError, "window is -1, expected 0"),
        ({"sinks": np.zeros(3, F32)}, ValueError, r"sinks has shape \(3,\), expected \(4\)"),
        ({"out": np.zeros((3, 4, 64), F32)}, TypeError, "out has dtype float32, expected uint16"),
        (
            {"out": np.zeros((4, 3, 64), BF16).transpose(1, 0, 2)},
            ValueError,
            "out is not a contiguous, writable array",
        ),
        ({"sequences": np.array([0, 2])}, ValueError, "sequences holds 2, expected 0 to 1"),
        ({"sequences": [0]}, TypeError, "sequences is list, expected numpy.ndarray"),
    ],
)
def test_bad_input_names_the_argument(
    scenario: Any, kernel: Any, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    case = scenario([20, 33], [2, 1])
    names = ["q", "pool", "block_table", "units_per_block", "cu_seqlens_q", "context_lens", "scale"]
    arguments = dict(zip(names, case.arguments, strict=True)) | change
    with pytest.raises(error, match=f"{kernel.__name__}: {message}"):
        kernel(**arguments)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_bad_pool_is_refused(scenario: Any, kernel: Any) -> None:
    case = scenario([20], [2])
    q, pool, *rest = case.arguments
    with pytest.raises(ValueError, match=r"pool.v has shape"):
        kernel(q, pool._replace(v=pool.v[:, :1]), *rest)
    with pytest.raises(TypeError, match=r"pool.v has dtype float32, expected uint16"):
        kernel(q, pool._replace(v=pool.v.astype(F32)), *rest)
    with pytest.raises(ValueError, match=r"pool.k or pool.v is not contiguous"):
        kernel(
            q,
            pool._replace(v=pool.v.transpose(1, 0, 2, 3, 4).copy().transpose(1, 0, 2, 3, 4)),
            *rest,
        )


@pytest.mark.parametrize("module", [decode_module, prefill_module])
def test_a_plan_serves_every_layer_and_refuses_what_was_not_planned(
    scenario: Any, module: Any
) -> None:
    case = scenario([20, 33], [2, 1])
    q, pool, table, per_block, cu, lens, scale = case.arguments
    whole = module.attention_decode if module is decode_module else module.attention_prefill
    planned = plan("step", q.shape, pool, table, per_block, cu, lens, split_keys=True)
    other = KVPool(pool.k[::-1].copy(), pool.v[::-1].copy())
    for layer in (pool, other, pool):
        out = module.attend(planned, q, layer, scale)
        expected = whole(q, layer, table, per_block, cu, lens, scale)
        np.testing.assert_array_equal(out, expected)
    with pytest.raises(ValueError, match=r"step: q has shape \(2, 4, 64\), expected \(3, 4, 64\)"):
        module.attend(planned, q[:2], pool, scale)
    smaller = KVPool(pool.k[:, 1:].copy(), pool.v[:, 1:].copy())
    with pytest.raises(ValueError, match=r"step: pool has shape .*, planned"):
        module.attend(planned, q, smaller, scale)
    with pytest.raises(ValueError, match=r"step: pool\.k or pool\.v is not contiguous"):
        module.attend(planned, q, KVPool(pool.k[::-1], pool.v[::-1]), scale)


def test_scratch_begins_at_cache_lines(scenario: Any) -> None:
    case = scenario([20, 700], [2, 1])
    q, pool, table, per_block, cu, lens, _ = case.arguments
    for split_keys in (True, False):
        planned = plan("step", q.shape, pool, table, per_block, cu, lens, split_keys=split_keys)
        for x in (planned.total, planned.values, planned.storage, planned.work):
            assert x.ctypes.data % 64 == 0


def test_tasks_are_cut_by_the_step_alone(scenario: Any) -> None:
    case = scenario([20, 700], [2, 1])
    q, pool, table, per_block, cu, lens, _ = case.arguments
    planned = plan("step", q.shape, pool, table, per_block, cu, lens, split_keys=True)
    assert planned.sizes[WORKERS] >= 1
    assert planned.num_splits.tolist() == [1, 2]
    assert planned.pieces == (1 + 2) * pool.num_kv_heads
    near = plan("step", q.shape, pool, table, per_block, cu, lens, window=100)
    assert near.first_split.tolist() == [0, 1]
    assert near.num_splits.tolist() == [1, 1]
    one = plan("step", q.shape, pool, table, per_block, cu, lens, sequences=np.array([1]))
    assert one.sequences.tolist() == [1]
