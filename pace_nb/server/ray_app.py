"""The server on a Ray cluster: each replica is the ASGI app of app.py with an engine of its own.

Knows Ray Serve's deployments and how replicas are counted out by load. Ray routes requests and
starts replicas, on as many machines as it has; what a request is answered with is the app's.

    serve run pace_nb.server.ray_app:app model=Qwen/Qwen3-0.6B threads=16 max_replicas=8

    options    fields of EngineConfig, of Limits and of Scaling, and `model`, `served_model_name`,
               `metrics_prefix`, `allowed_hosts`, `insecure_no_auth`, `threads`; values are JSON, or
               else text
    keys       PACE_NB_API_KEY where `serve run` is called; without any, only clients of the machine
               that Ray's proxy runs on are answered
    scaling    Ray counts the requests that run and wait; more than `target_ongoing_requests` for
               each replica, and it starts one more
    ready      a replica gets requests when its engine is ready; when no engine is left that could
               come back, Ray replaces it

Source: Ray Serve's `ingress`, `AutoscalingConfig`, https://docs.ray.io/en/latest/serve.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Final

from starlette.types import ASGIApp, Receive, Scope, Send

from pace_nb import env
from pace_nb.config import EngineConfig
from pace_nb.errors import ApiError, ConfigError, PaceError
from pace_nb.models import hub
from pace_nb.server.answers import error_response
from pace_nb.server.app import create_app
from pace_nb.server.engine_client import EngineOptions
from pace_nb.server.limits import Limits
from pace_nb.server.service import Service
from pace_nb.server.settings import Settings

LOOK: Final = 0.05  # seconds between looks at an engine that starts
SPARE_REQUESTS: Final = 64  # beside generations: health, metrics, the page
GRACE: Final = 10.0  # seconds that a replica may take to end, beyond shutdown_timeout


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """How many replicas; Ray's names. None leaves it to Ray.

    Attributes:
        min_replicas, max_replicas: Bounds of their number.
        target_ongoing_requests: Requests that run and wait, for each replica; None is max_num_seqs:
            where more wait, there are too few replicas.
        upscale_delay_s, downscale_delay_s: That it must last before a replica is started or ended.
        look_back_period_s: That requests are averaged over.
    """

    min_replicas: int = 1
    max_replicas: int = 1
    target_ongoing_requests: float | None = None
    upscale_delay_s: float | None = None
    downscale_delay_s: float | None = None
    look_back_period_s: float | None = None


@dataclass(frozen=True, kw_only=True)
class RayOptions:
    """What one application is given.

    Attributes:
        model: Directory or name on the hub, as each replica will look for it; None is the bundled
            one.
        settings: Of each replica's server; Ray listens, so nothing is said of addresses.
        engine: Fields of EngineConfig.
        max_num_seqs: Of an engine.
        threads: CPUs that Ray sets aside for a replica, and threads of its kernels.
        scaling: As in Scaling.
        local_only: Only clients of this machine are answered.
    """

    model: str | None
    settings: Settings
    engine: dict[str, Any]
    max_num_seqs: int
    threads: int
    scaling: Scaling
    local_only: bool

    @classmethod
    def from_arguments(cls, arguments: Mapping[str, Any], api_key: str | None) -> RayOptions:
        """From the texts of a command line, or the values of a configuration file.

        ConfigError for a name that is none, and as EngineConfig, Limits and Settings.
        """
        rest = {name: _value(value) for name, value in arguments.items()}

        def taken(kind: type) -> dict[str, Any]:
            names = [one.name for one in fields(kind) if one.name in rest]
            return {name: rest.pop(name) for name in names}

        model = rest.pop("model", None)
        name = str(rest.pop("served_model_name", model or "pace-nb-demo"))
        hosts = rest.pop("allowed_hosts", ())
        threads = rest.pop("threads", len(os.sched_getaffinity(0)))
        if type(threads) is not int or threads < 1:
            raise ConfigError(f"threads is {threads!r}, expected an integer from 1")
        insecure = rest.pop("insecure_no_auth", False) is True
        prefix = str(rest.pop("metrics_prefix", "pace_nb"))
        scaling = Scaling(**taken(Scaling))
        limits = Limits(**taken(Limits))
        engine = {**taken(EngineConfig), "num_threads": threads}
        if rest:
            raise ConfigError(f"{', '.join(sorted(rest))}: no such option")
        local_only = api_key is None and not insecure
        return cls(
            model=None if model is None else str(model),
            settings=Settings(
                host="127.0.0.1" if local_only else "0.0.0.0",  # noqa: S104 (nothing is bound)
                api_keys=() if api_key is None else (api_key,),
                insecure_no_auth=insecure,
                allowed_hosts=tuple([hosts] if isinstance(hosts, str) else hosts),
                served_model_names=(name,),
                model=str(model or "pace-nb-demo"),
                metrics_prefix=prefix,
                limits=limits,
            ),
            engine=engine,
            max_num_seqs=EngineConfig(**engine).max_num_seqs,
            threads=threads,
            scaling=scaling,
            local_only=local_only,
        )

    @property
    def autoscaling_config(self) -> dict[str, Any]:
        """Ray's."""
        given = {one.name: getattr(self.scaling, one.name) for one in fields(Scaling)}
        given["target_ongoing_requests"] = self.scaling.target_ongoing_requests or self.max_num_seqs
        return {name: value for name, value in given.items() if value is not None}

    @property
    def max_ongoing_requests(self) -> int:
        """Of a replica: beyond what the app itself would refuse, so that the refusal is its own."""
        queued = self.settings.limits.max_queued_requests
        return self.max_num_seqs * (1 if queued is not None else 5) + (queued or 0) + SPARE_REQUESTS


def _value(given: Any) -> Any:
    if not isinstance(given, str):
        return given
    try:
        return json.loads(given)
    except (ValueError, RecursionError):
        return given


@dataclass
class ReplicaApp:
    """An ASGI app that starts its engine in its lifespan and ends it there.

    Attributes:
        options: Of the application.
        service: Once the lifespan has begun.
    """

    options: RayOptions
    service: Service | None = None
    _app: ASGIApp | None = field(default=None, repr=False)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        elif self._app is None:
            await error_response(ApiError("not started", status=503))(scope, receive, send)
        elif scope["type"] == "http" and self.options.local_only and not _is_local(scope):
            refused = ApiError(
                "others than this machine need a key: set PACE_NB_API_KEY for `serve run`",
                status=403,
            )
            await error_response(refused)(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def check_health(self) -> None:
        """PaceError where no engine is left that could come back."""
        if self.service is not None and self.service.failed.is_set():
            raise PaceError(self.service.fatal or "no engine is left")

    async def _live(self, receive: Receive, send: Send) -> None:
        await receive()  # lifespan.startup
        try:
            await self._start()
        except PaceError as error:
            await self._stop()
            await send({"type": "lifespan.startup.failed", "message": str(error)})
            return
        await send({"type": "lifespan.startup.complete"})
        await receive()  # lifespan.shutdown
        await self._stop()
        await send({"type": "lifespan.shutdown.complete"})

    async def _start(self) -> None:
        """Until the engine is ready. PaceError where it cannot be."""
        directory = await asyncio.to_thread(hub.resolve, self.options.model)
        engine = EngineOptions(model=directory.resolve(), options=self.options.engine)
        self.service = Service(self.options.settings, engine, self.options.max_num_seqs)
        await self.service.start()
        self._app = create_app(self.service)
        while not self.service.ready:
            self.check_health()
            await asyncio.sleep(LOOK)

    async def _stop(self) -> None:
        """What runs may finish within shutdown_timeout."""
        if self.service is None:
            return
        self.service.draining = True
        end = asyncio.get_running_loop().time() + self.options.settings.limits.shutdown_timeout
        while self.service.num_requests and asyncio.get_running_loop().time() < end:
            await asyncio.sleep(LOOK)
        self.service.fail_all("the server is shutting down")
        await self.service.stop()


def _is_local(scope: Scope) -> bool:
    """The client is on the machine that Ray's proxy runs on."""
    address = scope["client"][0] if scope.get("client") else ""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def app(arguments: dict[str, str]) -> Any:
    """Ray Serve's application of these options: what `serve run` calls.

    ConfigError for options that are wrong, and where Ray is not installed.
    """
    try:
        from ray import serve
    except ImportError as error:
        raise ConfigError(
            "Ray Serve is not installed: pip install 'pace-nb[server,ray]'"
        ) from error
    options = RayOptions.from_arguments(arguments, env.api_key())

    def build() -> ReplicaApp:  # in each replica
        return ReplicaApp(options)

    timeout = options.settings.limits.shutdown_timeout + GRACE
    deployment: Callable[..., Any] = serve.deployment(
        name="pace_nb",
        ray_actor_options={"num_cpus": options.threads},
        autoscaling_config=options.autoscaling_config,
        max_ongoing_requests=options.max_ongoing_requests,
        graceful_shutdown_timeout_s=timeout,
    )
    made: Any = deployment(serve.ingress(build)(Replica))
    return made.bind()


class Replica:
    """What Ray makes one of in each replica's process; its ASGI app is a ReplicaApp."""

    app: ReplicaApp

    async def check_health(self) -> None:
        """Called by Ray every few seconds; raising has the replica replaced."""
        self.app.check_health()
