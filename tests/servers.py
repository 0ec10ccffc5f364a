"""Real servers on the bundled model: `pace-nb serve` in a process, spoken to over sockets."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

READY_SECONDS = 300  # the first run of a checkout compiles the kernels
ONE_CPU = ["--threads", "1"]
TIGHT = """
    --max-num-seqs 1 --max-num-queued-reqs 2 --max-num-batched-tokens 16 --max-body-bytes 20000
    --max-header-bytes 4000 --header-timeout 1 --body-timeout 1 --send-timeout 1 --queue-timeout 1
    --sse-ping-interval 0.05 --limit-concurrency 40 --served-model-name tight other
    --api-key secret --api-key other-secret
"""
SLOW = """
    --kernels reference --max-num-seqs 4 --max-num-batched-tokens 16 --sse-ping-interval 0.05
"""
DRAFTING = '--speculative-config {"method":"pard","num_speculative_tokens":6,"adaptive":false}'
SHARED = {  # name -> arguments, environment, the key that requests bring
    "server": ("", {}, None),
    "tight": (TIGHT, {"PACE_NB_API_KEY": "third-secret"}, "secret"),
    "slow": (SLOW, {}, None),
    "drafting": (f"{DRAFTING} --metrics-prefix vllm", {}, None),
}


class Reply:
    """An answer that was read whole."""

    def __init__(self, response):
        self.status = response.status
        self.headers = response.headers
        self.body = response.read()

    def json(self):
        return json.loads(self.body)

    @property
    def error(self):
        return self.json()["error"]


class Server:
    """`pace-nb serve` with these arguments; ended by `stop`."""

    def __init__(self, log: Path, *arguments, threads=ONE_CPU, environment=None):
        self.log_file = log
        with log.open("wb") as stream:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "pace_nb", "serve", "--port", "0", *threads, *arguments],
                stderr=stream,
                stdout=stream,
                env={**os.environ, **(environment or {})},
            )
        self.host, self.port, self.uds, self.key = "127.0.0.1", 0, None, None
        self.prefix = "vllm" if "vllm" in arguments else "pace_nb"

    # ---- life ----

    def listening(self):
        """Wait until it has said where."""
        found = self.logged(r"http://([\d.]+):(\d+) serves|unix:(\S+) serves")
        if found[3]:
            self.uds = found[3]
        else:
            self.port = int(found[2])
        return self

    def ready(self):
        """Wait until it takes requests; fails as soon as it has ended instead."""
        self.listening()

        def settled():
            return self.process.poll() is not None or self.get("/health").status == 200

        wait(settled, READY_SECONDS, self.log)
        if self.process.poll() is not None:
            pytest.fail(f"ended with {self.process.returncode}: {self.log()}")
        return self

    def stop(self, number=signal.SIGTERM, timeout=20):
        """Its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise

    def log(self):
        return self.log_file.read_text()

    def logged(self, pattern, timeout=60):
        """Wait for a line of the log; the match."""
        found = []
        wait(lambda: found.append(re.search(pattern, self.log())) or found[-1], timeout, self.log)
        return found[-1]

    def engine_pids(self):
        """Of the engines' processes: the server's children that run engine_process."""
        pids = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                parent = int(stat.read_text().rpartition(")")[2].split()[1])
                command = (stat.parent / "cmdline").read_bytes()
            except (OSError, ProcessLookupError):
                continue
            if parent == self.process.pid and b"engine_process" in command:
                pids.append(int(stat.parent.name))
        return sorted(pids)

    # ---- HTTP ----

    def connect(self):
        """A plain socket."""
        if self.uds is not None:
            one = socket.socket(socket.AF_UNIX)
            one.connect(self.uds)
        else:
            one = socket.create_connection((self.host, self.port))
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        one.settimeout(30)
        return one

    def connection(self):
        made = http.client.HTTPConnection(self.host, self.port, timeout=60)
        made.sock = self.connect()
        return made

    def with_key(self, headers):
        key = {} if self.key is None else {"Authorization": f"Bearer {self.key}"}
        return {**key, **(headers or {})}

    def request(self, method, path, body=None, headers=None):
        connection = self.connection()
        try:
            connection.request(method, path, body, self.with_key(headers))
            return Reply(connection.getresponse())
        finally:
            connection.close()

    def get(self, path, headers=None):
        return self.request("GET", path, headers=headers)

    def post(self, path, body, headers=None):
        data = body if isinstance(body, bytes | str) else json.dumps(body)
        return self.request(
            "POST", path, data, {"Content-Type": "application/json", **(headers or {})}
        )

    def complete(self, prompt="Once upon a time", **options):
        return self.post("/v1/completions", {"prompt": prompt, "temperature": 0, **options})

    def open_stream(self, path="/v1/completions", **body):
        """A connection and its response, with nothing of the body read."""
        connection = self.connection()
        if "completions" in path and "chat" not in path:
            body.setdefault("prompt", "Once upon a time")
        connection.request(
            "POST",
            path,
            json.dumps({"stream": True, "temperature": 0, **body}),
            self.with_key({"Content-Type": "application/json"}),
        )
        return connection, connection.getresponse()

    def events(self, path="/v1/completions", **body):
        """The data of all events of a stream, as text, `[DONE]` included."""
        connection, response = self.open_stream(path, **body)
        assert response.status == 200, response.read()
        text = response.read().decode()
        connection.close()
        return [part[6:] for part in text.split("\n\n") if part.startswith("data: ")]

    # ---- what it counts ----

    def metrics(self):
        """Sample name with labels -> value; engines and models left out of the labels."""
        found = {}
        for line in self.get("/metrics").body.decode().splitlines():
            if not line.startswith("#"):
                name, _, value = line.rpartition(" ")
                name = re.sub(r'(engine|model_name)="[^"]*",?', "", name).replace("{}", "")
                found[name.replace(",}", "}")] = found.get(name, 0.0) + float(value)
        return found

    def metric(self, name):
        return self.metrics()[f"{self.prefix}:{name}"]

    def idle(self, timeout=50):
        """Wait until nothing runs, waits or owns a block."""
        wait(lambda: self.loads() == (0, 0, 0.0, 0), timeout, self.loads)

    def loads(self):
        found = self.metrics()
        return (
            found[f"{self.prefix}:num_requests_running"],
            found[f"{self.prefix}:num_requests_waiting"],
            found[f"{self.prefix}:kv_cache_usage_perc"],
            self.get("/load").json()["server_load"],
        )


def wait(condition, timeout, told=lambda: ""):
    """Until it holds; fails with what is told."""
    end = time.monotonic() + timeout
    while True:
        try:
            if condition():
                return
        except (ConnectionError, http.client.HTTPException):
            pass
        if time.monotonic() > end:
            pytest.fail(f"not within {timeout} s: {told()}")
        time.sleep(0.02)


@pytest.fixture(scope="session")
def lend(tmp_path_factory):
    """Lends the server of a name from SHARED, started when it is first asked for; idle after it."""
    made = {}

    def lend(name):
        if name not in made:
            arguments, environment, key = SHARED[name]
            log = tmp_path_factory.mktemp(name) / "log"
            made[name] = Server(log, *arguments.split(), environment=environment)
            made[name].key = key
            made[name].ready()
        yield made[name]
        made[name].idle()

    yield lend
    codes = {name: one.stop() for name, one in made.items()}
    assert codes == dict.fromkeys(made, 0)
    for one in made.values():
        assert "Traceback" not in one.log()


@pytest.fixture
def server(lend):
    """A server of the bundled model with default limits, that many tests use."""
    yield from lend("server")


@pytest.fixture
def tight(lend):
    """A server with keys, one sequence at a time, and every limit low."""
    yield from lend("tight")


@pytest.fixture
def slow(lend):
    """A server whose answers take seconds: reference kernels, prompts in pieces of 16 tokens."""
    yield from lend("slow")


@pytest.fixture
def drafting(lend):
    """A server that speculates with the demo's draft model, and has vLLM's prefix of metrics."""
    yield from lend("drafting")


@pytest.fixture
def start(tmp_path):
    """Starts a server of its own for a test, stopped at its end."""
    made = []

    def start(*arguments, **options):
        made.append(Server(tmp_path / f"log{len(made)}", *arguments, **options))
        return made[-1]

    yield start
    for one in made:
        one.stop()


@pytest.fixture
def waiting():
    """`wait`, for tests."""
    return wait
