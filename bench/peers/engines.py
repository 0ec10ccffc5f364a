"""`Engine`: a runner's process, asked one case at a time and stopped while others are timed.

Knows how each engine is started: its interpreter, arguments and environment. Does not know what is
measured. A stopped process (SIGSTOP) neither spins in OpenMP's barriers nor takes a core; its
memory stays.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from bench.peers import install
from bench.peers.protocol import Case

ROOT = Path(__file__).resolve().parent.parent.parent
NAMES = ("pace_nb", *install.PEERS)
TICKS = os.sysconf("SC_CLK_TCK")


class Launch(NamedTuple):
    """How an engine is started."""

    command: list[str]
    environment: dict[str, str]  # beside what is there


def launch(name: str, checkpoint: Path, gguf: Path, folder: Path, cpus: list[int]) -> Launch:
    """The command and variables of engine `name`, one of NAMES, with one thread per CPU."""
    if name == "pace_nb":
        arguments = [checkpoint, len(cpus)]
        return Launch([sys.executable, "-m", "bench.peers.run_pace_nb", *map(str, arguments)], {})
    python = install.python_of(folder, name)
    if not python.exists():
        raise FileNotFoundError(f"{name} is not in {folder}: python -m bench.peers.install {name}")
    if name == "llama-cpp":
        arguments = [gguf, len(cpus)]
        return Launch([str(python), "-m", "bench.peers.run_llama_cpp", *map(str, arguments)], {})
    tcmalloc = install.find_tcmalloc(folder)
    preload = [str(tcmalloc)] if tcmalloc else []
    # docs.vllm.ai, installation/cpu: LD_PRELOAD of tcmalloc and Intel's OpenMP; the threads' CPUs.
    # Without a process of its own for the engine, which would leave this one a core less.
    environment = {
        "LD_PRELOAD": ":".join([*preload, str(folder / name / "lib" / "libiomp5.so")]),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cpus)),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    return Launch([str(python), "-m", "bench.peers.run_vllm", str(checkpoint)], environment)


class Engine:
    """A running engine. A context manager; leaving it ends the process.

    Attributes:
        facts: What the engine says of itself, versions among them.
        ready_seconds: From process start until it could be asked.
    """

    def __init__(self, name: str, launch: Launch, log: Path, nice: int = 0) -> None:
        """Start and wait until it is ready. `log` gets what the engine prints.

        nice: of all its threads; below 0 (for root) it goes before whatever else runs here.
        """
        self.name = name
        self._log = log
        start = time.perf_counter()
        with open(log, "w") as stderr:
            self._process = subprocess.Popen(
                ["nice", "-n", str(nice), *launch.command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                cwd=ROOT,
                env={**os.environ, **launch.environment},
                start_new_session=True,
            )
        self.started = start
        if nice:
            prefer(self._process.pid, nice)
        try:
            self.facts: dict[str, Any] = self._answer()["facts"]
        except BaseException:
            self.close()
            raise
        self.ready_seconds = time.perf_counter() - start

    def _answer(self) -> dict[str, Any]:
        line = self._process.stdout.readline() if self._process.stdout else ""
        if not line:
            raise RuntimeError(f"{self.name} ended; the last it said is in {self._log}")
        content: dict[str, Any] = json.loads(line)
        if "error" in content:
            raise RuntimeError(f"{self.name}: {content['error']}")
        return content

    def ask(self, case: Case) -> float:
        """Seconds that the engine took for the case."""
        if self._process.stdin is None:
            raise RuntimeError(f"{self.name} has no stdin")
        self._process.stdin.write(json.dumps(case._asdict()) + "\n")
        self._process.stdin.flush()
        return float(self._answer()["seconds"])

    def pause(self) -> None:
        """Stop all of its threads where they are."""
        os.killpg(self._process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Let them go on."""
        os.killpg(self._process.pid, signal.SIGCONT)

    def peak_rss(self) -> int:
        """Bytes of memory that the process has held at most, mapped files counted."""
        return 1024 * int(_status_field(self._process.pid, "VmHWM"))

    def cpu_seconds(self) -> float:
        """CPU time that its threads have used so far."""
        text = Path(f"/proc/{self._process.pid}/stat").read_text()
        user, system = text.rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / TICKS

    def close(self) -> None:
        """End it: by the end of its stdin, or, where that takes 30 s, by force."""
        if self._process.poll() is None:
            self.resume()
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):  # it ended by itself
                self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def machine_cpu_seconds() -> float:
    """CPU time that all processes have used, and what the hypervisor gave to other machines."""
    user, nice, system, _, _, irq, softirq, steal = map(
        int, Path("/proc/stat").read_text().split("\n")[0].split()[1:9]
    )
    return (user + nice + system + irq + softirq + steal) / TICKS


def prefer(pid: int, nice: int) -> None:
    """Give the session of a process its priority, too.

    Where Linux groups processes by session, nice counts within one only (proc_pid_autogroup(5)).
    """
    autogroup = Path(f"/proc/{pid}/autogroup")
    if autogroup.exists():
        autogroup.write_text(str(nice))


def _status_field(pid: int, field: str) -> str:
    """First word of a line of /proc/PID/status."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return value.split()[0]
    raise KeyError(f"/proc/{pid}/status has no {field}")
