"""`pace-nb doctor`: what it says is what the parts say."""

from __future__ import annotations

import pytest

from pace_nb.cli import doctor
from pace_nb.cli.main import main
from pace_nb.kernels import jit, norm


def findings(capsys, *arguments):
    code = main(["doctor", *arguments])
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    return code, lines


def test_the_machine_and_the_bundled_model(capsys):
    code, lines = findings(capsys)
    assert code == 0
    assert list(lines) == ("version cpu isa path threads memory cache check model".split())
    assert lines["path"] == jit.isa_path()
    assert lines["threads"].startswith(f"{jit.num_threads()} (")
    assert lines["cache"].startswith(jit.cache_state().split(",")[0])
    assert "agrees with its reference" in lines["check"]
    assert "LlamaForCausalLM (supported)" in lines["model"] and "fits into" in lines["model"]


def test_a_kernel_that_computes_nonsense_is_found(capsys, monkeypatch):
    monkeypatch.setattr(norm, "rms_norm", lambda x, weight, eps: x * 0)
    code, lines = findings(capsys)
    assert code == 1
    assert "WRONG by up to" in lines["check"]


def test_the_reason_for_the_number_of_threads(monkeypatch):
    monkeypatch.delenv("PACE_NB_NUM_THREADS", raising=False)
    assert doctor.threads(2) == "2 (one per usable CPU)"
    monkeypatch.setenv("PACE_NB_NUM_THREADS", "1")
    assert doctor.threads(1) == "1 (PACE_NB_NUM_THREADS)"


def test_the_reason_for_the_second_best_layer():
    assert "libgomp" in doctor.layer("workqueue")
    assert doctor.layer("omp") == "layer omp"


@pytest.mark.parametrize(
    ("text", "name"), [("processor: 0\nmodel name\t: EPYC 9\n", "EPYC 9"), ("", None)]
)
def test_the_cpu_has_a_name(tmp_path, text, name):
    (tmp_path / "cpuinfo").write_text(text)
    found = doctor.cpu_name(tmp_path / "cpuinfo")
    assert found == name if name else found


def test_cpus_that_may_not_be_used_are_named(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    assert doctor.usable_cpus(8) == "8 CPUs, all usable"
    assert doctor.usable_cpus(2).startswith("8 CPUs, 2 of them usable")
