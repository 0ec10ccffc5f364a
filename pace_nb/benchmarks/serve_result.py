"""What is reported of a serving benchmark: vLLM's metrics, its JSON keys and its summary.

Knows answers with their times, and the counters of a server that speculates. Sends nothing but for
those. Milliseconds where a key ends with `_ms`, seconds elsewhere.

    ttft    sending to first token                       tpot   (latency - ttft) / (tokens - 1)
    itl     one event with tokens to the next            e2el   sending to last token
    request_throughput    requests that succeeded / duration
    output_throughput     their generated tokens / duration
    duration              first request sent to last answer ended

Source: vllm/benchmarks/serve.py of vLLM 0.32.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np

from pace_nb.benchmarks.openai_client import Answer, OpenAIClient
from pace_nb.errors import PaceError

METRICS: Final = {
    "ttft": ("TTFT", "Time to First Token"),
    "tpot": ("TPOT", "Time per Output Token (excl. 1st token)"),
    "itl": ("ITL", "Inter-token Latency"),
    "e2el": ("E2EL", "End-to-end Latency"),
    "client_queue_time": ("Client Queue Time", "Client-side Queueing"),
    "e2el_including_client_queue": (
        "E2EL incl. Client Queue",
        "Queue-inclusive End-to-end Latency",
    ),
}
GOODPUT_METRICS: Final = ("ttft", "tpot", "e2el")
DETAILS: Final = (
    "input_lens", "output_lens", "start_times", "ttfts", "itls", "generated_texts", "errors",
)  # fmt: skip


def result(
    answers: Sequence[Answer],
    duration: float,
    *,
    metrics: Sequence[str] = ("ttft", "tpot", "itl"),
    percentiles: Sequence[float] = (99.0,),
    goodput: Mapping[str, float] | None = None,
    max_concurrency: int | None = None,
    request_rate: float = math.inf,
) -> dict[str, Any]:
    """vLLM's JSON of a run, DETAILS and all.

    goodput: most milliseconds of a good request, by GOODPUT_METRICS.
    """
    good = [one for one in answers if one.success]
    lengths = [one.output_tokens if one.success else 0 for one in answers]
    total_input = sum(one.prompt_len for one in good)
    total_output = sum(lengths)
    tpots = [_tpot(one) for one in good]
    values = {
        "ttft": [one.ttft for one in good],
        "tpot": [tpot for tpot, one in zip(tpots, good, strict=True) if one.output_tokens > 1],
        "itl": [gap for one in good for gap in one.itl],
        "e2el": [one.latency for one in good],
    }
    if max_concurrency is not None:
        values["client_queue_time"] = [one.queue_time for one in good]
        if not math.isinf(request_rate):
            values["e2el_including_client_queue"] = [one.latency + one.queue_time for one in good]
    num_good = None
    if goodput:
        each = {"ttft": values["ttft"], "tpot": tpots, "e2el": values["e2el"]}
        limits = [(each[name], most / 1000) for name, most in goodput.items()]
        num_good = sum(all(v[i] <= most for v, most in limits) for i in range(len(good)))
    peak_tokens, peak_requests = _peaks(good)
    content: dict[str, Any] = {
        "duration": duration,
        "completed": len(good),
        "failed": len(answers) - len(good),
        "total_input_tokens": total_input,
        "total_output_tokens": total_output,
        "request_throughput": len(good) / duration,
        "request_goodput": None if num_good is None else num_good / duration,
        "output_throughput": total_output / duration,
        "total_token_throughput": (total_input + total_output) / duration,
        "input_lens": [one.prompt_len for one in answers],
        "output_lens": lengths,
        "ttfts": [one.ttft for one in answers],
        "itls": [one.itl for one in answers],
        "latencies": [one.latency for one in answers],
        "start_times": [one.start_time for one in answers],
        "queue_times": [one.queue_time for one in answers],
        "generated_texts": [one.generated_text for one in answers],
        "errors": [one.error for one in answers],
        "max_output_tokens_per_s": peak_tokens,
        "max_concurrent_requests": peak_requests,
        "rtfx": 0.0,  # of audio
    }
    for name in METRICS:
        if name in metrics and name in values:
            milliseconds = 1000 * np.array(values[name] or [0.0])
            content[f"mean_{name}_ms"] = float(milliseconds.mean())
            content[f"median_{name}_ms"] = float(np.median(milliseconds))
            content[f"std_{name}_ms"] = float(milliseconds.std())
            for percentile in percentiles:
                found = float(np.percentile(milliseconds, percentile))
                content[f"p{percentile:g}_{name}_ms"] = found
    return content


def _tpot(answer: Answer) -> float:
    return (answer.latency - answer.ttft) / max(1, answer.output_tokens - 1)


def _peaks(good: Sequence[Answer]) -> tuple[float, int]:
    """The most events with tokens, and requests, of any second since the first request."""
    if not good:
        return 0.0, 0
    start = min(one.start_time for one in good)
    seconds = math.ceil(max(one.start_time + one.latency for one in good) - start) + 1
    tokens, requests = np.zeros(seconds), np.zeros(seconds, dtype=int)
    for one in good:
        begin = one.start_time - start
        times = begin + one.ttft + np.cumsum([0.0, *one.itl])
        np.add.at(tokens, times.astype(int), 1)
        requests[int(begin) : int(begin + one.latency) + 1] += 1
    return float(tokens.max()), int(requests.max())


def lines(content: Mapping[str, Any], request_rate: float = math.inf) -> list[str]:
    """vLLM's summary of `result`."""

    def line(name: str, value: float) -> str:
        return (
            f"{name:<40} {value:<10.2f}" if isinstance(value, float) else f"{name:<40} {value:<10}"
        )

    found = [
        f"{' Serving Benchmark Result ':=^50}",
        line("Successful requests:", content["completed"]),
        line("Failed requests:", content["failed"]),
    ]
    if content.get("max_concurrency") is not None:
        found.append(line("Maximum request concurrency:", content["max_concurrency"]))
    if not math.isinf(request_rate):
        found.append(line("Request rate configured (RPS):", request_rate))
    found += [
        line("Benchmark duration (s):", content["duration"]),
        line("Total input tokens:", content["total_input_tokens"]),
        line("Total generated tokens:", content["total_output_tokens"]),
        line("Request throughput (req/s):", content["request_throughput"]),
    ]
    if content["request_goodput"] is not None:
        found.append(line("Request goodput (req/s):", content["request_goodput"]))
    found += [
        line("Output token throughput (tok/s):", content["output_throughput"]),
        line("Peak output token throughput (tok/s):", content["max_output_tokens_per_s"]),
        line("Peak concurrent requests:", float(content["max_concurrent_requests"])),
        line("Total token throughput (tok/s):", content["total_token_throughput"]),
    ]
    for name, (short, title) in METRICS.items():
        if f"mean_{name}_ms" in content:
            found.append(f"{title:-^50}")
            found.append(line(f"Mean {short} (ms):", content[f"mean_{name}_ms"]))
            found.append(line(f"Median {short} (ms):", content[f"median_{name}_ms"]))
            for key, value in content.items():
                if percentile := re.fullmatch(rf"p([\d.]+)_{name}_ms", key):
                    found.append(line(f"P{percentile[1]} {short} (ms):", value))
    if "spec_decode_num_drafts" in content:
        found.append(f"{'Speculative Decoding':-^50}")
        found.append(line("Acceptance rate (%):", content["spec_decode_acceptance_rate"]))
        found.append(line("Acceptance length:", content["spec_decode_acceptance_length"]))
        found.append(line("Drafts:", content["spec_decode_num_drafts"]))
        found.append(line("Draft tokens:", content["spec_decode_draft_tokens"]))
        found.append(line("Accepted tokens:", content["spec_decode_accepted_tokens"]))
        found.append("Per-position acceptance (%):")
        rates = content["spec_decode_per_position_acceptance_rates"]
        found += [line(f"  Position {i}:", 100 * rate) for i, rate in enumerate(rates)]
    return [*found, "=" * 50]


# ---- speculation, as the server counts it ----------------------------------------------------


class Drafts(NamedTuple):
    """Counters of a server's /metrics: drafts, their tokens, those accepted, and by place."""

    num_drafts: int
    num_draft_tokens: int
    num_accepted_tokens: int
    per_position: dict[int, int]


async def read_drafts(client: OpenAIClient) -> Drafts | None:
    """None where the server does not speculate or has no /metrics."""
    try:
        text = (await client.get("/metrics")).decode("utf-8", "replace")
    except PaceError:
        return None
    counted: dict[str, int] = {}
    per_position: dict[int, int] = {}
    for line in text.splitlines():
        match = re.fullmatch(r"\w+:spec_decode_num_(\w+)_total(?:\{(.*)\})? (\S+)", line)
        if match is None:
            continue
        name, labels, value = match[1], match[2] or "", int(float(match[3]))
        place = re.search(r'position="(\d+)"', labels)
        if place is not None:
            per_position[int(place[1])] = per_position.get(int(place[1]), 0) + value
        else:
            counted[name] = counted.get(name, 0) + value
    if not counted:
        return None
    names = ("drafts", "draft_tokens", "accepted_tokens")
    drafts, tokens, accepted = (counted.get(name, 0) for name in names)
    return Drafts(drafts, tokens, accepted, per_position)


def speculation(before: Drafts | None, after: Drafts | None) -> dict[str, Any]:
    """vLLM's keys of what was drafted in between; {} where nothing was."""
    if before is None or after is None:
        return {}
    drafts = after.num_drafts - before.num_drafts
    tokens = after.num_draft_tokens - before.num_draft_tokens
    accepted = after.num_accepted_tokens - before.num_accepted_tokens
    if drafts <= 0 or tokens <= 0:
        return {}
    return {
        "spec_decode_acceptance_rate": 100 * accepted / tokens,
        "spec_decode_acceptance_length": 1 + accepted / drafts,
        "spec_decode_num_drafts": drafts,
        "spec_decode_draft_tokens": tokens,
        "spec_decode_accepted_tokens": accepted,
        "spec_decode_per_position_acceptance_rates": [
            (count - before.per_position.get(place, 0)) / drafts
            for place, count in sorted(after.per_position.items())
        ],
    }
