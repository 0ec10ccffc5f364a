"""Serve a model over HTTP, with OpenAI's endpoints. GET /health says when it is ready."""

from __future__ import annotations

import argparse
import secrets
from dataclasses import fields
from pathlib import Path

from pace_nb import env
from pace_nb.cli import options as shared
from pace_nb.errors import ConfigError

# Option -> Limits field. None means: not given on the command line.
LIMITS = {
    "max_num_queued_reqs": "max_queued_requests",
    "max_num_queued_tokens": "max_queued_tokens",
    "max_requests_per_client": "max_requests_per_client",
    "queue_timeout": "queue_timeout",
    "max_body_bytes": "max_body_bytes",
    "max_header_bytes": "max_header_bytes",
    "header_timeout": "header_timeout",
    "body_timeout": "body_timeout",
    "send_timeout": "send_timeout",
    "timeout_keep_alive": "keep_alive_timeout",
    "sse_ping_interval": "keep_alive_interval",
    "limit_concurrency": "max_connections",
    "shutdown_timeout": "shutdown_timeout",
    "watchdog_timeout": "watchdog_timeout",
    "max_engine_restarts": "max_restarts",
}
LIMIT_HELP = {
    "max_queued_requests": "requests that wait in each engine, beyond those that run",
    "max_queued_tokens": "prompt tokens that wait in each engine",
    "max_requests_per_client": "requests of one API key, or address, at a time",
    "queue_timeout": "a request may wait for its first step",
    "max_body_bytes": "of a request's body",
    "max_header_bytes": "of a request's headers",
    "header_timeout": "to send all headers of a request",
    "body_timeout": "to send all of a body",
    "send_timeout": "a client may leave an answer unread",
    "keep_alive_timeout": "a connection may be silent between requests",
    "keep_alive_interval": "between comments on a stream that has no news",
    "max_connections": "open connections",
    "shutdown_timeout": "for running requests to finish after SIGTERM or Ctrl-C",
    "watchdog_timeout": "for a step of an engine; then it counts as stalled",
    "max_restarts": "starts of a dead engine within an hour; then it stays down",
}
NO_DEFAULT = {
    "max_queued_requests": "4 x max_num_seqs",
    "max_queued_tokens": "4 x what the KV cache holds",
    "max_requests_per_client": "none",
}
DEMO_NAME = "pace-nb-demo"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Model, engine, where to listen, who may ask, how much of everything."""
    shared.add_model_arguments(parser, positional=True)
    parser.add_argument(
        "--served-model-name", "--alias", "-a", nargs="+", metavar="NAME",
        help="what clients call the model (default: as it was given)",
    )  # fmt: skip
    shared.add_engine_arguments(parser)
    shared.add_batching_arguments(parser)
    engine = parser.add_argument_group("serving").add_argument
    engine("--data-parallel-size", "-dp", type=int, default=1, metavar="N",
           help="engines, each a process with cores and a copy of the model")  # fmt: skip
    engine("--seed", type=int, help="of requests that bring none (default: another each time)")
    engine("--reasoning-parser", default="auto", metavar="NAME",
           help="deepseek_r1, qwen3, openai_gptoss, none (default: by template)")  # fmt: skip
    engine("--tool-call-parser", default="auto", metavar="NAME",
           help="hermes, llama3_json, mistral, openai, none (default: by template)")  # fmt: skip
    engine("--enable-auto-tool-choice", action=argparse.BooleanOptionalAction, default=True,
           help="calls that the model makes by itself are read; else only forced ones")  # fmt: skip
    http = parser.add_argument_group("http").add_argument
    http("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    http("--port", type=int, default=8000, help="0 takes a free one (default: %(default)s)")
    http("--uds", metavar="PATH", help="listen on a Unix socket instead")
    http("--api-key", action="append", default=[], metavar="KEY",
         help="let in only requests with it (repeatable; PACE_NB_API_KEY is safer)")  # fmt: skip
    http("--api-key-file", metavar="FILE", help="the same, one key per line")
    http("--insecure-no-auth", action="store_true",
         help="let others reach the server without any key")  # fmt: skip
    http("--allowed-hosts", nargs="+", default=[], metavar="NAME",
         help="names by which the server may be called")  # fmt: skip
    http("--allowed-origins", "--cors-origins", nargs="+", default=[], metavar="ORIGIN",
         help="of web pages elsewhere that may ask ('*': any)")  # fmt: skip
    http("--webui", action=argparse.BooleanOptionalAction, default=True, help="the web page at /")
    http("--disable-access-log", action="store_true", help="no line for each request")
    http("--metrics-prefix", default="pace_nb", metavar="NAME",
         help="of names at /metrics; vllm for its dashboards (default: %(default)s)")  # fmt: skip
    http("--log-level", default="info", choices=("debug", "info", "warning", "error"))
    http("--log-format", default="text", choices=("text", "json"))
    _add_limits(parser)


def _add_limits(parser: argparse.ArgumentParser) -> None:
    from pace_nb.server.limits import Limits

    kinds = {field.name: field for field in fields(Limits)}
    limits = parser.add_argument_group("limits").add_argument
    for option, name in LIMITS.items():
        default = kinds[name].default
        limits(
            f"--{option.replace('_', '-')}",
            type=float if isinstance(default, float) else int,
            metavar="SECONDS" if isinstance(default, float) else "N",
            help=f"{LIMIT_HELP[name]} "
            f"(default: {NO_DEFAULT[name] if default is None else default})",
        )


def run(options: argparse.Namespace) -> int:
    """Serve until Ctrl-C or SIGTERM."""
    try:
        from pace_nb.server.engine_client import EngineOptions
        from pace_nb.server.run import run as run_server
        from pace_nb.server.settings import Settings
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{error.name} is not installed: the server needs pip install 'pace-nb[server]'"
        ) from error
    from pace_nb.config import EngineConfig
    from pace_nb.server.limits import Limits

    given = {
        field: getattr(options, option)
        for option, field in LIMITS.items()
        if getattr(options, option) is not None
    }
    settings = Settings(
        host=options.host,
        port=options.port,
        uds=options.uds,
        api_keys=_keys(options),
        insecure_no_auth=options.insecure_no_auth,
        allowed_hosts=tuple(options.allowed_hosts),
        allowed_origins=tuple(options.allowed_origins),
        served_model_names=tuple(options.served_model_name or [options.model or DEMO_NAME]),
        model=options.model or DEMO_NAME,
        data_parallel_size=options.data_parallel_size,
        reasoning_parser=options.reasoning_parser,
        tool_call_parser=options.tool_call_parser if options.enable_auto_tool_choice else "none",
        metrics_prefix=options.metrics_prefix,
        web_page=options.webui,
        log_requests=not options.disable_access_log,
        limits=Limits(**given),
    )
    engine = shared.engine_options(options)
    engine["seed"] = secrets.randbits(32) if options.seed is None else options.seed
    config = EngineConfig(**engine)  # what it refuses, it refuses here
    return run_server(
        settings,
        EngineOptions(
            model=shared.resolve_model(options).resolve(),
            options=engine,
            log_level=options.log_level,
            log_format=options.log_format,
        ),
        config.max_num_seqs,
        options.log_level,
        options.log_format,
    )


def _keys(options: argparse.Namespace) -> tuple[str, ...]:
    """From the command line, the file and the variable together."""
    keys = [*options.api_key]
    if options.api_key_file is not None:
        try:
            lines = Path(options.api_key_file).read_text("ascii").splitlines()
        except OSError as error:
            raise ConfigError(f"--api-key-file {options.api_key_file}: {error.strerror}") from error
        except UnicodeDecodeError:
            raise ConfigError(f"--api-key-file {options.api_key_file}: expected ASCII") from None
        found = [line.strip() for line in lines if line.strip()]
        if not found:
            raise ConfigError(f"--api-key-file {options.api_key_file}: no key in it")
        keys += found
    variable = env.api_key()
    if variable:
        keys.append(variable)
    return tuple(keys)
