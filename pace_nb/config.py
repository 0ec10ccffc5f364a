"""`EngineConfig`, `SpeculativeConfig`, `CacheConfig`: all options of an engine, checked, frozen.

Knows option names (vLLM's), defaults and legal values. Does not know what a model or a machine
offers: options left `None` are resolved where that is known (`max_model_len` in llm.py, the pool
size in kv_cache/budget.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from pace_nb.errors import ConfigError

DTYPES = ("auto", "bfloat16", "float32")
KV_CACHE_KINDS = ("contiguous", "slab", "paged")
SCHEDULING_POLICIES = ("fcfs", "priority")
KERNELS = ("numba", "reference")
SPECULATIVE_METHODS = ("ngram", "prompt_lookup", "pard")
DRAFT_SAMPLE_METHODS = ("greedy", "probabilistic")
MOST_SPECULATIVE_TOKENS = 64


@dataclass(frozen=True)
class SpeculativeConfig:
    """How tokens are guessed ahead; names as in vLLM's speculative_config.

    What comes out is the same with and without, to the bit; with draft_sample_method
    "probabilistic" sampled tokens are others, of the same distribution.

    Attributes:
        method: "ngram", or "prompt_lookup", which is the same: what followed the last tokens
            earlier, in prompt or output, follows again. "pard": a draft model guesses all tokens in
            one pass.
        model: The draft model: local directory or hub name; None is the one that the bundled demo
            model has.
        num_speculative_tokens: Most tokens that are guessed for a request in a step; None is 5, for
            "pard" 12.
        prompt_lookup_max, prompt_lookup_min: How many last tokens must have been there before; the
            most are tried first. One left None is as the other, both are 5.
        pard_token: The draft's mask token, where its config.json does not name it.
        draft_sample_method: "greedy": guesses are the draft's likeliest tokens. "probabilistic":
            for requests that sample, they are drawn from its distribution, which a hot temperature
            accepts more of.
        adaptive: As many guesses as pay, up to num_speculative_tokens, by measured acceptance and
            cost; none where many requests run. False is always num_speculative_tokens. None is
            True, but for "probabilistic", whose tokens would hang on time.

    Raises:
        ConfigError: naming the field, the value and what was expected, in one line.
    """

    method: str
    num_speculative_tokens: int | None = None
    prompt_lookup_max: int | None = None
    prompt_lookup_min: int | None = None
    model: str | Path | None = None
    pard_token: int | None = None
    draft_sample_method: str = "greedy"
    adaptive: bool | None = None

    def __post_init__(self) -> None:
        try:
            _expect_choice("method", self.method, SPECULATIVE_METHODS)
            _expect_choice("draft_sample_method", self.draft_sample_method, DRAFT_SAMPLE_METHODS)
            other = ("prompt_lookup_max", "prompt_lookup_min")
            if self.method != "pard":
                other = ("model", "pard_token")
            for name in other:
                if getattr(self, name) is not None:
                    raise ConfigError(
                        f"{name} is {getattr(self, name)!r}, expected None for method "
                        f"{self.method!r}"
                    )
            if self.method != "pard" and self.draft_sample_method != "greedy":
                raise ConfigError(f"draft_sample_method must be greedy for method {self.method!r}")
            if not isinstance(self.adaptive, bool | None):
                raise ConfigError(f"adaptive must be a bool or None, got {self.adaptive!r}")
            if self.adaptive and self.draft_sample_method != "greedy":
                raise ConfigError(
                    "adaptive is True, expected False or None for draft_sample_method "
                    f"{self.draft_sample_method!r}: tokens would hang on how long steps take"
                )
            if self.model is not None and not (
                isinstance(self.model, str | Path) and str(self.model)
            ):
                raise ConfigError(f"model must be a directory or a hub name, got {self.model!r}")
            if self.pard_token is not None and (
                not _is_int(self.pard_token) or self.pard_token < 0
            ):
                raise ConfigError(f"pard_token must be an int >= 0, got {self.pard_token!r}")
            for name in ("num_speculative_tokens", "prompt_lookup_max", "prompt_lookup_min"):
                if getattr(self, name) is not None:
                    _expect_positive(name, getattr(self, name))
            if self.num_tokens > MOST_SPECULATIVE_TOKENS:
                raise ConfigError(
                    f"num_speculative_tokens must be 1 to {MOST_SPECULATIVE_TOKENS}, got "
                    f"{self.num_tokens}"
                )
            if self.lookup_min > self.lookup_max:
                raise ConfigError(
                    f"prompt_lookup_min must be at most prompt_lookup_max ({self.lookup_max}), got "
                    f"{self.lookup_min}"
                )
        except ConfigError as error:
            raise ConfigError(f"speculative_config: {error}") from None

    @classmethod
    def of(cls, given: object) -> SpeculativeConfig:
        """From what a user gave: one of these, or its fields by name."""
        if isinstance(given, cls):
            return given
        if not isinstance(given, Mapping):
            raise ConfigError(
                "speculative_config must be a SpeculativeConfig or a dict of its fields, got "
                f"{given!r}"
            )
        known = [field.name for field in fields(cls)]
        for name in given:
            if name not in known:
                raise ConfigError(
                    f"speculative_config has no field {name!r}, expected {', '.join(known)}"
                )
        if "method" not in given:
            raise ConfigError(
                "speculative_config names no method, expected one of "
                f"{', '.join(SPECULATIVE_METHODS)}"
            )
        return cls(**given)

    @property
    def num_tokens(self) -> int:
        """`num_speculative_tokens`, decided."""
        if self.num_speculative_tokens is None:
            return 12 if self.method == "pard" else 5
        return self.num_speculative_tokens

    @property
    def is_adaptive(self) -> bool:
        """`adaptive`, decided."""
        return self.draft_sample_method == "greedy" if self.adaptive is None else self.adaptive

    @property
    def lookup_max(self) -> int:
        """`prompt_lookup_max`, decided."""
        return self.prompt_lookup_max or self.prompt_lookup_min or 5

    @property
    def lookup_min(self) -> int:
        """`prompt_lookup_min`, decided."""
        return self.prompt_lookup_min or self.lookup_max


@dataclass(frozen=True)
class EngineConfig:
    """Options of one engine.

    Attributes:
        model: Local directory, hub name, or None for the bundled demo model.
        tokenizer: The same, where it is not the model's own.
        revision: Branch, tag or commit on the hub.
        dtype: Storage of weights, GEMM inputs and KV cache. "auto" is bfloat16, whatever the
            checkpoint holds.
        max_model_len: Longest sequence, prompt and output together; None is what the model was
            made for.
        max_num_seqs: Requests that run at the same time; the others wait. 32, not vLLM's 256: at a
            few dozen rows a CPU turns from bound by memory to bound by arithmetic, and from there
            more rows only stretch every step.
        max_num_batched_tokens: Token budget of a step. Decodes take theirs first, one each; prefill
            gets what is left.
        long_prefill_token_threshold: Most tokens of one prompt in a step; 0 is no bound but the
            budget. A lower one keeps steps short while a long prompt comes in, and lets shorter
            prompts pass it.
        scheduling_policy: "fcfs", first come, first served; "priority", by the requests' priority
            (lower values first) and then by arrival.
        enable_chunked_prefill: A prompt that exceeds what is left of the budget runs in pieces.
            Off: a prompt runs whole, and the first prompt of a step may exceed the budget.
        kv_cache: How keys and values are stored; what comes out is the same to the bit.
            "contiguous" keeps a sequence in one piece and copies it when it cannot grow there.
            "slab" keeps it in large blocks. "paged", the default, keeps it in small ones, which
            sequences with the same beginning share: nothing is ever copied to grow, at most a block
            per sequence is wasted, and a beginning that was computed once (a system prompt, the
            conversation so far, the prompt of n completions) is not computed again. The kernels
            read units of 16 tokens whatever the kind, so the others gain nothing over it but their
            simplicity.
        kv_cache_memory_bytes: Size of the KV pool; None takes it from the available memory.
        block_size: Tokens of a block, a multiple of 16. None is 16 for "paged", so that as little
            as possible is left out when beginnings are compared, and for "slab" what fits a quarter
            of L2. "contiguous" has no blocks.
        enable_prefix_caching: Share beginnings. None is on for "paged"; the others cannot.
        kernels: "numba" is compiled; "reference" is the whole engine in plain NumPy.
        seed: Of the engine. Requests without a seed of their own draw one from it, in order of
            arrival.
        num_threads: Threads of the compiled kernels; None is what affinity and cgroup allow.
        speculative_config: A SpeculativeConfig, or its fields by name; None guesses nothing.

    Raises:
        ConfigError: naming the field, the value and what was expected, in one line.
    """

    model: str | Path | None = None
    tokenizer: str | Path | None = None
    revision: str | None = None
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    max_model_len: int | None = None
    max_num_seqs: int = 32
    max_num_batched_tokens: int = 2048
    long_prefill_token_threshold: int = 0
    scheduling_policy: Literal["fcfs", "priority"] = "fcfs"
    enable_chunked_prefill: bool = True
    kv_cache: str = "paged"
    kv_cache_memory_bytes: int | None = None
    block_size: int | None = None
    enable_prefix_caching: bool | None = None
    kernels: Literal["numba", "reference"] = "numba"
    seed: int = 0
    num_threads: int | None = None
    speculative_config: SpeculativeConfig | None = None

    def __post_init__(self) -> None:
        if self.speculative_config is not None:
            decided = SpeculativeConfig.of(self.speculative_config)
            object.__setattr__(self, "speculative_config", decided)
        _expect_choice("dtype", self.dtype, DTYPES)
        _expect_choice("kv_cache", self.kv_cache, KV_CACHE_KINDS)
        _expect_choice("kernels", self.kernels, KERNELS)
        _expect_choice("scheduling_policy", self.scheduling_policy, SCHEDULING_POLICIES)
        for name in ("model", "tokenizer"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str | Path) or not str(value)):
                raise ConfigError(f"{name} must be a directory, a hub name or None, got {value!r}")
        if self.revision is not None and (not isinstance(self.revision, str) or not self.revision):
            raise ConfigError(f"revision must be a non-empty string or None, got {self.revision!r}")
        if not isinstance(self.enable_chunked_prefill, bool):
            raise ConfigError(
                f"enable_chunked_prefill must be a bool, got {self.enable_chunked_prefill!r}"
            )
        if self.long_prefill_token_threshold != 0:
            _expect_positive("long_prefill_token_threshold", self.long_prefill_token_threshold)
            if not self.enable_chunked_prefill:
                raise ConfigError(
                    "long_prefill_token_threshold is "
                    f"{self.long_prefill_token_threshold}, expected 0 where enable_chunked_prefill "
                    "is False: a prompt runs whole then"
                )
        _expect_positive("max_num_seqs", self.max_num_seqs)
        _expect_positive("max_num_batched_tokens", self.max_num_batched_tokens)
        for name in ("max_model_len", "kv_cache_memory_bytes", "num_threads"):
            if getattr(self, name) is not None:
                _expect_positive(name, getattr(self, name))
        if self.block_size is not None:
            _expect_block_size(self.block_size)
            if self.kv_cache == "contiguous":
                raise ConfigError(
                    f"block_size is {self.block_size}, expected None for kv_cache 'contiguous', "
                    "which has no blocks"
                )
        if not isinstance(self.enable_prefix_caching, bool | None):
            raise ConfigError(
                f"enable_prefix_caching must be a bool or None, got {self.enable_prefix_caching!r}"
            )
        if self.enable_prefix_caching and self.kv_cache != "paged":
            raise ConfigError(
                f"enable_prefix_caching is True, expected False or None for kv_cache "
                f"{self.kv_cache!r}: only 'paged' shares blocks"
            )
        if not _is_int(self.seed):
            raise ConfigError(f"seed must be an int, got {self.seed!r}")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least "
                f"max_num_seqs ({self.max_num_seqs}): each running request decodes a token per step"
            )

    @property
    def storage_dtype(self) -> Literal["bfloat16", "float32"]:
        """`dtype`, decided."""
        return "bfloat16" if self.dtype == "auto" else self.dtype

    @property
    def prefix_caching(self) -> bool:
        """`enable_prefix_caching`, decided."""
        return self.kv_cache == "paged" and self.enable_prefix_caching is not False


@dataclass(frozen=True)
class CacheConfig:
    """The resolved size of a KV cache.

    Attributes:
        kind: One of KV_CACHE_KINDS.
        num_tokens: Tokens that the pool holds, all requests together; a multiple of block_size.
        max_model_len: Longest sequence; it sets how far a contiguous sequence grows at a time.
        block_size: Tokens of a block, a multiple of 16; for "contiguous" always 16.
        enable_prefix_caching: Share beginnings, where the kind can.
        max_num_seqs, max_step_tokens: Sequences there are at most, and tokens that one of them gets
            in a step; None = not known. They bound the room of layers with a window.

    Raises:
        ConfigError: for a size that is not positive or not such a multiple.
    """

    kind: str
    num_tokens: int
    max_model_len: int
    block_size: int = 16
    enable_prefix_caching: bool = False
    max_num_seqs: int | None = None
    max_step_tokens: int | None = None

    def __post_init__(self) -> None:
        _expect_choice("kind", self.kind, KV_CACHE_KINDS)
        _expect_positive("num_tokens", self.num_tokens)
        _expect_positive("max_model_len", self.max_model_len)
        for name in ("max_num_seqs", "max_step_tokens"):
            if getattr(self, name) is not None:
                _expect_positive(name, getattr(self, name))
        _expect_block_size(self.block_size)
        if self.num_tokens % self.block_size:
            raise ConfigError(
                f"num_tokens must be a multiple of {self.block_size}, got {self.num_tokens}"
            )


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _expect_positive(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{name} must be an int >= 1, got {value!r}")


def _expect_block_size(value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 16 or value % 16:
        raise ConfigError(f"block_size must be a positive multiple of 16, got {value!r}")


def _expect_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
