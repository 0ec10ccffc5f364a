"""`Completion` and `Submission`: what becomes of a prompt, as it is told to whoever asked.

Knows how tokens of a request become the text, log-probabilities and ends of outputs.py, all at once
or piece by piece. Does not know where prompts come from, when steps run, or the engine, which in
turn knows no text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from pace_nb.engine.request import Request
from pace_nb.engine.stopping import StopChecker
from pace_nb.errors import InvalidRequestError
from pace_nb.outputs import CompletionOutput, FinishReason, RequestOutput, TokenLogprobs
from pace_nb.tokenizer import IncrementalDecoder, Tokenizer


class Completion:
    """One of the n continuations of a prompt: a request, and its text so far.

    tokenizer None: there is no text. Raises InvalidRequestError where stop strings need it.

    Attributes:
        request: The engine's.
        token_ids: Those that belong to the completion; a stop string may have cut some off.
        finish_reason: As in CompletionOutput. It may be there before the request's own: then a stop
            string was complete, and the request should be taken out of the engine.
    """

    def __init__(self, index: int, request: Request, tokenizer: Tokenizer | None) -> None:
        params = request.params
        decoder = None
        if tokenizer is not None and params.detokenize:
            decoder = IncrementalDecoder(
                tokenizer, request.prompt_token_ids, params.skip_special_tokens
            )
        elif params.stop:
            raise InvalidRequestError("stop strings need a tokenizer, the model has none")
        self.request = request
        self.token_ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self._index = index
        self._tokenizer = tokenizer if params.detokenize else None
        self._checker = StopChecker(params, decoder)
        self._texts: list[str] = []
        self._logprobs: list[TokenLogprobs] | None = None if params.logprobs is None else []
        self._cumulative_logprob = 0.0
        self._prompt_logprobs: list[TokenLogprobs | None] = []
        self._stop_reason: int | str | None = None
        self._told = (0, 0, False)  # tokens, texts and whether the end were in news()

    def take(self, new_token_ids: Sequence[int]) -> None:
        """Tokens of a step, or the request's end, or both. Whatever raises ends it with "error"."""
        request = self.request
        try:
            result = self._checker.push(
                new_token_ids,
                request.finish_reason,
                request.stop_reason,
                ended_by_text=request.grammar_complete,
            )
            if self._logprobs is not None and request.logprobs is not None:
                start = len(self._logprobs)
                found = request.logprobs[start : start + result.num_kept]
                for token_id, entries in zip(new_token_ids, found, strict=False):
                    self._logprobs.append(self._decoded(entries))
                    self._cumulative_logprob += entries[token_id].logprob
        except Exception as error:
            self.fail(f"{type(error).__name__}: {error}")
            return
        self.token_ids += new_token_ids[: result.num_kept]
        if result.text:
            self._texts.append(result.text)
        self.finish_reason, self._stop_reason = result.finish_reason, result.stop_reason
        if request.error is not None:
            self._stop_reason = request.error

    def fail(self, reason: str) -> None:
        """End it with "error"."""
        self.finish_reason, self._stop_reason = "error", " ".join(reason.split())

    def output(self) -> CompletionOutput:
        """All of it, so far."""
        return self._output(0, 0)

    def news(self) -> CompletionOutput | None:
        """What came since the last call; None if nothing did."""
        state = (len(self.token_ids), len(self._texts), self.finish_reason is not None)
        if state == self._told:
            return None
        news = self._output(*self._told[:2])
        self._told = state
        return news

    def prompt_logprobs(self) -> list[TokenLogprobs | None] | None:
        """Those of the prompt, with each token as text; None where they were not asked for."""
        found = self.request.prompt_logprobs
        if found is None:
            return None
        told = self._prompt_logprobs  # decoded once, not once per piece of news
        del told[len(found) :]
        told += [None if one is None else self._decoded(one) for one in found[len(told) :]]
        return told

    def _output(self, first_token: int, first_text: int) -> CompletionOutput:
        """What came after so many tokens and pieces of text."""
        logprobs = self._logprobs
        return CompletionOutput(
            index=self._index,
            text="".join(self._texts[first_text:]),
            token_ids=self.token_ids[first_token:],
            cumulative_logprob=None if logprobs is None else self._cumulative_logprob,
            logprobs=None if logprobs is None else logprobs[first_token:],
            finish_reason=self.finish_reason,
            stop_reason=self._stop_reason,
        )

    def _decoded(self, entries: TokenLogprobs) -> TokenLogprobs:
        """The same with each token as text, where there is a tokenizer."""
        if self._tokenizer is None:
            return entries
        return {
            token_id: replace(entry, decoded_token=self._tokenizer.token_text(token_id))
            for token_id, entry in entries.items()
        }


class Submission:
    """One prompt with its n completions.

    request_id: how it is called in outputs. text: the prompt as text, where it came as text.
    """

    def __init__(
        self, request_id: str, text: str | None, completions: Sequence[Completion]
    ) -> None:
        self.request_id = request_id
        self.completions = completions
        self._text = text
        self._prompt_token_ids = list(completions[0].request.prompt_token_ids)

    @property
    def finished(self) -> bool:
        """All completions have ended."""
        return all(completion.finish_reason is not None for completion in self.completions)

    def output(self) -> RequestOutput:
        """All of it, so far."""
        return self._with([completion.output() for completion in self.completions])

    def news(self) -> RequestOutput | None:
        """The completions that moved since the last call, with what is new; None if none did."""
        news = [completion.news() for completion in self.completions]
        moved = [completion for completion in news if completion is not None]
        return self._with(moved) if moved else None

    def _with(self, outputs: list[CompletionOutput]) -> RequestOutput:
        first = self.completions[0]
        return RequestOutput(
            request_id=self.request_id,
            prompt=self._text,
            prompt_token_ids=self._prompt_token_ids,
            prompt_logprobs=first.prompt_logprobs(),
            outputs=outputs,
            finished=self.finished,
            num_cached_tokens=first.request.num_cached_tokens,
            metrics=first.request.metrics,
        )
