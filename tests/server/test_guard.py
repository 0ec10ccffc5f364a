"""Default deny: every path, method and disguise without a key is turned away, and nothing leaks."""

from __future__ import annotations

import asyncio
import itertools
import logging

import pytest

from pace_nb.server.guard import Guard
from pace_nb.server.page import PAGE_PATHS
from pace_nb.server.settings import Settings
from pace_nb.server.turns import Turns

JSON = (b"content-type", b"application/json")


def ask(settings, *headers, path="/v1/models", method="GET", app=None, observe=lambda *_: None):
    """(status, headers, body) of one request through a guard; the app behind it says 200."""
    sent = []

    async def behind(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": scope["state"]["request_id"].encode()})

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": method, "path": path, "headers": list(headers)}
    asyncio.run(Guard(app or behind, settings, observe, Turns())(scope, receive, send))
    body = b"".join(one.get("body", b"") for one in sent)
    return sent[0]["status"], dict(sent[0]["headers"]), body


KEYS = Settings(api_keys=("one", "two"))


@pytest.mark.parametrize(
    "header, status",
    [
        (b"Bearer one", 200),
        (b"Bearer two", 200),
        (b"bearer one", 200),
        (b"Bearer  one ", 200),
        (b"", 401),
        (b"one", 401),
        (b"Basic one", 401),
        (b"Bearer", 401),
        (b"Bearer onetwo", 401),
        (b"Bearer on", 401),
        (b"Bearer \xff\xfe", 401),
        (b"Bearer one two", 401),
    ],
)
def test_S31_keys(header, status):
    assert ask(KEYS, (b"authorization", header))[0] == status


def test_S31_every_key_is_compared_whichever_is_right(monkeypatch):
    from pace_nb.server import guard

    compared = []
    real = guard.secrets.compare_digest
    monkeypatch.setattr(
        guard.secrets, "compare_digest", lambda a, b: compared.append(len(b)) or real(a, b)
    )
    for key in (b"one", b"two", b"wrong and of another length"):
        ask(KEYS, (b"authorization", b"Bearer " + key))
    assert compared == [32] * 6


def test_R13_clients_are_told_apart_by_key_or_else_by_address():
    seen = []

    async def behind(scope, receive, send):
        seen.append(scope["state"]["client"])
        await send({"type": "http.response.start", "status": 200, "headers": []})

    for key in (b"one", b"two", b"one"):
        ask(KEYS, (b"authorization", b"Bearer " + key), app=behind)
    assert seen[0] == seen[2] != seen[1] and b"one" not in seen[0]
    ask(Settings(), app=behind)
    assert seen[-1] == ""  # a Unix socket has no addresses


PATHS = [
    "/v1/models", "/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize",
    "/tokenizer_info", "/metrics", "/version", "/load", "/docs", "/nope", "//", "/static",
    "/static/", "/static/../v1/models", "/static/page.css/", "/static/%2e%2e/guard.py",
    "/V1/models", "//v1/models", "/v1//models", "/v1/models/", "/v1/../v1/models",
    "/health/../v1/models", "/health/", "/HEALTH", "/health/live/x", "/health;x", "/health%2f",
]  # fmt: skip


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "OPTIONS", "PUT", "DELETE", "TRACE"])
def test_S32_without_a_key_nothing_is_reached(method):
    async def reached(scope, receive, send):
        pytest.fail(f"{method} {scope['path']} was let through")

    hosts = [b"x/../health", b"localhost", b"localhost:8000/health?", b""]
    for path, host in itertools.product(PATHS, hosts):
        status, _, body = ask(
            Settings(api_keys=("k",), host="0.0.0.0"),
            (b"host", host), JSON, path=path, method=method, app=reached,
        )  # fmt: skip
        assert status == 401 and b"pace" not in body


def test_S32_health_needs_no_key():
    for path in ("/health", "/health/live", "/health/ready", "/ping"):
        assert ask(KEYS, path=path)[0] == 200


def test_S32_the_pages_files_may_be_read_without_a_key_and_nothing_else():
    """docs/adr/0016"""
    off = Settings(api_keys=("k",), web_page=False)
    for path in PAGE_PATHS:
        for method, status in [("GET", 200), ("HEAD", 200), ("POST", 401), ("OPTIONS", 401)]:
            assert ask(KEYS, JSON, path=path, method=method)[0] == status
            assert ask(off, JSON, path=path, method=method)[0] == 401
    assert ask(Settings(api_keys=("k",)), (b"host", b"evil.com"), path="/")[0] == 403


def test_S32_websockets_are_closed():
    sent = []

    async def send(message):
        sent.append(message)

    guard = Guard(None, KEYS, None, Turns())
    asyncio.run(guard({"type": "websocket", "path": "/health"}, None, send))
    assert sent == [{"type": "websocket.close", "code": 1008}]


def test_health_does_not_stand_in_line():
    turns, asked = Turns(at_once=1), []

    async def behind(scope, receive, send):
        asked.append(scope["path"])
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(message): ...

    async def main():
        guard = Guard(behind, Settings(), lambda *_: None, turns)
        paths = ["/v1/models", "/tokenize", "/metrics", "/health/live"]
        scopes = [{"type": "http", "method": "GET", "path": path, "headers": []} for path in paths]
        await asyncio.gather(*(guard(scope, None, send) for scope in scopes))

    asyncio.run(main())
    assert asked == ["/health/live", "/v1/models", "/tokenize", "/metrics"]


def test_S32_the_real_server_in_disguises(tight):
    """The same through uvicorn, which decodes paths, and Starlette, which routes them."""
    paths = [
        "/v1/models", "//v1/models", "/%761/models", "/v1/models%2f", "/v1/models?/health",
        "/health%2f..%2fv1/models", "/nope", "/metrics",
    ]  # fmt: skip
    for path in paths:
        for headers in ({}, {"Host": "localhost"}, {"X-Forwarded-Prefix": "/health"}):
            reply = tight.request("GET", path, headers={"Authorization": "Bearer no", **headers})
            assert reply.status == 401, path
            assert reply.error["type"] == "AuthenticationError"
    for key in ("secret", "other-secret", "third-secret"):
        reply = tight.get("/v1/models", {"Authorization": f"Bearer {key}"})
        assert reply.status == 200
    assert tight.get("/health", {"Authorization": "Bearer no"}).status == 200


@pytest.mark.parametrize(
    "host, status",
    [
        (b"localhost", 200), (b"LOCALHOST:8000", 200), (b"127.0.0.1:1", 200), (b"[::1]:8000", 200),
        (b"evil.com", 403), (b"evil.com:8000", 403), (b"localhost.evil.com", 403),
        (b"127.0.0.1.nip.io", 403), (b"localhost@evil.com", 403), (b"", 200),
    ],
)  # fmt: skip
def test_S33_a_name_that_is_not_ours_is_turned_away(host, status):
    assert ask(Settings(), (b"host", host))[0] == status


def test_S33_hosts_can_be_allowed_and_a_request_without_one_is_no_page():
    assert ask(Settings(allowed_hosts=("box.lan",)), (b"host", b"box.lan:80"))[0] == 200
    assert ask(Settings())[0] == 200


@pytest.mark.parametrize(
    "origin, status",
    [
        (b"http://localhost:8000", 200), (b"http://evil.com", 403), (b"null", 403), (b"", 403),
        (b"http://localhost:9000", 403), (b"http://localhost:8000.evil.com", 403),
        (b"https://app.example", 200), (b"https://app.example.evil.com", 403),
    ],
)  # fmt: skip
def test_S33_pages_elsewhere_may_not_ask(origin, status):
    settings = Settings(allowed_origins=("https://app.example/",))
    assert ask(settings, (b"host", b"localhost:8000"), (b"origin", origin))[0] == status


def test_S33_a_post_must_be_json(server):
    for kind, status in [
        (b"application/json", 200), (b"application/json; charset=utf-8", 200),
        (b"APPLICATION/JSON", 200), (b"text/plain", 415), (b"", 415),
        (b"application/x-www-form-urlencoded", 415), (b"multipart/form-data; boundary=x", 415),
        (b"text/plain; application/json", 415),
    ]:  # fmt: skip
        assert ask(Settings(), (b"content-type", kind), method="POST")[0] == status, kind
    assert "access-control-allow-origin" not in server.get("/v1/models").headers
    reply = server.request("OPTIONS", "/v1/models", headers={"Origin": "http://evil.com"})
    assert reply.status == 403


def test_S15_encoded_bodies_are_not_unpacked(server):
    for encoding in ("gzip", "br", "identity, gzip", "zstd"):
        reply = server.post("/v1/completions", b"x", {"Content-Encoding": encoding})
        assert (reply.status, reply.error["code"]) == (415, 415)


@pytest.mark.parametrize("given", ["abc-1.2_X", "a" * 128])
def test_S30_a_harmless_request_id_is_kept(server, given):
    assert ask(Settings(), (b"x-request-id", given.encode()))[2].decode() == given
    reply = server.complete(max_tokens=1)
    assert reply.json()["id"] == f"cmpl-{reply.headers['x-request-id']}"
    reply = server.post("/v1/completions", {"prompt": "a"}, {"X-Request-Id": given})
    assert reply.headers["x-request-id"] == given and reply.json()["id"] == f"cmpl-{given}"


@pytest.mark.parametrize("given", [b"", b"a" * 129, b"a b", b"a\x1b[0m", b"\xe9", b"../x", b"a\r"])
def test_S30_any_other_request_id_is_replaced(given):
    _, headers, body = ask(Settings(), (b"x-request-id", given))
    assert body.isalnum() and len(body) == 32 and headers[b"x-request-id"] == body


def test_S30_what_fails_inside_is_told_to_the_log_only(caplog):
    async def failing(scope, receive, send):
        raise RuntimeError("0x7f00 /etc/secret")

    seen = []
    status, headers, body = ask(Settings(), app=failing, observe=lambda *a: seen.append(a))
    assert status == 500 and headers[b"x-request-id"] in body
    assert b"secret" not in body and b"0x7f" not in body
    assert "0x7f00 /etc/secret" in caplog.text
    assert seen == [("GET", "/v1/models", 500)]


def test_a_failure_in_the_middle_of_an_answer_cuts_it(caplog):
    async def failing(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise RuntimeError("half-way")

    with pytest.raises(RuntimeError):
        ask(Settings(), app=failing)
    assert "half-way" in caplog.text


def test_lines_of_the_log(caplog):
    caplog.set_level(logging.INFO)
    ask(Settings(), path="/v1/models\nforged")
    ask(Settings(), path="/health")
    ask(Settings(log_requests=False))
    (line,) = [one for one in caplog.records if one.name == "pace_nb.server.requests"]
    assert line.args[:3] == ("GET", "/v1/models\nforged", 200)  # written out by the formatter


def test_S30_prompts_are_not_in_the_log_or_the_metrics(server):
    canary = "zebra-canary-7731"
    server.complete(canary, max_tokens=2)
    server.post("/v1/chat/completions", {"messages": [{"role": "user", "content": canary}], "n": 0})
    server.complete(canary, temperature=-1)
    server.complete(canary, max_tokens=10**6)
    server.get(f"/{canary}")
    assert canary not in server.log().replace(f"GET /{canary} 404", "")
    assert canary not in server.get("/metrics").body.decode()


def test_S20_a_body_has_one_length(server):
    """With two, a proxy before us and we may disagree about where the next request begins."""
    body = b'{"prompt": "x", "max_tokens": 1}'
    hidden = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n"
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    chunked = b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    for lengths in (b"Content-Length: 4\r\n" + chunked, b"Content-Length: 4\r\nX: y\r\n" + chunked):
        with server.connect() as one:
            one.sendall(head + lengths + hidden)
            answer = b"".join(iter(lambda one=one: one.recv(65536), b""))
        assert answer.startswith(b"HTTP/1.1 400") and answer.count(b"HTTP/1.1") == 1
        assert b"not both" in answer
    with server.connect() as one:
        one.sendall(head + b"Connection: close\r\n" + chunked)
        assert b"".join(iter(lambda: one.recv(65536), b"")).startswith(b"HTTP/1.1 200")
