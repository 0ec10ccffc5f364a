"""Answers in the order of the lines; a bad line costs itself; few lines are under way."""

from __future__ import annotations

import json

import pytest

from pace_nb.llm import LLM
from pace_nb.openai_api import batch_file
from pace_nb.openai_api.batch_file import answer_lines
from pace_nb.sampling_params import SamplingParams

SERVED = ["m", "alias"]
CHAT, COMPLETIONS = batch_file.URLS
GREEDY = {"temperature": 0, "max_tokens": 4, "ignore_eos": True}
HI = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def shared():
    with LLM(kernels="reference", max_num_seqs=2) as llm:
        yield llm


@pytest.fixture
def llm(shared):
    yield shared
    assert shared._engine.num_unfinished == 0 and not shared._submissions
    cache = shared._engine._cache
    assert cache.num_free_tokens == cache.num_total_tokens


def line(custom_id, url=COMPLETIONS, method="POST", **body):
    body = {"prompt": "A cat", **GREEDY, **body} if url == COMPLETIONS else {**GREEDY, **body}
    found = {"custom_id": custom_id, "method": method, "url": url, "body": body}
    return json.dumps(found).encode() + b"\n"


def answers(llm, *lines):
    return list(answer_lines(llm, lines, SERVED))


def expected_text(llm, prompt, **params):
    params = SamplingParams(**{**GREEDY, **params})
    (output,) = llm.generate([prompt], params, use_tqdm=False)
    return output.outputs[0].text


def test_completions_and_chats_as_the_model_gives_them(llm):
    first, second, third = answers(
        llm,
        line("a", model="m"),
        b"\n",
        line("b", CHAT, messages=HI, model="alias"),
        line("c", prompt=["A cat", "The"], n=2),
    )
    assert [one["custom_id"] for one in (first, second, third)] == ["a", "b", "c"]
    assert [one["error"] for one in (first, second, third)] == [None] * 3
    assert len({one["id"] for one in (first, second, third)}) == 3
    response = first["response"]
    assert response["status_code"] == 200 and response["request_id"]
    assert response["body"]["object"] == "text_completion" and response["body"]["model"] == "m"
    assert response["body"]["choices"][0]["text"] == expected_text(llm, "A cat")
    assert response["body"]["usage"]["completion_tokens"] == 4

    chat = llm.chat(HI, SamplingParams(**GREEDY), use_tqdm=False)[0]
    body = second["response"]["body"]
    assert body["choices"][0]["message"]["content"] == chat.outputs[0].text
    assert body["object"] == "chat.completion" and body["model"] == "alias"
    assert body["usage"]["prompt_tokens"] == len(chat.prompt_token_ids)

    texts = [choice["text"] for choice in third["response"]["body"]["choices"]]
    assert texts == [expected_text(llm, "A cat")] * 2 + [expected_text(llm, "The")] * 2


def test_a_short_answer_waits_for_a_long_one_before_it(llm):
    long, short = answers(llm, line("long", max_tokens=30), line("short", max_tokens=1))
    assert (long["custom_id"], short["custom_id"]) == ("long", "short")
    assert long["response"]["body"]["usage"]["completion_tokens"] == 30


def test_prompts_without_their_special_tokens(llm):
    (plain,) = answers(llm, line("a", add_special_tokens=False, max_tokens=1))
    ids = llm.get_tokenizer().encode("A cat", add_special_tokens=False)
    assert plain["response"]["body"]["usage"]["prompt_tokens"] == len(ids)


@pytest.mark.parametrize(
    "bad, custom_id, status, param, message",
    [
        (b"{not json\n", None, 400, None, "line 2 is not valid JSON at character 1"),
        (b"[1]\n", None, 400, None, "line 2 is a list, expected an object"),
        (b'{"custom_id": "x", "url": \xff}\n', None, 400, None, "line 2 is not UTF-8 at byte 26"),
        (b'{"method": "POST"}\n', None, 400, "custom_id", "line 2 has no custom_id"),
        (line("x", method="GET"), "x", 400, "method", "expected it"),
        (line("x", "/v1/embeddings"), "x", 400, "url", "expected /v1/chat/completions or"),
        (b'{"custom_id": "x", "method": "POST", "url": "/v1/completions"}\n', "x", 400, "body",
         "body is missing"),
        (line("x", temperature=-1), "x", 400, "temperature", "temperature is -1"),
        (line("x", model="gpt"), "x", 404, "model", "'gpt' is not served here"),
        (line("x", stream=True), "x", 400, "stream", "expected false in a batch"),
        (line("x", prompt=[["a"]]), "x", 400, "prompt", "prompt is a list"),
        (line("x", prompt=[[5], [9999]]), "x", 400, None, "token id is 9999"),
        (line("x", prompt=[[5] * 2000]), "x", 400, None, "maximum context length is 1024 tokens"),
        (line("x", priority=1), "x", 400, None, "priority is 1, expected 0"),
        (line("x", structured_outputs={"regex": "("}), "x", 400, None, "regex cannot be followed"),
        (line("x", CHAT), "x", 400, "messages", "messages is missing"),
    ],
)  # fmt: skip
def test_a_bad_line_costs_itself(llm, bad, custom_id, status, param, message):
    before, found, after = answers(llm, line("a"), bad, line("b"))
    assert (before["custom_id"], after["custom_id"]) == ("a", "b")
    assert before["error"] is None and after["error"] is None
    assert found["custom_id"] == custom_id and found["response"]["status_code"] == status
    error = found["error"]
    assert message in error["message"] and (error["param"], error["code"]) == (param, status)
    assert found["response"]["body"] == {"error": error}
    json.dumps(found, allow_nan=False)


def test_a_line_that_is_too_long(llm, monkeypatch):
    monkeypatch.setattr(batch_file, "MAX_LINE_BYTES", 500)
    found, after = answers(llm, line("x", prompt="a " * 300), line("b"))
    assert found["error"]["message"] == "line 1 has more than 500 bytes"
    assert after["error"] is None


def test_a_request_that_fails_on_the_way(llm, monkeypatch):
    run = llm._engine._runner.run

    def failing(scheduled):
        if any(request.prompt_token_ids[-1] == 77 for request, _ in scheduled):
            raise ValueError("it broke")
        return run(scheduled)

    monkeypatch.setattr(llm._engine._runner, "run", failing)
    found, after = answers(llm, line("x", prompt=[77]), line("b"))
    assert found["response"]["status_code"] == 500
    assert "ValueError: it broke" in found["error"]["message"]
    assert after["error"] is None


def test_what_no_one_foresaw_costs_its_line_too(llm, monkeypatch):
    monkeypatch.setattr(
        type(llm), "get_suggested_sampling", lambda self: (_ for _ in ()).throw(KeyError("odd"))
    )
    (found,) = answers(llm, line("x"))
    assert found["response"]["status_code"] == 500


def test_no_more_lines_are_read_than_there_is_room_for(llm, monkeypatch):
    monkeypatch.setattr(batch_file, "LINES_PER_SEQUENCE", 3)
    taken = 0

    def lines():
        nonlocal taken
        for number in range(14):
            taken += 1
            yield line(str(number), max_tokens=1)

    given = 0
    for answer in answer_lines(llm, lines(), SERVED):
        assert answer["custom_id"] == str(given)
        given += 1
        assert taken - given <= 3 * 2
    assert given == 14

    monkeypatch.setattr(batch_file, "MAX_PENDING_BYTES", 1)
    taken = given = 0
    for _ in answer_lines(llm, lines(), SERVED):
        given += 1
        assert taken - given <= 1


def test_whoever_stops_early_leaves_nothing_running(llm):
    stream = answer_lines(llm, [line(str(i), max_tokens=i + 1) for i in range(6)], SERVED)
    next(stream)
    assert llm._engine.num_unfinished
    stream.close()
    assert llm._engine.num_unfinished == 0
