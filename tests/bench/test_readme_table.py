"""The README's table is made from result files and nothing else."""

from __future__ import annotations

import json

import pytest

from bench import readme_table

ROW = {
    "case": "M=1, 256 MiB",
    "value": 44.04,
    "unit": "GB/s",
    "limit": 46.0,
    "limit_unit": "GB/s",
    "share": 0.957,
}


def record(bench="gemm", rows=(ROW,)):
    return {
        "bench": bench,
        "machine": {"cpu": "EPYC", "threads": 2},
        "preempted": 3,
        "rows": list(rows),
    }


def write(folder, **records):
    for name, content in records.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


def test_rows_come_in_order_of_files(tmp_path):
    write(tmp_path, norm=record("norm"), gemm=record("gemm", [ROW, {**ROW, "share": 0.5}]))
    first, *lines, last = readme_table.render(tmp_path).splitlines()
    assert (first, last) == ("<details>", "</details>") and lines[0].startswith("<summary>")
    lines = lines[2:-1]
    assert lines[2] == "| gemm | M=1, 256 MiB | 44 GB/s | 46 GB/s | 96% |"
    assert lines[3].endswith("| 50% |")
    assert lines[4].startswith("| norm |")
    assert lines[-1] == "- norm: cpu EPYC, threads 2, preempted 3 times during the run"


PEERS = {
    "bench": "peers",
    "machine": {"cpu": "EPYC", "threads": 2},
    "checkpoint": "llama-3.2-1b",
    "engines": {"pace_nb": {"version": "pace_nb 1"}, "other": {"version": "other 2"}},
    "cases": [
        {
            "case": "decode batch 1",
            "unit": "tok/s",
            "disturbed": [0.01, 0.061],
            "median": {"pace_nb": 15.04, "other": 12.0},
            "ratio": {"other": 1.254, "best peer": 1.254},
        },
        {"case": "peak RSS", "unit": "GB", "median": {"pace_nb": 3.0}},
    ],
}


def test_peers_have_a_table_of_their_own(tmp_path):
    write(tmp_path, peers=PEERS, norm=record("norm"))
    lines = readme_table.render(tmp_path).splitlines()
    assert lines[0] == "| llama-3.2-1b | pace_nb | other | to other | to best peer |"
    assert lines[2] == "| decode batch 1, tok/s | 15 | 12 | 1.25 | 1.25 |"
    assert lines[3] == "| peak RSS, GB | 3 |  |  |  |"
    assert lines[5] == (
        "- peers: cpu EPYC, threads 2; others used at most 0.06 CPUs during a measurement; "
        "pace_nb is pace_nb 1; other is other 2"
    )
    assert sum(line.startswith("| bench | case |") for line in lines) == 1
    assert sum(line.startswith("- norm: ") for line in lines) == 1
    assert not any(line.startswith("- peers: ") for line in lines[6:])


def compared(case, value, limit, unit, share):
    units = {"unit": unit, "limit_unit": unit}
    return {"case": case, "value": value, "limit": limit, "share": share} | units


def test_what_is_no_limit_of_the_machine_is_not_called_one(tmp_path):
    """Speed-ups, longer steps and a budget have tables of their own, in the order of numbers."""
    speculative = [
        compared("batch 16", 128.0, 231.0, "tok/s", 0.556),
        compared("batch 4", 130.0, 76.8, "tok/s", 1.686),
        compared("13 rows beside 1", 74.6, 55.5, "ms/step", 1.335),
    ]
    overhead = [compared("null model", 116.0, 150.0, "us/step", 1.25)]
    write(
        tmp_path, gemm=record(), overhead=record("overhead", overhead),
        speculative=record("speculative", speculative),
    )  # fmt: skip
    text = readme_table.render(tmp_path)
    speed, rows, budget, _, limits, facts, _ = text.split("\n\n")
    assert limits.count("\n") == 2 and "| 96% |" in limits
    assert speed.splitlines() == [
        "| speculation | with guesses | without | speed-up |",
        "|---|---:|---:|---:|",
        "| batch 4 | 130 tok/s | 76.8 tok/s | 1.69 x |",
        "| batch 16 | 128 tok/s | 231 tok/s | 0.56 x |",
    ]
    assert rows.splitlines()[0].endswith("| all of them | one row | times as long |")
    assert rows.splitlines()[2] == "| 13 rows beside 1 | 74.6 ms/step | 55.5 ms/step | 1.33 x |"
    assert budget.splitlines()[2] == "| null model | 116 us/step | 150 us/step | 80% |"
    assert [line.split(":")[0] for line in facts.splitlines()] == [
        "- gemm", "- overhead", "- speculative",
    ]  # fmt: skip


def test_without_results_it_says_so(tmp_path):
    assert readme_table.render(tmp_path).startswith("No results have been recorded yet")


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.12345, "0.123"), (1.0, "1"), (23.46, "23.5"), (99.96, "100"), (1234.5, "1,234")],
)
def test_numbers_have_three_figures(value, text):
    assert readme_table.number(value) == text


def test_only_what_is_between_the_marks_changes():
    readme = f"before\n{readme_table.BEGIN}\nold\n{readme_table.END}\nafter\n"
    new = readme_table.replaced(readme, "new")
    assert new == f"before\n{readme_table.BEGIN}\nnew\n{readme_table.END}\nafter\n"
    assert readme_table.replaced(new, "new") == new


@pytest.mark.parametrize("readme", ["no marks", f"{readme_table.BEGIN}", f"{readme_table.END * 2}"])
def test_missing_or_doubled_marks_are_refused(readme):
    with pytest.raises(ValueError, match="each results mark exactly once"):
        readme_table.replaced(readme, "new")


def test_check_tells_a_difference(tmp_path, monkeypatch, capsys):
    (tmp_path / "bench" / "results").mkdir(parents=True)
    write(tmp_path / "bench" / "results", gemm=record())
    (tmp_path / "README.md").write_text(f"{readme_table.BEGIN}\nold\n{readme_table.END}\n")
    monkeypatch.setattr(readme_table, "ROOT", tmp_path)
    assert readme_table.main(["--check"]) == 1
    assert "make docs" in capsys.readouterr().err
    assert readme_table.main([]) == 0
    assert readme_table.main(["--check"]) == 0
