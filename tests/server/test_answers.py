"""Answers in bytes: errors in OpenAI's shape, events on one line, streams that are closed."""

from __future__ import annotations

import asyncio
import json

import pytest

from pace_nb.errors import ApiError, InvalidRequestError
from pace_nb.server.answers import (
    DONE,
    EventStream,
    as_json,
    comment,
    error_response,
    event,
    json_around,
    json_response,
)


@pytest.mark.parametrize(
    "error, status, kind, header",
    [
        (ApiError("no", param="n"), 400, "BadRequestError", None),
        (InvalidRequestError("no"), 400, "BadRequestError", None),
        (ApiError("no", status=401), 401, "AuthenticationError", ("www-authenticate", "Bearer")),
        (ApiError("no", status=404), 404, "NotFoundError", None),
        (ApiError("no", status=413), 413, "BadRequestError", ("connection", "close")),
        (ApiError("no", status=429), 429, "RateLimitError", ("retry-after", "1")),
        (ApiError("no", status=503), 503, "ServiceUnavailableError", ("retry-after", "1")),
        (ValueError("no"), 500, "InternalServerError", None),
    ],
)
def test_errors_have_openais_shape(error, status, kind, header):
    response = error_response(error)
    assert response.status_code == status
    found = json.loads(response.body)["error"]
    param = "n" if getattr(error, "param", None) else None
    assert found == {"message": "no", "type": kind, "param": param, "code": status}
    if header is not None:
        assert response.headers[header[0]] == header[1]


def test_nothing_that_is_not_json_is_written():
    with pytest.raises(ValueError, match="Out of range float"):
        json_response({"logprob": float("nan")})
    with pytest.raises(ValueError, match="Out of range float"):
        event({"logprob": float("-inf")})


@pytest.mark.parametrize("items", [[], [{"a": "\n\u2028]"}], [1, None, ["x"]]])
def test_a_list_may_be_encoded_ahead(items):
    whole = {"id": "x", "choices": items, "usage": {"a": 1}}
    around = {**whole, "choices": []}
    found = json_around(around, "choices", [as_json(one) for one in items])
    assert found.body == json_response(whole).body
    assert found.media_type == json_response(whole).media_type


def test_R55_an_event_is_one_line_whatever_it_says():
    text = "a\nb\r\nc\rd\u2028e\u2029f\0g\U0001f600 data: x\n\n"
    data = event({"text": text})
    assert data.startswith(b"data: ") and data.endswith(b"\n\n")
    assert data.count(b"\n") == 2 and b"\r" not in data and b"\0" not in data
    assert json.loads(data[6:])["text"] == text
    assert comment("keepalive 1/2") == b": keepalive 1/2\n\n"
    assert DONE == b"data: [DONE]\n\n"


def serve(stream, send):
    async def receive():
        await asyncio.sleep(3600)

    asyncio.run(stream({"type": "http"}, receive, send))


async def pieces(closed):
    try:
        yield b"one"
        yield b"two"
    finally:
        closed.append("events")


def test_a_stream_is_sent_and_closed():
    sent, closed = [], []

    async def send(message):
        sent.append(message)

    serve(EventStream(pieces(closed), 1.0, lambda: closed.append("close")), send)
    start, *bodies = sent
    headers = dict(start["headers"])
    assert headers[b"content-type"] == b"text/event-stream; charset=utf-8"
    assert headers[b"cache-control"] == b"no-cache" and headers[b"x-accel-buffering"] == b"no"
    assert b"content-length" not in headers
    assert [(one["body"], one["more_body"]) for one in bodies] == [
        (b"one", True), (b"two", True), (b"", False),
    ]  # fmt: skip
    assert closed == ["events", "close"]


def test_R14_a_client_that_does_not_read_ends_its_stream():
    closed = []

    async def send(message):
        if message.get("body") == b"two":
            await asyncio.sleep(3600)

    with pytest.raises(TimeoutError):
        serve(EventStream(pieces(closed), 0.05, lambda: closed.append("close")), send)
    assert closed == ["events", "close"]


def test_a_stream_that_never_began_is_closed_too():
    closed = []

    async def send(message):
        raise OSError

    with pytest.raises(OSError):
        serve(EventStream(pieces([]), 1.0, lambda: closed.append("close")), send)
    assert closed == ["close"]
