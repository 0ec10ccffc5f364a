"""Connections and signals of real servers: deadlines, floods, and how a server goes."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
import stat
import threading
import time
from types import SimpleNamespace

import pytest

from pace_nb.errors import ConfigError
from pace_nb.server import http_server
from pace_nb.server.settings import Settings

GET = b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n\r\n"


def closed_within(one, seconds):
    """Whether the other end closes; what it said first."""
    one.settimeout(seconds)
    data = b""
    try:
        while piece := one.recv(65536):
            data += piece
    except TimeoutError:
        return False, data
    except ConnectionError:
        pass
    return True, data


def test_it_says_where_it_serves_once_it_can_be_reached(caplog):
    settings = Settings(port=0)
    sockets = http_server.listen(settings)
    port = sockets[0].getsockname()[1]
    reached = []

    async def app(scope, receive, send): ...

    async def stop(): ...

    class Reader(logging.Handler):
        def emit(self, record):
            if " serves " in record.getMessage():
                socket.create_connection(("127.0.0.1", port)).close()
                reached.append(record.getMessage())
                server.should_exit = True

    async def serve():
        service.failed = asyncio.Event()
        await asyncio.wait_for(server.serve(sockets), 10)

    log, reader = logging.getLogger(http_server.__name__), Reader()
    log.addHandler(reader)
    try:
        service = SimpleNamespace(settings=settings, stop=stop)
        server = http_server.HttpServer(app, service)
        with caplog.at_level("INFO", log.name):
            asyncio.run(serve())
    finally:
        log.removeHandler(reader)
    name = settings.served_model_names[0]
    assert reached == [f"http://127.0.0.1:{port} serves {name} (this machine only, no API key)"]


# ---- connections -------------------------------------------------------------------------------
def test_S20_headers_are_bounded(tight):
    for head in (
        b"GET /health/live HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 10_000,
        b"GET /" + b"a" * 10_000,
        b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 2000,
    ):
        one = tight.connect()
        one.sendall(head)
        closed, data = closed_within(one, 5)
        one.close()
        assert closed and data.startswith(b"HTTP/1.1 400")
    assert tight.get("/health/live").status == 200
    for path, headers in (  # small enough to come at once, with their end
        ("/health/live", {"X": "a" * 4100}),
        ("/health/live", {f"X-{i}": "yy" for i in range(800)}),
        ("/" + "a" * 4100, {}),
        ("/health/live?" + "a" * 4100, {}),
    ):
        reply = tight.request("GET", path, headers=headers)
        assert reply.status == 431 and reply.error["type"] == "BadRequestError"
        assert reply.error["message"] == "the headers have more than 4000 bytes"


def test_many_that_connect_at_once_are_all_answered(tight):
    """A few are accepted in a turn of the loop; the others wait in the kernel, not in vain."""
    os.kill(tight.process.pid, signal.SIGSTOP)
    try:
        crowd = [socket.create_connection((tight.host, tight.port), 10) for _ in range(35)]
        for one in crowd:
            one.sendall(GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
    finally:
        os.kill(tight.process.pid, signal.SIGCONT)
    for one in crowd:
        closed, data = closed_within(one, 10)
        one.close()
        assert closed and data.startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    "data",
    [
        b"\r\n\r\n", b"GET\r\n\r\n", b"\x16\x03\x01\x02\x00\n\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n\r\n",
    ],
)  # fmt: skip
def test_S20_what_is_no_http_is_cut_off(tight, data):
    one = tight.connect()
    one.sendall(data)
    closed, answer = closed_within(one, 5)
    one.close()
    assert closed and (not answer or answer.split()[1] in (b"400", b"401", b"403"))
    assert tight.get("/health/live").status == 200


def test_S22_headers_that_drip_are_cut_off(tight):
    silent, dripping = tight.connect(), tight.connect()
    start = time.monotonic()
    for byte in GET[:8]:
        try:
            dripping.sendall(bytes([byte]))
        except OSError:
            break
        time.sleep(0.25)
    for one in (silent, dripping):
        closed, data = closed_within(one, 3)
        assert closed and not data
        one.close()
    assert 1 < time.monotonic() - start < 5


def test_S22_a_second_request_has_the_same_deadline(tight):
    one = tight.connect()
    one.sendall(GET)
    assert b"200 OK" in one.recv(65536)
    time.sleep(1.5)  # between requests a connection may be silent for longer
    one.sendall(GET[:10])
    closed, _ = closed_within(one, 4)
    one.close()
    assert closed


def test_R15_idle_connections_make_room_for_new_ones(tight):
    idle = []
    for _ in range(60):  # 40 are allowed
        one = tight.connect()
        one.sendall(GET)
        assert b" 200 " in one.recv(65536)
        idle.append(one)
    gone = [closed_within(one, 0.01)[0] for one in idle]
    for one in idle:
        one.close()
    assert gone[:20] == [True] * 20 and not any(gone[21:])  # the longest idle went first


def test_R15_when_all_are_busy_a_new_one_is_refused(tight):
    busy = []
    for _ in range(40):
        one = tight.connect()
        one.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer secret\r\n"
            b"Content-Type: application/json\r\nContent-Length: 9\r\n\r\n"
        )
        busy.append(one)
    time.sleep(0.1)  # they send their bodies within a second
    start = time.monotonic()
    reply = tight.get("/health/live")
    assert time.monotonic() - start < 0.5
    assert (reply.status, reply.headers["retry-after"]) == (503, "1")
    assert "too many connections" in reply.error["message"]
    for one in busy:
        one.close()


def test_R14_a_slow_reader_costs_the_others_nothing(tight, server, waiting):
    """`tight` gives up after a second without a read; meanwhile the rest goes on."""
    one = socket.socket()
    one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
    one.connect((tight.host, tight.port))
    body = json.dumps(
        {"prompt": "a", "max_tokens": 1000, "ignore_eos": True, "stream": True, "logprobs": 20}
    )
    one.sendall(
        f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer secret\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()
    )
    tight.logged("the client reads too slowly", 30)
    tight.idle()
    closed, data = closed_within(one, 10)
    one.close()
    assert closed and b"[DONE]" not in data


# ---- signals -----------------------------------------------------------------------------------
def stream_in_thread(server, events, **body):
    def read():
        events.append(server.events(**body))

    thread = threading.Thread(target=read)
    thread.start()
    return thread


def test_R20_what_runs_may_finish(start, waiting):
    server = start().ready()
    events = []
    reading = stream_in_thread(server, events, max_tokens=300, ignore_eos=True)
    waiting(lambda: server.metric("num_requests_running") == 1, 5)
    kept = server.connection()
    kept.request("GET", "/health/ready")
    kept.getresponse().read()
    (engine,) = server.engine_pids()
    server.process.send_signal(signal.SIGTERM)
    server.logged("shutting down: 1 requests have 30 s")
    with pytest.raises(OSError):
        for _ in range(100):
            server.connect().close()
            time.sleep(0.02)
    kept.close()
    assert server.process.wait(30) == 0
    reading.join()
    assert events[0][-1] == "[DONE]" and len(events[0]) > 100
    assert json.loads(events[0][-2])["choices"][0]["finish_reason"] == "length"
    with pytest.raises(ProcessLookupError):
        os.kill(engine, 0)


def test_R21_what_takes_longer_is_told_and_the_end_is_clean(start, waiting):
    server = start("--shutdown-timeout", "0.3", "--max-num-seqs", "1").ready()
    events = []
    threads = [stream_in_thread(server, events, max_tokens=1000, ignore_eos=True) for _ in range(3)]
    waiting(lambda: server.metric("num_requests_waiting") == 2, 5)
    began = time.monotonic()
    assert server.stop() == 0
    assert time.monotonic() - began < 5
    for thread in threads:
        thread.join()
    for one in events:
        assert one[-1] == "[DONE]"
        assert "shutting down" in json.loads(one[-2])["error"]["message"]


def test_R21_a_second_signal_ends_it_at_once(start, waiting):
    server = start().ready()
    connection, response = server.open_stream(max_tokens=1000, ignore_eos=True, n=8)
    assert response.read(6) == b"data: "
    server.process.send_signal(signal.SIGINT)
    server.logged("shutting down")
    began = time.monotonic()
    assert server.stop(signal.SIGINT) == 1
    assert time.monotonic() - began < 3
    response.close()
    connection.close()


def test_R20_R22_R27_a_server_that_is_still_loading(start):
    server = start().listening()
    reply = server.get("/health")
    assert reply.status == 503
    assert reply.json() == {
        "error": {"code": 503, "message": "Loading model", "type": "unavailable_error"}
    }
    assert server.get("/health/live").status == 200
    refused = server.complete()
    assert refused.status == 503 and refused.headers["retry-after"] == "1"
    began = time.monotonic()
    assert server.stop() == 0
    assert time.monotonic() - began < 4
    assert not server.engine_pids()


# ---- sockets -----------------------------------------------------------------------------------
def test_S38_a_unix_socket_is_for_this_user_only(start, tmp_path):
    path = tmp_path / "socket"
    server = start("--uds", str(path)).ready()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert server.complete(max_tokens=1).status == 200
    with pytest.raises(ConfigError, match="in use"):
        http_server.listen(Settings(uds=str(path)))
    assert server.stop() == 0
    assert not path.exists()


def test_a_socket_that_a_dead_server_left_is_replaced(tmp_path):
    path = tmp_path / "socket"
    left = socket.socket(socket.AF_UNIX)
    left.bind(str(path))
    left.close()
    (one,) = http_server.listen(Settings(uds=str(path)))
    assert http_server.url([one]) == f"unix:{path}"
    one.close()
    path.unlink()
    path.write_text("a file")
    with pytest.raises(ConfigError, match="cannot listen on"):
        http_server.listen(Settings(uds=str(path)))
    assert path.read_text() == "a file"


def test_addresses():
    (one,) = http_server.listen(Settings(port=0))
    address = one.getsockname()
    assert http_server.url([one]) == f"http://127.0.0.1:{address[1]}"
    one.listen()
    with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1 port {address[1]}"):
        http_server.listen(Settings(port=address[1]))
    one.close()
    with pytest.raises(ConfigError, match="cannot listen on no-such-host"):
        http_server.listen(Settings(host="no-such-host.invalid", insecure_no_auth=True))
