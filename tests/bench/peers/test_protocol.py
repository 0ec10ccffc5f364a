"""A runner answers cases, and refuses to time an answer that is too short."""

from __future__ import annotations

import io
import json

from bench.peers.protocol import Case, serve


def answers_to(cases, generate):
    questions = io.StringIO("".join(json.dumps(case._asdict()) + "\n" for case in cases))
    answers = io.StringIO()
    serve(generate, 50, {"version": "fake 1"}, questions, answers)
    return [json.loads(line) for line in answers.getvalue().splitlines()]


def test_each_case_is_generated_once_and_timed():
    seen = []

    def generate(prompts, output_len):
        seen.append((prompts, output_len))
        return [output_len] * len(prompts)

    cases = [Case(2, 3, 4, seed=1), Case(1, 5, 1, seed=2)]
    ready, first, second = answers_to(cases, generate)
    assert ready == {"facts": {"version": "fake 1"}}
    assert first["seconds"] > 0 and second["seconds"] > 0
    assert seen == [(case.prompts(50), case.output_len) for case in cases]


def test_a_short_answer_is_an_error():
    _, answer = answers_to([Case(2, 3, 4)], lambda prompts, output_len: [output_len, 1])
    assert "generated [4, 1] tokens" in answer["error"]


def test_prompts_depend_on_the_seed_and_fit_the_vocabulary():
    case = Case(3, 200, 1, seed=7)
    prompts = case.prompts(50)
    assert prompts == case.prompts(50)
    assert [len(prompt) for prompt in prompts] == [200] * 3
    assert {token for prompt in prompts for token in prompt} == set(range(50))
    other = case._replace(seed=8).prompts(50)
    beginnings = {tuple(prompt[:16]) for prompt in prompts + other}
    assert len(beginnings) == 6, "two prompts that begin alike could be answered from a cache"
