"""uvicorn, with what it lacks: deadlines for headers, an end that says 0, sockets of our own.

Knows connections and signals. Does not know routes.

    first SIGTERM or SIGINT   nothing new is taken; what runs may finish within shutdown_timeout,
                              then it gets an error; exit code 0
    second                    everything ends at once; exit code 1
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import logging
import os
import resource
import signal
import socket
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any, Final

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from pace_nb.errors import ApiError, ConfigError
from pace_nb.openai_api.response_body import error_body
from pace_nb.server.limits import Limits
from pace_nb.server.service import Service
from pace_nb.server.settings import Settings
from pace_nb.server.turns import ACCEPTED

_log = logging.getLogger(__name__)

BACKLOG: Final = 2048
CUT_AFTER: Final = 5.0  # seconds that a closing connection may take to flush what nobody reads
LAST_WORDS: Final = 2.0  # seconds to send the errors with which requests end at shutdown
SEND_BUFFER: Final = 2**17  # bytes of a connection that the kernel keeps for a slow reader
SPARE_FILES: Final = 256  # beside those of connections
CHECK: Final = 0.25  # seconds between looks at deadlines


_FULL = json.dumps(error_body(ApiError("the server has too many connections", status=503))).encode()
FULL: Final = (
    b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nretry-after: 1\r\n"
    b"connection: close\r\ncontent-length: %d\r\n\r\n%b" % (len(_FULL), _FULL)
)


class _Config(uvicorn.Config):
    """uvicorn's, with ours beside it for `Connection` to see."""

    def __init__(self, limits: Limits, app: ASGIApp, **options: Any) -> None:
        super().__init__(app, **options)
        self.limits = limits


class Connection(H11Protocol):
    """One connection; it knows since when it has been idle, and since when something is due."""

    config: _Config
    idle_since: float | None = None
    due_since: float | None = None  # the headers of a request
    closing_since: float | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.idle_since = self.due_since = time.monotonic()
        if len(self.connections) > self.config.limits.max_connections:
            self._make_room()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self.idle_since = self.due_since = None
        elif self.due_since is None:
            self.due_since = time.monotonic()

    def on_response_complete(self) -> None:
        self.idle_since = time.monotonic()
        super().on_response_complete()

    def _make_room(self) -> None:
        """There is one too many: the one that was idle longest goes, or else the new one."""
        idle = [
            one
            for one in self.connections
            if isinstance(one, Connection) and one.idle_since is not None and one is not self
        ]
        if idle:
            longest = min(idle, key=lambda one: one.idle_since or 0.0)
            longest.idle_since = None
            longest.transport.abort()
        else:
            _log.warning("%d connections, one more is refused", len(self.connections) - 1)
            self.transport.write(FULL)
            self.transport.close()

    def send_400_response(self, msg: str) -> None:
        """What was sent is no HTTP. The answer that may be under way has no one to go to."""
        super().send_400_response(msg)
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()

    def check(self, now: float, limits: Limits) -> None:
        """Cut it where it is overdue."""
        if self.transport.is_closing():
            if self.closing_since is None:
                self.closing_since = now
            elif now - self.closing_since > CUT_AFTER:
                self.transport.abort()
        elif self.due_since is not None and now - self.due_since > limits.header_timeout:
            self.transport.abort()


class HttpServer(uvicorn.Server):
    """Serves an app on sockets until a signal, or until no engine is left.

    exit_code: What the process should end with.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        limits = service.settings.limits
        _allow_files(limits.max_connections + SPARE_FILES)
        super().__init__(
            _Config(
                limits,
                app,
                http=Connection,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=limits.keep_alive_timeout,
                h11_max_incomplete_event_size=limits.max_header_bytes,
                backlog=ACCEPTED,  # asyncio accepts as many in one go; see `startup`
                proxy_headers=False,
            )
        )
        self.exit_code = 0
        self._service = service
        self._limits = limits
        self._tasks: list[asyncio.Task[None]] = []

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Until a signal, or until no engine is left; then the engines are gone too."""
        self._tasks = [
            asyncio.create_task(self._check_connections(), name="connections"),
            asyncio.create_task(self._watch_engines(), name="engines"),
        ]
        try:
            await super().serve(sockets)
        finally:
            for task in self._tasks:
                task.cancel()
            await self._service.stop()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, with room for more connections than are accepted in one go; then say where."""
        await super().startup(sockets)
        if not sockets:
            return
        for one in sockets:
            one.listen(BACKLOG)
        settings = self._service.settings
        keys = f"{len(settings.api_keys)} API keys" if settings.api_keys else "no API key"
        reach = "this machine only" if settings.is_local else "reachable by others"
        name = settings.served_model_names[0]
        _log.info("%s serves %s (%s, %s)", url(sockets), name, reach, keys)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """uvicorn's own would raise them again at the end, and the exit code would be theirs."""
        before = {
            number: signal.signal(number, self.handle_exit)
            for number in (signal.SIGTERM, signal.SIGINT)
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal came."""
        if self._service.draining:
            self.exit_code = 1
            self.force_exit = True
            self._service.fail_all("the server was stopped")
            return
        # Not here: a handler may interrupt anything. At the loop's next turn.
        self._service.draining = True
        asyncio.get_running_loop().call_soon_threadsafe(self._drain)

    def _drain(self) -> None:
        running, timeout = self._service.num_requests, self._limits.shutdown_timeout
        _log.info("shutting down: %d requests have %g s to finish", running, timeout)
        self.config.timeout_graceful_shutdown = int(timeout + LAST_WORDS + 1)
        self.should_exit = True
        self._tasks.append(asyncio.create_task(self._end_of_patience(timeout)))

    async def _end_of_patience(self, timeout: float) -> None:
        await asyncio.sleep(timeout)
        self._service.fail_all("the server is shutting down")

    async def _check_connections(self) -> None:
        while True:
            await asyncio.sleep(CHECK)
            now = time.monotonic()
            for connection in list(self.server_state.connections):
                if isinstance(connection, Connection):
                    connection.check(now, self._limits)

    async def _watch_engines(self) -> None:
        await self._service.failed.wait()
        self.exit_code = 2 if self._service.fatal is not None else 1
        self._service.draining = True
        self._service.fail_all("no engine is left")
        self.should_exit = True


def _allow_files(wanted: int) -> None:
    """Raise this process's own limit of open files, as far as it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def listen(settings: Settings) -> list[socket.socket]:
    """The sockets to serve on. ConfigError where the address is taken or is none."""
    if settings.uds is not None:
        return [_listen_unix(Path(settings.uds))]
    sockets: list[socket.socket] = []
    try:
        found = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        for family, kind, protocol, _, address in dict.fromkeys(found):
            if settings.port == 0 and sockets:
                break  # a second free port would be another one
            one = socket.socket(family, kind, protocol)
            sockets.append(one)
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)  # accepted ones get it
            if family == socket.AF_INET6:
                one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            try:
                one.bind(address)
            except OSError:
                if family == socket.AF_INET6 and len(sockets) > 1:  # no IPv6 here
                    sockets.pop().close()
                    continue
                raise
            one.setblocking(False)
    except OSError as error:
        for one in sockets:
            one.close()
        other = "; --port N takes another one" if error.errno == errno.EADDRINUSE else ""
        raise ConfigError(
            f"cannot listen on {settings.host} port {settings.port}: {error.strerror}{other}"
        ) from error
    return sockets


def _listen_unix(path: Path) -> socket.socket:
    """A socket file that only this user may use; one that a dead server left is replaced."""
    one = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if path.exists() and stat.S_ISSOCK(path.lstat().st_mode):
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                try:
                    probe.connect(str(path))
                except ConnectionRefusedError:
                    path.unlink()
        before = os.umask(0o177)
        try:
            one.bind(str(path))
        finally:
            os.umask(before)
        one.setblocking(False)
    except OSError as error:
        one.close()
        raise ConfigError(f"cannot listen on {path}: {error.strerror or error}") from error
    return one


def url(sockets: list[socket.socket]) -> str:
    """Where to reach the first of them."""
    address: Any = sockets[0].getsockname()
    if isinstance(address, str):
        return f"unix:{address}"
    host = f"[{address[0]}]" if ":" in address[0] else address[0]
    return f"http://{host}:{address[1]}"
