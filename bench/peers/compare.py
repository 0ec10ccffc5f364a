"""pace_nb and its peers on one checkpoint, in turn, and how they compare.

    python -m bench.peers.compare /tmp/ck/llama-3.2-1b                  # everything
    python -m bench.peers.compare /tmp/ck/llama-3.2-1b --cases decode --engines pace_nb llama-cpp

Knows the cases, their definitions (vLLM's) and the ratios. Every engine is one process that lives
through all rounds; a round asks each engine once, while the others are stopped, so all meet the
same neighbours. A ratio is the median over rounds of the ratio within a round; above 1 pace_nb is
better.

    prefill L      L / time to the first token, one prompt of L random tokens
    decode B       B tokens per step, first token excluded: (time of 25 tokens - time of 1) / 24,
                   prompts of 16 tokens
    throughput     prompt and generated tokens / time, 32 requests of 128 in and 64 out together
    startup        from process start to ready and to the first token after 128; peak RSS then;
                   with the page cache and each engine's compile cache warm

Results go to bench/results/peers.json, case by case: a run replaces the cases that it measured.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from bench import timing
from bench.peers import engines, install, to_gguf
from bench.peers.engines import Engine
from bench.peers.protocol import Case

SHORT, DECODED = 16, 24  # tokens of a prompt before decoding is timed; tokens that are timed
QUIET = 0.1  # CPUs that others may use during a measurement, on average
PATIENCE = 3  # times as many rounds, until the least disturbed ones count
ATTEMPTS = 3  # at a measurement that a neighbour made senseless
GB = 1e9


class Asked(Protocol):
    """What a measurement needs of an engine."""

    def ask(self, case: Case) -> float: ...


class Measurement(NamedTuple):
    """One line of the table. `measure(engine, seed)` gives the value."""

    case: str
    unit: str
    measure: Callable[[Asked, int], float]


def prefill(length: int) -> Measurement:
    return Measurement(
        f"prefill {length}", "tok/s", lambda e, seed: length / e.ask(Case(1, length, 1, seed))
    )


def decode(batch: int) -> Measurement:
    def measure(engine: Asked, seed: int) -> float:
        for _ in range(ATTEMPTS):
            one = engine.ask(Case(batch, SHORT, 1, seed))
            many = engine.ask(Case(batch, SHORT, 1 + DECODED, seed + 1))
            if many > one:
                return batch * DECODED / (many - one)
        raise RuntimeError(f"decode batch {batch}: the machine is too busy, 1 token took longer")

    return Measurement(f"decode batch {batch}", "tok/s", measure)


def throughput(requests: int, input_len: int, output_len: int) -> Measurement:
    tokens = requests * (input_len + output_len)
    return Measurement(
        f"throughput {requests} x {input_len}+{output_len}",
        "tok/s",
        lambda e, seed: tokens / e.ask(Case(requests, input_len, output_len, seed)),
    )


CASES = {
    "prefill": [prefill(128), prefill(1024)],
    "decode": [decode(1), decode(8), decode(32)],
    "throughput": [throughput(32, 128, 64)],
}
STARTUP = (("start to ready", "s"), ("start to first token", "s"), ("peak RSS", "GB"))

Rounds = dict[str, list[float]]
"""Engine -> its value in each round."""


class Turn(NamedTuple):
    """One engine's measurement in one round. disturbed: CPUs that others used meanwhile."""

    value: float
    disturbed: float


Round = dict[str, Turn]


def measured(engine: Engine, measurement: Measurement, seeds: itertools.count[int]) -> Turn:
    """One turn: the engine goes on, is woken, measured and stopped again."""
    engine.resume()
    engine.ask(Case(1, SHORT, 2, next(seeds)))  # wakes its threads
    start, own = time.perf_counter(), engine.cpu_seconds()
    everybody = engines.machine_cpu_seconds()
    value = measurement.measure(engine, next(seeds) * 2)
    others = engines.machine_cpu_seconds() - everybody - (engine.cpu_seconds() - own)
    seconds = time.perf_counter() - start
    engine.pause()
    return Turn(value, max(others, 0.0) / seconds)


def worst(turns: Round) -> float:
    """The largest disturbance of a round."""
    return max(turn.disturbed for turn in turns.values())


def interleave(
    running: Mapping[str, Engine],
    measurement: Measurement,
    rounds: int,
    seeds: itertools.count[int],
    around: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> list[Round]:
    """So many rounds, in each of which every engine has its turn, after one unmeasured round.

    A round in which others used the machine is done again, up to PATIENCE times as many in all;
    then the least disturbed ones count. A stray process on one of two cores halves every engine's
    rate, and some more than others. `around()` is entered for each round: on a machine that others
    use, something that keeps them quiet meanwhile.
    """
    done: list[Round] = []
    while len(done) <= PATIENCE * rounds:
        with around():
            done.append({n: measured(e, measurement, seeds) for n, e in running.items()})
        if sum(worst(turns) < QUIET for turns in done[1:]) == rounds:
            break
    kept = sorted(range(1, len(done)), key=lambda index: worst(done[index]))[:rounds]
    return [done[index] for index in sorted(kept)]


def compared(case: str, unit: str, rounds: Rounds) -> dict[str, Any]:
    """One case of the result: medians, bests, and the ratios of pace_nb to each peer and the best.

    Units of rates are better when higher, s, ms and GB when lower.
    """
    higher = unit not in ("s", "ms", "GB")
    best = max if higher else min

    def ratio(ours: float, theirs: float) -> float:
        return ours / theirs if higher else theirs / ours

    row: dict[str, Any] = {
        "case": case,
        "unit": unit,
        "rounds": rounds,
        "median": {name: statistics.median(values) for name, values in rounds.items()},
        "best": {name: best(values) for name, values in rounds.items()},
    }
    peers = [name for name in rounds if name != "pace_nb"]
    if "pace_nb" not in rounds or not peers:
        return row
    ours = rounds["pace_nb"]
    theirs = {name: rounds[name] for name in peers}
    theirs["best peer"] = [best(turn) for turn in zip(*(rounds[n] for n in peers), strict=True)]
    row["ratio"] = {
        name: statistics.median(map(ratio, ours, values)) for name, values in theirs.items()
    }
    row["ratio_of_bests"] = {
        name: ratio(best(ours), best(values)) for name, values in theirs.items()
    }
    return row


def merged(old: Mapping[str, Any] | None, new: Mapping[str, Any]) -> dict[str, Any]:
    """`new` with the engines and cases of `old` that it does not replace, in the table's order."""
    if old is None:
        return dict(new)
    order = [m.case for group in CASES.values() for m in group] + [case for case, _ in STARTUP]
    rows = {row["case"]: row for row in [*old["cases"], *new["cases"]]}
    known = sorted(rows, key=lambda case: order.index(case) if case in order else len(order))
    return {
        **new,
        "engines": {**old["engines"], **new["engines"]},
        "cases": [rows[case] for case in known],
    }


def record(path: Path, checkpoint: str, result: Mapping[str, Any], cpus: Sequence[int]) -> None:
    """Merge the result into the file, and print its cases."""
    facts = timing.machine(len(cpus)) | {"date": time.strftime("%Y-%m-%d %H:%M", time.gmtime())}
    new = {"bench": "peers", "machine": facts, "checkpoint": checkpoint, **result}
    old = json.loads(path.read_text()) if path.exists() else None
    if old is not None and old["checkpoint"] != checkpoint:
        old = None
    path.write_text(json.dumps(merged(old, new), indent=1) + "\n")
    for row in result["cases"]:
        values = "  ".join(f"{name} {value:.4g}" for name, value in row["median"].items())
        ratios = "  ".join(f"{name} {value:.2f}" for name, value in row.get("ratio", {}).items())
        print(f"{row['case']:<24} {row['unit']:<5}  {values}  |  ratio to  {ratios}")
        if max(row.get("disturbed", [0.0])) >= QUIET:
            print(f"  others used up to {max(row['disturbed']):.2f} CPUs meanwhile")


class Comparison:
    """The engines of one comparison: started one after the other, then asked in turn."""

    def __init__(
        self,
        names: Sequence[str],
        checkpoint: Path,
        gguf: Path,
        folder: Path,
        cpus: list[int],
        nice: int = 0,
    ) -> None:
        self._launches = {n: engines.launch(n, checkpoint, gguf, folder, cpus) for n in names}
        self._nice = nice
        self._logs = Path(tempfile.mkdtemp(prefix="peers-"))
        self.running: dict[str, Engine] = {}
        self._seeds = itertools.count(1)
        self._stack = ExitStack()

    def start(self) -> None:
        """Start every engine and leave it stopped."""
        for name in self._launches:
            self.start_one(name)

    def start_one(self, name: str) -> None:
        log = self._logs / f"{name}.log"
        engine = Engine(name, self._launches[name], log, self._nice)
        self.running[name] = self._stack.enter_context(engine)
        engine.ask(Case(1, SHORT, 2))
        engine.pause()

    def measure(
        self,
        measurements: Sequence[Measurement],
        rounds: int,
        around: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> dict[str, Any]:
        """Engines and cases of a result. around: as for `interleave`."""
        rows = []
        for m in measurements:
            done = interleave(self.running, m, rounds, self._seeds, around)
            values = {name: [turns[name].value for turns in done] for name in self.running}
            disturbed = [worst(turns) for turns in done]
            rows.append(compared(m.case, m.unit, values) | {"disturbed": disturbed})
        return {
            "engines": {name: engine.facts for name, engine in self.running.items()},
            "cases": rows,
        }

    def startup(
        self, rounds: int, around: Callable[[], AbstractContextManager[object]] = nullcontext
    ) -> dict[str, Any]:
        """The same for processes that are started for it, one at a time, after a start unmeasured.

        Nothing else may run: `close` comes before. `around()` is entered for each start.
        """
        values: dict[str, Rounds] = {
            case: {name: [] for name in self._launches} for case, _ in STARTUP
        }
        facts = {}
        for turn in range(rounds + 1):
            for name, launch in self._launches.items():
                log = self._logs / f"{name}.log"
                with around(), Engine(name, launch, log, self._nice) as engine:
                    engine.ask(Case(1, 128, 1, next(self._seeds)))
                    first = time.perf_counter() - engine.started
                    facts[name] = engine.facts
                    if turn:
                        found = engine.ready_seconds, first, engine.peak_rss() / GB
                        for (case, _), value in zip(STARTUP, found, strict=True):
                            values[case][name].append(value)
        rows = [compared(case, unit, values[case]) for case, unit in STARTUP]
        return {"engines": facts, "cases": rows}

    def close(self) -> None:
        """End the engines."""
        self._stack.close()
        self.running.clear()


def gguf_of(checkpoint: Path) -> Path:
    """The checkpoint as GGUF beside its directory, written where it is not there yet."""
    path = checkpoint.with_name(f"{checkpoint.name}.gguf")
    if not path.exists():
        partial = path.with_suffix(".partial")
        to_gguf.convert(checkpoint, partial)
        partial.rename(path)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="made by bench.make_checkpoint llama-3.2-1b")
    parser.add_argument("--engines", nargs="+", choices=engines.NAMES, default=engines.NAMES)
    groups = [*CASES, "startup"]
    parser.add_argument("--cases", nargs="+", choices=groups, default=groups)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--nice", type=int, default=0, help="of all engines; -20 goes first")
    parser.add_argument("--folder", type=Path, default=install.default_folder())
    parser.add_argument("--output", type=Path, default=timing.RESULTS / "peers.json")
    options = parser.parse_args()
    checkpoint = options.checkpoint.resolve()
    cpus = sorted(os.sched_getaffinity(0))
    gguf = gguf_of(checkpoint) if "llama-cpp" in options.engines else checkpoint
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # stopped engines would stay for ever
    comparison = Comparison(options.engines, checkpoint, gguf, options.folder, cpus, options.nice)
    try:
        if "startup" in options.cases:
            result = comparison.startup(options.rounds)
            record(options.output, checkpoint.name, result, cpus)
        chosen = [m for group in options.cases if group in CASES for m in CASES[group]]
        if chosen:
            comparison.start()
            for measurement in chosen:
                result = comparison.measure([measurement], options.rounds)
                record(options.output, checkpoint.name, result, cpus)
    finally:
        comparison.close()


if __name__ == "__main__":
    main()
