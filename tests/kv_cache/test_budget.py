"""The pool's size: from what was asked, what is available and what can be used at most."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pace_nb.config import EngineConfig
from pace_nb.errors import ConfigError, OutOfMemoryError
from pace_nb.kv_cache import budget
from pace_nb.kv_cache.base import UNIT, KVCacheConfig

MODEL = KVCacheConfig(num_layers=2, num_kv_heads=1, head_dim=16, dtype="float32")  # 4096 B a unit


@pytest.fixture(autouse=True)
def available(monkeypatch):
    """4 MiB are available, so that no test depends on the machine."""
    monkeypatch.setattr(budget, "available_memory", lambda: 4 * 2**20)


def test_no_more_than_all_sequences_could_use():
    found = budget.cache_budget(EngineConfig(max_num_seqs=3), MODEL, max_model_len=100)
    assert found.cache.num_tokens == 3 * 7 * UNIT
    assert found.cache.max_model_len == 100
    assert found.arithmetic == (
        "KV cache: 336 tokens x 256 bytes = 0.1 MiB; the least of 3.0 MiB (75% of 4.0 MiB left) "
        "and 3 sequences of 100 tokens"
    )


WINDOWED = replace(MODEL, num_layers=3, windows=(40, 0, 40))  # 2048 B a unit and layer


def test_layers_with_a_window_count_as_much_as_they_can_need():
    """8 sequences of 40 - 1 + 32 tokens, which lie in 6 blocks: 48 blocks, not 8 x 63."""
    config = EngineConfig(max_num_seqs=8, max_num_batched_tokens=32)
    found = budget.cache_budget(config, WINDOWED, max_model_len=1000)
    assert found.cache.num_tokens == 8 * 63 * UNIT
    assert (found.cache.max_num_seqs, found.cache.max_step_tokens) == (8, 32)
    assert found.arithmetic == (
        "KV cache: 8064 tokens x 128 bytes + 768 tokens x 256 bytes (2 layers that see 40) = "
        "1.2 MiB; the least of 3.0 MiB (75% of 4.0 MiB left) and 8 sequences of 1000 tokens"
    )


def test_what_windows_save_holds_more_tokens():
    config = EngineConfig(
        max_num_seqs=8, max_num_batched_tokens=32, kv_cache_memory_bytes=100 * 6144
    )
    tokens = budget.cache_budget(config, WINDOWED, max_model_len=5000).cache.num_tokens
    assert tokens == (100 * 3 - 48 * 2) * UNIT
    least = replace(config, kv_cache_memory_bytes=10 * 6144)  # less than the windows could take
    assert budget.cache_budget(least, WINDOWED, max_model_len=5000).cache.num_tokens == 10 * UNIT
    whole = replace(config, kv_cache="contiguous")
    assert budget.cache_budget(whole, WINDOWED, max_model_len=5000).cache.num_tokens == 1600
    unchunked = replace(config, enable_chunked_prefill=False)  # a prompt is one step
    assert budget.cache_budget(unchunked, WINDOWED, max_model_len=5000).cache.num_tokens == 1600


def test_what_is_available_bounds_it():
    found = budget.cache_budget(EngineConfig(), MODEL, max_model_len=10_000)
    assert found.cache.num_tokens == 768 * UNIT  # three quarters of 4 MiB in units of 4096 bytes
    assert found.cache.max_model_len == 10_000


def test_what_was_asked_for_bounds_it():
    config = EngineConfig(kv_cache_memory_bytes=5 * 4096 + 4095)
    found = budget.cache_budget(config, MODEL, max_model_len=48)
    assert found.cache.num_tokens == 5 * UNIT
    assert "asked for" in found.arithmetic


@pytest.mark.parametrize(
    "options, block_size, num_tokens, prefix_caching",
    [
        ({}, 16, 3 * 112, True),
        ({"enable_prefix_caching": False}, 16, 3 * 112, False),
        ({"block_size": 64}, 64, 3 * 128, True),
        ({"kv_cache": "slab"}, 128, 3 * 128, False),
        ({"kv_cache": "slab", "block_size": 48}, 48, 3 * 144, False),
        ({"kv_cache": "contiguous"}, 16, 3 * 112, False),
        # 82 units of 4096 bytes: as many whole blocks as they hold
        (
            {"block_size": 64, "max_num_seqs": 30, "kv_cache_memory_bytes": 82 * 4096},
            64,
            1280,
            True,
        ),
    ],
)
def test_the_pool_is_cut_into_blocks(monkeypatch, options, block_size, num_tokens, prefix_caching):
    monkeypatch.setattr(budget, "tuned_block_size", lambda model: 128)
    config = EngineConfig(**{"max_num_seqs": 3, **options})
    cache = budget.cache_budget(config, MODEL, max_model_len=100).cache
    assert (cache.kind, cache.block_size) == (config.kv_cache, block_size)
    assert (cache.num_tokens, cache.enable_prefix_caching) == (num_tokens, prefix_caching)


def test_room_for_no_block_is_refused():
    config = EngineConfig(block_size=64, kv_cache_memory_bytes=3 * 4096)
    with pytest.raises(OutOfMemoryError, match="16384 bytes for 64 tokens, its budget is 12288"):
        budget.cache_budget(config, MODEL, max_model_len=99)


def test_an_open_max_model_len_shrinks_to_the_pool_and_a_given_one_is_refused():
    config = EngineConfig(kv_cache_memory_bytes=4 * 4096)
    assert budget.cache_budget(config, MODEL, max_model_len=99).cache.max_model_len == 64
    config = EngineConfig(kv_cache_memory_bytes=4 * 4096, max_model_len=99)
    with pytest.raises(ConfigError, match="max_model_len is 99, the KV cache holds 64 tokens"):
        budget.cache_budget(config, MODEL, max_model_len=99)


def test_more_than_is_available_is_refused():
    config = EngineConfig(kv_cache_memory_bytes=5 * 2**20)
    with pytest.raises(OutOfMemoryError, match="is 5242880, available are 4194304 bytes"):
        budget.cache_budget(config, MODEL, max_model_len=99)


def test_room_for_nothing_is_refused():
    config = EngineConfig(kv_cache_memory_bytes=4095)
    with pytest.raises(OutOfMemoryError, match="4096 bytes for 16 tokens, its budget is 4095"):
        budget.cache_budget(config, MODEL, max_model_len=99)


class TestAvailableMemory:
    """On a made-up /proc and /sys."""

    @pytest.fixture
    def system(self, tmp_path, monkeypatch):
        monkeypatch.undo()

        def write(files):
            for name, text in files.items():
                path = tmp_path / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text)
            return tmp_path

        return write

    def test_the_machine_alone(self, system):
        root = system({"proc/meminfo": "MemTotal: 900 kB\nMemAvailable:   500 kB\n"})
        assert budget.available_memory(root) == 500 * 1024

    def test_cgroup_v2_and_its_parents_with_page_cache_counted_as_free(self, system):
        root = system(
            {
                "proc/meminfo": "MemAvailable: 500 kB\n",
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/b/memory.max": "max\n",
                "sys/fs/cgroup/a/memory.max": "300000\n",
                "sys/fs/cgroup/a/memory.current": "250000\n",
                "sys/fs/cgroup/a/memory.stat": "anon 1\ninactive_file 40000\n",
            }
        )
        assert budget.available_memory(root) == 90000

    def test_cgroup_v1_in_a_container_that_sees_only_its_own_group(self, system):
        root = system(
            {
                "proc/meminfo": "MemAvailable: 500 kB\n",
                "proc/self/cgroup": "5:cpu,cpuacct:/x\n9:memory:/docker/abc\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "200000\n",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "150000\n",
                "sys/fs/cgroup/memory/memory.stat": "total_inactive_file 10000\n",
            }
        )
        assert budget.available_memory(root) == 60000

    def test_no_limit_in_cgroup_v1_is_a_huge_number(self, system):
        root = system(
            {
                "proc/meminfo": "MemAvailable: 500 kB\n",
                "proc/self/cgroup": "9:memory:/\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{2**63 - 4096}\n",
            }
        )
        assert budget.available_memory(root) == 500 * 1024

    def test_a_system_that_says_nothing_has_what_sysconf_says(self, tmp_path, monkeypatch):
        monkeypatch.undo()
        assert 2**20 < budget.available_memory(tmp_path) < 2**50

    def test_this_machine(self, monkeypatch):
        monkeypatch.undo()
        assert 2**20 < budget.available_memory() < 2**50
