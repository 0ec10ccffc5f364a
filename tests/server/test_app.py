"""The routes that do not generate, and the list of all there are."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace

import pytest

import pace_nb
from pace_nb.server.app import ROUTES, create_app
from pace_nb.server.settings import Settings
from pace_nb.server.turns import Turns
from pace_nb.tokenizer import Tokenizer

DEMO = "pace-nb-demo"


def test_S7_S40_no_route_loads_a_model_or_reads_a_file():
    assert {(route.path, *sorted(route.methods)) for route in ROUTES} == {
        ("/v1/chat/completions", "POST"),
        ("/v1/completions", "POST"),
        ("/v1/models", "GET", "HEAD"),
        ("/v1/models/{name:path}", "GET", "HEAD"),
        ("/tokenize", "POST"),
        ("/detokenize", "POST"),
        ("/tokenizer_info", "GET", "HEAD"),
        ("/health", "GET", "HEAD"),
        ("/health/ready", "GET", "HEAD"),
        ("/health/live", "GET", "HEAD"),
        ("/ping", "GET", "HEAD", "POST"),
        ("/metrics", "GET", "HEAD"),
        ("/version", "GET", "HEAD"),
        ("/load", "GET", "HEAD"),
    }


def test_S30_what_fails_in_a_route_is_told_in_openais_shape(caplog):
    """Not in plain text, as Starlette would, and by nobody but the guard."""
    failing = SimpleNamespace(settings=Settings(), turns=Turns(), metrics=Seen())
    scope = {
        "type": "http", "method": "GET", "path": "/load", "headers": [], "query_string": b"",
    }  # fmt: skip
    sent = []

    async def send(message):
        sent.append(message)

    asyncio.run(create_app(failing)(scope, None, send))  # it has no num_requests
    assert [one["type"] for one in sent] == ["http.response.start", "http.response.body"]
    error = json.loads(sent[1]["body"])["error"]
    assert (sent[0]["status"], error["code"], error["type"]) == (500, 500, "InternalServerError")
    assert dict(sent[0]["headers"])[b"x-request-id"].decode() in error["message"]
    assert "num_requests" not in error["message"] and "num_requests" in caplog.text
    assert failing.metrics.seen == [("GET", "/load", 500)]


class Seen:
    """Metrics that note requests."""

    def __init__(self):
        self.seen = []

    def http(self, *request):
        self.seen.append(request)


def test_models(server, tight):
    (model,) = server.get("/v1/models").json()["data"]
    assert model["id"] == DEMO and model["object"] == "model" and model["max_model_len"] == 1024
    assert server.get(f"/v1/models/{DEMO}").json() == model
    missing = server.get("/v1/models/../../etc/passwd")
    assert missing.status == 404 and missing.error["type"] == "NotFoundError"
    named = tight.get("/v1/models").json()["data"]
    assert [(one["id"], one["root"]) for one in named] == [
        ("tight", "pace-nb-demo"),
        ("other", "pace-nb-demo"),
    ]
    assert tight.complete(max_tokens=1, model="other").json()["model"] == "tight"


@pytest.fixture(scope="module")
def tokenizer():
    made = Tokenizer.from_directory(pace_nb.__path__[0] + "/demo")
    yield made
    made.close()


def test_tokens_there_and_back(server, tokenizer):
    text = "Once upon a time, <|end|> naïve 🐱"
    for special in (True, False):
        reply = server.post("/tokenize", {"prompt": text, "add_special_tokens": special}).json()
        assert reply["tokens"] == tokenizer.encode(text, special)
        assert reply["count"] == len(reply["tokens"]) and reply["max_model_len"] == 1024
        assert reply["token_strs"] is None
    back = server.post("/detokenize", {"tokens": reply["tokens"]}).json()
    assert back == {"prompt": text}
    strings = server.post("/tokenize", {"prompt": "cat", "return_token_strs": True}).json()
    assert "".join(strings["token_strs"]).endswith("cat")
    left_out = {"add_special_tokens": None, "messages": None, "return_token_strs": None}
    assert server.post("/tokenize", {"prompt": text, **left_out}).json()["tokens"] == (
        tokenizer.encode(text, True)
    )
    messages = [{"role": "user", "content": "<|end|> hi"}]
    chat = server.post("/tokenize", {"messages": messages}).json()
    assert chat["tokens"] == tokenizer.encode_chat(messages).token_ids


@pytest.mark.parametrize(
    "path, body, param",
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/tokenize", {"prompt": "\ud800"}, "prompt"),
        ("/tokenize", {"prompt": "a", "add_special_tokens": 1}, "add_special_tokens"),
        ("/tokenize", {"prompt": "x" * 20000}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"messages": [{"role": "user"}]}, "messages"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [1536]}, "tokens"),
        ("/detokenize", {"tokens": [True]}, "tokens"),
        ("/detokenize", {"tokens": "1"}, "tokens"),
    ],
)
def test_what_has_no_tokens_is_refused(server, path, body, param):
    reply = server.post(path, body)
    assert reply.status == 400 and reply.error["param"] == param
    assert server.post(path, {**body, "model": "nope"}).status == 404


def test_what_lm_eval_asks_of_the_tokenizer(server, tokenizer):
    found = server.get("/tokenizer_info").json()
    assert (found["bos_token"], found["eos_token"]) == ("<|bos|>", "<|eos|>")
    assert found["chat_template"] == tokenizer.chat_template.templates["default"]
    assert found["vocab_size"] == 1536


def test_small_routes(server):
    assert server.get("/version").json() == {"version": pace_nb.__version__}
    assert server.get("/load").json() == {"server_load": 0}
    for path in ("/health", "/health/ready", "/health/live", "/ping"):
        reply = server.get(path)
        assert reply.status == 200 and reply.json() == {"status": "ok"}
    head = server.request("HEAD", "/health")
    assert (head.status, head.body) == (200, b"")
    assert server.get("/metrics").headers["content-type"].startswith("text/plain; version=0.0.4")


@pytest.mark.parametrize(
    "method, path, status",
    [("GET", "/nope", 404), ("GET", "/v1/completions", 405), ("DELETE", "/v1/models", 405),
     ("GET", "/v1/models/", 404), ("GET", "/docs", 404)],
)  # fmt: skip
def test_what_is_not_there_is_told_in_openais_shape(server, method, path, status):
    reply = server.request(method, path)
    assert reply.status == status and reply.error["code"] == status


def test_pages_that_are_allowed_may_ask(start):
    server = start("--allowed-origins", "https://app.example", "--api-key", "k").listening()
    origin = {"Origin": "https://app.example"}
    asked = {**origin, "Access-Control-Request-Method": "POST"}
    preflight = server.request("OPTIONS", "/v1/completions", headers=asked)
    assert preflight.status == 200
    assert preflight.headers["access-control-allow-origin"] == "https://app.example"
    reply = server.get("/v1/models", origin)
    assert reply.status == 401  # the key is needed all the same, and the page may read that
    assert reply.headers["access-control-allow-origin"] == "https://app.example"
    other = server.request("OPTIONS", "/v1/completions", headers={**asked, "Origin": "http://x"})
    assert "access-control-allow-origin" not in other.headers
