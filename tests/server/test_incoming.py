"""Bodies: too large, too slow, too deep, or no JSON, each with its status and none kept."""

from __future__ import annotations

import json
import time

import pytest

PATH = "/v1/completions"


def raw(server, head, body=b"", pause=0.0, pieces=()):
    """A request written by hand; the status line and the error's message."""
    one = server.connect()
    lines = [
        f"POST {PATH} HTTP/1.1", "Host: localhost", "Content-Type: application/json",
        "Authorization: Bearer secret", *head, "", "",
    ]  # fmt: skip
    one.sendall("\r\n".join(lines).encode() + body)
    for piece in pieces:
        time.sleep(pause)
        try:
            one.sendall(piece)
        except OSError:
            break
    data = b""
    try:
        while piece := one.recv(65536):
            data += piece
            if b"}}" in data:
                break
    except ConnectionError:
        pass
    one.close()
    status = int(data.split()[1]) if data else None
    return status, data.decode(errors="replace")


def test_S21_a_declared_length_is_refused_before_it_is_read(tight):
    start = time.monotonic()
    status, text = raw(tight, ["Content-Length: 20001"])
    assert status == 413 and "more than 20000 bytes" in text and "connection: close" in text
    assert time.monotonic() - start < 0.9  # it did not wait for the body


def test_S21_a_length_that_is_not_declared_is_counted(tight):
    chunk = b"400\r\n" + b" " * 1024 + b"\r\n"
    status, text = raw(tight, ["Transfer-Encoding: chunked"], chunk * 20)
    assert status == 413 and "more than 20000 bytes" in text


def test_S21_the_largest_body_that_fits(tight):
    body = json.dumps({"prompt": [5], "max_tokens": 1})
    reply = tight.post(PATH, body + " " * (20000 - len(body)))
    assert reply.status == 200


def test_S22_a_body_that_drips_is_cut_off(tight):
    start = time.monotonic()
    status, text = raw(tight, ["Content-Length: 100"], b"{", 0.3, [b" "] * 8)
    assert status == 408 and "took more than 1 s" in text
    assert time.monotonic() - start < 4


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b'"text"', b"null", b"\xff\xfe{}", b'{"prompt": "\xff"}',
        b'{"prompt": [5], "temperature": NaN}', b'{"prompt": [5], "top_p": Infinity}',
        b'{"prompt": [5], "temperature": -Infinity}', b'{"prompt": [5], "temperature": 1e400}',
        b'{"prompt": [5], "seed": ' + b"9" * 5000 + b"}",
        b"[" * 9000, b'{"a":' * 3000, b'{"prompt": [5], "x": ' + b"[" * 100 + b"]" * 100 + b"}",
    ],
)  # fmt: skip
def test_S19_S21_what_is_no_json_object_is_refused(tight, body):
    reply = tight.post(PATH, body)
    assert reply.status == 400 and reply.error["type"] == "BadRequestError"
    assert len(reply.error["message"]) < 300 and "\n" not in reply.error["message"]


def test_a_client_that_goes_while_it_sends_is_no_error(tight):
    one = tight.connect()
    one.sendall(
        f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer secret\r\n"
        "Content-Type: application/json\r\nContent-Length: 50\r\n\r\n{".encode()
    )
    one.close()
    tight.logged(rf"POST {PATH} 499")
