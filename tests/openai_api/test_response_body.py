"""The bodies clients read, field by field, and streams that add up to the whole."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from pace_nb.errors import ApiError, InvalidRequestError, PaceError
from pace_nb.openai_api.request_body import read_chat, read_completion
from pace_nb.openai_api.response_body import (
    ChatResponse,
    CompletionResponse,
    error_body,
    failure,
)
from pace_nb.outputs import CompletionOutput, Logprob, RequestOutput

HI = [{"role": "user", "content": "Hi"}]
NAMED = {"response_id": "r-1", "model": "m", "created": 5}


def logprob(value, text, rank=1):
    return Logprob(value, rank, text)


FIRST = {7: logprob(-0.5, "He"), 8: logprob(-1.5, "Hat", 2)}
SECOND = {9: logprob(float("-inf"), "llo", 3), 8: logprob(-0.1, "llo")}
PROMPT = [None, {3: logprob(-2.0, " b", 4), 4: logprob(-0.25, " c")}]


def output(index=0, prompt="a b", finish="stop", **fields):
    one = CompletionOutput(index, "Hello", [7, 9], -1.0, [FIRST, SECOND], finish, None)
    return RequestOutput("x", prompt, [1, 3], PROMPT, [replace(one, **fields)], True, 1)


class Vocabulary:
    """As much of a Tokenizer as is needed: token 1 is "a", and 9 is half a character."""

    def token_text(self, token_id):
        return {1: "a"}[token_id]

    def token_bytes(self, token_id):
        return {7: b"He", 8: b"Hat", 9: b"\xc3"}[token_id]

    def decode(self, token_ids):
        return {(1, 3): "a b"}[tuple(token_ids)]


def completion_response(fields=None, **options):
    body = read_completion({"prompt": "a b", **(fields or {})})
    return CompletionResponse(body, tokenizer=Vocabulary(), **NAMED, **options)


def chat_response(fields=None):
    body = read_chat({"messages": HI, **(fields or {})})
    return ChatResponse(body, tokenizer=Vocabulary(), **NAMED)


USAGE = {
    "prompt_tokens": 2,
    "completion_tokens": 2,
    "total_tokens": 4,
    "prompt_tokens_details": {"cached_tokens": 1},
}


def test_a_completion():
    assert completion_response().whole([output(logprobs=None)]) == {
        "id": "r-1",
        "object": "text_completion",
        "created": 5,
        "model": "m",
        "choices": [
            {
                "index": 0,
                "text": "Hello",
                "logprobs": None,
                "finish_reason": "stop",
                "stop_reason": None,
            }
        ],
        "usage": USAGE,
    }


def test_a_chat():
    assert chat_response().whole(output(logprobs=None, stop_reason="###")) == {
        "id": "r-1",
        "object": "chat.completion",
        "created": 5,
        "model": "m",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Hello", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
                "stop_reason": "###",
            }
        ],
        "usage": USAGE,
    }


def test_logprobs_of_an_echoed_completion_as_lm_eval_reads_them():
    answer = completion_response({"echo": True, "logprobs": 1}).whole([output()])
    (choice,) = answer["choices"]
    assert choice["text"] == "a bHello"
    assert choice["logprobs"] == {
        "tokens": ["a", " b", "He", "llo"],
        "token_logprobs": [None, -2.0, -0.5, -9999.0],
        "top_logprobs": [
            None,
            {" c": -0.25, " b": -2.0},
            {"He": -0.5, "Hat": -1.5},
            {"llo": -0.1},  # two tokens of the same text: the likelier
        ],
        "text_offset": [0, 1, 3, 5],
    }
    assert "prompt_logprobs" in choice
    json.dumps(answer, allow_nan=False)


def test_the_prompt_alone():
    response = completion_response({"echo": True, "logprobs": 0, "max_tokens": 0})
    answer = response.whole([output(finish="length")])
    (choice,) = answer["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("a b", "length")
    assert choice["logprobs"]["tokens"] == ["a", " b"]
    assert answer["usage"]["completion_tokens"] == 0


def test_a_prompt_of_token_ids_is_echoed_as_text():
    answer = completion_response({"echo": True}).whole([output(prompt=None, logprobs=None)])
    assert answer["choices"][0]["text"] == "a bHello"


def test_choices_of_several_prompts_are_numbered_through():
    body = read_completion({"prompt": ["a", "b"], "n": 2})
    outputs = []
    for _ in range(2):
        both = [output(index=i).outputs[0] for i in range(2)]
        outputs.append(replace(output(), outputs=both))
    answer = CompletionResponse(body, **NAMED).whole(outputs)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert answer["usage"]["prompt_tokens"] == 4 and answer["usage"]["completion_tokens"] == 8


def test_logprobs_of_a_chat_have_their_bytes():
    answer = chat_response({"logprobs": True, "top_logprobs": 1}).whole(output())
    first, second = answer["choices"][0]["logprobs"]["content"]
    assert first == {
        "token": "He",
        "logprob": -0.5,
        "bytes": [72, 101],
        "top_logprobs": [{"token": "He", "logprob": -0.5, "bytes": [72, 101]}],
    }
    assert (second["logprob"], second["bytes"]) == (-9999.0, [0xC3])
    assert second["top_logprobs"][0]["logprob"] == -0.1
    json.dumps(answer, allow_nan=False)


def test_token_ids_where_they_are_asked_for():
    fields = {"return_token_ids": True, "return_tokens_as_token_ids": True, "logprobs": 1}
    (choice,) = completion_response(fields).whole([output()])["choices"]
    assert (choice["token_ids"], choice["prompt_token_ids"]) == ([7, 9], [1, 3])
    assert choice["logprobs"]["tokens"] == ["token_id:7", "token_id:9"]
    answer = chat_response({"return_token_ids": True}).whole(output(logprobs=None))
    assert answer["prompt_token_ids"] == [1, 3] and answer["choices"][0]["token_ids"] == [7, 9]


def test_prompt_logprobs_in_vllms_form():
    expected = [
        None,
        {
            "3": {"logprob": -2.0, "rank": 4, "decoded_token": " b"},
            "4": {"logprob": -0.25, "rank": 1, "decoded_token": " c"},
        },
    ]
    assert chat_response({"prompt_logprobs": 1}).whole(output())["prompt_logprobs"] == expected
    answer = completion_response({"prompt_logprobs": 1}).whole([output()])
    assert answer["choices"][0]["prompt_logprobs"] == expected


def pieces():
    """The whole output as it would come: one token, nothing, then the rest and the end."""
    yield output(text="He", token_ids=[7], logprobs=[FIRST], finish=None)
    yield output(text="", token_ids=[], logprobs=[], finish=None)
    yield output(text="llo", token_ids=[9], logprobs=[SECOND], finish="stop")


def test_a_streamed_chat_begins_with_its_role_and_ends_with_its_reason():
    response = chat_response({"stream": True, "stream_options": {"include_usage": True}})
    chunks = [c for piece in pieces() for c in response.chunks(replace_logprobs(piece))]
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [
        {"role": "assistant", "content": ""},
        {"content": "He"},
        {"content": "llo"},
        {},
    ]
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons == [None, None, None, "stop"]
    assert all(chunk["object"] == "chat.completion.chunk" for chunk in chunks)
    assert all(chunk["usage"] is None and chunk["id"] == "r-1" for chunk in chunks)
    last, silent = response.usage_chunk(), response.silent_chunk()
    assert (last["choices"], last["usage"]) == ([], USAGE)
    assert silent == {**last, "usage": None}


def replace_logprobs(piece):
    (one,) = piece.outputs
    return replace(piece, outputs=[replace(one, logprobs=None)])


def test_a_streamed_completion_adds_up_to_the_whole():
    fields = {"echo": True, "logprobs": 1}
    (whole,) = completion_response(fields).whole([output()])["choices"]
    response = completion_response({**fields, "stream": True})
    chunks = [c["choices"][0] for piece in pieces() for c in response.chunks(0, piece)]
    assert len(chunks) == 2
    assert "".join(chunk["text"] for chunk in chunks) == whole["text"]
    for name, values in whole["logprobs"].items():
        assert [v for chunk in chunks for v in chunk["logprobs"][name]] == values
    assert [chunk["finish_reason"] for chunk in chunks] == [None, "stop"]
    assert "usage" not in response.chunks(0, output())[0]


def test_usage_in_every_chunk_where_it_is_asked_for():
    options = {"stream": True, "stream_options": {"continuous_usage_stats": True}}
    response = completion_response(options)
    totals = [
        chunk["usage"]["completion_tokens"]
        for piece in pieces()
        for chunk in response.chunks(0, replace_logprobs(piece))
    ]
    assert totals == [1, 2]


def test_an_open_last_message_is_echoed():
    fields = {
        "messages": [*HI, {"role": "assistant", "content": "Oh, "}],
        "continue_final_message": True,
        "echo": True,
    }
    answer = chat_response(fields).whole(output(logprobs=None))
    assert answer["choices"][0]["message"]["content"] == "Oh, Hello"
    first = chat_response({**fields, "stream": True}).chunks(output(logprobs=None))[0]
    assert first["choices"][0]["delta"]["content"] == "Oh, "


def test_what_failed_is_told_apart_from_what_did_not():
    bad = output(finish="error", stop_reason="it is NaN", logprobs=None)
    good = output(logprobs=None)
    assert failure([good]) is None and failure([bad, good]) is None
    for whole in (
        lambda: completion_response().whole([bad]),
        lambda: chat_response().whole(bad),
    ):
        with pytest.raises(ApiError, match="generation failed: it is NaN") as caught:
            whole()
        assert caught.value.status == 500
    body = read_completion({"prompt": ["a", "b"]})
    failed, fine = CompletionResponse(body, **NAMED).whole([bad, good])["choices"]
    assert failed["finish_reason"] is None and "it is NaN" in failed["error"]["message"]
    assert fine["finish_reason"] == "stop" and "error" not in fine


@pytest.mark.parametrize(
    "error, expected",
    [
        (ApiError("a", param="b"), ("a", "BadRequestError", "b", 400)),
        (ApiError("a", status=404), ("a", "NotFoundError", None, 404)),
        (ApiError("a", status=429), ("a", "RateLimitError", None, 429)),
        (ApiError("a", status=413), ("a", "BadRequestError", None, 413)),
        (ApiError("a", status=599), ("a", "InternalServerError", None, 599)),
        (InvalidRequestError("c"), ("c", "BadRequestError", None, 400)),
        (PaceError("d"), ("d", "InternalServerError", None, 500)),
        (MemoryError(), ("MemoryError", "InternalServerError", None, 500)),
    ],
)
def test_the_error_object(error, expected):
    message, kind, param, code = expected
    assert error_body(error) == {
        "error": {"message": message, "type": kind, "param": param, "code": code}
    }
