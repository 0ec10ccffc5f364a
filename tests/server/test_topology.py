"""CPUs for N engines, on machines written into a folder as Linux would write them."""

from __future__ import annotations

import os

import pytest

from pace_nb.errors import ConfigError
from pace_nb.server.topology import assign_cpus


@pytest.fixture
def machine(tmp_path):
    """Two nodes of four cores with two threads each: core c has CPUs c and c + 8."""
    for cpu in range(16):
        folder = tmp_path / f"cpu/cpu{cpu}/topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{cpu % 8},{cpu % 8 + 8}\n")
    for node, cpus in enumerate(["0-3,8-11", "4-7,12-15"]):
        (tmp_path / f"node/node{node}").mkdir(parents=True)
        (tmp_path / f"node/node{node}/cpulist").write_text(cpus + "\n")
    return tmp_path


def test_an_engine_for_each_node(machine):
    assert assign_cpus(2, range(16), machine) == [
        [0, 1, 2, 3, 8, 9, 10, 11],
        [4, 5, 6, 7, 12, 13, 14, 15],
    ]


def test_a_core_is_never_shared_and_none_is_left_over(machine):
    for num in range(1, 9):
        shares = assign_cpus(num, range(16), machine)
        assert sorted(cpu for share in shares for cpu in share) == list(range(16))
        cores = [{cpu % 8 for cpu in share} for share in shares]
        assert sum(map(len, cores)) == 8
        assert max(map(len, cores)) - min(map(len, cores)) <= 1


def test_only_cpus_that_are_allowed(machine):
    assert assign_cpus(2, [0, 8, 5, 13, 6], machine) == [[0, 5, 8, 13], [6]]


def test_more_engines_than_cores(machine):
    with pytest.raises(ConfigError, match="data_parallel_size is 3, expected at most 2"):
        assign_cpus(3, [0, 8, 1], machine)


def test_a_system_that_says_nothing(tmp_path):
    assert assign_cpus(2, [3, 1, 2], tmp_path) == [[1, 2], [3]]


def test_the_affinity_mask_of_this_machine():
    assert assign_cpus(1) == [sorted(os.sched_getaffinity(0))]
