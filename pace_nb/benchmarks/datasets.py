"""What a serving benchmark asks: prompts with their lengths, as `vllm bench serve` draws them.

Knows vLLM's datasets and how it samples them: the same seed and tokenizer give the same prompts,
in the same order, with the same lengths. Does not know servers or when a request is sent, but for
the times that a trace brings along.

    random     tokens in a row, from a drawn place of the vocabulary on; lengths uniform around
               the mean
    sharegpt   JSON: [{"conversations": [{"value": prompt}, {"value": answer}, ..]}, ..]
    custom     JSON lines: {"prompt": text, "output_tokens": number}
    burstgpt   CSV with a header: Timestamp, Model, Request tokens, Response tokens, ..

Source: vllm/benchmarks/datasets/datasets.py of vLLM 0.32. BurstGPT: Wang et al. 2024,
"BurstGPT: A Real-World Workload Dataset to Optimize LLM Serving Systems".
"""

from __future__ import annotations

import csv
import json
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from pace_nb.errors import ConfigError
from pace_nb.tokenizer import Tokenizer

MAX_TRIES: Final = 10  # to reach a length by decoding and encoding again
SHORTEST: Final = 4  # tokens of a ShareGPT prompt, and of its answer
LONGEST_PROMPT: Final = 1024
LONGEST: Final = 2048  # prompt and answer together
MODEL: Final = "GPT-4"  # the rows of a BurstGPT trace that count


class Sample(NamedTuple):
    """One request: its text, its tokens, how many are to be generated, seconds after the first."""

    prompt: str
    prompt_len: int
    output_len: int
    time: float = 0.0


def random_samples(
    tokenizer: Tokenizer,
    num: int,
    *,
    input_len: int,
    output_len: int,
    range_ratio: tuple[float, float] = (0.0, 0.0),
    prefix_len: int = 0,
    seed: int = 0,
) -> list[Sample]:
    """vLLM's `random`.

    input_len, output_len: means. With a ratio r lengths are uniform in mean * (1 - r) to
        mean * (1 + r); the first ratio is of inputs. What the tokenizer puts around a text counts.
    prefix_len: tokens in front that all prompts share.

    A text that is encoded again may have other tokens than it was made of; a length is missed by
    some where MAX_TRIES do not reach it. ConfigError for lengths that cannot be.
    """
    if not all(0.0 <= ratio < 1.0 for ratio in range_ratio):
        raise ConfigError(f"--random-range-ratio {range_ratio}: expected values in [0, 1)")
    own = max(0, input_len - len(tokenizer.encode("")))
    low, high = _around(own, range_ratio[0])
    if prefix_len + low < 1:
        raise ConfigError(f"--random-input-len {input_len}: no token is left of the shortest")
    drawn = np.random.default_rng(seed)
    num_tokens = num_base_tokens(tokenizer)
    inputs = drawn.integers(low, high + 1, num)
    low, high = (max(1, bound) for bound in _around(output_len, range_ratio[1]))
    outputs = drawn.integers(low, high + 1, num)
    offsets = drawn.integers(0, num_tokens, num)
    named = {
        token_id
        for text in tokenizer.special_tokens.values()
        if (token_id := tokenizer.vocabulary.get(text)) is not None
    }
    allowed = np.setdiff1d(np.arange(num_tokens), list(named))
    if not allowed.size:
        raise ConfigError("the tokenizer has no tokens but special ones")

    def text_of(ids: list[int], length: int) -> tuple[str, list[int]]:
        """A text that has `length` tokens, as far as that can be had, and its tokens."""
        for remaining in range(MAX_TRIES, -1, -1):
            text = tokenizer.decode(ids, skip_special_tokens=False)
            ids = tokenizer.encode(text, add_special_tokens=False)
            if len(ids) == length or not remaining:
                break
            ids += drawn.integers(0, num_tokens, max(0, length - len(ids))).tolist()
            del ids[length:]
        return text, ids

    prefix: list[int] = []
    if prefix_len:
        chosen = allowed[drawn.integers(0, allowed.size, prefix_len)]
        prefix = text_of(chosen.tolist(), prefix_len)[1]
    samples = []
    for index in range(num):
        places = (offsets[index] + index + np.arange(inputs[index])) % allowed.size
        text, ids = text_of(prefix + allowed[places].tolist(), prefix_len + int(inputs[index]))
        samples.append(Sample(text, len(ids), int(outputs[index])))
    return samples


def _around(mean: int, ratio: float) -> tuple[int, int]:
    return math.floor(mean * (1 - ratio)), math.ceil(mean * (1 + ratio))


def num_base_tokens(tokenizer: Tokenizer) -> int:
    """Tokens of the vocabulary without those that were added to it: HF's `vocab_size`."""
    return len(json.loads(tokenizer.to_json())["model"]["vocab"])


def sharegpt(
    tokenizer: Tokenizer,
    num: int,
    path: Path,
    *,
    output_len: int | None = None,
    shuffle: bool = True,
    oversample: bool = True,
    seed: int = 0,
) -> list[Sample]:
    """The first questions of conversations; the answers there say how many tokens to generate.

    output_len: instead of those. Prompts and answers that vLLM finds too short or too long are
    left out. oversample: where the file has fewer than `num`, some come more than once.
    """
    found = _read(path, lambda text: json.loads(text))
    if not isinstance(found, list):
        raise ConfigError(f"{path}: expected a JSON list of conversations")

    def pairs() -> Iterator[tuple[str, str]]:
        for entry in found:
            turns = entry.get("conversations") if isinstance(entry, dict) else None
            if isinstance(turns, list) and len(turns) >= 2:
                yield _text(path, turns[0]), _text(path, turns[1])

    entries = list(pairs())
    if shuffle:
        _drawer(seed).shuffle(entries)
    samples: list[Sample] = []
    for prompt, answer in entries:
        if len(samples) == num:
            break
        prompt_len = len(tokenizer.encode(prompt))
        wanted = len(tokenizer.encode(answer)) if output_len is None else output_len
        too_short = prompt_len < SHORTEST or (output_len is None and wanted < SHORTEST)
        if not (too_short or prompt_len > LONGEST_PROMPT or prompt_len + wanted > LONGEST):
            samples.append(Sample(prompt, prompt_len, wanted))
    return _enough(samples, num, path, oversample, seed)


def _text(path: Path, turn: Any) -> str:
    text = turn.get("value") if isinstance(turn, dict) else None
    if not isinstance(text, str):
        raise ConfigError(f"{path}: a turn of a conversation has no text in `value`")
    return text


def custom(
    tokenizer: Tokenizer,
    num: int,
    path: Path,
    *,
    output_len: int | None = 256,
    chat: bool = True,
    shuffle: bool = True,
    oversample: bool = True,
    seed: int = 0,
) -> list[Sample]:
    """The lines of a file. output_len: None takes each line's own. chat: through the template."""

    def parse(text: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in text.splitlines() if line.strip()]

    rows = _read(path, parse)
    if shuffle:
        _drawer(seed).shuffle(rows)
    samples: list[Sample] = []
    for row in rows[:num]:
        prompt = row.get("prompt") if isinstance(row, dict) else None
        wanted = row.get("output_tokens") if output_len is None else output_len
        if not isinstance(prompt, str) or type(wanted) is not int or wanted < 1:
            raise ConfigError(
                f"{path}: a line is {json.dumps(row)[:80]}, expected a prompt, and output_tokens "
                "where --custom-output-len is -1"
            )
        if chat:
            message = {"role": "user", "content": prompt}
            prompt = tokenizer.apply_chat_template([message])
        samples.append(Sample(prompt, len(tokenizer.encode(prompt)), wanted))
    return _enough(samples, num, path, oversample, seed)


def burstgpt(
    tokenizer: Tokenizer, num: int, path: Path, *, timed: bool = False, seed: int = 0
) -> list[Sample]:
    """Requests as long as those of a trace, of tokens in a row.

    timed: the first `num` of the trace in its order, each with its time after the first; else rows
    at random, as vLLM has them. Rows count that are of MODEL and were answered.
    """

    def parse(text: str) -> list[tuple[float, int, int]]:
        rows = csv.DictReader(text.splitlines())
        return [
            (float(row["Timestamp"]), int(row["Request tokens"]), int(row["Response tokens"]))
            for row in rows
            if row["Model"] == MODEL and int(row["Response tokens"]) > 0
        ]

    rows = _read(path, parse)
    if not rows:
        raise ConfigError(f"{path}: no row of {MODEL} that was answered")
    if timed:
        if num > len(rows):
            raise ConfigError(f"--num-prompts {num}: {path} has {len(rows)} requests")
        chosen = sorted(rows[:num])
    else:
        drawn = np.random.RandomState(seed)  # pandas' `sample`
        chosen = [rows[i] for i in drawn.choice(len(rows), num, replace=num > len(rows))]
    num_tokens = num_base_tokens(tokenizer)
    return [
        Sample(
            tokenizer.decode(
                [(index + j) % num_tokens for j in range(input_len)], skip_special_tokens=False
            ),
            input_len,
            output_len,
            time - chosen[0][0] if timed else 0.0,
        )
        for index, (time, input_len, output_len) in enumerate(chosen)
    ]


def _drawer(seed: int) -> random.Random:
    """Python's own, because the order of vLLM's samples is its."""
    return random.Random(seed)  # noqa: S311 (no secret)


def _read(path: Path, parse: Callable[[str], Any]) -> Any:
    """A file's content; ConfigError that names the file where it is not what it should be."""
    try:
        return parse(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"--dataset-path {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        what = f"no column {error}" if isinstance(error, KeyError) else str(error)[:120]
        raise ConfigError(f"--dataset-path {path}: not in the dataset's format: {what}") from error


def _enough(
    samples: list[Sample], num: int, path: Path, oversample: bool, seed: int
) -> list[Sample]:
    if not samples:
        raise ConfigError(f"--dataset-path {path}: no entry that can be used")
    if oversample:
        drawn = _drawer(seed)
        return samples + [drawn.choice(samples) for _ in range(num - len(samples))]
    return samples
