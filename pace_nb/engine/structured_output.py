"""`GrammarCompiler` and `TokenGrammar`: which tokens may come next, for a text of a given form.

Knows llguidance, which keeps a model to a JSON schema, a regular expression or a grammar by a mask
over the vocabulary for each token. Does not know logits: the sampler applies the mask
(`SamplingParams.token_mask`), the engine asks whether the form is complete.

llguidance builds nothing ahead of time: a form costs milliseconds to compile, and its lexer and
parser are bounded by LIMITS, whatever a user sends. A form that goes beyond them when it is
compiled is refused; one that does later ends its own request with "error". Nothing is kept of it
after its request.

The package is needed for this only (extra `server`), and imported with the first request that asks.
Source: https://github.com/guidance-ai/llguidance, docs/json_schema.md and docs/syntax.md.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Collection, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from pace_nb.errors import InvalidRequestError
from pace_nb.structured_outputs import StructuredOutputsParams
from pace_nb.tokenizer import Tokenizer

# Of one form. By llguidance's own figures the fuel of a step is 14 ms of its lexer, that of the
# beginning 20 ms; a state of the lexer has up to 2 kB.
LIMITS: Final[dict[str, Any]] = {
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 200_000,
    "step_max_items": 50_000,
    "max_items_in_row": 2_000,
    "max_lexer_states": 25_000,
    "max_grammar_size": 500_000,
    "verbose_errors": False,
}
# A small model, once it may write white space for ever, does. llama.cpp's bound.
WHITESPACE: Final = r"( |\n[ \t]{0,20})?"
MAX_MESSAGE: Final = 200  # characters of the library's own words


class TokenGrammar:
    """The form of one request's text, followed token by token.

    It may be asked about any ids, those of the last call with more behind them above all: it holds
    nothing that cannot be made again from them.
    """

    def __init__(
        self,
        matcher: Any,
        tokenizer: Tokenizer,
        vocab_size: int,
        start_id: int | None,
        end: bytes,
    ) -> None:
        """start_id: the token that may begin reasoning; end: what ends it, b"" for none."""
        self._matcher = matcher
        self._tokenizer = tokenizer
        self._num_words = -(-vocab_size // 32)
        self._start_id = start_id
        self._end = end
        self._ids: list[int] = []  # that were followed
        self._tail = b""  # the last bytes of the reasoning
        self._reasons = bool(end) and start_id is None

    def copy(self) -> TokenGrammar:
        """The same from the beginning, for another completion of the same prompt."""
        made = TokenGrammar.__new__(TokenGrammar)
        made.__dict__.update(self.__dict__)
        made._matcher = self._matcher.deep_copy()
        made._restart()
        return made

    def __call__(self, generated: Sequence[int]) -> NDArray[np.int32]:
        """The mask for the token after these: int32[ceil(V / 32)], as in `SamplingParams`.

        Raises ValueError where the form cannot be followed any further, with the library's reason.
        """
        self._follow(generated)
        if self._reasons or self._matcher.is_stopped():  # after its end anything goes
            return np.full(self._num_words, -1, np.int32)
        words = np.frombuffer(self._matcher.compute_bitmask(), np.int32)[: self._num_words]
        self._raise_error()
        if self._start_id is not None and not self._ids:
            words = words.copy()
            words.view(np.uint32)[self._start_id // 32] |= np.uint32(1 << self._start_id % 32)
        return words

    def is_complete(self, generated: Sequence[int]) -> bool:
        """Whether these ids are a whole text of the form, to which nothing can be added."""
        self._follow(generated)
        return not self._reasons and bool(self._matcher.is_stopped())

    def _follow(self, generated: Sequence[int]) -> None:
        known = len(self._ids)
        if list(generated[:known]) != self._ids:
            self._restart()
            known = 0
        for token_id in generated[known:]:
            if self._reasons:
                self._tail += self._tokenizer.token_bytes(token_id)
                self._reasons = self._end not in self._tail
                self._tail = self._tail[-len(self._end) :]
            elif token_id == self._start_id and not self._ids:
                self._reasons = True
            elif not self._matcher.is_stopped():
                self._matcher.consume_token(token_id)
                self._raise_error()
            self._ids.append(token_id)

    def _restart(self) -> None:
        self._matcher.reset()
        self._ids = []
        self._tail = b""
        self._reasons = bool(self._end) and self._start_id is None

    def _raise_error(self) -> None:
        if self._matcher.is_error():
            raise ValueError(_short(self._matcher.get_error()))


class GrammarCompiler:
    """Makes the grammars of one model's requests. May be called from any thread."""

    def __init__(
        self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Collection[int]
    ) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = sorted(one for one in eos_token_ids if one < vocab_size)
        self._lock = threading.Lock()
        self._vocabulary: Any = None

    def compile(self, wanted: StructuredOutputsParams) -> TokenGrammar:
        """The grammar of a form. InvalidRequestError, in one line, where there can be none."""
        try:
            from llguidance import LLMatcher, LLParserLimits
        except ModuleNotFoundError:
            raise InvalidRequestError(
                "structured outputs need llguidance: pip install 'pace-nb[server]'"
            ) from None
        vocabulary = self._open_vocabulary()
        try:
            source = _source(wanted)
        except Exception as error:  # the library's converters raise all kinds
            raise _refusal(wanted, f"{type(error).__name__}: {error}") from None
        matcher = LLMatcher(vocabulary, source, log_level=0, limits=LLParserLimits(**LIMITS))
        if not matcher.is_error():
            matcher.compute_bitmask()  # the first step finds what the compiler did not
        if matcher.is_error():
            raise _refusal(wanted, matcher.get_error())
        matcher.reset()
        return TokenGrammar(matcher, self._tokenizer, self._vocab_size, *self._reasoning(wanted))

    def _reasoning(self, wanted: StructuredOutputsParams) -> tuple[int | None, bytes]:
        """The token that may begin reasoning, and what ends it."""
        if wanted.reasoning_end is None:
            return None, b""
        end = wanted.reasoning_end.encode()
        if wanted.reasoning_start is None:
            return None, end
        ids = self._tokenizer.encode(wanted.reasoning_start, add_special_tokens=False)
        return (ids[0], end) if len(ids) == 1 else (None, b"")

    def _open_vocabulary(self) -> Any:
        from llguidance import LLTokenizer

        with self._lock:
            if self._vocabulary is None:
                try:
                    self._vocabulary = LLTokenizer(
                        self._tokenizer.to_json(),
                        n_vocab=self._vocab_size,
                        eos_token=self._eos_token_ids or None,
                    )
                except Exception as error:
                    raise InvalidRequestError(
                        "structured outputs are not possible with this model's tokenizer: "
                        f"{_short(str(error))}"
                    ) from None
            return self._vocabulary


def _source(wanted: StructuredOutputsParams) -> str:
    """The form in llguidance's own notation."""
    from llguidance import LLMatcher
    from llguidance.gbnf_to_lark import any_to_lark

    if wanted.regex is not None:
        return str(LLMatcher.grammar_from_regex(wanted.regex))
    if wanted.choice is not None:
        choices = [json.dumps(one, ensure_ascii=False) for one in wanted.choice]
        return str(LLMatcher.grammar_from_lark(f"start: {' | '.join(choices)}"))
    if wanted.grammar is not None:
        return str(LLMatcher.grammar_from_lark(any_to_lark(wanted.grammar)))
    schema = {"type": "object"} if wanted.json is None else wanted.json
    options: Any = {"coerce_one_of": True}  # oneOf as anyOf: better than refused
    if wanted.disable_any_whitespace:
        options["whitespace_flexible"] = False
    else:
        options["whitespace_pattern"] = wanted.whitespace_pattern or WHITESPACE
    return str(LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=options))


def _refusal(wanted: StructuredOutputsParams, reason: str) -> InvalidRequestError:
    kind = next(iter(wanted.to_json()))
    return InvalidRequestError(f"structured_outputs: {kind} cannot be followed: {_short(reason)}")


def _short(message: str) -> str:
    """On one line, and not all of it."""
    text = " ".join(message.split())
    return text if len(text) <= MAX_MESSAGE else text[:MAX_MESSAGE] + "..."
