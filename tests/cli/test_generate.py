"""`pace-nb generate` with the bundled model: in this process, and as other programs see it."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pace_nb import LLM, SamplingParams
from pace_nb.cli.generate import logprob_lines
from pace_nb.cli.main import main
from pace_nb.models.hub import DEMO_MODEL
from pace_nb.outputs import CompletionOutput, Logprob

PROMPT = "Once upon a time"
REFERENCE = ("--kernels", "reference")  # nothing to compile: for all that is not about kernels
COMMAND = [sys.executable, "-m", "pace_nb", "generate", *REFERENCE]


def generate(capsys, *arguments):
    """(exit code, standard output, standard error)."""
    code = main(["generate", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def refused(capsys, *arguments):
    """The one line that the arguments are refused with."""
    code, out, err = generate(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("pace-nb: error: ") and err.count("\n") == 1
    return err


@pytest.fixture(scope="module")
def story():
    """What the library itself writes, greedy."""
    with LLM(kernels="reference") as llm:
        params = SamplingParams(temperature=0, max_tokens=12)
        (output,) = llm.generate([PROMPT], params, use_tqdm=False)
    return output.outputs[0].text


def test_the_text_is_the_library_s(capsys, story):
    arguments = (PROMPT, "--temp", "0", "-n", "12", *REFERENCE)
    assert generate(capsys, *arguments) == (0, f"{PROMPT}{story}\n", "")
    assert generate(capsys, *arguments, "--no-echo") == (0, f"{story}\n", "")


def test_the_compiled_kernels_write_a_story(capsys):
    code, out, err = generate(capsys, PROMPT, "--seed", "1", "-n", "8", "--stats")
    assert code == 0
    assert out.startswith(PROMPT) and len(out) > len(PROMPT) + 8
    assert [line.split()[0] for line in err.splitlines()] == (
        "kernels seed prompt first decode roofline".split()
    )
    assert "compiled meanwhile" not in err, "the warm-up must have left nothing to compile"


def test_the_same_seed_gives_the_same_text(capsys):
    def text(seed):
        return generate(capsys, PROMPT, "--temp", "1.5", "-n", "16", "-s", seed, *REFERENCE)[1]

    assert text("1") == text("1")
    assert len({text(seed) for seed in "12345"}) > 1


def test_without_a_seed_each_call_draws_one_and_shows_it(capsys):
    arguments = (PROMPT, "--temp", "1.5", "-n", "16", *REFERENCE, "--stats")
    runs = [generate(capsys, *arguments) for _ in range(2)]
    seeds = [re.search(r"^seed +(\d+)$", err, re.MULTILINE).group(1) for _, _, err in runs]
    assert seeds[0] != seeds[1]
    assert generate(capsys, *arguments, "--seed", seeds[0])[1] == runs[0][1]


def test_the_model_s_own_settings_are_the_default(capsys, tmp_path, story):
    for file in filter(Path.is_file, DEMO_MODEL.iterdir()):
        shutil.copy(file, tmp_path)
    settings = json.loads((tmp_path / "generation_config.json").read_text())
    (tmp_path / "generation_config.json").write_text(json.dumps({**settings, "temperature": 0.0}))
    _, out, _ = generate(capsys, PROMPT, "-m", str(tmp_path), "-n", "12", *REFERENCE)
    assert out == f"{PROMPT}{story}\n"


def test_a_stop_string_ends_the_text(capsys, story):
    word = story.split()[2]
    arguments = (PROMPT, "--temp", "0", "-n", "12", "--stop", word, "--no-echo", *REFERENCE)
    _, out, _ = generate(capsys, *arguments)
    assert out == story.partition(word)[0] + "\n"


def test_logprobs_are_listed_beside_the_text(capsys, story):
    arguments = (PROMPT, "--temp", "0", "-n", "12", "--logprobs", "2", *REFERENCE)
    code, out, err = generate(capsys, *arguments)
    assert (code, out) == (0, f"{PROMPT}{story}\n")
    lines = [line.split() for line in err.splitlines()]
    assert len(lines) == 12
    assert all(float(line[1]) <= 0 and line[2:4] == ["rank", "1"] for line in lines)


def test_logprob_lines_tell_token_and_likeliest():
    entries = {7: Logprob(-2.5, 2, "\n"), 3: Logprob(-0.125, 1, "a")}
    (line,) = logprob_lines(CompletionOutput(0, "\n", [7], logprobs=[entries]))
    assert line.split() == ["7", "-2.500", "rank", "2", '"\\n"', "of", '"a"', "-0.125", '"\\n"', "-2.500"]  # fmt: skip  # noqa: E501


# ---- what is refused ----


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--temperature", "nan"), "temperature"),
        (("--top-p", "0"), "top_p"),
        (("--threads", "9999"), "--threads"),
        (("--max-model-len", "9999999"), "max_position_embeddings"),
        (("--max-model-len", "4"), "prompt"),
        (("-m", "/nowhere/model"), "/nowhere/model"),
    ],
)
def test_values_that_cannot_be_served(capsys, arguments, words):
    assert words in refused(capsys, PROMPT, *arguments, *REFERENCE)


def test_a_prompt_longer_than_the_context(capsys):
    assert "1024" in refused(capsys, "word " * 2000, *REFERENCE)


@pytest.fixture
def broken_model(tmp_path):
    """A copy of the bundled model, to be broken."""
    for file in filter(Path.is_file, DEMO_MODEL.iterdir()):
        shutil.copy(file, tmp_path)
    return tmp_path


def test_truncated_weights(capsys, broken_model):
    weights = broken_model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert "model.safetensors" in refused(capsys, PROMPT, "-m", str(broken_model), *REFERENCE)


def test_an_architecture_that_is_not_there_is_told_those_that_are(capsys, broken_model):
    config = json.loads((broken_model / "config.json").read_text())
    config["architectures"] = ["BertModel"]
    (broken_model / "config.json").write_text(json.dumps(config))
    error = refused(capsys, PROMPT, "-m", str(broken_model), *REFERENCE)
    assert "BertModel" in error and "LlamaForCausalLM" in error


def test_a_config_that_does_not_fit_the_weights(capsys, broken_model):
    config = json.loads((broken_model / "config.json").read_text())
    config["intermediate_size"] += 16
    (broken_model / "config.json").write_text(json.dumps(config))
    error = refused(capsys, PROMPT, "-m", str(broken_model), *REFERENCE)
    assert "mlp" in error and str(config["intermediate_size"]) in error


# ---- as other programs see it ----


def test_a_pipe_in_and_a_pipe_out(story):
    result = subprocess.run(
        [*COMMAND, "--temp", "0", "-n", "4", "--no-echo"],
        input=PROMPT.encode(),
        capture_output=True,
        check=True,
        timeout=60,
    )
    assert result.stderr == b""
    text = result.stdout.decode().removesuffix("\n")
    assert text and story.startswith(text)


def test_a_reader_that_goes_away_stops_it_quietly():
    with subprocess.Popen(
        [*COMMAND, PROMPT, "-n", "500", "--ignore-eos"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        process.stdout.read(20)
        process.stdout.close()
        assert process.wait(timeout=60) == 141
        assert process.stderr.read() == b""


def test_ctrl_c_is_130_without_a_traceback():
    with subprocess.Popen(
        [*COMMAND, PROMPT, "-n", "1000", "--ignore-eos"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        os.read(process.stdout.fileno(), 1)  # it has begun
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 130
        assert err.strip() == b""
