"""Prompts are vLLM's: those here were made by vllm 0.32's own classes with the demo's tokenizer."""

from __future__ import annotations

import json

import numpy as np
import pytest

from pace_nb.benchmarks import datasets
from pace_nb.errors import ConfigError
from pace_nb.models import hub
from pace_nb.tokenizer import Tokenizer

# RandomDataset(random_seed=3).sample(tokenizer, 4, input_len=20, output_len=8), and the same with
# range_ratio=0.5, prefix_len=3: prompt, prompt_len, expected_output_len. U+FFFD: half a character.
PLAIN = [
    (" dinnersdayursdaymeraturday low lamiveppyew kneweet ch VFollowier easier!<|rise", 19, 8),
    ("\ufffd" * 7, 21, 8),
    ("anll h nin dusme f c louit T.<|ayre wasant", 19, 8),
    ("ke fr with onirac Eearookil ti timeameve smcevery Aut", 19, 8),
]
RANGES = [
    ("Come HisucXYZ[\\]^_`abcdefghijklmnopq\ufffd", 30, 5),
    ("Come Hisuc\ufffd\ufffd\ufffd\ufffd", 15, 11),
    ("Come Hisucucy boyella Zuno happy Goe lit littleolly too", 15, 11),
    ("Come Hisuc quiet out birurpondTh every al But whitely co", 16, 9),
]


@pytest.fixture(scope="module")
def tokenizer():
    with_template = Tokenizer.from_directory(hub.DEMO_MODEL)
    yield with_template
    with_template.close()


def test_random_prompts_are_vllms(tokenizer):
    made = datasets.random_samples(tokenizer, 4, input_len=20, output_len=8, seed=3)
    plain = [(one.prompt, one.prompt_len, one.output_len) for one in made]
    assert [one[1:] for one in plain] == [one[1:] for one in PLAIN]
    assert [plain[i][0] for i in (0, 2, 3)] == [PLAIN[i][0] for i in (0, 2, 3)]
    assert set(plain[1][0]) == {"\ufffd"}
    made = datasets.random_samples(
        tokenizer, 4, input_len=20, output_len=8, range_ratio=(0.5, 0.5), prefix_len=3, seed=3
    )
    assert [(one.prompt_len, one.output_len) for one in made] == [one[1:] for one in RANGES]
    assert [made[i].prompt for i in (2, 3)] == [RANGES[i][0] for i in (2, 3)]
    assert all(one.prompt.startswith("Come Hisuc") for one in made)


def test_a_length_is_that_of_the_text_with_what_surrounds_it(tokenizer):
    made = datasets.random_samples(tokenizer, 50, input_len=40, output_len=8)
    around = len(tokenizer.encode(""))
    counted = [len(tokenizer.encode(one.prompt)) for one in made]
    assert counted == [one.prompt_len + around for one in made]
    assert sum(count == 40 for count in counted) > 40  # a few cannot be hit


@pytest.mark.parametrize(
    "wrong",
    [{"range_ratio": (1.0, 0.0)}, {"range_ratio": (0.0, -0.1)}, {"input_len": 1}],
)
def test_lengths_that_cannot_be(tokenizer, wrong):
    options = {"input_len": 20, "output_len": 8, **wrong}
    with pytest.raises(ConfigError, match="--random-"):
        datasets.random_samples(tokenizer, 2, **options)


def test_sharegpt_takes_first_turns_and_leaves_out_the_extremes(tokenizer, tmp_path):
    def talk(*texts):
        return {"conversations": [{"from": "x", "value": text} for text in texts]}

    long = "once upon a time " * 400
    content = [talk("Tell me a story.", "Once there was a cat.", "And?"), talk("only one turn"),
               talk("x", "too short a question"), talk(long, "too long a question"),
               talk("Who sat on the mat?", "The cat sat on the mat."), {"id": 3}]  # fmt: skip
    path = tmp_path / "share.json"
    path.write_text(json.dumps(content))
    made = datasets.sharegpt(tokenizer, 9, path, shuffle=False, oversample=False)
    assert [one.prompt for one in made] == ["Tell me a story.", "Who sat on the mat?"]
    assert [one.prompt_len for one in made] == [len(tokenizer.encode(one.prompt)) for one in made]
    answers = ["Once there was a cat.", "The cat sat on the mat."]
    assert [one.output_len for one in made] == [len(tokenizer.encode(text)) for text in answers]
    made = datasets.sharegpt(tokenizer, 9, path, output_len=2, seed=1)
    assert len(made) == 9 and {one.output_len for one in made} == {2}
    assert made == datasets.sharegpt(tokenizer, 9, path, output_len=2, seed=1)


def test_custom_lines(tokenizer, tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text('{"prompt": "Who?", "output_tokens": 7}\n\n{"prompt": "Why?"}\n')
    made = datasets.custom(tokenizer, 2, path, chat=False, shuffle=False)
    assert [(one.prompt, one.output_len) for one in made] == [("Who?", 256), ("Why?", 256)]
    (made,) = datasets.custom(tokenizer, 1, path, output_len=None, shuffle=False)
    assert made.output_len == 7 and "<|user|>" in made.prompt
    with pytest.raises(ConfigError, match="expected a prompt, and output_tokens"):
        datasets.custom(tokenizer, 2, path, output_len=None, shuffle=False)


BURST = """Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
5,ChatGPT,100,100,200,Conversation log
10,GPT-4,6,3,9,Conversation log
11.5,GPT-4,9,0,9,API log
13,GPT-4,8,5,13,API log
20,GPT-4,4,2,6,API log
"""


def test_burstgpt_has_a_traces_lengths_and_times(tokenizer, tmp_path):
    path = tmp_path / "burst.csv"
    path.write_text(BURST)
    made = datasets.burstgpt(tokenizer, 3, path, timed=True)
    assert [(one.prompt_len, one.output_len, one.time) for one in made] == [
        (6, 3, 0.0), (8, 5, 3.0), (4, 2, 10.0),
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="has 3 requests"):
        datasets.burstgpt(tokenizer, 4, path, timed=True)
    drawn = datasets.burstgpt(tokenizer, 5, path, seed=4)
    rows = [(6, 3), (8, 5), (4, 2)]  # pandas: RandomState(seed).choice
    expected = [rows[i] for i in np.random.RandomState(4).choice(3, 5, replace=True)]
    assert [(one.prompt_len, one.output_len) for one in drawn] == expected
    assert {one.time for one in drawn} == {0.0}


@pytest.mark.parametrize(
    "read, text",
    [
        (datasets.sharegpt, "{}"), (datasets.sharegpt, "[1"), (datasets.sharegpt, "[]"),
        (datasets.sharegpt, '[{"conversations": [{}, {}]}]'), (datasets.custom, "{"),
        (datasets.custom, '{"text": "x"}'), (datasets.burstgpt, "a,b\n1,2\n"),
        (datasets.burstgpt, BURST.replace("GPT-4", "GPT-5")),
        (datasets.burstgpt, BURST.replace("13,GPT-4,8", "13,GPT-4,x")),
    ],
)  # fmt: skip
def test_a_file_of_another_kind_is_named(tokenizer, tmp_path, read, text):
    path = tmp_path / "file"
    path.write_text(text)
    with pytest.raises(ConfigError, match=str(path)):
        read(tokenizer, 2, path)
    with pytest.raises(ConfigError, match="No such file"):
        read(tokenizer, 2, tmp_path / "none")
