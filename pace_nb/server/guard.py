"""`Guard`: what stands before every route. Who is this, is it a browser that was lured, is it JSON?

Knows HTTP headers. Does not know what routes do. Everything is refused that is not let through:

- a key, in `Authorization: Bearer`, for every path that is not in OPEN_PATHS, whether it exists or
  not; the web page's files may be read without one (docs/adr/0016). The path is the one that
  routing looks at (CVE-2026-48746), and digests are compared, all of them, in constant time
  (CVE-2025-59425);
- `Host` must be one of ours where only this machine can connect: a page whose name was pointed at
  127.0.0.1 says its own (DNS rebinding, CVE-2024-28224);
- `Origin`, which browsers add, must be ours or allowed, and a POST must be application/json, which
  a page elsewhere cannot send unasked;
- no encoded bodies: there is nothing to unpack, so there are no bombs; and none with two lengths.

It gives every request an id, catches what routes let fall (the client learns the id, the log the
rest), and writes the line about it. Text of requests is never written.
"""

from __future__ import annotations

import hashlib
import logging
import re
import secrets
import time
from collections.abc import Callable
from typing import Any, Final

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pace_nb.errors import ApiError
from pace_nb.server.answers import error_response
from pace_nb.server.page import PAGE_PATHS
from pace_nb.server.settings import Settings
from pace_nb.server.turns import Turns

_log = logging.getLogger("pace_nb.server.requests")

OPEN_PATHS: Final = frozenset({"/health", "/health/live", "/health/ready", "/ping"})
QUIET_PATHS: Final = OPEN_PATHS | {"/metrics"}  # asked every few seconds
REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._-]{1,128}", re.ASCII)
CLIENT_CLOSED: Final = 499  # nginx's, for the log: nobody was there to be answered


class Guard:
    """An ASGI app around another.

    observe: called with method, path and status of each request.
    turns: requests wait in it before they begin, but for those of OPEN_PATHS.
    """

    def __init__(
        self,
        app: ASGIApp,
        settings: Settings,
        observe: Callable[[str, str, int], None],
        turns: Turns,
    ) -> None:
        self._app = app
        self._turns = turns
        self._settings = settings
        self._observe = observe
        self._keys = [_digest(key.encode()) for key in settings.api_keys]
        self._hosts = settings.host_names
        self._origins = {origin.lower().rstrip("/") for origin in settings.allowed_origins}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await self._http(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008})

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        start = time.monotonic()
        if scope["path"] not in OPEN_PATHS:
            await self._turns.wait()
        headers = Headers(scope=scope)
        request_id = _request_id(headers)
        scope.setdefault("state", {})["request_id"] = request_id
        scope["state"]["arrival_time"] = start
        scope["state"]["client"] = self._client(scope, headers)
        status = CLIENT_CLOSED

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [
                    *message.get("headers", ()),
                    (b"x-request-id", request_id.encode()),
                ]
            await send(message)

        try:
            refused = self._refusal(scope, headers)
            if refused is None:
                await self._app(scope, receive, send_with_id)
            else:
                response = error_response(refused)
                if _has_two_lengths(headers):
                    response.headers["connection"] = "close"  # what follows may be a body
                await response(scope, receive, send_with_id)
        except Exception as error:
            if isinstance(error, TimeoutError) and status != CLIENT_CLOSED:
                _log.warning("%s: the client reads too slowly, it is cut off", request_id)
                return  # in the middle of an answer: the connection is closed
            _log.exception("request %s failed", request_id)
            if status == CLIENT_CLOSED:
                told = ApiError(
                    f"something went wrong here; the log knows more under {request_id}", status=500
                )
                await error_response(told)(scope, receive, send_with_id)
            else:
                raise  # the answer is under way: the connection is cut
        finally:
            self._observe(scope["method"], scope["path"], status)
            if self._settings.log_requests and scope["path"] not in QUIET_PATHS:
                _log.info(
                    "%s %s %d %.3f s id=%s",
                    scope["method"], scope["path"][:200], status, time.monotonic() - start,
                    request_id,
                )  # fmt: skip

    def _refusal(self, scope: Scope, headers: Headers) -> ApiError | None:
        most = self._settings.limits.max_header_bytes
        if _num_bytes(scope) > most:
            return ApiError(f"the headers have more than {most} bytes", status=431)
        if _has_two_lengths(headers):
            return ApiError("expected Content-Length or Transfer-Encoding, not both", status=400)
        host = headers.get("host", "").lower()
        if self._hosts and host and _name(host) not in self._hosts:
            return ApiError("this Host is not served here; see --allowed-hosts", status=403)
        origin = headers.get("origin")
        if origin is not None and not self._is_allowed(origin.lower(), host):
            return ApiError("this Origin may not ask here; see --allowed-origins", status=403)
        if self._keys and not self._is_open(scope) and not self._has_key(headers):
            return ApiError("a valid API key is needed: Authorization: Bearer KEY", status=401)
        if scope["method"] in ("POST", "PUT", "PATCH"):
            kind = headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind != "application/json":
                return ApiError("Content-Type must be application/json", status=415)
        encoding = headers.get("content-encoding", "identity").strip().lower()
        if encoding != "identity":
            return ApiError("Content-Encoding is not supported", status=415)
        return None

    def _is_open(self, scope: Scope) -> bool:
        path = scope["path"]
        reads_page = self._settings.web_page and scope["method"] in ("GET", "HEAD")
        return path in OPEN_PATHS or (reads_page and path in PAGE_PATHS)

    def _has_key(self, headers: Headers) -> bool:
        scheme, given = _credentials(headers)
        found = False
        for digest in self._keys:  # all of them, whichever is right
            found |= secrets.compare_digest(given, digest)
        return found and scheme.lower() == "bearer"

    def _client(self, scope: Scope, headers: Headers) -> bytes | str:
        """Whose request counts as whose: by key, or by address where there are no keys."""
        if self._keys:
            return _credentials(headers)[1]
        return scope["client"][0] if scope.get("client") else ""

    def _is_allowed(self, origin: str, host: str) -> bool:
        if "*" in self._origins or origin.rstrip("/") in self._origins:
            return True
        return bool(host) and origin.partition("://")[2] == host


def _num_bytes(scope: Scope) -> int:
    """Of a request's target and headers. h11 counts only those that it waits for the rest of."""
    target = len(scope["path"]) + len(scope.get("query_string", b""))
    return target + sum(len(name) + len(value) for name, value in scope["headers"])


def _has_two_lengths(headers: Headers) -> bool:
    """A proxy that goes by the other one would see the next request elsewhere (smuggling)."""
    return "transfer-encoding" in headers and "content-length" in headers


def _credentials(headers: Headers) -> tuple[str, bytes]:
    """The scheme of `Authorization`, and the digest of what follows it."""
    scheme, _, key = headers.get("authorization", "").partition(" ")
    return scheme, _digest(key.strip().encode("utf-8", "surrogateescape"))


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _name(host: str) -> str:
    """A Host header without its port."""
    if host.startswith("["):
        return host.partition("]")[0] + "]"
    return host.partition(":")[0]


def _request_id(headers: Headers) -> str:
    """The caller's own, where it is harmless; else a new one."""
    given = headers.get("x-request-id", "")
    return given if REQUEST_ID.fullmatch(given) else secrets.token_hex(16)


def request_id(scope: Any) -> str:
    """The id that the guard gave a request."""
    found: str = scope["state"]["request_id"]
    return found
