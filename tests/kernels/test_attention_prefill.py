"""attention_prefill.py: whole prompts, ragged batches, continuation from a cached prefix."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pace_nb.kernels import jit
from pace_nb.kernels.attention_decode import attention_decode
from pace_nb.kernels.attention_prefill import attention_prefill

Array = NDArray[Any]
F32, BF16 = np.float32, np.uint16
compiled = pytest.mark.skipif(jit.INTERPRETED, reason="takes minutes interpreted")


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("window", [0, 7])
def test_a_ragged_batch(scenario: Any, window: int, dtype: Any) -> None:
    case = scenario([3, 3, 3, 50], [3, 3, 3, 50], heads=(2, 1), d=24, dtype=dtype)
    case.assert_close(attention_prefill(*case.arguments, window), window)


@compiled
@pytest.mark.parametrize("past", [0, 7, 300])
@pytest.mark.parametrize("tokens", [65, 128, 130, 512, 513])
def test_prompts_new_and_continued(scenario: Any, tokens: int, past: int) -> None:
    heads = [(4, 4), (8, 2), (7, 1)][tokens % 3]
    case = scenario([past + tokens, 20], [tokens, 4], heads=heads, d=64, block=32)
    sinks = np.linspace(-5, 5, heads[0]).astype(F32)
    for window in (0, 100):
        case.assert_close(attention_prefill(*case.arguments, window, sinks), window, sinks)


@compiled
@pytest.mark.parametrize("d", [40, 64, 80, 96, 128, 256])
def test_head_dims(scenario: Any, d: int) -> None:
    for dtype in (BF16, F32):
        case = scenario([150, 70], [70, 70], heads=(6, 2), d=d, dtype=dtype, block=None)
        case.assert_close(attention_prefill(*case.arguments))


@pytest.mark.parametrize("d", [8, 16, 24])
def test_small_head_dims(scenario: Any, d: int) -> None:
    """Down to half a vector: columns beyond D are neither read nor written."""
    case = scenario([18], [18], heads=(2, 2), d=d)
    out = np.full((20, 2, d), 7, BF16)
    attention_prefill(*case.arguments, out=out[1:19])
    case.assert_close(out[1:19])
    assert (out[[0, 19]] == 7).all()


def test_a_token_does_not_see_later_ones(scenario: Any) -> None:
    """The first rows of a prompt are those of the shorter prompt."""
    n = 20 if jit.INTERPRETED else 200
    case = scenario([n], [n], heads=(4, 2), d=32)
    whole = attention_prefill(*case.arguments)
    for m in (1, 2, n // 2, n - 1):
        shorter = case.with_queries([0], [m])
        np.testing.assert_array_equal(attention_prefill(*shorter.arguments), whole[:m])


@compiled
def test_a_mixed_batch_with_both_kernels_on_one_output(scenario: Any) -> None:
    case = scenario([100, 300, 90, 41], [1, 200, 90, 3], heads=(8, 2), d=64)
    out = np.empty_like(case.q)
    attention_decode(*case.arguments, out=out, sequences=np.array([0, 3]))
    attention_prefill(*case.arguments, out=out, sequences=np.array([1, 2]))
    case.assert_close(out)
    np.testing.assert_array_equal(out, attention_prefill(*case.arguments))
