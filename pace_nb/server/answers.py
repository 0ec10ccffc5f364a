"""Answers as they leave: JSON bodies, errors in OpenAI's shape, server-sent events.

Knows bytes on the way out and how long a client may take to read them. Does not know what they say.

Events, as OpenAI's clients, `vllm bench serve` and browsers' EventSource read them: `data: ` and
one JSON object on one line, an empty line, and `data: [DONE]` at the end. A comment (`: ...`) keeps
proxies from cutting a stream that has nothing to say yet. No `id:` or `retry:` lines: openai-python
takes them for empty events (openai-python#2722).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from typing import Any, Final

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from pace_nb.openai_api.response_body import error_body

DONE: Final = b"data: [DONE]\n\n"
RETRY_AFTER: Final = "1"  # seconds; openai-python waits that long before it tries again
EVENT_STREAM: Final = "text/event-stream; charset=utf-8"


def json_response(content: Any, status: int = 200) -> Response:
    """Plain data as a JSON answer. ValueError as in `as_json`."""
    return Response(as_json(content), status, media_type="application/json")


def json_around(content: Mapping[str, Any], name: str, items: Sequence[bytes]) -> Response:
    """The same, with these items, which are JSON already, as the list `name` of the object."""
    parts = [
        b"%b:%b" % (as_json(key), b"[%b]" % b",".join(items) if key == name else as_json(value))
        for key, value in content.items()
    ]
    return Response(b"{%b}" % b",".join(parts), media_type="application/json")


def error_response(error: Exception) -> Response:
    """The error object, with its status; see `error_body`."""
    body = error_body(error)
    status = body["error"]["code"]
    response = json_response(body, status)
    if status in (429, 503):
        response.headers["retry-after"] = RETRY_AFTER
    elif status == 401:
        response.headers["www-authenticate"] = "Bearer"
    elif status in (408, 413):  # the rest of the body is not read
        response.headers["connection"] = "close"
    return response


def event(content: Any) -> bytes:
    """One event. ValueError as in `as_json`."""
    return b"data: " + as_json(content) + b"\n\n"


def comment(text: str) -> bytes:
    """One line that clients skip."""
    return f": {text}\n\n".encode()


class EventStream(Response):
    """An answer in pieces, as `events` yields them.

    send_timeout: seconds that a client may leave a piece unread; then the connection is cut.
    close: called at the end, whatever that is.
    """

    def __init__(
        self, events: AsyncGenerator[bytes], send_timeout: float, close: Callable[[], None]
    ) -> None:
        super().__init__(
            headers={"cache-control": "no-cache", "x-accel-buffering": "no"},
            media_type=EVENT_STREAM,
        )
        del self.headers["content-length"]
        self._events = events
        self._send_timeout = send_timeout
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        try:
            async with aclosing(self._events):
                await send(start)
                async for data in self._events:
                    async with asyncio.timeout(self._send_timeout):
                        await send({"type": "http.response.body", "body": data, "more_body": True})
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            self._close()


def as_json(content: Any) -> bytes:
    """On one line: JSON escapes line ends. ValueError where it holds NaN or infinity."""
    return json.dumps(content, allow_nan=False, ensure_ascii=False, separators=(",", ":")).encode()
