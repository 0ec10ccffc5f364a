"""`Settings`: where the server listens, who may ask, what the model is called.

Knows what must not be combined: a server that others can reach and that asks for no key. Does not
know how much of anything (limits.py) or what an engine is given (`EngineConfig`).
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field

from pace_nb.errors import ConfigError
from pace_nb.openai_api.message_format import MessageFormat
from pace_nb.server.limits import Limits

LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "[::1]")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Options of one server.

    Attributes:
        host, port: Where to listen; port 0 takes a free one.
        uds: Path of a Unix socket to listen on instead; only this user may connect.
        api_keys: Any of them lets a request in; none of them, every request.
        insecure_no_auth: Be reachable without keys all the same.
        allowed_hosts: Names for `Host`, beside those of loopback; on other addresses, where none
            are named, any.
        allowed_origins: Of web pages elsewhere that may ask; "*" is all of them.
        served_model_names: What the model is called; the first is told.
        model: Where it comes from, as it was given: a directory or a name on the hub. Clients that
            make prompts of their own look for its tokenizer there (`root` in /v1/models, as vLLM
            has it).
        data_parallel_size: Engines.
        reasoning_parser, tool_call_parser: Names of `openai_api/message_format.py`; "auto" is what
            the chat template asks for, "none" leaves everything in the text.
        metrics_prefix: Of the metrics' names; "vllm" for dashboards that were made for it.
        web_page: Serve the page at /, whose files need no key.
        log_requests: A line for each request: method, path, status, time; never its text.
        limits: How much of everything.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    uds: str | None = None
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    insecure_no_auth: bool = False
    allowed_hosts: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    served_model_names: tuple[str, ...] = ("pace-nb-demo",)
    model: str = "pace-nb-demo"
    data_parallel_size: int = 1
    reasoning_parser: str = "auto"
    tool_call_parser: str = "auto"
    metrics_prefix: str = "pace_nb"
    web_page: bool = True
    log_requests: bool = True
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if type(self.port) is not int or not 0 <= self.port <= 65535:
            raise ConfigError(f"port is {self.port!r}, expected 0 to 65535")
        if not self.host:
            raise ConfigError("host is empty, expected an address such as 127.0.0.1")
        if any(not key or not key.isascii() or not key.isprintable() for key in self.api_keys):
            raise ConfigError("an API key is wrong, expected printable ASCII text")
        if not self.served_model_names or not all(self.served_model_names):
            raise ConfigError("served_model_name is empty, expected a name")
        MessageFormat.chosen(self.reasoning_parser, self.tool_call_parser)  # refuses wrong names
        if type(self.data_parallel_size) is not int or self.data_parallel_size < 1:
            raise ConfigError(
                f"data_parallel_size is {self.data_parallel_size!r}, expected an integer from 1"
            )
        if not self.metrics_prefix.isidentifier():
            raise ConfigError(
                f"metrics_prefix is {self.metrics_prefix!r}, expected a name such as vllm"
            )
        if not (self.is_local or self.api_keys or self.insecure_no_auth):
            raise ConfigError(
                f"host is {self.host}, which others can reach: give --api-key (or the variable "
                "PACE_NB_API_KEY), or --insecure-no-auth to serve everybody"
            )

    @property
    def is_local(self) -> bool:
        """Only this machine can connect."""
        if self.uds is not None or self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def host_names(self) -> frozenset[str]:
        """What `Host` may say, without port, in lower case; empty: anything."""
        if self.uds is not None or (not self.is_local and not self.allowed_hosts):
            return frozenset()
        own = f"[{self.host}]" if ":" in self.host else self.host
        return frozenset(name.lower() for name in (*LOOPBACK_HOSTS, own, *self.allowed_hosts))
