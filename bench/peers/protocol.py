"""What a runner and `compare.py` say to each other: JSON lines on the runner's stdin and stdout.

    -> {"batch": 8, "input_len": 16, "output_len": 25, "seed": 3}
    <- {"seconds": 1.234}

Knows the case and how its prompts are drawn, the same for every engine. Knows no engine. Imports
the standard library only, because the runners execute in the peers' own environments.

A runner says {"facts": {...}} by itself when it has loaded, and ends when its stdin does. What the
libraries of an engine print goes to stderr.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TextIO

LONGEST = 1100  # tokens of a sequence, prompt and output: what the engines are told to expect
MOST_SEQUENCES = 32
KV_BYTES = 1 << 28  # of the KV cache; llama-3.2-1b keeps 8192 tokens in it

Generate = Callable[[list[list[int]], int], list[int]]
"""(prompts as token ids, tokens wanted of each) -> how many each got; greedy, EOS ignored."""


class Case(NamedTuple):
    """`batch` prompts of `input_len` random tokens that arrive together; `output_len` from each."""

    batch: int
    input_len: int
    output_len: int
    seed: int = 0

    def prompts(self, vocab_size: int) -> list[list[int]]:
        """Token ids, by the seed; another seed shares no beginning that a cache could keep."""
        draw = random.Random(self.seed)
        return [
            [draw.randrange(vocab_size) for _ in range(self.input_len)] for _ in range(self.batch)
        ]


def private_stdout() -> TextIO:
    """Standard output for the protocol alone; what anything else prints goes to stderr from now."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    return answers


def serve(
    generate: Generate,
    vocab_size: int,
    facts: Mapping[str, Any],
    questions: TextIO,
    answers: TextIO,
) -> None:
    """Answer cases until `questions` ends. A case that comes out short is answered by an error."""

    def answer(content: Mapping[str, Any]) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    answer({"facts": dict(facts)})
    for line in questions:
        case = Case(**json.loads(line))
        prompts = case.prompts(vocab_size)
        start = time.perf_counter()
        lengths = generate(prompts, case.output_len)
        seconds = time.perf_counter() - start
        if lengths != [case.output_len] * case.batch:
            answer({"error": f"{case}: generated {lengths} tokens"})
        else:
            answer({"seconds": seconds})
