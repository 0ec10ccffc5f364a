"""Which CPUs each of N engines gets: whole cores, one NUMA node before the next.

Knows the affinity mask and Linux's /sys/devices/system; needs no numactl. Memory follows: a page
lies on the node of the thread that first writes it, and each engine's threads are pinned before
they load anything. Where /sys says nothing, every CPU is a core of its own on one node.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

from pace_nb.errors import ConfigError

SYSTEM = Path("/sys/devices/system")


def assign_cpus(
    num_engines: int, cpus: Collection[int] | None = None, system: Path = SYSTEM
) -> list[list[int]]:
    """Disjoint sets of CPUs, one per engine, as equal as whole cores allow.

    cpus: those that may be used; None is this process's affinity mask. Both threads of a core go
    to the same engine, and an engine gets cores that are neighbours in the order of nodes: with as
    many engines as equal nodes, a node each. ConfigError where cores are fewer than engines.
    """
    allowed = sorted(os.sched_getaffinity(0) if cpus is None else cpus)
    cores = _cores(allowed, system)
    if len(cores) < num_engines:
        raise ConfigError(
            f"data_parallel_size is {num_engines}, expected at most {len(cores)}: the cores that "
            "this process may use"
        )
    base, rest = divmod(len(cores), num_engines)
    shares, start = [], 0
    for index in range(num_engines):
        end = start + base + (index < rest)
        shares.append(sorted(cpu for core in cores[start:end] for cpu in core))
        start = end
    return shares


def _cores(cpus: list[int], system: Path) -> list[tuple[int, ...]]:
    """The CPUs in groups that share a core, ordered by node and then by number."""
    nodes = _nodes(system)
    allowed = set(cpus)
    cores: dict[tuple[int, ...], int] = {}
    for cpu in cpus:
        siblings = _cpu_list(system / f"cpu/cpu{cpu}/topology/thread_siblings_list") or [cpu]
        core = tuple(sorted(allowed.intersection(siblings) | {cpu}))
        cores.setdefault(core, nodes.get(cpu, 0))
    return sorted(cores, key=lambda core: (cores[core], core))


def _nodes(system: Path) -> dict[int, int]:
    """CPU -> NUMA node, as far as the system says."""
    found = {}
    for folder in sorted(system.glob("node/node[0-9]*")):
        for cpu in _cpu_list(folder / "cpulist"):
            found[cpu] = int(folder.name.removeprefix("node"))
    return found


def _cpu_list(file: Path) -> list[int]:
    """A list such as "0-3,8"; empty where the file is missing or says something else."""
    cpus: list[int] = []
    try:
        for part in file.read_text().strip().split(","):
            first, _, last = part.partition("-")
            cpus += range(int(first), int(last or first) + 1)
    except (OSError, ValueError):
        return []
    return cpus
