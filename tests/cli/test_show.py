"""`pace-nb show`: facts from config.json and headers."""

from __future__ import annotations

from dataclasses import replace

from pace_nb.cli.main import main
from pace_nb.cli.show import described
from pace_nb.models import hub


def test_the_bundled_model(capsys):
    assert main(["show"]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["architecture"] == "LlamaForCausalLM (supported)"
    assert lines["directory"] == str(hub.DEMO_MODEL)
    parameters = int(lines["parameters"].split()[0].replace(",", ""))
    assert 2e6 <= parameters <= 5e6


def test_what_is_not_known_is_left_out_and_not_made_up():
    facts = replace(hub.show(None), context_length=None, architecture=None, is_supported=False)
    lines = dict(described(facts))
    assert "context" not in lines
    assert lines["architecture"] == "not given (NOT supported)"


def test_no_such_model_is_one_line(capsys):
    assert main(["show", "/nowhere/model"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("pace-nb: error: ") and "/nowhere/model" in error
    assert error.count("\n") == 1
