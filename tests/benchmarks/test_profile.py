"""profile.py: calls, bytes and FLOPs are what the shapes say; kernels are as before afterwards."""

from __future__ import annotations

import json

import numpy as np
import pytest

from pace_nb import LLM, SamplingParams
from pace_nb.benchmarks.profile import BETWEEN, Profile
from pace_nb.cli.main import main
from pace_nb.kernels import gemm, jit, mlp
from pace_nb.kernels.attention_decode import attention_decode
from pace_nb.kernels.attention_prefill import attention_prefill
from pace_nb.kernels.kv_write import new_pool


def rows_of(profile: Profile) -> dict[str, tuple[int, float, float]]:
    return {row.name: (row.calls, row.moved, row.flops) for row in profile.rows(1e9, 1e9)}


def test_products_are_counted_by_shape():
    w = gemm.pack_weight(np.zeros((70, 32), np.uint16))
    before = gemm._gemm_kernel
    with Profile() as profile:
        for m in (1, 6, 6):
            gemm.gemm(np.zeros((m, 32), np.uint16), w)
        assert gemm._gemm_kernel is not before
    assert gemm._gemm_kernel is before
    rows = rows_of(profile)
    assert rows["gemm M=1 N=70 K=32"] == (1, 2 * 32 + w.data.nbytes + 4 * 70, 2.0 * 70 * 32)
    assert rows["gemm M=6 N=70 K=32"][0::2] == (2, 2 * 2.0 * 6 * 70 * 32)


def test_the_first_half_of_an_mlp_is_counted():
    weight = mlp.new_mlp_weight(70, 32, np.uint16, gated=True)
    with Profile() as profile:
        mlp.mlp(np.zeros((4, 32), np.uint16), weight, "silu")
    moved = 2 * 4 * 32 + weight.panels.data.nbytes + 2 * 4 * 70
    assert rows_of(profile)["mlp M=4 N=140 K=32"] == (1, moved, 2.0 * 4 * 140 * 32)


@pytest.mark.parametrize(
    ("options", "keys", "seen"),
    [
        ({}, 9 + 20, (8 + 9) + 20),
        ({"window": 4}, 5 + 4, 4 + 4 + 4),
        ({"chunk": 8}, 9 + 4, 8 + 1 + 4),
    ],
)
def test_attention_counts_the_keys_that_are_seen(options, keys, seen):
    heads, kv_heads, d = 4, 2, 24  # padded to 32 among the values
    pool = new_pool(4, kv_heads, d, np.uint16)
    q = np.zeros((3, heads, d), np.uint16)
    table = np.array([[0, 1], [2, 3]])
    lens = np.array([0, 2, 3], np.int32), np.array([9, 20], np.int32)
    for kernel in (attention_decode, attention_prefill):
        with Profile() as profile:
            kernel(q, pool, table, 1, *lens, 1.0, **options)
        calls, moved, flops = rows_of(profile)[kernel.__name__]
        assert calls == 1
        assert moved == keys * kv_heads * (d + 32) * 2
        assert flops == 4 * heads * d * seen


def test_all_time_is_somewhere_and_an_error_restores_the_kernels():
    with LLM() as llm:
        llm.generate([[1]], SamplingParams(max_tokens=2), use_tqdm=False)  # imports all it needs
    before = {name: where[name] for where, name in jit.kernels()}
    with LLM() as llm, Profile() as profile:
        llm.generate([[5, 6, 7]], SamplingParams(max_tokens=3), use_tqdm=False)
    found = profile.rows(1e9, 1e12)
    assert sum(row.seconds for row in found) == pytest.approx(profile.seconds)
    assert sum(row.share_of_time for row in found) == pytest.approx(1.0)
    assert found[-1].name == BETWEEN and found[-1].seconds > 0
    names = {row.name.split()[0] for row in found}
    assert {"gemm", "mlp", "rope_kv_write", "attention_decode", "add_rms_norm"} <= names
    with pytest.raises(RuntimeError), profile:
        raise RuntimeError
    assert {name: where[name] for where, name in jit.kernels() if name in before} == before


def test_bench_latency_prints_and_keeps_it(capsys, tmp_path):
    out = tmp_path / "latency.json"
    lengths = ["--input-len", "4", "--output-len", "3", "--batch-size", "2"]
    iterations = ["--num-iters-warmup", "0", "--num-iters", "1"]
    arguments = ["bench", "latency", "--profile", "--output-json", str(out)]
    assert main([*arguments, *lengths, *iterations]) == 0
    printed = capsys.readouterr().out
    assert "GB/s read from DRAM" in printed and BETWEEN in printed
    kept = json.loads(out.read_text())["profile"]
    assert {"name", "calls", "seconds", "moved", "flops", "share_of_limit"} <= set(kept[0])
    assert any(row["name"].startswith("gemm M=2 ") for row in kept)
