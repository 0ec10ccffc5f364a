"""What a user asked for: one request's sampling, stopping and logprob options, validated once.

Knows the names, defaults and legal ranges (vLLM's names, so that code and habits carry over). Does
not know a vocabulary, a model or a context length: token ids against `vocab_size` and prompt
lengths against `max_model_len` are checked where those are known, at the engine's front.

vLLM's `extra_args` and `spaces_between_special_tokens` are absent: an option that would be ignored
is worse than one that is refused by name.

Source: vLLM `vllm/sampling_params.py`; the caps keep one request's cost bounded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from numbers import Integral, Real
from typing import Any, Final, NoReturn

from pace_nb.errors import InvalidRequestError
from pace_nb.structured_outputs import StructuredOutputsParams

GREEDY_TEMPERATURE: Final = 1e-5  # below this, dividing logits is noise: take the argmax instead

# Bounds on one request. They keep every later list, array and loop small and every float32 finite.
MAX_N: Final = 1024
MAX_STOP_STRINGS: Final = 16
MAX_STOP_LENGTH: Final = 256  # characters, also of one bad word
MAX_STOP_TOKEN_IDS: Final = 64
MAX_BAD_WORDS: Final = 128
MAX_LOGIT_BIAS: Final = 1024
MAX_ABS_LOGIT_BIAS: Final = 100.0
MAX_LOGPROBS: Final = 20
MAX_TEMPERATURE: Final = 1e6  # beyond it a float32 temperature may be inf, and -inf / inf is NaN
MAX_TOKEN_ID: Final = 2**31 - 1  # token ids travel as int32
MAX_TOKENS: Final = 2**31 - 1
MIN_SEED: Final = -(2**63)  # OpenAI's; a negative seed is the one of the same 64 bits
MAX_SEED: Final = 2**64 - 1


class RequestOutputKind(Enum):
    """What each output of a stream holds: all so far, what is new, or one output, at the end."""

    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How to sample, when to stop and what to report, for one request.

    Values are normalised on construction: `stop`, `stop_token_ids`, `bad_words` and
    `allowed_token_ids` become tuples (a lone string is one stop string, None is none), `top_k=-1`
    becomes 0, `seed=-1` becomes None, `logit_bias` keys become ints, numbers become int or float.

    Attributes:
        n: Completions per prompt, each sampled by itself. 1 to 1024.
        presence_penalty: Subtracted once from the logit of each token generated so far. -2 to 2.
        frequency_penalty: Subtracted per occurrence of a generated token. -2 to 2.
        repetition_penalty: Divides positive and multiplies negative logits of tokens seen in the
            prompt or the output. 1 is off; 0.01 to 100.
        temperature: Divides the logits. Below 1e-5 the most likely token is taken (`greedy`).
        top_p: Smallest set of tokens whose probability reaches this. Above 0, at most 1 (off).
        top_k: The k most likely tokens. 0 or -1 is off.
        min_p: Drop tokens less likely than this share of the most likely one. 0 (off) to 1.
        seed: Same seed, same request, same tokens, whatever else runs. None or -1 draws one.
            -2**63 to 2**64 - 1.
        stop: Strings that end the text. At most 16 of at most 256 characters.
        stop_token_ids: Token ids that end generation, besides the model's own end tokens.
        ignore_eos: Go on past the model's end tokens.
        max_tokens: Most tokens to generate; None is as many as the context holds. The default of
            16 is vLLM's and OpenAI's; the command line uses more.
        min_tokens: Before this many tokens nothing but `max_tokens` ends generation: end tokens
            and stop ids are not sampled, and stop strings do not match.
        logprobs: Report this many most likely tokens for each generated one, besides the token
            itself (0: only itself). None reports nothing. At most 20.
        prompt_logprobs: The same for each prompt token.
        detokenize: False returns token ids only; the text stays empty.
        skip_special_tokens: Leave special tokens out of the text.
        include_stop_str_in_output: Keep the matched stop string at the end of the text.
        logit_bias: Added to the logits: token id -> bias. At most 1024 entries, -100 to 100.
        allowed_token_ids: Only these may be generated. None is all.
        bad_words: Strings whose token sequences must not be generated. At most 128.
        token_mask: Which tokens may be generated next, for grammars: an array bool[V], or int32 of
            ceil(V / 32) words whose bit i % 32 of word i // 32 is token i (llguidance's form); or a
            function that is given the ids generated so far and returns such an array. None is all.
        structured_outputs: The form that the text must have, a StructuredOutputsParams or an object
            of its fields, such as {"json": schema}. It takes the place of token_mask, and the text
            ends where it is complete. Needs a tokenizer, and llguidance (extra `server`).
        truncate_prompt_tokens: Keep only the last so many prompt tokens; -1 keeps what the context
            holds. None refuses a prompt that is too long.
        output_kind: What the outputs of `AsyncLLM` hold. Elsewhere the method says: `generate` and
            `chat` of `LLM` give the final output, its streams what is new.

    Raises:
        InvalidRequestError: naming the field, the value and what was expected, in one line.
    """

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: Sequence[str] = ()  # a str is a Sequence[str]: one stop string
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    logit_bias: Mapping[int, float] | None = field(default=None, hash=False)
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] = ()
    token_mask: Any = field(default=None, compare=False)
    structured_outputs: StructuredOutputsParams | Mapping[str, Any] | None = field(
        default=None, hash=False
    )
    truncate_prompt_tokens: int | None = None
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE

    def __post_init__(self) -> None:
        self._store("n", _integer("n", self.n, 1, MAX_N))
        for name in ("presence_penalty", "frequency_penalty"):
            self._store(name, _number(name, getattr(self, name), -2.0, 2.0))
        self._store(
            "repetition_penalty",
            _number("repetition_penalty", self.repetition_penalty, 0.01, 100.0),
        )
        self._store("temperature", _number("temperature", self.temperature, 0.0, MAX_TEMPERATURE))
        self._store("top_p", _number("top_p", self.top_p, 0.0, 1.0, open_low=True))
        self._store("top_k", max(0, _integer("top_k", self.top_k, -1, MAX_TOKENS)))
        self._store("min_p", _number("min_p", self.min_p, 0.0, 1.0))
        if self.seed is not None:
            seed = _integer("seed", self.seed, MIN_SEED, MAX_SEED)
            self._store("seed", None if seed == -1 else seed % 2**64)

        self._store("stop", _strings("stop", self.stop, MAX_STOP_STRINGS))
        self._store("bad_words", _strings("bad_words", self.bad_words, MAX_BAD_WORDS))
        self._store(
            "stop_token_ids",
            _token_ids("stop_token_ids", self.stop_token_ids or (), MAX_STOP_TOKEN_IDS),
        )
        if self.allowed_token_ids is not None:
            allowed = _token_ids("allowed_token_ids", self.allowed_token_ids, MAX_TOKEN_ID)
            if not allowed:
                _refuse("allowed_token_ids", self.allowed_token_ids, "None or at least one id")
            self._store("allowed_token_ids", allowed)
        if self.logit_bias is not None:
            self._store("logit_bias", _logit_bias(self.logit_bias) or None)

        if self.token_mask is not None and not (
            callable(self.token_mask) or hasattr(self.token_mask, "dtype")
        ):
            _refuse("token_mask", self.token_mask, "a NumPy array, a function or None")
        if self.structured_outputs is not None:
            form = StructuredOutputsParams.of(self.structured_outputs)
            self._store("structured_outputs", form)

        if self.max_tokens is not None:
            self._store("max_tokens", _integer("max_tokens", self.max_tokens, 1, MAX_TOKENS))
        self._store("min_tokens", _integer("min_tokens", self.min_tokens, 0, MAX_TOKENS))
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            _refuse("min_tokens", self.min_tokens, f"at most max_tokens ({self.max_tokens})")
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                self._store(name, _integer(name, getattr(self, name), 0, MAX_LOGPROBS))
        if self.truncate_prompt_tokens is not None:
            kept = _integer("truncate_prompt_tokens", self.truncate_prompt_tokens, -1, MAX_TOKENS)
            if kept == 0:
                _refuse("truncate_prompt_tokens", kept, "-1 or an integer of at least 1")
            self._store("truncate_prompt_tokens", kept)

        for name in (
            "ignore_eos",
            "detokenize",
            "skip_special_tokens",
            "include_stop_str_in_output",
        ):
            if not isinstance(getattr(self, name), bool):
                _refuse(name, getattr(self, name), "true or false")
        if not isinstance(self.output_kind, RequestOutputKind):
            _refuse("output_kind", self.output_kind, "a RequestOutputKind")
        if self.stop and not self.detokenize:
            _refuse("detokenize", self.detokenize, "true where stop strings are given")

    def _store(self, name: str, value: object) -> None:
        """Put the normalised value in place (the class is frozen for everyone else)."""
        object.__setattr__(self, name, value)

    @property
    def only_greedy(self) -> bool:
        """True where the largest logits decide as they are, and no logprobs are asked for."""
        return (
            self.greedy
            and self.logprobs is None
            and self.prompt_logprobs is None
            and not self.logit_bias
            and self.allowed_token_ids is None
            and self.token_mask is None
            and not self.min_tokens
            and self.repetition_penalty == 1
            and not self.frequency_penalty
            and not self.presence_penalty
        )

    @property
    def greedy(self) -> bool:
        """True where the most likely token is taken instead of sampling."""
        return self.temperature < GREEDY_TEMPERATURE


def _refuse(name: str, value: object, expected: str) -> NoReturn:
    raise InvalidRequestError(f"{name} is {_shown(value)}, expected {expected}")


def _shown(value: object) -> str:
    """A short, one-line, always printable form of a value that came from outside."""
    if isinstance(value, (str, bytes)):
        value = value[:80]
    elif isinstance(value, Integral) and int(value).bit_length() > 130:
        return "an integer of more than 39 digits"  # repr() of a huge int raises or takes minutes
    elif isinstance(value, (Mapping, list, tuple, set, frozenset)):
        return f"a {type(value).__name__} of {len(value)}"
    text = ascii(value) if isinstance(value, str) else repr(value)
    text = " ".join(text.split())
    return text if len(text) <= 90 else text[:90] + "..."


def _integer(name: str, value: object, low: int, high: int) -> int:
    """`value` as int when it is one (bool is not) and low <= value <= high."""
    if isinstance(value, Integral) and not isinstance(value, bool) and low <= int(value) <= high:
        return int(value)
    bounds = "-2**63 to 2**64 - 1" if high == MAX_SEED else f"{low} to {high}"
    _refuse(name, value, f"an integer from {bounds}")


def _number(name: str, value: object, low: float, high: float, *, open_low: bool = False) -> float:
    """`value` as float when it is a finite number (bool is not) in [low, high], or (low, high]."""
    if isinstance(value, Real) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:  # an int beyond 1.8e308
            number = math.inf
        if low <= number <= high and not (open_low and number == low):  # NaN compares false
            return number
    bounds = f"above {low:g} and at most {high:g}" if open_low else f"from {low:g} to {high:g}"
    _refuse(name, value, f"a number {bounds}")


def _items(name: str, value: object, most: int, what: str) -> list[object]:
    """The items of a list-like value, refused when it is no list or holds too many."""
    if not isinstance(value, (list, tuple, set, frozenset, range)):
        _refuse(name, value, f"a list of {what}")
    if len(value) > most:
        _refuse(name, value, f"at most {most} {what}")
    return list(value)


def _strings(name: str, value: object, most: int) -> tuple[str, ...]:
    """Non-empty strings of at most MAX_STOP_LENGTH characters, without repeats, in order."""
    if value is None:
        return ()
    items = [value] if isinstance(value, str) else _items(name, value, most, "strings")
    strings: list[str] = []
    for item in items:
        if not isinstance(item, str) or not 1 <= len(item) <= MAX_STOP_LENGTH:
            _refuse(f"{name} entry", item, f"a string of 1 to {MAX_STOP_LENGTH} characters")
        if any("\ud800" <= character <= "\udfff" for character in item):
            _refuse(f"{name} entry", item, "text without lone surrogates")
        strings.append(item)
    return tuple(dict.fromkeys(strings))


def _token_ids(name: str, value: object, most: int) -> tuple[int, ...]:
    """Token ids in [0, 2**31), without repeats, in order."""
    items = _items(name, value, most, "token ids")
    return tuple(dict.fromkeys(_integer(f"{name} entry", i, 0, MAX_TOKEN_ID) for i in items))


def _logit_bias(value: object) -> dict[int, float]:
    """Token id -> bias. JSON writes keys as strings, so a decimal string is an id too."""
    if not isinstance(value, Mapping):
        _refuse("logit_bias", value, "a mapping of token id to bias")
    if len(value) > MAX_LOGIT_BIAS:
        _refuse("logit_bias", value, f"at most {MAX_LOGIT_BIAS} entries")
    biases: dict[int, float] = {}
    for key, bias in value.items():
        if isinstance(key, str) and key.isascii() and key.isdigit() and len(key) <= 10:
            key = int(key)
        token_id = _integer("logit_bias key", key, 0, MAX_TOKEN_ID)
        biases[token_id] = _number(
            f"logit_bias of token {token_id}", bias, -MAX_ABS_LOGIT_BIAS, MAX_ABS_LOGIT_BIAS
        )
    return biases
