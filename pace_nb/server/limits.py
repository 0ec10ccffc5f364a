"""`Limits`: how much of everything one server takes, with its default, in one place.

Knows numbers. What happens beyond them stands beside each: the HTTP status that says so. Limits of
a single request's sampling values are in `pace_nb/sampling_params.py`, those of JSON bodies in
`pace_nb/openai_api/request_body.py`, those of chat templates in `pace_nb/chat_template.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from pace_nb.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds of one server. Times are seconds, sizes bytes.

    Attributes:
        max_body_bytes: Of a request's body. 413.
        max_header_bytes: Of a request's line and headers. 431, or 400 while they are still coming.
        header_timeout: To send all headers of a request, once a connection is open. Closed.
        body_timeout: To send all of a body. 408.
        keep_alive_timeout: A connection may be silent between two requests. Closed.
        send_timeout: A client may leave bytes unread in an answer. Aborted.
        max_connections: Open connections. 503.
        max_queued_requests: Sequences that wait in each engine, beyond the max_num_seqs that run;
            None is 4 * max_num_seqs. 503.
        max_queued_tokens: Tokens of prompts that wait in each engine; None is 4 times what its KV
            cache holds. 503.
        max_requests_per_client: Generations at a time of one API key, or of one address where no
            keys are asked for; None is no limit. 429.
        queue_timeout: A request may wait before its first step. 503.
        max_mailbox_bytes: Of an answer that a slow client has not read. Aborted.
        keep_alive_interval: Between comments on a stream that has no news.
        shutdown_timeout: For running requests to finish after SIGTERM; then they get an error.
        watchdog_timeout: For one step of an engine; then it counts as stalled.
        max_restarts: Of an engine within an hour; then it stays down.
    """

    max_body_bytes: int = 8 * 2**20
    max_header_bytes: int = 64 * 2**10
    header_timeout: float = 30.0
    body_timeout: float = 30.0
    keep_alive_timeout: float = 75.0
    send_timeout: float = 60.0
    max_connections: int = 1024
    max_queued_requests: int | None = None
    max_queued_tokens: int | None = None
    max_requests_per_client: int | None = None
    queue_timeout: float = 300.0
    max_mailbox_bytes: int = 8 * 2**20
    keep_alive_interval: float = 10.0
    shutdown_timeout: float = 30.0
    watchdog_timeout: float = 120.0
    max_restarts: int = 5

    def __post_init__(self) -> None:
        zero_allowed = {
            "max_queued_requests",
            "max_queued_tokens",
            "shutdown_timeout",
            "max_restarts",
        }
        for field in fields(self):
            value = getattr(self, field.name)
            least = "0 or more" if field.name in zero_allowed else "more than 0"
            if value is None and field.default is None:
                continue
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not (value > 0 or (value == 0 and field.name in zero_allowed)):
                raise ConfigError(f"{field.name} is {value!r}, expected a number, {least}")
