"""How large the KV pool may be: the memory that is left, and the arithmetic in words.

Knows where the system says how much memory there is. Does not know what is done with the pool.

    tokens = min(memory // bytes per block, max_num_seqs * blocks of max_model_len) * block size

Layers with a sliding window (slab and paged) keep what a sequence can see and write in one step,
for each of max_num_seqs sequences, and never more than that many tokens: they cost less, so the
same memory holds more tokens.

Memory is what was asked for, else three quarters of what is available once the weights are loaded:
the rest is for activations, logits and everybody else. Available is the smaller of what the machine
has (MemAvailable) and what each cgroup above us still allows, page cache that could be dropped
counted as free. A page of the pool costs memory only once it has been written.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from pace_nb.config import CacheConfig, EngineConfig
from pace_nb.errors import ConfigError, OutOfMemoryError
from pace_nb.kv_cache.base import UNIT, KVCacheConfig, LayerGroup
from pace_nb.kv_cache.blocks import num_blocks as blocks_of
from pace_nb.kv_cache.slab import tuned_block_size

POOL_SHARE = 0.75  # of the available memory
NO_LIMIT = 2**60  # cgroup v1 writes "none" as a number near 2**63


class Budget(NamedTuple):
    """cache: what to build. arithmetic: how its size came about, in one line."""

    cache: CacheConfig
    arithmetic: str


def cache_budget(
    config: EngineConfig, model: KVCacheConfig, max_model_len: int, share: float = 1.0
) -> Budget:
    """Size of the pool for a model; max_model_len is what the model and the config allow.

    share: of the memory, where another model's cache gets the rest.

    Where the config leaves max_model_len open and the pool cannot hold that much, the cache's
    max_model_len is what it can hold. Raises OutOfMemoryError where the pool holds nothing or was
    asked to be larger than the available memory, ConfigError where it is smaller than a
    max_model_len that was asked for.
    """
    available = available_memory()
    asked = config.kv_cache_memory_bytes
    if asked is not None and asked > available:
        raise OutOfMemoryError(
            f"kv_cache_memory_bytes is {asked}, available are {available} bytes of memory"
        )
    memory = int((available * POOL_SHARE if asked is None else asked) * share)
    block_size = config.block_size or (
        tuned_block_size(model) if config.kv_cache == "slab" else UNIT
    )

    def sized(num_blocks: int) -> CacheConfig:
        num_tokens = num_blocks * block_size
        return CacheConfig(
            config.kv_cache,
            num_tokens,
            min(max_model_len, num_tokens),
            block_size,
            config.prefix_caching,
            config.max_num_seqs,
            config.max_num_batched_tokens if config.enable_chunked_prefill else None,
        )

    most_blocks = config.max_num_seqs * -(-max_model_len // block_size)
    num_blocks = bisect_right(
        range(1, most_blocks + 1), memory, key=lambda n: _bytes_of(_pools(model, sized(n)))
    )
    if num_blocks == 0:
        least = _bytes_of(_pools(model, sized(1)))
        raise OutOfMemoryError(
            f"the KV cache needs {least} bytes for {block_size} tokens, its budget is "
            f"{memory} bytes"
        )
    cache = sized(num_blocks)
    num_tokens = cache.num_tokens
    if num_tokens < max_model_len and config.max_model_len is not None:
        raise ConfigError(
            f"max_model_len is {max_model_len}, the KV cache holds {num_tokens} tokens in "
            f"{memory} bytes: lower max_model_len or raise kv_cache_memory_bytes"
        )
    source = "asked for" if asked is not None else f"{POOL_SHARE:.0%} of {_mib(available)} left"
    pools = _pools(model, cache)
    arithmetic = (
        f"KV cache: {' + '.join(map(str, pools))} = {_mib(_bytes_of(pools))}; the least of "
        f"{_mib(memory)} ({source}) and {config.max_num_seqs} sequences of {max_model_len} tokens"
    )
    return Budget(cache, arithmetic)


class _Pool(NamedTuple):
    """What a group of layers stores."""

    group: LayerGroup
    num_tokens: int
    bytes_per_token: int

    def __str__(self) -> str:
        reach = f" ({len(self.group.layers)} layers that see {self.group.reach})"
        return f"{self.num_tokens} tokens x {self.bytes_per_token} bytes" + (
            reach if self.group.reach else ""
        )


def _pools(model: KVCacheConfig, cache: CacheConfig) -> list[_Pool]:
    """Those of all groups; a contiguous cache has one, whatever its layers see."""
    whole = cache.kind == "contiguous"
    groups = (model.whole,) if whole else model.groups(cache.max_model_len)
    per_token = model.layer_bytes_per_unit // UNIT
    return [
        _Pool(group, blocks_of(group, cache) * cache.block_size, per_token * len(group.layers))
        for group in groups
    ]


def _bytes_of(pools: Sequence[_Pool]) -> int:
    return sum(pool.num_tokens * pool.bytes_per_token for pool in pools)


def available_memory(root: Path = Path("/")) -> int:
    """Bytes that this process can still take: the machine's and its cgroups' (v2 and v1)."""
    return min(_machine_available(root / "proc/meminfo"), *_cgroup_rests(root), NO_LIMIT)


def _machine_available(meminfo: Path) -> int:
    """MemAvailable; where there is no /proc/meminfo, all the memory the machine has."""
    try:
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _cgroup_rests(root: Path) -> list[int]:
    """Limit less use of our memory cgroup and of each above it, as far as they can be seen."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    rests = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # v2
            base, limit, use = root / "sys/fs/cgroup", "memory.max", "memory.current"
            droppable = "inactive_file"
        elif "memory" in controllers.split(","):
            base, limit = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes"
            use, droppable = "memory.usage_in_bytes", "total_inactive_file"
        else:
            continue
        # In a container the path may name a group outside of what is mounted; then only the mount's
        # root, which is the container's own group, can be read.
        group = Path(path.lstrip("/"))
        for folder in (group, *group.parents):
            rest = _rest(base / folder, limit, use, droppable)
            if rest is not None:
                rests.append(rest)
    return rests


def _rest(folder: Path, limit: str, use: str, droppable: str) -> int | None:
    """What one cgroup still allows; None where it sets no limit or cannot be read."""
    try:
        text = (folder / limit).read_text().strip()
        if text == "max" or int(text) >= NO_LIMIT:
            return None
        used = int((folder / use).read_text())
        for line in (folder / "memory.stat").read_text().splitlines():
            name, value = line.split()
            if name == droppable:
                used -= int(value)
        return max(0, int(text) - used)
    except (OSError, ValueError):
        return None


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.1f} MiB"
