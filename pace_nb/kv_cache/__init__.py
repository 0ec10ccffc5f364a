"""Storage of keys and values between steps: one protocol (base.py), one file per kind."""

from collections.abc import Callable

from pace_nb.config import CacheConfig
from pace_nb.kv_cache.base import KVCache, KVCacheConfig
from pace_nb.kv_cache.contiguous import ContiguousCache
from pace_nb.kv_cache.paged import PagedCache
from pace_nb.kv_cache.slab import SlabCache

_KINDS: dict[str, Callable[[KVCacheConfig, CacheConfig], KVCache]] = {
    "contiguous": ContiguousCache,
    "slab": SlabCache,
    "paged": PagedCache,
}


def create_cache(model: KVCacheConfig, config: CacheConfig) -> KVCache:
    """An empty cache of the kind and size that `config` says. OutOfMemoryError where it fails."""
    return _KINDS[config.kind](model, config)
