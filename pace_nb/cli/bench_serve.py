"""`pace-nb bench serve`: `vllm bench serve`, its flags, its summary and its JSON.

Knows the flags, and the order of a run: the model's name, its tokenizer, the prompts, the traffic,
the report. Any server with OpenAI's endpoints can be measured; prompts are made with the tokenizer
of the model it names, which must be found here (`--tokenizer`).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import uuid
from contextlib import closing
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pace_nb import env
from pace_nb.cli import options as shared
from pace_nb.cli.serve import DEMO_NAME
from pace_nb.errors import ConfigError, ModelNotFoundError, PaceError

if TYPE_CHECKING:
    from pace_nb.benchmarks.datasets import Sample
    from pace_nb.benchmarks.openai_client import OpenAIClient
    from pace_nb.tokenizer import Tokenizer

BACKENDS = {"openai": "/v1/completions", "vllm": "/v1/completions",
            "openai-chat": "/v1/chat/completions"}  # fmt: skip
DATASETS = ("random", "sharegpt", "burstgpt", "custom")
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty",
            "repetition_penalty")  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """vLLM's, as far as they mean anything here, and `--mode`, `--plot`."""
    number = shared.at_least(1)
    server = parser.add_argument_group("server").add_argument
    server("--backend", "--endpoint-type", choices=BACKENDS, default="openai",
           help="completions, or chats (default: %(default)s)")  # fmt: skip
    server("--base-url", metavar="URL", help="instead of host and port, such as http://a:8000")
    server("--host", default="127.0.0.1", help="default: %(default)s")
    server("--port", type=int, default=8000, help="default: %(default)s")
    server("--endpoint", metavar="PATH", help="default: the backend's")
    server("--header", nargs="*", default=[], metavar="KEY=VALUE",
           help="sent with each request; OPENAI_API_KEY is sent by itself")  # fmt: skip
    server("-m", "--model", metavar="MODEL", help="default: the first of /v1/models")
    server("--served-model-name", metavar="NAME", help="what the server calls it")
    server("--tokenizer", metavar="MODEL", help="directory or hub name (default: the model's)")
    server("--hf-token", metavar="TOKEN", help=argparse.SUPPRESS)
    server("--ready-check-timeout-sec", type=int, default=0, metavar="SECONDS",
           help="wait so long for a first answer (default: do not ask)")  # fmt: skip
    data = parser.add_argument_group("prompts").add_argument
    data("--dataset-name", choices=DATASETS, default="random", help="default: %(default)s")
    data("--dataset-path", type=Path, metavar="FILE", help="of all but random")
    data("--num-prompts", type=number, default=100, metavar="N", help="default: %(default)s")
    data("--seed", type=shared.at_least(0), default=0, help="of prompts and arrivals")
    data("--input-len", type=number, metavar="N", help="the same as --random-input-len")
    data("--output-len", type=number, metavar="N", help="of any dataset but burstgpt")
    data("--random-input-len", type=number, default=128, metavar="N", help="default: %(default)s")
    data("--random-output-len", type=number, default=128, metavar="N", help="default: %(default)s")
    data("--random-range-ratio", type=_ratios, default=(0.0, 0.0), metavar="R",
         help='lengths of 1 - R to 1 + R times that; or {"input": R, "output": R}')  # fmt: skip
    data("--random-prefix-len", type=shared.at_least(0), default=0, metavar="N",
         help="tokens that all prompts begin with")  # fmt: skip
    data("--sharegpt-output-len", type=number, metavar="N", help="instead of the answers' own")
    data("--custom-output-len", type=int, default=256, metavar="N", help="-1: each line's own")
    data("--skip-chat-template", action="store_true", help="of custom")
    data("--disable-shuffle", action="store_true", help="keep the file's order")
    data("--no-oversample", action="store_true", help="fewer requests where the file has fewer")
    traffic = parser.add_argument_group("traffic").add_argument
    traffic("--mode", choices=("realistic", "stress", "throughput"), default="throughput",
            help="what the next two are where they are not given: 1 and 1.0; 4 and 0.25; inf "
            "(default: %(default)s)")  # fmt: skip
    traffic("--request-rate", type=float, metavar="X", help="requests per second; inf: all at once")
    traffic("--burstiness", type=float, metavar="X",
            help="1 is a Poisson process, less comes in bursts")  # fmt: skip
    traffic("--max-concurrency", type=number, metavar="N", help="requests at a time")
    traffic("--self-timed", action="store_true",
            help="burstgpt: at the trace's times, stretched to a --request-rate")  # fmt: skip
    traffic("--num-warmups", type=shared.at_least(0), default=0, metavar="N",
            help="requests that do not count (default: %(default)s)")  # fmt: skip
    sampling = parser.add_argument_group("sampling").add_argument
    for name in SAMPLING:
        sampling(f"--{name.replace('_', '-')}", type=int if name == "top_k" else float, metavar="X")
    sampling("--ignore-eos", action="store_true", help="always so with random")
    sampling("--logprobs", type=int, metavar="N", help="of each token, from completions")
    sampling("--extra-body", type=shared.json_object, default={}, metavar="JSON",
             help="put into each request")  # fmt: skip
    report = parser.add_argument_group("report").add_argument
    report("--percentile-metrics", default="ttft,tpot,itl", metavar="NAMES",
           help="of ttft, tpot, itl, e2el, client_queue_time, e2el_including_client_queue "
           "(default: %(default)s)")  # fmt: skip
    report("--metric-percentiles", type=_percentiles, default=[99.0], metavar="P,P,..",
           help="default: 99")  # fmt: skip
    report("--goodput", nargs="+", type=_limit, default=[], metavar="NAME:MS",
           help="also count the requests within these: ttft, tpot, e2el")  # fmt: skip
    report("--disable-tqdm", action="store_true", help="no progress bar")
    report("--save-result", action="store_true", help="write the JSON")
    report("--save-detailed", action="store_true", help="with each request's times and text")
    report("--append-result", action="store_true", help="as a line more of the file")
    report("--result-dir", type=Path, default=Path(), metavar="DIR", help="made where it is not")
    report("--result-filename", metavar="FILE", help="default: by label, rate, model and time")
    report("--label", metavar="TEXT", help="what this run is called")
    report("--metadata", nargs="*", default=[], metavar="KEY=VALUE", help="put into the JSON")
    report("--request-id-prefix", default=f"bench-{uuid.uuid4().hex[:8]}-", metavar="TEXT")
    report("--plot", type=Path, metavar="FILE",
           help="draw requests, rates and latencies (needs the extra bench)")  # fmt: skip


def _ratios(text: str) -> tuple[float, float]:
    """A number for both, or a JSON object with `input` and `output`."""
    if not text.strip().startswith("{"):
        return float(text), float(text)
    found = shared.json_object(text)
    if found.keys() != {"input", "output"}:
        raise ValueError
    return float(found["input"]), float(found["output"])


def _percentiles(text: str) -> list[float]:
    found = [float(part) for part in text.split(",")]
    if not all(0 <= one <= 100 for one in found):
        raise ValueError
    return found


def _limit(text: str) -> tuple[str, float]:
    from pace_nb.benchmarks.serve_result import GOODPUT_METRICS

    name, _, value = text.partition(":")
    if name not in GOODPUT_METRICS or not float(value) >= 0:
        raise ValueError
    return name, float(value)


_ratios.__name__ = 'number, or {"input": number, "output": number}'
_percentiles.__name__ = "list of numbers from 0 to 100"
_limit.__name__ = "NAME:MS with ttft, tpot or e2el"


def run(options: argparse.Namespace) -> int:
    """Measure, and report; 1 where no request succeeded."""
    from pace_nb.benchmarks import plots
    from pace_nb.benchmarks.serve_result import DETAILS, METRICS

    if unknown := set(options.percentile_metrics.split(",")) - METRICS.keys():
        raise ConfigError(
            f"--percentile-metrics {', '.join(sorted(unknown))}: expected some of "
            f"{', '.join(METRICS)}"
        )
    shared.check_plot(options.plot)
    pairs = {**_pairs("--metadata", options.metadata)}
    headers = _pairs("--header", options.header)
    if (key := env.openai_api_key()) and "authorization" not in map(str.lower, headers):
        headers["Authorization"] = f"Bearer {key}"
    content = {"date": datetime.now().strftime("%Y%m%d-%H%M%S")}
    content |= asyncio.run(_measured(options, headers, pairs))
    if options.plot is not None:
        name = content["model_id"].rpartition("/")[2]
        title = f"{name}: {options.num_prompts} requests, {content['request_rate']} per second"
        if not plots.serving(content, title, options.plot):
            print("no request succeeded: no plot")
    if options.save_result or options.append_result:
        if not options.save_detailed:
            content = {name: value for name, value in content.items() if name not in DETAILS}
        _save(options, content)
    return 0 if content["completed"] else 1


def _pairs(option: str, texts: list[str]) -> dict[str, str]:
    found = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or any(ord(c) < 32 for c in text):
            raise ConfigError(f"{option} {text!r}: expected KEY=VALUE")
        found[name.strip()] = value.strip()
    return found


async def _measured(
    options: argparse.Namespace, headers: dict[str, str], metadata: dict[str, str]
) -> dict[str, Any]:
    """vLLM's JSON of the run that the options describe, but its date."""
    from tqdm import tqdm

    from pace_nb.benchmarks import serve, serve_result
    from pace_nb.benchmarks.openai_client import OpenAIClient

    host = f"[{options.host}]" if ":" in options.host else options.host
    async with OpenAIClient(options.base_url or f"http://{host}:{options.port}", headers) as client:
        name, model = options.served_model_name, options.model
        if model is None:
            name, model = await _first_model(client)
        directory = _tokenizer_directory(options, model)
        from pace_nb.tokenizer import Tokenizer

        with closing(Tokenizer.from_directory(directory)) as tokenizer:
            samples = _samples(options, tokenizer)
            if options.dataset_name == "random":
                samples = await serve.aligned(client, name or model, samples)
            mode = serve.MODES[options.mode]
            rate, burstiness = options.request_rate, options.burstiness
            rate = mode.request_rate if rate is None and not options.self_timed else rate
            burstiness = mode.burstiness if burstiness is None else burstiness
            if options.self_timed:
                rate = math.inf if rate is None else rate
                times = serve.trace_times(samples, rate)
            else:
                times = serve.arrival_times(len(samples), rate, burstiness, options.seed)
            ask = serve.question(
                options.backend,
                name or model,
                path=options.endpoint or BACKENDS[options.backend],
                ignore_eos=options.ignore_eos or options.dataset_name == "random",
                logprobs=options.logprobs,
                extra_body={
                    **{n: v for n in SAMPLING if (v := getattr(options, n)) is not None},
                    **options.extra_body,
                },
            )
            if options.ready_check_timeout_sec:
                await serve.wait_until_ready(
                    client, ask, samples[0], options.ready_check_timeout_sec
                )
            if options.num_warmups:
                again = [samples[0]] * options.num_warmups
                await serve.run(
                    client, ask, again, [0.0] * len(again), max_concurrency=options.max_concurrency,
                    request_id_prefix=f"{options.request_id_prefix}warmup-",
                )  # fmt: skip
            before = await serve_result.read_drafts(client)
            with tqdm(total=len(samples), disable=options.disable_tqdm, unit="requests") as bar:
                answers, duration = await serve.run(
                    client, ask, samples, times, max_concurrency=options.max_concurrency,
                    request_id_prefix=options.request_id_prefix, on_done=bar.update,
                )  # fmt: skip
            for answer in answers:  # a server that tells no usage
                if answer.success and not answer.output_tokens:
                    answer.output_tokens = len(tokenizer.encode(answer.generated_text, False))
            after = await serve_result.read_drafts(client)
        content = serve_result.result(
            answers,
            duration,
            metrics=options.percentile_metrics.split(","),
            percentiles=options.metric_percentiles,
            goodput=dict(options.goodput),
            max_concurrency=options.max_concurrency,
            request_rate=rate,
        )
        content = {
            "endpoint_type": options.backend,
            "backend": options.backend,
            "label": options.label,
            "model_id": model,
            "tokenizer_id": options.tokenizer or model,
            "num_prompts": options.num_prompts,
            **metadata,
            "request_rate": "inf" if math.isinf(rate) else rate,
            "burstiness": burstiness,
            "max_concurrency": options.max_concurrency,
            **content,
            **serve_result.speculation(before, after),
        }
        print("\n".join(serve_result.lines(content, rate)))
        if failures := [error for error in content["errors"] if error]:
            print(f"{len(failures)} requests failed; the first: {failures[0]}")
        return content


async def _first_model(client: OpenAIClient) -> tuple[str, str]:
    """What the server calls its first model, and where that comes from."""
    try:
        found = json.loads(await client.get("/v1/models"))["data"][0]
        return str(found["id"]), str(found.get("root") or found["id"])
    except (ValueError, LookupError, TypeError, AttributeError):
        raise PaceError(
            f"{client.base_url}/v1/models: no model in it; name it by --model"
        ) from None


def _tokenizer_directory(options: argparse.Namespace, model: str) -> Path:
    from pace_nb.models import hub

    name = options.tokenizer or model
    try:
        return hub.resolve(None if name == DEMO_NAME else name, token=options.hf_token)
    except ModelNotFoundError as error:
        raise ConfigError(f"no tokenizer for the prompts: {error} (see --tokenizer)") from error


def _samples(options: argparse.Namespace, tokenizer: Tokenizer) -> list[Sample]:
    from pace_nb.benchmarks import datasets

    name, path, num = options.dataset_name, options.dataset_path, options.num_prompts
    if options.self_timed and name != "burstgpt":
        raise ConfigError("--self-timed: only with --dataset-name burstgpt, whose rows have times")
    if (path is None) != (name == "random"):
        raise ConfigError(
            f"--dataset-name {name}: expected {'no ' if path else 'a '}--dataset-path"
        )
    if name == "random":
        return datasets.random_samples(
            tokenizer,
            num,
            input_len=options.input_len or options.random_input_len,
            output_len=options.output_len or options.random_output_len,
            range_ratio=options.random_range_ratio,
            prefix_len=options.random_prefix_len,
            seed=options.seed,
        )
    if name == "burstgpt":
        return datasets.burstgpt(tokenizer, num, path, timed=options.self_timed, seed=options.seed)
    order: dict[str, Any] = {
        "shuffle": not options.disable_shuffle,
        "oversample": not options.no_oversample,
        "seed": options.seed,
    }
    if name == "sharegpt":
        output_len = options.output_len or options.sharegpt_output_len
        return datasets.sharegpt(tokenizer, num, path, output_len=output_len, **order)
    output_len = options.output_len or options.custom_output_len
    return datasets.custom(
        tokenizer,
        num,
        path,
        output_len=None if output_len == -1 else output_len,
        chat=not options.skip_chat_template,
        **order,
    )


def _save(options: argparse.Namespace, content: dict[str, Any]) -> None:
    """Where vLLM would write it."""
    limit = options.max_concurrency
    name = options.result_filename or (
        f"{options.label or options.backend}-{content['request_rate']}qps"
        f"{'' if limit is None else f'-concurrency{limit}'}-"
        f"{content['model_id'].rpartition('/')[2]}-{content['date']}.json"
    )
    path = options.result_dir / name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(content)
        if options.append_result and path.exists() and path.stat().st_size:
            text = "\n" + text
        with path.open("a" if options.append_result else "w") as stream:
            stream.write(text)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    print(f"written to {path}")
