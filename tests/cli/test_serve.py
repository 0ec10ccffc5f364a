"""Flags of `pace-nb serve` become settings, limits and an engine's options; nothing is started."""

from __future__ import annotations

import argparse
import subprocess
import sys

import pytest

from pace_nb.cli import serve
from pace_nb.cli.main import main
from pace_nb.models import hub


@pytest.fixture
def given(monkeypatch):
    """What `run` of the server was given."""
    calls = []
    monkeypatch.setattr("pace_nb.server.run.run", lambda *a: calls.append(a) or 0)
    monkeypatch.delenv("PACE_NB_API_KEY", raising=False)

    def parse(*arguments):
        assert main(["serve", *arguments]) == 0
        return calls[-1]

    return parse


def test_defaults(given):
    settings, engine, max_num_seqs, level, kind = given()
    assert (settings.host, settings.port, settings.api_keys) == ("127.0.0.1", 8000, ())
    assert settings.served_model_names == ("pace-nb-demo",) == (settings.model,)
    assert settings.limits == type(settings.limits)() and settings.log_requests
    assert engine.model == hub.DEMO_MODEL and max_num_seqs == 32
    assert (level, kind, settings.metrics_prefix) == ("info", "text", "pace_nb")
    seeds = {given()[1].options["seed"] for _ in range(5)}
    assert len(seeds) > 1


def test_vllms_names(given):
    settings, engine, max_num_seqs, _, _ = given(
        *"--served-model-name a b --host ::1 --port 9 --max-num-seqs 7 --seed 3 -t 1".split(),
        *"--max-num-batched-tokens 2K --no-enable-chunked-prefill --max-model-len 128".split(),
        *"--no-enable-prefix-caching --kv-cache-memory-bytes 1m --dtype float32".split(),
        *"--data-parallel-size 2 --metrics-prefix vllm --disable-access-log".split(),
        *"--scheduling-policy priority".split(),
    )
    assert settings.served_model_names == ("a", "b") and settings.host == "::1"
    assert settings.data_parallel_size == 2 and settings.metrics_prefix == "vllm"
    assert not settings.log_requests and max_num_seqs == 7
    assert engine.options == {
        "dtype": "float32", "kernels": "numba", "max_model_len": 128, "kv_cache": "paged",
        "enable_prefix_caching": False, "max_num_seqs": 7, "max_num_batched_tokens": 2048,
        "enable_chunked_prefill": False, "kv_cache_memory_bytes": 1000000, "num_threads": 1,
        "seed": 3, "scheduling_policy": "priority", "block_size": None,
        "speculative_config": None,
    }  # fmt: skip


def test_every_limit_has_a_flag_that_sets_it(given):
    arguments = []
    for number, name in enumerate(serve.LIMITS, 1):
        arguments += [f"--{name.replace('_', '-')}", str(number)]
    limits = given(*arguments)[0].limits
    assert [getattr(limits, field) for field in serve.LIMITS.values()] == [
        *range(1, len(serve.LIMITS) + 1)
    ]


def test_help_says_of_every_limit_what_it_bounds():
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    text = " ".join(parser.format_help().split())
    for field in serve.LIMITS.values():
        assert f"{serve.LIMIT_HELP[field]} (default: " in text


def test_keys_from_three_places(given, tmp_path, monkeypatch):
    file = tmp_path / "keys"
    file.write_text("two\n\n three \n")
    monkeypatch.setenv("PACE_NB_API_KEY", "four")
    settings = given("--api-key", "one", "--api-key-file", str(file), "--host", "0.0.0.0")[0]
    assert settings.api_keys == ("one", "two", "three", "four")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--host", "0.0.0.0"], "give --api-key"),
        (["--host", "0.0.0.0", "--api-key", ""], "API key is wrong"),
        (["--api-key-file", "/no/such"], "--api-key-file /no/such: No such file"),
        (["--queue-timeout", "-1"], "queue_timeout is -1.0"),
        (["--max-num-seqs", "0"], "max_num_seqs must be"),
        (["--max-num-seqs", "x"], "invalid int value"),
        (["--no-such-flag"], "--no-such-flag"),
        (["/no/such/model"], "/no/such/model"),
    ],
)
def test_what_is_wrong_is_one_line(given, capsys, arguments, message):
    try:
        code = main(["serve", *arguments])
    except SystemExit as stopped:
        code = stopped.code
    assert code == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_an_empty_file_of_keys_is_no_open_door(given, capsys, tmp_path):
    file = tmp_path / "keys"
    file.write_text("\n \n")
    assert main(["serve", "--api-key-file", str(file)]) == 2
    assert "no key in it" in capsys.readouterr().err


def test_without_the_extra_it_says_what_to_install():
    """In a process of its own: modules that are imported twice are two modules ever after."""
    code = (
        "import sys\n"
        "for name in ('prometheus_client', 'starlette', 'starlette.applications'):\n"
        "    sys.modules[name] = None\n"
        "from pace_nb.cli.main import main\n"
        "sys.exit(main(['serve']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "pip install 'pace-nb[server]'" in done.stderr
