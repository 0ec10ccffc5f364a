"""Every option that cannot be meant is refused by name, in one line."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import pytest

from pace_nb.config import CacheConfig, EngineConfig
from pace_nb.errors import ConfigError


def test_defaults_are_valid_and_frozen():
    config = EngineConfig()

    assert (config.dtype, config.kernels, config.kv_cache) == ("auto", "numba", "paged")
    assert config.enable_chunked_prefill
    assert config.max_num_batched_tokens >= config.max_num_seqs
    with pytest.raises(FrozenInstanceError):
        config.seed = 1


def test_auto_dtype_is_bfloat16():
    assert EngineConfig(dtype="auto").storage_dtype == "bfloat16"
    assert EngineConfig(dtype="bfloat16").storage_dtype == "bfloat16"
    assert EngineConfig(dtype="float32").storage_dtype == "float32"


@pytest.mark.parametrize(
    "field, value",
    [
        ("model", ""),
        ("model", 5),
        ("tokenizer", ""),
        ("revision", ""),
        ("revision", 3),
        ("dtype", "float16"),
        ("dtype", None),
        ("kernels", "cuda"),
        ("kv_cache", "dynamic"),
        ("enable_chunked_prefill", 1),
        ("enable_prefix_caching", 1),
        ("enable_prefix_caching", "no"),
        ("block_size", 0),
        ("block_size", 24),
        ("block_size", -16),
        ("block_size", True),
        ("block_size", 16.0),
        ("max_num_seqs", 0),
        ("max_num_seqs", None),
        ("max_num_batched_tokens", -5),
        ("max_num_batched_tokens", 2.5),
        ("long_prefill_token_threshold", -1),
        ("long_prefill_token_threshold", None),
        ("scheduling_policy", "lifo"),
        ("max_model_len", 0),
        ("max_model_len", True),
        ("kv_cache_memory_bytes", 0),
        ("kv_cache_memory_bytes", "1g"),
        ("num_threads", 0),
        ("seed", None),
        ("seed", 1.0),
    ],
)
def test_a_value_that_cannot_be_meant(field, value):
    with pytest.raises(ConfigError) as caught:
        EngineConfig(**{field: value})
    message = str(caught.value)
    assert field in message and repr(value) in message and "\n" not in message


def test_a_budget_below_one_token_per_request():
    with pytest.raises(ConfigError, match=r"max_num_batched_tokens \(8\) .* max_num_seqs \(9\)"):
        EngineConfig(max_num_batched_tokens=8, max_num_seqs=9)


def test_a_prompt_that_runs_whole_has_no_longest_chunk():
    assert EngineConfig(long_prefill_token_threshold=64).long_prefill_token_threshold == 64
    with pytest.raises(ConfigError, match="threshold is 64, expected 0 where enable_chunked_pre"):
        EngineConfig(long_prefill_token_threshold=64, enable_chunked_prefill=False)


def test_only_the_paged_cache_shares_beginnings():
    assert EngineConfig().prefix_caching
    assert EngineConfig(enable_prefix_caching=True).prefix_caching
    assert not EngineConfig(enable_prefix_caching=False).prefix_caching
    for kind in ("contiguous", "slab"):
        assert not EngineConfig(kv_cache=kind).prefix_caching
        assert not EngineConfig(kv_cache=kind, enable_prefix_caching=False).prefix_caching
        with pytest.raises(ConfigError, match=f"enable_prefix_caching is True, .* '{kind}': only"):
            EngineConfig(kv_cache=kind, enable_prefix_caching=True)


def test_a_contiguous_cache_has_no_blocks():
    assert EngineConfig(kv_cache="slab", block_size=48).block_size == 48
    with pytest.raises(ConfigError, match="block_size is 16, expected None for kv_cache 'contig"):
        EngineConfig(kv_cache="contiguous", block_size=16)


@pytest.mark.parametrize(
    "kind, num_tokens, max_model_len, block_size",
    [
        ("none", 16, 16, 16),
        ("contiguous", 0, 16, 16),
        ("contiguous", 17, 16, 16),
        ("contiguous", 16, 0, 16),
        ("slab", 48, 16, 32),
        ("paged", 48, 16, 24),
    ],
)
def test_a_cache_size_that_cannot_be(kind, num_tokens, max_model_len, block_size):
    with pytest.raises(ConfigError):
        CacheConfig(kind, num_tokens, max_model_len, block_size)
