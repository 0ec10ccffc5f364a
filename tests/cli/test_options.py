"""Shared options: where the prompt comes from, and what becomes of sampling flags."""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys

import pytest

from pace_nb.cli import options as shared
from pace_nb.config import EngineConfig, SpeculativeConfig
from pace_nb.errors import ConfigError, InvalidRequestError, ModelNotFoundError
from pace_nb.sampling_params import SamplingParams


def parse(*arguments):
    parser = argparse.ArgumentParser(allow_abbrev=False)
    shared.add_prompt_arguments(parser)
    shared.add_model_arguments(parser)
    shared.add_engine_arguments(parser)
    shared.add_sampling_arguments(parser, max_tokens=99)
    return parser.parse_args(arguments)


def stdin(monkeypatch, data, terminal=False):
    stream = io.TextIOWrapper(io.BytesIO(data))
    stream.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stdin", stream)


# ---- the prompt ----


@pytest.mark.parametrize("arguments", [("a b",), ("-p", "a b"), ("--prompt", "a b")])
def test_prompt_from_the_command_line(arguments):
    assert shared.read_prompt(parse(*arguments)) == "a b"


def test_prompt_from_a_file_is_taken_as_it_stands(tmp_path):
    (tmp_path / "prompt.txt").write_bytes("née\r\n\n".encode())
    assert shared.read_prompt(parse("-f", str(tmp_path / "prompt.txt"))) == "née\r\n\n"


@pytest.mark.parametrize("arguments", [(), ("-",)])
def test_prompt_from_a_pipe(monkeypatch, arguments):
    stdin(monkeypatch, "漢字\n".encode())
    assert shared.read_prompt(parse(*arguments)) == "漢字\n"


def test_no_prompt_at_a_terminal_is_refused_and_not_waited_for(monkeypatch):
    stdin(monkeypatch, b"", terminal=True)
    with pytest.raises(ConfigError, match="no prompt"):
        shared.read_prompt(parse())


def test_two_prompts_are_refused():
    with pytest.raises(ConfigError, match="once"):
        shared.read_prompt(parse("a", "-p", "b"))


def test_text_that_is_not_utf8_is_refused(monkeypatch, tmp_path):
    stdin(monkeypatch, b"ab\xff")
    with pytest.raises(InvalidRequestError, match="standard input: not UTF-8 at byte 2"):
        shared.read_prompt(parse())
    (tmp_path / "x").write_bytes(b"\xc3")
    with pytest.raises(InvalidRequestError, match="x: not UTF-8 at byte 0"):
        shared.read_prompt(parse("-f", str(tmp_path / "x")))
    with pytest.raises(InvalidRequestError, match="prompt: not UTF-8 at byte 1"):
        shared.read_prompt(parse("a\udcff"))


def test_a_missing_file_is_refused():
    with pytest.raises(ConfigError, match="--file /nowhere/x: No such file"):
        shared.read_prompt(parse("-f", "/nowhere/x"))


# ---- sampling ----


def test_what_is_not_given_comes_from_the_defaults():
    defaults = SamplingParams(temperature=0.5, top_k=7, max_tokens=None, stop=["x"])
    params = shared.sampling_params(parse("p", "--top-p", "0.9"), defaults)
    assert (params.temperature, params.top_k, params.top_p) == (0.5, 7, 0.9)
    assert params.stop == ("x",)
    assert params.max_tokens == 99


def test_an_interrupt_while_the_model_loads_comes_afterwards(monkeypatch):
    loaded = []

    def load(*arguments, **options):
        os.kill(os.getpid(), signal.SIGINT)
        loaded.append(arguments)

    monkeypatch.setattr("pace_nb.llm.LLM", load)
    with pytest.raises(KeyboardInterrupt):
        shared.open_llm(parse("p"))
    assert loaded


def test_a_seed_is_drawn_where_none_is_given():
    drawn = [shared.sampling_params(parse("p"), SamplingParams()).seed for _ in range(3)]
    assert None not in drawn and len(set(drawn)) > 1
    assert shared.sampling_params(parse("p"), SamplingParams(seed=3)).seed == 3
    assert shared.sampling_params(parse("p", "-s", "-1"), SamplingParams()).seed is not None


def test_every_flag_reaches_its_field():
    arguments = (
        "p -n 5 --min-tokens 2 --temp 0.25 --top-p 0.5 --top-k 4 --min-p 0.125 --repeat-penalty 1.5"
        " --frequency-penalty 0.5 --presence-penalty -0.5 -s 11 --stop END -r FIN"
        " --stop-token-ids 3 4 --ignore-eos"
    ).split()
    assert shared.sampling_params(parse(*arguments), SamplingParams()) == SamplingParams(
        max_tokens=5,
        min_tokens=2,
        temperature=0.25,
        top_p=0.5,
        top_k=4,
        min_p=0.125,
        repetition_penalty=1.5,
        frequency_penalty=0.5,
        presence_penalty=-0.5,
        seed=11,
        stop=["END", "FIN"],
        stop_token_ids=[3, 4],
        ignore_eos=True,
    )


@pytest.mark.parametrize("flag", ["-n", "--max-tokens", "--n-predict", "--max-new-tokens"])
def test_max_tokens_has_its_other_names(flag):
    assert shared.sampling_params(parse("p", flag, "3"), SamplingParams()).max_tokens == 3


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--temperature", "nan"),
        ("--temperature", "-1"),
        ("--top-p", "0"),
        ("--top-p", "1.5"),
        ("--min-p", "inf"),
        ("--max-tokens", "0"),
        ("--top-k", "-2"),
        ("--stop", ""),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(flag, value):
    with pytest.raises(InvalidRequestError, match=flag.strip("-").replace("-", "_")):
        shared.sampling_params(parse("p", flag, value), SamplingParams())


# ---- the model ----


def test_the_bundled_model_is_the_default(repository):
    assert shared.resolve_model(parse("p")) == repository / "pace_nb" / "demo"


@pytest.mark.parametrize("flag", ["-m", "--model", "-hf"])
def test_a_directory_is_taken_as_it_is(tmp_path, flag):
    assert shared.resolve_model(parse("p", flag, str(tmp_path))) == tmp_path


def test_offline_asks_only_the_cache():
    with pytest.raises(ModelNotFoundError, match="offline mode is on"):
        shared.resolve_model(parse("p", "-m", "nobody/nothing", "--offline"))


# ---- the engine ----


@pytest.mark.parametrize(
    ("flags", "kv_cache", "block_size", "prefix_caching"),
    [
        ("", "paged", None, None),
        ("--kv-cache slab --block-size 64", "slab", 64, None),
        ("--kv-backend contiguous", "contiguous", None, None),
        ("--no-enable-prefix-caching", "paged", None, False),
        ("--enable-prefix-caching", "paged", None, True),
    ],
)
def test_engine_flags_reach_their_fields(monkeypatch, flags, kv_cache, block_size, prefix_caching):
    asked = {}
    monkeypatch.setattr("pace_nb.llm.LLM", lambda model, **options: asked.update(options))
    shared.open_llm(parse("p", *flags.split()))
    EngineConfig(**asked)
    assert asked["kv_cache"] == kv_cache
    assert asked["block_size"] == block_size
    assert asked["enable_prefix_caching"] is prefix_caching
    assert asked["speculative_config"] is None


@pytest.mark.parametrize(
    "text, value",
    [
        ("4096", 4096), ("-5", -5), ("4k", 4000), ("4K", 4096), ("25.6k", 25600), ("0.5K", 512),
        ("2m", 2 * 10**6), ("2G", 2**31), ("3t", 3 * 10**12), ("1T", 2**40), ("0", 0),
    ],
)  # fmt: skip
def test_sizes_may_have_vllms_units(text, value):
    for flag in ("--max-model-len", "-c", "--ctx-size"):
        assert parse(f"{flag}={text}").max_model_len == value


@pytest.mark.parametrize(
    "text", ["", "k", "4kk", "4.5", "1e3", "4 k", "k4", "-4k", "4KiB", "\u0664"]
)
def test_sizes_that_are_none(text, capsys):
    with pytest.raises(SystemExit):
        parse(f"--max-model-len={text}")
    assert "expected an integer, such as 4096, 4k (4000) or 4K (4096)" in capsys.readouterr().err


def test_speculation_is_asked_for_in_json(monkeypatch, capsys):
    asked = {}
    monkeypatch.setattr("pace_nb.llm.LLM", lambda model, **options: asked.update(options))
    json = '{"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4}'
    shared.open_llm(parse("p", "--speculative-config", json))
    assert EngineConfig(**asked).speculative_config == SpeculativeConfig("ngram", 3, 4)
    for text in ("ngram", "[]", '{"method": '):
        with pytest.raises(SystemExit):
            parse("p", "--speculative-config", text)
        assert f"expected a JSON object, got {text!r}" in capsys.readouterr().err


def test_the_defaults_in_help_are_those_of_the_engine():
    parser = argparse.ArgumentParser()
    shared.add_batching_arguments(parser)
    text = " ".join(parser.format_help().split())
    config = EngineConfig()
    for default in (
        f"at the same time (default: {config.max_num_seqs})",
        f"then prompts (default: {config.max_num_batched_tokens})",
        f"in a step (default: {config.long_prefill_token_threshold},",
        f"(default: {'on' if config.enable_chunked_prefill else 'off'})",
        f"(default: {config.scheduling_policy})",
    ):
        assert default in text


# ---- a plot ----


def test_a_plot_that_cannot_be_drawn_is_refused_beforehand(tmp_path, monkeypatch):
    shared.check_plot(None)
    shared.check_plot(tmp_path / "x.SVG")
    shared.check_plot(tmp_path / "x")
    with pytest.raises(ConfigError, match=r"--plot .*x\.nothing: expected a name that ends in"):
        shared.check_plot(tmp_path / "x.nothing")
    with pytest.raises(ConfigError, match="no such folder"):
        shared.check_plot(tmp_path / "none" / "x.svg")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"pip install 'pace-nb\[bench\]'"):
        shared.check_plot(tmp_path / "x.svg")
