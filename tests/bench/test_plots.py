"""Each result file has its figures."""

from __future__ import annotations

import json

from bench import plots

FACTS = {"cpu": "EPYC", "threads": 2, "date": "2026-11-23"}
ROW = {"case": "M=1", "value": 20.0, "unit": "GB/s", "limit": 40.0, "share": 0.5}


def test_figures_of_every_result(tmp_path):
    results = tmp_path / "results"
    results.mkdir()
    case = {"case": "decode", "unit": "tok/s", "median": {"pace_nb": 2.0, "other": 1.0}}
    curve = [{"acceptance": a, "speedup": 1 + a} for a in (0.0, 0.8, 1.0)]
    records = {
        "gemm": {"bench": "gemm", "machine": FACTS, "rows": [ROW | {"flops_per_byte": 1.0}]},
        "rope": {"bench": "rope", "machine": FACTS, "rows": [ROW]},
        "spec": {"bench": "spec", "machine": FACTS, "rows": [ROW | {"curve": curve}]},
        "peers": {"bench": "peers", "machine": FACTS, "engines": {}, "cases": [case]},
    }
    for name, record in records.items():
        (results / f"{name}.json").write_text(json.dumps(record))
    found = [path.name for path in plots.draw(results, tmp_path / "plots")]
    assert found == [
        "gemm_shares.svg", "gemm_roofline.svg", "peers.svg", "rope_shares.svg", "spec_shares.svg",
        "spec_speedups.svg",
    ]  # fmt: skip
    assert "times plain decoding" in (tmp_path / "plots/spec_speedups.svg").read_text()
    assert "gemm: EPYC, 2 threads, 2026-11-23" in (tmp_path / "plots/gemm_shares.svg").read_text()
