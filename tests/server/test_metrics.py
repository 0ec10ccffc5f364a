"""Metrics: vLLM's names, counted once, from what engines say."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import pytest

from pace_nb.sampling_params import SamplingParams
from pace_nb.server.engine_client import State
from pace_nb.server.metrics import Metrics

# What vLLM's own dashboards ask for (vllm 0.31, docs/usage/metrics), as far as it exists here.
VLLM_NAMES = """
num_requests_running num_requests_waiting kv_cache_usage_perc prefix_cache_queries_total
prefix_cache_hits_total num_preemptions_total prompt_tokens_total generation_tokens_total
request_success_total time_to_first_token_seconds_bucket inter_token_latency_seconds_bucket
request_time_per_output_token_seconds_bucket e2e_request_latency_seconds_bucket
request_queue_time_seconds_bucket request_inference_time_seconds_bucket
request_prefill_time_seconds_bucket request_decode_time_seconds_bucket request_prompt_tokens_bucket
request_generation_tokens_bucket iteration_tokens_total_bucket request_params_n_bucket
request_params_max_tokens_bucket corrupted_requests_total
""".split()


@pytest.fixture
def metrics():
    made = Metrics("pace_nb", "demo", 2, lambda index: None)
    made.engine_facts(0, facts())
    return made


def facts(num_spec_tokens=0):
    return {
        "num_threads": 3, "num_compiled": 4, "cache_config": {"enable_prefix_caching": True},
        "num_spec_tokens": num_spec_tokens,
    }  # fmt: skip


def value(metrics, name, engine="0", **labels):
    wanted = {"engine": engine, "model_name": "demo", **labels}
    for line in metrics.text().decode().splitlines():
        match = re.fullmatch(r"(\S+?)\{(.*)\} (\S+)", line)
        if match and match[1] == name:
            found = dict(pair.split("=") for pair in match[2].replace('"', "").split(","))
            if found == wanted:
                return float(match[3])
    raise KeyError(name)


def ticket(**options):
    plain = {
        "arrival_time": 10.0, "prompt_token_ids": [1] * 7, "params": SamplingParams(max_tokens=9),
        "num_sequences": 1, "begun": False, "num_generated": 0, "num_finished": 0,
    }  # fmt: skip
    return SimpleNamespaceHash(**{**plain, **options})


class SimpleNamespaceHash(SimpleNamespace):
    __hash__ = object.__hash__


def news(times, *outputs, finished=False, **more):
    return {
        "outputs": list(outputs), "finished": finished, "num_cached_tokens": 3, "metrics": times,
        "num_preemptions": 2, **more,
    }  # fmt: skip


def test_vllms_names_are_there_from_the_beginning():
    text = Metrics("vllm", "demo", 1, lambda index: None).text().decode()
    names = {line.partition("{")[0] for line in text.splitlines() if not line.startswith("#")}
    assert {f"vllm:{name}" for name in VLLM_NAMES} <= names


def test_buckets_reach_minutes():
    text = Metrics("p", "demo", 1, lambda index: None).text().decode()
    for name, least in [("time_to_first_token_seconds", 600), ("inter_token_latency_seconds", 10),
                        ("e2e_request_latency_seconds", 3600)]:  # fmt: skip
        bounds = re.findall(rf'p:{name}_bucket\{{.*le="([\d.]+)"', text)
        assert max(map(float, bounds)) >= least


def test_a_request_is_counted_once_and_by_its_own_clock(metrics):
    one = ticket()
    first = {"index": 0, "token_ids": [5]}
    metrics.news(0, one, news([10.0, 11.0, 12.5, 12.5, None], first))
    one.begun = True
    metrics.news(0, one, news([10.0, 11.0, 12.5, 13.0, None], {"index": 0, "token_ids": [6]}))
    last = {"index": 0, "token_ids": [7, 8], "finish_reason": "length"}
    metrics.news(0, one, news([10.0, 11.0, 12.5, 14.0, 14.5], last, finished=True))
    for name, expected in {
        "prompt_tokens_total": 7, "generation_tokens_total": 4, "prefix_cache_queries_total": 7,
        "prefix_cache_hits_total": 3, "num_preemptions_total": 2,
        "time_to_first_token_seconds_sum": 2.5, "inter_token_latency_seconds_sum": 1.5,
        "inter_token_latency_seconds_count": 2, "e2e_request_latency_seconds_sum": 4.5,
        "request_queue_time_seconds_sum": 1.0, "request_inference_time_seconds_sum": 3.5,
        "request_prefill_time_seconds_sum": 1.5, "request_decode_time_seconds_sum": 2.0,
        "request_time_per_output_token_seconds_sum": 0.5, "request_prompt_tokens_sum": 7,
        "request_generation_tokens_sum": 4, "request_params_n_sum": 1,
        "request_params_max_tokens_sum": 9, "corrupted_requests_total": 0,
    }.items():  # fmt: skip
        assert value(metrics, f"pace_nb:{name}") == expected, name
    assert value(metrics, "pace_nb:request_success_total", finished_reason="length") == 1
    assert value(metrics, "pace_nb:prompt_tokens_total", engine="1") == 0
    assert not metrics._last_token


def test_what_fails_and_what_is_given_up(metrics):
    one = ticket(num_sequences=3)
    failed = {"index": 0, "token_ids": [], "finish_reason": "error"}
    running = {"index": 1, "token_ids": [5]}
    metrics.news(0, one, news([10.0, 11.0, 12.0, 12.0, None], failed, running))
    metrics.dropped(0, one, "abort")
    assert value(metrics, "pace_nb:corrupted_requests_total") == 1
    assert value(metrics, "pace_nb:request_success_total", finished_reason="error") == 1
    assert value(metrics, "pace_nb:request_success_total", finished_reason="abort") == 2
    assert not metrics._last_token


def test_states_and_steps(metrics):
    load = {"num_running": 3, "num_waiting": 2, "kv_cache_usage": 0.5, "num_step_tokens": 40}
    metrics.engine_state(0, State.READY)
    metrics.step(0, {"load": load, "num_compiled": 6, "seconds": 0.2})
    assert value(metrics, "pace_nb:num_requests_running") == 3
    assert value(metrics, "pace_nb:kv_cache_usage_perc") == 0.5
    assert value(metrics, "pace_nb:iteration_tokens_total_sum") == 40
    assert value(metrics, "pace_nb:engine_up") == 1
    assert value(metrics, "pace_nb:jit_kernels_compiled_total") == 6
    metrics.engine_state(0, State.STALLED)
    assert value(metrics, "pace_nb:scheduler_stalls_total") == 1
    assert value(metrics, "pace_nb:engine_up") == 0
    metrics.engine_state(0, State.DOWN)
    assert value(metrics, "pace_nb:num_requests_running") == 0
    assert value(metrics, "pace_nb:engine_deaths_total") == 1
    metrics.step(0, {"load": load, "num_compiled": 2})  # another process, which compiled two
    assert value(metrics, "pace_nb:jit_kernels_compiled_total") == 8


def test_guesses_are_counted_where_an_engine_speculates(metrics):
    assert b"spec_decode" not in metrics.text()  # as in vLLM
    metrics.engine_facts(1, facts(num_spec_tokens=3))
    load = {"num_running": 1, "num_waiting": 0, "kv_cache_usage": 0.5, "num_step_tokens": 4}

    def step(*drafts):
        metrics.step(1, {"load": load, "num_compiled": 4, "drafts": list(drafts)})

    def counted():
        names = ("drafts", "draft_tokens", "accepted_tokens")
        prefix = "pace_nb:spec_decode_num"
        return [value(metrics, f"{prefix}_{name}_total", engine="1") for name in names] + [
            value(metrics, f"{prefix}_accepted_tokens_per_pos_total", engine="1", position=str(i))
            for i in range(3)
        ]

    assert counted() == [0] * 6
    step(1, 3, 2, 1, 1, 0)
    step(4, 12, 6, 4, 1, 1)
    assert counted() == [4, 12, 6, 4, 1, 1]
    metrics.engine_facts(1, facts(num_spec_tokens=3))  # a new process counts from 0
    step(1, 3, 3, 1, 1, 1)
    assert counted() == [5, 15, 9, 5, 2, 2]
    assert value(metrics, "pace_nb:spec_decode_num_drafts_total", engine="0") == 0


def test_a_server_that_speculates_says_how_well(drafting):
    """In vLLM's names, for what bench serve and the page make of them."""
    before = drafting.metrics()
    answer = drafting.complete(max_tokens=40).json()
    after = drafting.metrics()
    new = {name: after[name] - before[name] for name in after if "spec_decode" in name}
    drafts = new["vllm:spec_decode_num_drafts_total"]
    accepted = new["vllm:spec_decode_num_accepted_tokens_total"]
    guesses = new["vllm:spec_decode_num_draft_tokens_total"]
    assert 6 * (drafts - 1) < guesses <= 6 * drafts  # none beyond max_tokens
    positions = [
        new[f'vllm:spec_decode_num_accepted_tokens_per_pos_total{{position="{i}"}}']
        for i in range(6)
    ]
    assert sum(positions) == accepted > 0
    assert positions == sorted(positions, reverse=True) and positions[0] <= drafts
    # each step with guesses gave one token more than were kept; the first came from the prompt
    assert drafts + accepted >= answer["usage"]["completion_tokens"] - 1 == 39


def test_real_requests_are_counted(server):
    before = server.metrics()
    server.complete(["Once", "The"], max_tokens=3, n=2, temperature=1.0, ignore_eos=True)
    server.complete(model="nope")
    after = server.metrics()

    def new(name):
        return after[name] - before.get(name, 0.0)

    assert new("pace_nb:generation_tokens_total") == 12
    assert new("pace_nb:time_to_first_token_seconds_count") == 2
    assert new('pace_nb:request_success_total{finished_reason="length"}') == 4
    assert new("pace_nb:request_params_n_sum") == 4
    labels = 'handler="/v1/completions",method="POST",status="{}"'
    assert new(f"http_requests_total{{{labels.format(200)}}}") == 1
    assert new(f"http_requests_total{{{labels.format(404)}}}") == 1
    assert after["pace_nb:engine_resident_anonymous_bytes"] > 10 * 2**20
    server.get("/some/path/that/is/not/there")
    assert "/some/path" not in json.dumps(server.metrics())


# ---- docs/monitoring ---------------------------------------------------------------------------
def queries(dashboard):
    """Every PromQL expression of a dashboard."""
    if isinstance(dashboard, dict):
        for key, value in dashboard.items():
            if key in ("expr", "query") and isinstance(value, str):
                yield value
            else:
                yield from queries(value)
    elif isinstance(dashboard, list):
        for item in dashboard:
            yield from queries(item)


def test_every_query_of_the_dashboard_names_a_metric_that_is_exported(drafting, repository):
    drafting.complete(max_tokens=2)
    exported = set()
    for line in drafting.get("/metrics").body.decode().splitlines():
        if not line.startswith("#"):
            exported.add(re.split(r"[{ ]", line)[0].replace("vllm:", "pace_nb:"))
    dashboard = json.loads((repository / "docs/monitoring/grafana/pace_nb.json").read_text())
    asked = set()
    for query in queries(dashboard["panels"] + dashboard["templating"]["list"]):
        plain = re.sub(r'"[^"]*"|\{[^}]*\}|\[[^\]]*\]|by \([^)]*\)', "", query)
        names = set(re.findall(r"\b(?:pace_nb:|process_|http_)\w+", plain))
        assert names or query == "prometheus", query
        asked |= names
    assert asked <= exported, sorted(asked - exported)
    assert len(asked) > 30


def test_prometheus_and_grafana_find_each_other(repository):
    """The files of docs/monitoring name each other rightly; they are not started here."""
    folder = repository / "docs" / "monitoring"
    compose = (folder / "compose.yaml").read_text()
    for mounted in re.findall(r"- (\./\S+?):/", compose):
        assert (folder / mounted).is_file(), mounted
    scraped = re.search(r'targets: \["127.0.0.1:(\d+)"\]', (folder / "prometheus.yml").read_text())
    assert scraped[1] == "8000"
    assert "web.listen-address=127.0.0.1:9090" in compose
    assert "url: http://127.0.0.1:9090" in (folder / "grafana" / "datasource.yml").read_text()
