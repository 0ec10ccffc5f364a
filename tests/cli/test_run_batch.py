"""`pace-nb run-batch` with the bundled model: files in, files out, and what is said beside."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import pytest

from pace_nb.cli import run_batch
from pace_nb.cli.main import main
from pace_nb.openai_api import batch_file

REFERENCE = ("--kernels", "reference")
BODY = {"prompt": "A cat", "max_tokens": 3, "temperature": 0, "ignore_eos": True}


def line(custom_id, **body):
    return json.dumps(
        {
            "custom_id": custom_id,
            "method": "POST",
            "url": "/v1/completions",
            "body": {**BODY, **body},
        }
    )


@pytest.fixture
def batch(tmp_path, capsys):
    """Runs lines through the verb: (exit code, answers, standard error)."""

    def run(text, *arguments):
        source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
        source.write_text(text)
        code = main(["run-batch", "-i", str(source), "-o", str(target), *REFERENCE, *arguments])
        answers = []
        if target.exists():
            answers = [json.loads(one) for one in target.read_text().splitlines()]
        return code, answers, capsys.readouterr().err

    return run


def test_every_line_has_its_answer(batch):
    text = "\n".join([line("a"), "nonsense", "", line("b", model="pace-nb-demo"), line("c")])
    code, answers, err = batch(text, "--max-num-seqs", "2")
    assert code == 0
    assert [answer["custom_id"] for answer in answers] == ["a", None, "b", "c"]
    assert [answer["error"] is None for answer in answers] == [True, False, True, True]
    texts = [one["response"]["body"]["choices"][0]["text"] for one in answers if not one["error"]]
    assert len(set(texts)) == 1 and texts[0]
    assert "4 requests, 1 with an error; answers in " in err
    assert "4/4" in err and "tokens/s" in err


def test_the_model_goes_by_the_names_it_is_given(batch):
    text = "\n".join([line("a", model="x"), line("b", model="pace-nb-demo")])
    _, answers, _ = batch(text, "--served-model-name", "x", "y")
    assert [answer["response"]["status_code"] for answer in answers] == [200, 404]


def test_priorities_need_their_policy(batch):
    text = line("a", priority=3)
    assert batch(text)[1][0]["response"]["status_code"] == 400
    _, (answer,), _ = batch(text, "--scheduling-policy", "priority")
    assert answer["response"]["status_code"] == 200


def test_an_empty_file_has_no_answers(batch):
    code, answers, err = batch("\n\n")
    assert (code, answers) == (0, []) and "0 requests, 0 with an error" in err


def test_files_that_cannot_be(tmp_path, capsys):
    source = tmp_path / "in.jsonl"
    source.write_text(line("a"))

    def refused(*arguments):
        assert main(["run-batch", *map(str, arguments), *REFERENCE]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        return err

    assert "--input-file /nowhere/x: No such file" in refused("-i", "/nowhere/x", "-o", source)
    assert "--output-file /nowhere/x: No such" in refused("-i", source, "-o", "/nowhere/x")
    assert "expected another file than --input-file" in refused("-i", source, "-o", source)
    assert source.read_text() == line("a")
    with pytest.raises(SystemExit):
        main(["run-batch", "-i", str(source)])
    assert "--output-file" in capsys.readouterr().err


def test_a_full_disk_is_one_line(tmp_path, capsys):
    source = tmp_path / "in.jsonl"
    source.write_text(line("a"))
    assert main(["run-batch", "-i", str(source), "-o", "/dev/full", *REFERENCE]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "pace-nb: error: --output-file /dev/full: No space left on device"


def test_of_a_line_that_is_too_long_only_the_beginning_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(batch_file, "MAX_LINE_BYTES", 10)
    path = tmp_path / "x"
    path.write_bytes(b"123456789\n" + b"a" * 35 + b"\nend")
    with path.open("rb") as file:
        assert list(run_batch.lines_of(file)) == [b"123456789\n", b"a" * 11, b"end"]


def test_ctrl_c_keeps_what_is_answered(tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(line(str(number), max_tokens=9) for number in range(5000)))
    command = [sys.executable, "-m", "pace_nb", "run-batch", *REFERENCE]
    process = subprocess.Popen(
        [*command, "-i", source, "-o", target], stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not (target.exists() and target.stat().st_size):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err
    answers = [json.loads(one) for one in target.read_text().splitlines()]
    assert [answer["custom_id"] for answer in answers] == [str(i) for i in range(len(answers))]
    assert 1 <= len(answers) < 5000
