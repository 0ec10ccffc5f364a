"""attention_decode.py: long contexts in splits, many rows, compiled and interpreted body."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pace_nb.kernels import attention_decode as module
from pace_nb.kernels import jit
from pace_nb.kernels.attention_decode import attention_decode
from pace_nb.kernels.attention_prefill import attention_prefill
from pace_nb.kernels.attention_rows import ROWS, SPLIT
from pace_nb.kernels.bf16 import widen
from pace_nb.kernels.kv_write import new_pool

Array = NDArray[Any]
F32, BF16 = np.float32, np.uint16
compiled = pytest.mark.skipif(jit.INTERPRETED, reason="takes minutes interpreted")


@compiled
@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("window", [0, 3000])
def test_a_long_context_in_many_splits(scenario: Any, window: int, dtype: Any) -> None:
    case = scenario([8192, 8 * SPLIT + 1, 2], [1, 2, 1], heads=(32, 8), d=128, dtype=dtype)
    for sinks in (None, np.linspace(-5, 20, 32).astype(F32)):
        case.assert_close(attention_decode(*case.arguments, window, sinks), window, sinks)


@pytest.mark.parametrize("context", [SPLIT - 1, SPLIT, SPLIT + 1, 2 * SPLIT + 17])
def test_around_the_ends_of_splits(scenario: Any, context: int) -> None:
    d = 8 if jit.INTERPRETED else 64
    for seed in (1, 2):  # the largest score in the first split, or in a later one
        case = scenario([context], [2], heads=(2, 1), d=d, seed=seed)
        for window in (0, 3, SPLIT):
            case.assert_close(attention_decode(*case.arguments, window), window)


@compiled
def test_splits_agree_with_one_pass_over_all_keys(scenario: Any) -> None:
    """At most 1 ULP of BF16 from all keys at once, for 99 % of outputs that do not cancel."""
    case = scenario([6 * SPLIT + 9], [8], heads=(8, 2), d=128)
    case.values[0][...] &= 0x7FFF  # all positive
    case.fill()
    out, exact = widen(attention_decode(*case.arguments)), case.exact()
    ulp = 2.0 ** (np.floor(np.log2(exact)) - 7)
    assert (np.abs(out - exact) <= ulp).mean() > 0.99


@pytest.mark.parametrize(("heads", "rows"), [((1, 1), 1), ((128, 1), 1), ((6, 1), 17)])
def test_any_number_of_rows_per_key_value_head(
    scenario: Any, heads: tuple[int, int], rows: int
) -> None:
    """Fewer rows than a tile, more heads than ROWS, tokens in more than one group."""
    case = scenario([rows + 2], [rows], heads=heads, d=16)
    out = attention_decode(*case.arguments)
    case.assert_close(out)
    assert rows == 1 or rows * heads[0] > ROWS
    assert np.array_equal(attention_prefill(*case.arguments), out)


@compiled
@pytest.mark.parametrize("tokens", [2, 5, 13, 33, 64])
def test_several_tokens_of_a_sequence(scenario: Any, tokens: int) -> None:
    """Verification of a draft: rows of one sequence see different numbers of keys."""
    case = scenario([300 + tokens, tokens], [tokens, tokens], heads=(8, 2), d=64, block=64)
    case.assert_close(attention_decode(*case.arguments))


@compiled
def test_compiled_and_interpreted_agree(scenario: Any, tmp_path: Path) -> None:
    """One source, two executions: they differ only where NumPy rounds an fma twice."""
    case = scenario([70, 20], [2, 3], d=24, dtype=F32)
    q, pool, *rest = case.arguments
    names = ["table", "per_block", "cu", "lens", "scale"]
    given, result = tmp_path / "in.npz", tmp_path / "out.npy"
    np.savez(given, q=q, k=pool.k, v=pool.v, **dict(zip(names, rest, strict=True)))
    code = (
        "import sys, numpy as np; from pace_nb.kernels.attention_decode import *; "
        "d = np.load(sys.argv[1]); pool = KVPool(d['k'], d['v']); "
        "np.save(sys.argv[2], attention_decode(d['q'], pool, d['table'], int(d['per_block']), "
        "d['cu'], d['lens'], float(d['scale']), 30))"
    )
    environment = os.environ | {"NUMBA_DISABLE_JIT": "1"}
    subprocess.run([sys.executable, "-c", code, given, result], check=True, env=environment)
    out = attention_decode(*case.arguments, 30)
    np.testing.assert_allclose(np.load(result), out, rtol=1e-6, atol=1e-6)


@pytest.mark.skipif(
    jit.INTERPRETED or not {"avx512f", "avx512bf16"} <= jit.cpu_features(),
    reason="the CPU has no vdpbf16ps",
)
@pytest.mark.parametrize(
    ("name", "rows", "dots", "loops_of_them", "moves"),
    [
        ("_attend_kernel", 16, 24, 2, 36),  # 6 rows x 4 vectors: of scores, and of values
        ("_attend_few_kernel", 1, 16, 1, 24),  # 2 rows x 8 vectors of values
    ],
)
def test_assembly_has_full_tiles_in_registers(
    scenario: Any, name: str, rows: int, dots: int, loops_of_them: int, moves: int
) -> None:
    case = scenario([20], [rows], d=64)
    attention_decode(*case.arguments)
    kernel = getattr(module, name)
    bf16 = [types for types in kernel.signatures if types[0].dtype.name == "uint16"]
    assembly = jit.assembly(SimpleNamespace(py_func=kernel.py_func, signatures=bf16[:1]))
    loops = inner_loops(assembly)
    tiles = [loop for loop in loops if sum("vdpbf16ps" in line for line in loop) >= dots]
    assert len(tiles) >= loops_of_them, f"no loop of {dots} dot products"
    for loop in loops:
        assert not [line for line in loop if on_stack(line)], "\n".join(loop)
    lines = assembly.splitlines()
    places = [i for i, line in enumerate(lines) if "vdpbf16ps" in line]
    # Constants may come from the stack; what goes there is a part of a tile, or of a softmax.
    spilled = sum(bool(re.search(r"%zmm\d+, .*\(%rsp\)", x)) for x in lines[places[0] : places[-1]])
    assert spilled < 12, f"{spilled} vectors move to the stack around the loops: a tile?"
    moved = sum(map(on_stack, lines[places[0] : places[-1]]))
    assert moved < moves, f"{moved} vectors move to or from the stack around the loops: a tile?"


def on_stack(line: str) -> bool:
    return "zmm" in line and "(%rsp)" in line


def inner_loops(assembly: str) -> list[list[str]]:
    """Blocks that jump back to their own label and hold dot products."""
    loops, label, lines = [], "", []
    for line in assembly.splitlines():
        if line.endswith(":"):
            label, lines = line[:-1], []
            continue
        lines.append(line)
        if line.split()[:1] and line.split()[0].startswith("j"):
            if line.split()[-1] == label and any("vdpbf16ps" in x for x in lines):
                loops.append(lines)
            label, lines = "", []
    return loops


def test_wrapping_lengths_and_blocks_are_refused() -> None:
    """Differences and sums of extreme integers wrap; comparisons do not."""
    pool = new_pool(4, 1, 32, np.float32)
    q = np.zeros((1, 1, 32), np.float32)
    far = 2**31 - 1
    lengths = np.array([0, far, -2, 1], np.int32), np.array([far, far, 3], np.int32)
    with pytest.raises(ValueError, match="cu_seqlens_q is not a rising sequence"):
        attention_decode(q, pool, np.zeros((3, 1), np.int64), 4, *lengths, 1.0)
    table = np.array([[2**63 - 1]], np.int64)
    one = np.array([0, 1], np.int32), np.array([1], np.int32)
    with pytest.raises(ValueError, match=r"block_table\[0, 0\] is 9223372036854775807"):
        attention_decode(q, pool, table, 4, *one, 1.0)
    with pytest.raises(ValueError, match="scale is 1e\\+39, expected a finite number"):
        attention_decode(q, pool, np.zeros((1, 1), np.int64), 4, *one, 1e39)
