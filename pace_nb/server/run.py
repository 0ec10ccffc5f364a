"""`run`: a whole server, from options to exit code.

Knows the order of a start. HTTP is answered first, so that whoever waits for the model is told so;
the engines load meanwhile.
"""

from __future__ import annotations

import asyncio
import gc
import socket
from pathlib import Path
from typing import Literal

from pace_nb.errors import PaceError
from pace_nb.server import logs
from pace_nb.server.app import create_app
from pace_nb.server.engine_client import EngineOptions
from pace_nb.server.http_server import HttpServer, listen
from pace_nb.server.service import Service
from pace_nb.server.settings import Settings
from pace_nb.server.turns import new_event_loop


def run(
    settings: Settings,
    engine: EngineOptions,
    max_num_seqs: int,
    log_level: str,
    log_format: Literal["text", "json"],
) -> int:
    """Serve until a signal; the exit code.

    ConfigError where the address cannot be had, PaceError where the model has no tokenizer or no
    engine can be started with it.
    """
    logs.set_up(log_level, log_format)
    sockets = listen(settings)
    try:
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            return runner.run(_serve(settings, engine, max_num_seqs, sockets))
    finally:
        for one in sockets:
            one.close()
        if settings.uds is not None:
            Path(settings.uds).unlink(missing_ok=True)


async def _serve(
    settings: Settings, engine: EngineOptions, max_num_seqs: int, sockets: list[socket.socket]
) -> int:
    service = Service(settings, engine, max_num_seqs)
    await service.start()
    server = HttpServer(create_app(service), service)
    gc.freeze()  # modules live for ever: a collection need not look at them, 20 ms each time
    await server.serve(sockets)
    if service.fatal is not None and server.exit_code == 2:
        raise PaceError(service.fatal)
    return server.exit_code
