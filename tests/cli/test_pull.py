"""`pace-nb pull`: hands its arguments to the hub and prints the directory."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub

from pace_nb.cli.main import main


def test_the_arguments_reach_the_hub(capsys, monkeypatch, tmp_path):
    (tmp_path / "model.safetensors").touch()
    asked = {}

    def snapshot_download(name, **options):
        asked.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert main(["pull", "owner/name", "--revision", "v2", "--hf-token", "hf_x"]) == 0
    assert Path(capsys.readouterr().out.strip()) == tmp_path
    assert (asked["name"], asked["revision"], asked["token"]) == ("owner/name", "v2", "hf_x")


def test_a_failure_is_one_line_without_the_token(capsys):
    assert main(["pull", "nobody/nothing", "--hf-token", "hf_secret"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("pace-nb: error: ") and error.count("\n") == 1
    assert "nobody/nothing" in error and "hf_secret" not in error
