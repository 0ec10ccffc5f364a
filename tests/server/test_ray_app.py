"""Options and a replica without Ray; then `serve run` with a local Ray, where that is installed."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

from pace_nb.errors import ConfigError, PaceError
from pace_nb.server import ray_app
from pace_nb.server.ray_app import RayOptions, ReplicaApp
from tests.servers import READY_SECONDS, Server, wait

needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="needs pip install 'pace-nb[ray]'"
)


def options(key=None, **arguments):
    return RayOptions.from_arguments(arguments, key)


# ---- what is asked for ----


def test_defaults():
    made = options()
    assert made.model is None and made.settings.served_model_names == ("pace-nb-demo",)
    assert made.threads == len(os.sched_getaffinity(0)) == made.engine["num_threads"]
    assert made.autoscaling_config == {
        "min_replicas": 1, "max_replicas": 1, "target_ongoing_requests": 32,
    }  # fmt: skip
    assert made.local_only and "localhost" in made.settings.host_names
    assert made.max_ongoing_requests > made.max_num_seqs * 5  # the app's own refusal comes first


def test_texts_and_values_become_options():
    made = options(
        "secret", model="/models/x", threads="2", max_num_seqs="8", dtype="float32",
        max_replicas="4", upscale_delay_s="0.5", queue_timeout=7.0, max_queued_requests="3",
        served_model_name="x", metrics_prefix="vllm", allowed_hosts='["a", "b"]',
        speculative_config='{"method": "prompt_lookup", "num_speculative_tokens": 3}',
    )  # fmt: skip
    assert made.engine == {
        "dtype": "float32", "max_num_seqs": 8, "num_threads": 2,
        "speculative_config": {"method": "prompt_lookup", "num_speculative_tokens": 3},
    }  # fmt: skip
    assert made.model == "/models/x" == made.settings.model
    assert made.settings.served_model_names == ("x",) and made.settings.metrics_prefix == "vllm"
    assert made.settings.limits.queue_timeout == 7.0 and made.settings.api_keys == ("secret",)
    assert made.settings.allowed_hosts == ("a", "b") == tuple(sorted(
        made.settings.host_names - {"localhost", "127.0.0.1", "[::1]", "0.0.0.0"}
    ))  # fmt: skip
    assert made.autoscaling_config["upscale_delay_s"] == 0.5
    assert made.autoscaling_config["target_ongoing_requests"] == 8
    assert 8 + 3 < made.max_ongoing_requests < 8 * 5 + 64 and not made.local_only
    assert not options(insecure_no_auth="true").local_only


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"no_such": "x"}, "no_such: no such option"),
        ({"threads": "0"}, "threads is 0"),
        ({"threads": "many"}, "threads is 'many'"),
        ({"max_num_seqs": "-1"}, "max_num_seqs"),
        ({"queue_timeout": "-1"}, "queue_timeout"),
        ({"metrics_prefix": "a b"}, "metrics_prefix"),
    ],
)
def test_what_is_wrong_is_refused_before_anything_starts(arguments, message):
    with pytest.raises(ConfigError, match=message):
        options(**arguments)


def test_without_ray_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"pip install 'pace-nb\[server,ray\]'"):
        ray_app.app({})


# ---- one replica, without Ray ----


class Lifespan:
    """Drives an ASGI app as an ASGI server does."""

    def __init__(self, app):
        self.app = app
        self.inbox, self.outbox = asyncio.Queue(), asyncio.Queue()
        self.task = asyncio.create_task(app({"type": "lifespan"}, self.inbox.get, self.outbox.put))

    async def say(self, what):
        await self.inbox.put({"type": f"lifespan.{what}"})
        return await asyncio.wait_for(self.outbox.get(), READY_SECONDS)


async def get(app, path, client="127.0.0.1", **headers):
    """Status and JSON."""
    sent = []
    raw = [
        (name.encode(), value.encode()) for name, value in {"host": "localhost", **headers}.items()
    ]
    scope = {"type": "http", "method": "GET", "path": path, "headers": raw, "query_string": b"",
             "client": (client, 1), "scheme": "http"}  # fmt: skip

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message):
        sent.append(message)

    await app(scope, receive, send)
    return sent[0]["status"], json.loads(sent[1]["body"])


def test_a_replica_answers_once_its_engine_is_ready_and_ends_it():
    async def main():
        app = ReplicaApp(options(threads=1))
        status, _ = await get(app, "/health")
        assert status == 503
        life = Lifespan(app)
        assert (await life.say("startup"))["type"] == "lifespan.startup.complete"
        app.check_health()
        assert (await get(app, "/health"))[0] == 200
        status, body = await get(app, "/health", client="10.0.0.7")
        assert status == 403 and "PACE_NB_API_KEY" in body["error"]["message"]
        assert (await get(app, "/v1/models", host="evil.example"))[0] == 403
        pid = app.service.router.engines[0].pid
        app.service.failed.set()
        with pytest.raises(PaceError, match="no engine is left"):
            app.check_health()  # Ray replaces it
        assert (await life.say("shutdown"))["type"] == "lifespan.shutdown.complete"
        await life.task
        assert not Path(f"/proc/{pid}").exists()

    asyncio.run(main())


def test_with_a_key_anybody_who_has_it_is_answered():
    async def main():
        app = ReplicaApp(options("secret", threads=1))
        life = Lifespan(app)
        await life.say("startup")
        headers = {"host": "models.example", "client": "10.0.0.7"}
        assert (await get(app, "/v1/models", **headers))[0] == 401
        status, body = await get(app, "/v1/models", authorization="Bearer secret", **headers)
        assert status == 200 and body["data"][0]["root"] == "pace-nb-demo"
        await life.say("shutdown")
        await life.task

    asyncio.run(main())


@pytest.mark.parametrize(
    "arguments, message",
    [({"model": "/no/such/model"}, "/no/such/model"), ({"max_model_len": 10**6}, "max_model_len")],
)
def test_a_replica_that_cannot_start_says_why(arguments, message):
    async def main():
        life = Lifespan(ReplicaApp(options(threads=1, **arguments)))
        said = await life.say("startup")
        await life.task
        return said

    said = asyncio.run(main())
    assert said["type"] == "lifespan.startup.failed" and message in said["message"]


# ---- Ray ----


class RayServer(Server):
    """`serve run` of a configuration file, which unlike the plain command can name a port."""

    def __init__(self, folder, **arguments):
        with socket.socket() as one:
            one.bind(("127.0.0.1", 0))
            self.port = one.getsockname()[1]
        self.host, self.uds, self.key, self.prefix = "127.0.0.1", None, None, "pace_nb"
        config = {
            "http_options": {"host": self.host, "port": self.port},
            "applications": [{"name": "pace", "route_prefix": "/", "args": arguments,
                              "import_path": "pace_nb.server.ray_app:app"}],
        }  # fmt: skip
        (folder / "config.yaml").write_text(json.dumps(config))  # JSON is YAML
        self.log_file = folder / "log"
        environment = {
            **os.environ, "RAY_ADDRESS": "local", "RAY_TMPDIR": str(folder), "HOME": str(folder),
            "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled",
            "RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "0.5",
            "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "0.5",
        }  # fmt: skip
        with self.log_file.open("wb") as stream:
            self.process = subprocess.Popen(
                [Path(sys.executable).with_name("serve"), "run", folder / "config.yaml"],
                stdout=stream, stderr=stream, env=environment, cwd=folder,
            )  # fmt: skip

    def up(self):
        wait(lambda: self.get("/health").status == 200, READY_SECONDS, self.log)
        return self

    def replicas(self, looks=6):
        """Different processes that answer, of a few asked."""
        found = set()
        for _ in range(looks):
            text = self.get("/metrics").body.decode()
            found.add(re.search(r"^process_start_time_seconds (\S+)", text, re.MULTILINE)[1])
        return len(found)


@pytest.fixture(scope="module")
def ray():
    folder = Path(tempfile.mkdtemp(prefix="ray-"))  # sockets' paths must be short
    made = RayServer(
        folder, threads=1, max_replicas=2, target_ongoing_requests=2, upscale_delay_s=0,
        look_back_period_s=11,
    )  # fmt: skip
    try:
        yield made.up()
        made.stop(signal.SIGINT, 60)
        assert "Traceback" not in made.log()
    finally:
        made.process.kill()
        made.process.wait()
        shutil.rmtree(folder, ignore_errors=True)


@needs_ray
def test_ray_serves_the_same_app(ray, server):
    asked = {"max_tokens": 12, "logprobs": 2}
    through_ray, direct = (one.complete(**asked).json()["choices"] for one in (ray, server))
    assert through_ray == direct  # to the bit
    events = ray.events(max_tokens=5, ignore_eos=True, stream_options={"include_usage": True})
    assert events[-1] == "[DONE]"
    assert json.loads(events[-2])["usage"]["completion_tokens"] == 5
    text = "".join(json.loads(one)["choices"][0]["text"] for one in events[:-2])
    assert text == server.complete(max_tokens=5, ignore_eos=True).json()["choices"][0]["text"]
    refused = ray.complete(max_tokens=-1)
    assert refused.status == 400 and refused.error["type"] == "BadRequestError"
    assert ray.get("/").body == server.get("/").body
    assert ray.get("/v1/models", {"Host": "evil.example"}).status == 403


@needs_ray
def test_a_client_that_goes_is_noticed_through_ray(ray):
    connection, response = ray.open_stream(max_tokens=1000, ignore_eos=True, n=8, temperature=1)
    assert response.read(50)
    response.close()
    connection.close()
    wait(lambda: ray.metric("client_disconnects_total") == 1, 20, ray.log)
    wait(lambda: ray.get("/load").json()["server_load"] == 0, 20, ray.log)
    assert ray.metrics()['pace_nb:request_success_total{finished_reason="abort"}'] == 8


@needs_ray
def test_more_requests_than_one_replica_should_have_start_another(ray):
    assert ray.replicas() == 1
    done, stop = [], threading.Event()

    def client():
        while not stop.is_set():
            done.append(ray.complete(max_tokens=200, ignore_eos=True).status)

    threads = [threading.Thread(target=client) for _ in range(6)]
    for thread in threads:
        thread.start()
    try:
        wait(lambda: ray.replicas() == 2, 60, ray.log)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert set(done) == {200} and len(done) >= 6
