"""Answers byte by byte from a server of a few lines, then from the real one."""

from __future__ import annotations

import asyncio
import json

import pytest

from pace_nb.benchmarks.openai_client import OpenAIClient, events
from pace_nb.errors import ConfigError, PaceError


def chunk(data):
    return b"%x\r\n%b\r\n" % (len(data), data)


def event(content):
    return b"data: " + json.dumps(content).encode() + b"\n\n"


HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
END = b"0\r\n\r\n"
USAGE = {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 3}}
TOKENS = [{"choices": [{"text": text}]} for text in ("a", "", "bc")]


def served(pieces, use, requests=None):
    """`use(client)` against a server that answers each request with `pieces`; a number is a pause,
    None the end of the connection."""

    async def handle(reader, writer):
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0] or 0)
                body = await reader.readexactly(length)
                if requests is not None:
                    requests.append((id(writer), head, body))
                for piece in pieces:
                    if piece is None:
                        return
                    if isinstance(piece, bytes):
                        writer.write(piece)
                    else:
                        await asyncio.sleep(piece)
        except (asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    async def main():
        server = await asyncio.start_server(handle, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        url = f"http://127.0.0.1:{port}/base/"
        try:
            async with OpenAIClient(url, {"X-Mine": "yes"}) as client:
                return await use(client)
        finally:
            server.close()

    return asyncio.run(main())


async def ask(client):
    return await client.ask("/v1/completions", {"prompt": "x"}, 4, "id-1")


def test_times_of_a_stream():
    pieces = [HEAD, chunk(b": keepalive 1/2\n\n"), 0.1, chunk(event(TOKENS[0])), 0.2,
              chunk(event(TOKENS[1]) + event(TOKENS[2])[:9]), 0.1, chunk(event(TOKENS[2])[9:]),
              0.3, chunk(event(USAGE) + b"data: [DONE]\n\n"), END]  # fmt: skip
    answer = served(pieces, ask)
    assert answer.success and answer.generated_text == "abc"
    assert (answer.prompt_len, answer.output_tokens) == (5, 3)
    assert 0.09 < answer.ttft < 0.19
    assert 0.19 < answer.itl[0] < 0.3 and 0.09 < answer.itl[1] < 0.19 and len(answer.itl) == 2
    assert answer.latency == pytest.approx(answer.ttft + sum(answer.itl))  # the usage is no token


def test_a_chats_words_are_in_its_deltas():
    deltas = [{"role": "assistant", "content": ""}, {"content": "He"}, {"content": "y"}, {}]
    pieces = [HEAD, *(chunk(event({"choices": [{"delta": one}]})) for one in deltas), END]
    answer = served(pieces, ask)
    assert answer.generated_text == "Hey" and len(answer.itl) == 3 and answer.output_tokens == 0


@pytest.mark.parametrize(
    "pieces, error",
    [
        ([HEAD, chunk(event(TOKENS[0])), chunk(event({"error": {"message": "gone"}})),
          END], "gone"),
        ([HEAD, chunk(event({"error": "odd"})), END], "odd"),
        ([HEAD, chunk(event(USAGE)), END], "the stream had no token"),
        ([HEAD, chunk(event(TOKENS[0])), None], "IncompleteReadError"),
        ([HEAD, chunk(b"data: {]\n\n"), END], "JSONDecodeError"),
        ([HEAD, b"xyz\r\n", END], "ValueError"),
        ([b"what\r\n\r\n"], "ValueError"),
        ([None], "IncompleteReadError"),
        ([b"HTTP/1.1 503 Busy\r\nContent-Length: 39\r\n\r\n",
          b'{"error": {"message": "full, \\n wait"}}'], "503 Busy: full, wait"),
        ([b"HTTP/1.1 404 Not Found\r\n\r\nnothing here", None], "404 Not Found: nothing here"),
    ],
)  # fmt: skip
def test_what_goes_wrong_is_the_answers_error(pieces, error):
    answer = served(pieces, ask)
    assert not answer.success and answer.error.startswith(error)


def test_connections_are_used_again_and_replaced():
    pieces = [HEAD, chunk(event(TOKENS[0])), END]
    requests = []

    async def twice(client):
        return [await ask(client), await ask(client), *await asyncio.gather(*[ask(client)] * 1)]

    assert all(one.success for one in served(pieces, twice, requests))
    assert len({connection for connection, _, _ in requests}) == 1
    head, body = requests[0][1].decode(), json.loads(requests[0][2])
    assert head.startswith("POST /base/v1/completions HTTP/1.1\r\nHost: 127.0.0.1:")
    assert (
        "X-Mine: yes\r\n" in head and "x-request-id: id-1\r\n" in head and body == {"prompt": "x"}
    )
    requests.clear()

    async def with_a_pause(client):
        first = await ask(client)
        await asyncio.sleep(0.1)  # meanwhile the server ends the connection
        return [first, await ask(client)]

    assert all(one.success for one in served([*pieces, None], with_a_pause, requests))
    assert len(requests) == 2


def test_plain_gets_and_posts():
    body = b'{"tokens": [1, 2]}'
    head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body)
    assert served([head + body], lambda client: client.get("/x")) == body
    assert served([head, 0.05, body], lambda client: client.post("/x", {}))["tokens"] == [1, 2]
    assert served([b"HTTP/1.1 200 OK\r\n\r\nall", None], lambda client: client.get("/x")) == b"all"
    with pytest.raises(PaceError, match="/base/x: 500 Oops"):
        served([b"HTTP/1.1 500 Oops\r\nContent-Length: 0\r\n\r\n"], lambda c: c.get("/x"))
    with pytest.raises(PaceError, match="cannot be reached"):
        asyncio.run(OpenAIClient("http://127.0.0.1:1").get("/x"))


@pytest.mark.parametrize("url", ["", "localhost:8000", "ftp://a", "http://", "http://a:x"])
def test_an_address_is_judged_first(url):
    with pytest.raises(ConfigError, match=r"such as http://127\.0\.0\.1:8000"):
        OpenAIClient(url)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_events_at_every_cut(size):
    text = ': hi\r\n\r\ndata: {"a": "é"}\n\ndata:one\ndata: two\r\n\r\nevent: x\n'.encode()
    text += b"data: 3\n\ndata: cut"

    async def cut():
        for start in range(0, len(text), size):
            yield text[start : start + size]

    async def main():
        return [data async for data in events(cut())]

    assert asyncio.run(main()) == ['{"a": "é"}', "one\ntwo", "3"]


def test_the_real_server(server):
    url = f"http://{server.host}:{server.port}"
    body = {"prompt": "Once", "max_tokens": 6, "ignore_eos": True, "stream": True, "temperature": 0,
            "stream_options": {"include_usage": True}}  # fmt: skip

    async def main():
        async with OpenAIClient(url) as client:
            answers = await asyncio.gather(
                *(client.ask("/v1/completions", body, 1, str(i)) for i in range(3))
            )
            return answers, await client.ask("/v1/completions", {**body, "max_tokens": -1}, 1, "x")

    answers, refused = asyncio.run(main())
    whole = server.complete("Once", max_tokens=6, ignore_eos=True).json()
    for one in answers:
        assert one.success and one.output_tokens == 6
        assert one.prompt_len == whole["usage"]["prompt_tokens"]
        assert one.generated_text == whole["choices"][0]["text"]
        assert 0 < one.ttft < one.latency
    assert refused.error.startswith("400 Bad Request: max_tokens")
