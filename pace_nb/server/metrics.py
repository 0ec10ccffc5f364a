"""`Metrics`: what Prometheus reads at /metrics, in vLLM's names and units.

Knows what counts and in which buckets. Does not know HTTP or processes; it is told (`Observer` in
engine_client.py). It lives in the server's process, so a busy engine never delays a scrape. Buckets
reach minutes: on a CPU the first token of a long prompt may take that long.

Source: vLLM `vllm/v1/metrics/loggers.py`; docs/monitoring/ has a dashboard for it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

from pace_nb.server.engine_client import State, Ticket

FIRST_TOKEN_SECONDS: Final = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1.2, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0,
    160.0, 320.0, 640.0, 1280.0, 2560.0,
)  # fmt: skip
TOKEN_SECONDS: Final = (
    0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0,
    2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
REQUEST_SECONDS: Final = (
    0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0,
    60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0,
)  # fmt: skip
COUNTS: Final = tuple(float(m * 10**e) for e in range(6) for m in (1, 2, 5))  # 1 to 500000
ITERATION_TOKENS: Final = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
REJECTIONS: Final = ("full", "tokens", "client", "not_ready", "draining")
FINISH_REASONS: Final = ("stop", "length", "abort", "error")


class Metrics:
    """All of one server's.

    Args:
        prefix: Of every name but those of the process and of HTTP.
        model: The label `model_name`.
        num_engines: The label `engine` is "0" to the last.
        pid: An engine's process id, None while it has none.
    """

    def __init__(
        self, prefix: str, model: str, num_engines: int, pid: Callable[[int], int | None]
    ) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry = CollectorRegistry(auto_describe=True)
        self._model = model
        self._engines = [str(index) for index in range(num_engines)]
        self._last_token: dict[tuple[Ticket, int], float] = {}
        self._compiled = dict.fromkeys(range(num_engines), 0)
        self._drafts: dict[int, list[int]] = {}  # of each engine that speculates: what it said last
        self._shares_beginnings: set[int] = set()
        ProcessCollector(registry=self._registry)
        PlatformCollector(registry=self._registry)

        def made(kind: Any, name: str, text: str, labels: Sequence[str] = (), **more: Any) -> Any:
            full = f"{prefix}:{name}"
            names = ["model_name", "engine", *labels]
            metric = kind(full, text, names, registry=self._registry, **more)
            if not labels:
                for engine in self._engines:  # there from the beginning, as 0
                    metric.labels(model, engine)
            return metric

        self._running = made(Gauge, "num_requests_running", "Sequences that run.")
        self._waiting = made(Gauge, "num_requests_waiting", "Sequences that wait.")
        self._kv_usage = made(Gauge, "kv_cache_usage_perc", "Share of the KV cache in use, 0 to 1.")
        self._up = made(Gauge, "engine_up", "1 where the engine takes requests.")
        self._memory = made(
            Gauge, "engine_resident_anonymous_bytes", "RssAnon of the engine's process."
        )
        for engine in self._engines:
            index = int(engine)
            self._memory.labels(model, engine).set_function(
                lambda index=index: _anonymous_bytes(pid(index))
            )
        self._threads = made(Gauge, "threads", "Threads of the engine's kernels.")
        self._prompt_tokens = made(Counter, "prompt_tokens", "Tokens of prompts.")
        self._generation_tokens = made(Counter, "generation_tokens", "Generated tokens.")
        self._prefix_queries = made(
            Counter, "prefix_cache_queries", "Tokens of prompts that were looked for in the cache."
        )
        self._prefix_hits = made(Counter, "prefix_cache_hits", "Those that were there.")
        self._preemptions = made(Counter, "num_preemptions", "Sequences that gave way to others.")
        self._corrupted = made(
            Counter, "corrupted_requests", "Sequences that failed, by NaN logits above all."
        )
        self._stalls = made(Counter, "scheduler_stalls", "Steps beyond the watchdog's time.")
        self._restarts = made(Counter, "engine_deaths", "Ends of the engine's process.")
        self._jit = made(Counter, "jit_kernels_compiled", "Kernels compiled, cached ones not.")
        self._made = made  # for those that are there only where engines speculate
        self._spec_counters: list[Any] = []
        self._spec_per_position: Any = None
        self._success = made(
            Counter, "request_success", "Sequences that ended.", ["finished_reason"]
        )
        for engine in self._engines:
            for reason in FINISH_REASONS:
                self._success.labels(model, engine, reason)

        def seconds(name: str, text: str, buckets: Sequence[float]) -> Any:
            return made(Histogram, name, text, buckets=buckets)

        self._ttft = seconds(
            "time_to_first_token_seconds", "Arrival to first token.", FIRST_TOKEN_SECONDS
        )
        self._itl = seconds("inter_token_latency_seconds", "Between two tokens.", TOKEN_SECONDS)
        self._tpot = seconds(
            "request_time_per_output_token_seconds",
            "Mean of a request's tokens after the first.",
            TOKEN_SECONDS,
        )
        self._e2e = seconds("e2e_request_latency_seconds", "Arrival to end.", REQUEST_SECONDS)
        self._queue = seconds(
            "request_queue_time_seconds", "Arrival to first step.", REQUEST_SECONDS
        )
        self._inference = seconds(
            "request_inference_time_seconds", "First step to end.", REQUEST_SECONDS
        )
        self._prefill = seconds(
            "request_prefill_time_seconds", "First step to first token.", REQUEST_SECONDS
        )
        self._decode = seconds(
            "request_decode_time_seconds", "First token to end.", REQUEST_SECONDS
        )
        self._step_seconds = seconds("engine_step_seconds", "One step.", TOKEN_SECONDS)
        self._request_prompt = seconds("request_prompt_tokens", "Tokens of a prompt.", COUNTS)
        self._request_generation = seconds(
            "request_generation_tokens", "Tokens generated for a prompt.", COUNTS
        )
        self._iteration = seconds(
            "iteration_tokens_total", "Tokens computed in a step.", ITERATION_TOKENS
        )
        self._params_n = seconds("request_params_n", "n.", (1, 2, 5, 10, 20, 50, 100))
        self._params_max_tokens = seconds("request_params_max_tokens", "max_tokens.", COUNTS)
        self._cache_config = Info(
            f"{prefix}:cache_config", "The KV cache.", ["engine"], registry=self._registry
        )

        def plain(kind: Any, name: str, text: str, labels: Sequence[str] = ()) -> Any:
            return kind(name, text, labels, registry=self._registry)

        tasks = plain(Gauge, f"{prefix}:server_tasks", "Tasks of the server's event loop.")
        tasks.set_function(_num_tasks)
        self._rejected = plain(
            Counter, f"{prefix}:request_rejected", "Refused for want of room.", ["reason"]
        )
        for reason in REJECTIONS:
            self._rejected.labels(reason)
        self._disconnects = plain(
            Counter, f"{prefix}:client_disconnects", "Clients that went before the end."
        )
        self._http = plain(
            Counter, "http_requests", "HTTP requests.", ["method", "handler", "status"]
        )

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self._registry)

    # ---- told by engines ----

    def engine_state(self, engine: int, state: State) -> None:
        """An engine has changed, or begins anew."""
        labels = (self._model, self._engines[engine])
        self._up.labels(*labels).set(state is State.READY)
        if state is State.STALLED:
            self._stalls.labels(*labels).inc()
            return
        if state in (State.DOWN, State.FAILED):
            self._restarts.labels(*labels).inc()
        if state is not State.READY:
            self._compiled[engine] = 0
            for gauge in (self._running, self._waiting, self._kv_usage):
                gauge.labels(*labels).set(0)

    def engine_facts(self, engine: int, facts: Mapping[str, Any]) -> None:
        """What a new engine said of itself."""
        self._threads.labels(self._model, self._engines[engine]).set(facts["num_threads"])
        self._count_compiled(engine, facts["num_compiled"])
        if facts["cache_config"]["enable_prefix_caching"]:
            self._shares_beginnings.add(engine)
        self._cache_config.labels(self._engines[engine]).info(
            {name: str(value) for name, value in facts["cache_config"].items()}
        )
        if facts["num_spec_tokens"]:
            self._speculates(engine, facts["num_spec_tokens"])

    def step(self, engine: int, message: Mapping[str, Any]) -> None:
        """A step's frame."""
        labels = (self._model, self._engines[engine])
        load = message["load"]
        self._running.labels(*labels).set(load["num_running"])
        self._waiting.labels(*labels).set(load["num_waiting"])
        self._kv_usage.labels(*labels).set(load["kv_cache_usage"])
        self._count_compiled(engine, message["num_compiled"])
        if "drafts" in message:
            self._count_drafts(engine, message["drafts"])
        if "seconds" in message:
            self._step_seconds.labels(*labels).observe(message["seconds"])
            self._iteration.labels(*labels).observe(load["num_step_tokens"])

    def news(self, engine: int, ticket: Ticket, found: Mapping[str, Any]) -> None:
        """News of a request, as it came through the socket; `ticket.begun` is still as before."""
        labels = (self._model, self._engines[engine])
        _, scheduled, first_token, last_token, finished = found["metrics"]
        num_new = 0
        for one in found["outputs"]:
            num_new += len(one["token_ids"])
            key = ticket, one["index"]
            if one["token_ids"]:
                before = self._last_token.get(key)
                if before is not None:
                    self._itl.labels(*labels).observe(max(0.0, last_token - before))
                self._last_token[key] = last_token
            reason = one.get("finish_reason")
            if reason is not None:
                self._last_token.pop(key, None)
                ticket.num_finished += 1
                self._success.labels(*labels, reason).inc()
                if reason == "error":
                    self._corrupted.labels(*labels).inc()
        self._generation_tokens.labels(*labels).inc(num_new)
        ticket.num_generated += num_new
        if not ticket.begun:
            num_prompt = len(ticket.prompt_token_ids)
            self._prompt_tokens.labels(*labels).inc(num_prompt)
            if engine in self._shares_beginnings:
                self._prefix_queries.labels(*labels).inc(num_prompt)
            self._prefix_hits.labels(*labels).inc(found["num_cached_tokens"])
            if first_token is not None:
                self._ttft.labels(*labels).observe(max(0.0, first_token - ticket.arrival_time))
        if not found["finished"]:
            return
        self._preemptions.labels(*labels).inc(found["num_preemptions"])
        self._request_prompt.labels(*labels).observe(len(ticket.prompt_token_ids))
        self._request_generation.labels(*labels).observe(ticket.num_generated)
        self._params_n.labels(*labels).observe(ticket.num_sequences)
        if ticket.params.max_tokens is not None:
            self._params_max_tokens.labels(*labels).observe(ticket.params.max_tokens)
        self._e2e.labels(*labels).observe(finished - ticket.arrival_time)
        if scheduled is not None:
            self._queue.labels(*labels).observe(max(0.0, scheduled - ticket.arrival_time))
            self._inference.labels(*labels).observe(finished - scheduled)
        if scheduled is not None and first_token is not None:
            self._prefill.labels(*labels).observe(first_token - scheduled)
            self._decode.labels(*labels).observe(finished - first_token)
            after_first = ticket.num_generated - ticket.num_sequences
            if after_first > 0:
                each = (last_token - first_token) / (after_first / ticket.num_sequences)
                self._tpot.labels(*labels).observe(each)

    def dropped(self, engine: int, ticket: Ticket, reason: str) -> None:
        """A request that ended without news: given up ("abort") or lost ("error")."""
        for index in range(ticket.num_sequences):
            self._last_token.pop((ticket, index), None)
        labels = (self._model, self._engines[engine], reason)
        self._success.labels(*labels).inc(ticket.num_sequences - ticket.num_finished)

    # ---- told by HTTP ----

    def rejected(self, reason: str) -> None:
        """A request was refused, for one of REJECTIONS: too many sequences, too many tokens of
        prompts, too many requests of one client, no engine, the end of the server."""
        self._rejected.labels(reason).inc()

    def disconnected(self) -> None:
        """A client went before its answer was complete."""
        self._disconnects.inc()

    def http(self, method: str, handler: str, status: int) -> None:
        """A request was answered. handler: a route's path; anything else would be a label each."""
        self._http.labels(method, handler, str(status)).inc()

    def _speculates(self, engine: int, num_spec_tokens: int) -> None:
        """A new engine does; the counters are vLLM's, and like its are there only then."""
        if not self._spec_counters:
            self._spec_counters = [
                self._made(Counter, f"spec_decode_num_{name}", text)
                for name, text in (
                    ("drafts", "Times that a sequence's step held guesses."),
                    ("draft_tokens", "Guesses."),
                    ("accepted_tokens", "Guesses that were right and kept."),
                )
            ]
            self._spec_per_position = self._made(
                Counter,
                "spec_decode_num_accepted_tokens_per_pos",
                "Of the first, second, ... guess, those that were kept.",
                ["position"],
            )
        labels = (self._model, self._engines[engine])
        for position in range(num_spec_tokens):
            self._spec_per_position.labels(*labels, str(position))
        self._drafts[engine] = [0] * (len(self._spec_counters) + num_spec_tokens)

    def _count_drafts(self, engine: int, totals: list[int]) -> None:
        """totals: since the engine began; see `EngineLoop._state`."""
        labels = (self._model, self._engines[engine])
        counters = [counter.labels(*labels) for counter in self._spec_counters]
        for position in range(len(totals) - len(counters)):
            counters.append(self._spec_per_position.labels(*labels, str(position)))
        for counter, new, old in zip(counters, totals, self._drafts[engine], strict=True):
            counter.inc(new - old)
        self._drafts[engine] = totals

    def _count_compiled(self, engine: int, num_compiled: int) -> None:
        new = num_compiled - self._compiled[engine]
        self._compiled[engine] = num_compiled
        self._jit.labels(self._model, self._engines[engine]).inc(max(0, new))


def _num_tasks() -> float:
    """Of the loop that answers the scrape; 0 outside of one."""
    try:
        return len(asyncio.all_tasks())
    except RuntimeError:
        return 0.0


def _anonymous_bytes(pid: int | None) -> float:
    """RssAnon of a process, as Linux tells it; 0 where it does not."""
    if pid is None:
        return 0.0
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return float(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    return 0.0
