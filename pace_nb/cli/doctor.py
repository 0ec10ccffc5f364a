"""Say what runs on this machine and why: CPU, threads, memory, kernels, and if a model fits."""

from __future__ import annotations

import argparse
import os
import platform
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pace_nb
from pace_nb import env
from pace_nb.cli import options as shared

FEATURES = (
    "avx", "avx2", "fma", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512vnni", "avx512bf16",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which model to look at."""
    shared.add_model_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Print one line per finding, as each is found; 1 when something does not work."""
    code = 0
    for finding in findings(options):
        print(f"{finding.name:<8}  {finding.text}", flush=True)
        code |= not finding.sound
    return code


class Finding(NamedTuple):
    """One line of the report; `sound` is false where something does not work."""

    name: str
    text: str
    sound: bool = True


def findings(options: argparse.Namespace) -> Iterator[Finding]:
    """What there is to say, the cheapest first."""
    from pace_nb.kernels import jit

    features = jit.cpu_features()
    yield Finding("version", f"pace-nb {pace_nb.__version__}, Python {platform.python_version()}")
    yield Finding("cpu", f"{cpu_name()}, {usable_cpus(jit.allowed_threads())}")
    yield Finding("isa", " ".join(f for f in FEATURES if f in features) or "none of the AVX family")
    yield Finding("path", jit.isa_path())
    yield Finding("threads", f"{threads(jit.num_threads())}, {layer(jit.threading_layer())}")
    yield Finding("memory", memory())
    yield Finding("cache", jit.cache_state())
    yield kernel_check()
    yield model_fit(options)


def cpu_name(cpu_info: Path = Path("/proc/cpuinfo")) -> str:
    """The CPU's own name where the system tells it."""
    if cpu_info.is_file():
        for line in cpu_info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def usable_cpus(allowed: int) -> str:
    """How many CPUs there are, and what is left of them for us."""
    present = os.cpu_count() or 1
    if allowed == present:
        return f"{present} CPUs, all usable"
    return f"{present} CPUs, {allowed} of them usable (affinity mask and cgroup quota)"


def threads(number: int) -> str:
    """How many threads the kernels use, and who said so."""
    asked = env.num_threads() is not None
    return f"{number} ({'PACE_NB_NUM_THREADS' if asked else 'one per usable CPU'})"


def layer(name: str) -> str:
    """The threading layer, with the reason where it is the second best."""
    if name == "workqueue":
        return "layer workqueue: libgomp.so.1 was not found (Debian: apt install libgomp1)"
    return f"layer {name}"


def memory() -> str:
    """What this process may still take, and which limits say so."""
    from pace_nb.kv_cache.budget import available_memory

    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    limit = "" if soft == resource.RLIM_INFINITY else f", ulimit -v {soft / 1e9:.1f} GB"
    return f"{available_memory() / 1e9:.1f} GB available (machine and cgroup{limit})"


def kernel_check() -> Finding:
    """Run one kernel and compare it with its reference, to see that compiling works here."""
    import numpy as np

    from pace_nb.kernels import jit, norm

    x = np.linspace(-3, 3, 4 * 96, dtype=np.float32).reshape(4, 96)
    weight = np.linspace(0.5, 1.5, 96, dtype=np.float32)
    compiled = jit.num_compiled()
    start = time.perf_counter()
    result = norm.rms_norm(x, weight, 1e-5)
    seconds = time.perf_counter() - start
    how = "compiled" if jit.num_compiled() > compiled else "loaded from the cache"
    how = "interpreted" if jit.INTERPRETED else how
    error = float(np.abs(result - norm.rms_norm_ref(x, weight, 1e-5)).max())
    sound = error < 1e-5  # of values up to 3: a few ULP
    verdict = "agrees with its reference" if sound else f"WRONG by up to {error:.3g}"
    return Finding("check", f"rms_norm {how} in {seconds:.1f} s, {verdict}", sound)


def model_fit(options: argparse.Namespace) -> Finding:
    """What the model is, whether it is supported, and whether its weights fit into memory."""
    from pace_nb.kv_cache.budget import available_memory
    from pace_nb.models import hub

    facts = hub.show(options.model, options.revision, options.hf_token, options.offline or None)
    weights = 2 * facts.num_parameters  # as BF16, the default
    fits = weights < available_memory()
    return Finding(
        "model",
        f"{facts.name}: {facts.architecture} ({'' if facts.is_supported else 'NOT '}supported), "
        f"{facts.num_parameters / 1e6:,.1f} M parameters, {weights / 1e6:,.1f} MB in bfloat16, "
        f"{'fits' if fits else 'does NOT fit'} into memory",
        fits and facts.is_supported,
    )
