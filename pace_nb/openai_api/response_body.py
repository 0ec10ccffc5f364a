"""`CompletionResponse` and `ChatResponse`: outputs as OpenAI's response bodies, whole or in chunks.

Knows the shapes `text_completion`, `chat.completion`, `chat.completion.chunk` and the error object.
Does not know HTTP or how a chunk is framed; every body is plain data that `json.dumps(...,
allow_nan=False)` takes.

- Probability 0 is written as -9999.0: JSON has no infinity.
- A completion that failed has finish_reason null and the reason in its own `error`; where all
  failed there is nothing to answer with, and `failure` gives the ApiError to answer with instead.

Source: OpenAI's API reference; vLLM `vllm/entrypoints/openai/`.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

from pace_nb.errors import ApiError, InvalidRequestError
from pace_nb.openai_api.message_format import PLAIN, MessageFormat
from pace_nb.openai_api.message_pieces import MessageReader, Piece, as_message, joined
from pace_nb.openai_api.request_body import ChatBody, CompletionBody, RequestBody
from pace_nb.outputs import CompletionOutput, Logprob, RequestOutput, TokenLogprobs

if TYPE_CHECKING:
    from pace_nb.tokenizer import Tokenizer

LOWEST_LOGPROB: Final = -9999.0  # vLLM's
ERROR_TYPES: Final = {
    400: "BadRequestError",
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    429: "RateLimitError",
    500: "InternalServerError",
    503: "ServiceUnavailableError",
}

Json = dict[str, Any]


def error_body(error: Exception) -> Json:
    """The error object for an error: {"error": {"message", "type", "param", "code"}}.

    `code` is the HTTP status: an ApiError's own, 400 for other InvalidRequestErrors, else 500.
    """
    status = 500
    if isinstance(error, ApiError):
        status = error.status
    elif isinstance(error, InvalidRequestError):
        status = 400
    return {
        "error": {
            "message": str(error) or type(error).__name__,
            "type": ERROR_TYPES.get(status, ERROR_TYPES[400 if status < 500 else 500]),
            "param": error.param if isinstance(error, ApiError) else None,
            "code": status,
        }
    }


def failure(outputs: Iterable[RequestOutput]) -> ApiError | None:
    """Status 500 with the first reason, where every completion failed; else None."""
    completions = [completion for output in outputs for completion in output.outputs]
    if completions and all(completion.finish_reason == "error" for completion in completions):
        return ApiError(f"generation failed: {completions[0].stop_reason}", status=500)
    return None


class _Response:
    """What both kinds share: who answers what to whom, and the count of tokens so far."""

    object_name: str
    chunk_name: str

    def __init__(
        self,
        body: RequestBody,
        *,
        response_id: str,
        model: str,
        created: int | None = None,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        """response_id: such as "chatcmpl-...". created: Unix seconds. tokenizer: for tokens' bytes
        and for the text of prompts that came as token ids."""
        self._body = body
        self._id = response_id
        self._model = model
        self._created = int(time.time()) if created is None else created
        self._tokenizer = tokenizer
        self._prompts: dict[int, tuple[int, int]] = {}  # index -> its tokens, those from the cache
        self._num_completion_tokens = 0

    def usage(self) -> Json:
        """Tokens of everything that was given to `whole` or `chunks` so far."""
        num_prompt = sum(total for total, _ in self._prompts.values())
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": self._num_completion_tokens,
            "total_tokens": num_prompt + self._num_completion_tokens,
            "prompt_tokens_details": {
                "cached_tokens": sum(cached for _, cached in self._prompts.values())
            },
        }

    def usage_chunk(self) -> Json:
        """The last chunk of a stream whose `stream_options` ask for the usage."""
        return {**self._envelope(self.chunk_name, []), "usage": self.usage()}

    def silent_chunk(self) -> Json:
        """One that says nothing, for a client that reads `usage_chunk` and so can read it."""
        return {**self._envelope(self.chunk_name, []), "usage": None}

    def _count(self, prompt_index: int, output: RequestOutput) -> None:
        self._prompts[prompt_index] = (len(output.prompt_token_ids), output.num_cached_tokens)
        self._num_completion_tokens += sum(len(one.token_ids) for one in output.outputs)

    def _envelope(self, name: str, choices: list[Json]) -> Json:
        return {
            "id": self._id,
            "object": name,
            "created": self._created,
            "model": self._model,
            "choices": choices,
        }

    def _chunk(self, choice: Json) -> Json:
        chunk = self._envelope(self.chunk_name, [choice])
        options = self._body.stream_options
        if options.continuous_usage_stats:
            chunk["usage"] = self.usage()
        elif options.include_usage:
            chunk["usage"] = None
        return chunk

    def _name(self, token_id: int, entry: Logprob | None) -> str:
        """A token in logprobs."""
        if self._body.return_tokens_as_token_ids:
            return f"token_id:{token_id}"
        if entry is not None and entry.decoded_token is not None:
            return entry.decoded_token
        return f"token_id:{token_id}" if self._tokenizer is None else self._text_of(token_id)

    def _text_of(self, token_id: int) -> str:
        return "" if self._tokenizer is None else self._tokenizer.token_text(token_id)


class CompletionResponse(_Response):
    """Answers a CompletionBody. The choices of prompt p are p * n to p * n + n - 1."""

    object_name = chunk_name = "text_completion"
    _body: CompletionBody

    def __init__(self, body: CompletionBody, **options: Any) -> None:
        super().__init__(body, **options)
        self._offsets: dict[int, int] = {}  # choice -> characters told so far
        self._begun: set[int] = set()

    def whole(self, outputs: Sequence[RequestOutput]) -> Json:
        """The body for the finished outputs of all prompts, in order. ApiError: see `failure`."""
        return self.around([*self.choices(outputs)], outputs)

    def choices(self, outputs: Sequence[RequestOutput]) -> Iterator[Json]:
        """Those of `whole`, one by one: with logprobs each takes its time."""
        failed = failure(outputs)
        if failed is not None:
            raise failed
        for prompt_index, output in enumerate(outputs):
            for completion in output.outputs:
                yield self._choice(prompt_index, output, completion)

    def around(self, choices: list[Json], outputs: Sequence[RequestOutput]) -> Json:
        """The rest of `whole`, around these choices."""
        for prompt_index, output in enumerate(outputs):
            self._count(prompt_index, output)
        if self._body.prompt_only:
            self._num_completion_tokens = 0
        answer = self._envelope(self.object_name, choices)
        return {**answer, "usage": self.usage()}

    def chunks(self, prompt_index: int, news: RequestOutput) -> list[Json]:
        """What to send for news of a prompt; maybe nothing."""
        self._count(prompt_index, news)
        chunks = []
        for completion in news.outputs:
            choice = self._choice(prompt_index, news, completion)
            has_tokens = choice["logprobs"] is not None or self._body.return_token_ids
            if choice["text"] or completion.finish_reason or (has_tokens and completion.token_ids):
                chunks.append(self._chunk(choice))
        return chunks

    def _choice_index(self, prompt_index: int, completion: CompletionOutput) -> int:
        return prompt_index * self._body.params.n + completion.index

    def _choice(
        self, prompt_index: int, output: RequestOutput, completion: CompletionOutput
    ) -> Json:
        """A choice, or the next piece of one; the first has the prompt, where it is echoed."""
        index = self._choice_index(prompt_index, completion)
        text, new_ids, ids = completion.text, completion.token_ids, completion.token_ids
        entries: list[TokenLogprobs | None] | None = None
        if completion.logprobs is not None:
            entries = [*completion.logprobs]
        if self._body.prompt_only:
            text, new_ids, ids, entries = "", [], [], None if entries is None else []
        first = index not in self._begun
        if self._body.echo and first:
            text = self._prompt_text(output) + text
            if entries is not None and output.prompt_logprobs is not None:
                ids = output.prompt_token_ids + ids
                entries = [*output.prompt_logprobs, *entries]
        self._begun.add(index)
        choice: Json = {
            "index": index,
            "text": text,
            "logprobs": None if entries is None else self._logprobs(index, ids, entries),
            **_ending(completion, finish="length" if self._body.prompt_only else None),
        }
        if not self._body.stream and self._body.params.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_logprobs(output.prompt_logprobs)
        if self._body.return_token_ids:
            choice["token_ids"] = new_ids
            choice["prompt_token_ids"] = output.prompt_token_ids if first else None
        return choice

    def _prompt_text(self, output: RequestOutput) -> str:
        """What is echoed: the prompt as it came, or what was left of it."""
        is_whole = self._body.params.truncate_prompt_tokens is None
        if self._tokenizer is None or (is_whole and output.prompt is not None):
            return output.prompt or ""
        return self._tokenizer.decode(output.prompt_token_ids)

    def _logprobs(
        self, index: int, token_ids: Sequence[int], entries: Sequence[TokenLogprobs | None]
    ) -> Json:
        """Parallel lists, an item per token; a prompt's first has no logprob."""
        found: Json = {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}
        offset = self._offsets.get(index, 0)
        for token_id, entry in zip(token_ids, entries, strict=True):
            own = None if entry is None else entry[token_id]
            name = self._name(token_id, own)
            found["text_offset"].append(offset)
            found["tokens"].append(name)
            found["token_logprobs"].append(None if own is None else _number(own.logprob))
            found["top_logprobs"].append(None if entry is None else self._top(entry))
            offset += len(name)
        self._offsets[index] = offset
        return found

    def _top(self, entry: TokenLogprobs) -> Json:
        """Name -> logprob; of tokens with the same text the likeliest."""
        found: Json = {}
        for token_id, logprob in sorted(entry.items(), key=lambda item: -item[1].logprob):
            found.setdefault(self._name(token_id, logprob), _number(logprob.logprob))
        return found


class ChatResponse(_Response):
    """Answers a ChatBody. message_format: how the model writes reasoning and tool calls."""

    object_name, chunk_name = "chat.completion", "chat.completion.chunk"
    _body: ChatBody

    def __init__(
        self, body: ChatBody, *, message_format: MessageFormat = PLAIN, **options: Any
    ) -> None:
        super().__init__(body, **options)
        self._format = message_format
        self._readers: dict[int, MessageReader] = {}  # of choices that have begun
        self._with_calls: set[int] = set()  # choices that hold tool calls

    def whole(self, output: RequestOutput) -> Json:
        """The body for a finished output. ApiError: see `failure`."""
        return self.around([*self.choices(output)], output)

    def choices(self, output: RequestOutput) -> Iterator[Json]:
        """Those of `whole`, one by one: with logprobs each takes its time."""
        failed = failure([output])
        if failed is not None:
            raise failed
        for completion in output.outputs:
            reader = self._format.reader(self._body, output.prompt)
            pieces = joined(reader.push(completion.text) + reader.finish())
            yield {
                "index": completion.index,
                "message": self._message(pieces),
                "logprobs": self._logprobs(completion),
                **_calling(_ending(completion), any(one.kind == "call" for one in pieces)),
                **self._token_ids(completion),
            }

    def around(self, choices: list[Json], output: RequestOutput) -> Json:
        """The rest of `whole`, around these choices."""
        self._count(0, output)
        answer = self._envelope(self.object_name, choices)
        answer["usage"] = self.usage()
        if self._body.params.prompt_logprobs is not None:
            answer["prompt_logprobs"] = prompt_logprobs(output.prompt_logprobs)
        if self._body.return_token_ids:
            answer["prompt_token_ids"] = output.prompt_token_ids
        return answer

    def chunks(self, news: RequestOutput) -> list[Json]:
        """What to send for news: each choice begins with its role and ends with its reason."""
        self._count(0, news)
        chunks = []
        for completion in news.outputs:
            index = completion.index
            if index not in self._readers:
                self._readers[index] = self._format.reader(self._body, news.prompt)
                chunks.append(self.delta(index, {"role": "assistant", "content": self._echoed()}))
            reader, ended = self._readers[index], completion.finish_reason is not None
            pieces = reader.push(completion.text) + (reader.finish() if ended else [])
            deltas = [self._piece(piece) for piece in joined(pieces)]
            logprobs = self._logprobs(completion)
            if not deltas and (logprobs or self._body.return_token_ids) and completion.token_ids:
                deltas = [{"content": ""}]
            beside = {"logprobs": logprobs, **self._token_ids(completion)}  # of all the news
            for delta in deltas:
                chunks.append(self.delta(index, delta, **beside))
                beside = {}
            if any(piece.kind == "call" for piece in pieces):
                self._with_calls.add(index)
            if ended:
                ending = _calling(_ending(completion), index in self._with_calls)
                chunks.append(self.delta(index, {}, **ending))
        return chunks

    def _message(self, pieces: Sequence[Piece]) -> Json:
        """A whole message. Clients differ in what they call reasoning, so it has both names."""
        reasoning, content, calls = as_message(pieces)
        text = self._echoed() + content
        message: Json = {
            "role": "assistant",
            "content": text if text or not (calls or reasoning) else None,
            "refusal": None,
        }
        if reasoning:
            message |= {"reasoning": reasoning, "reasoning_content": reasoning}
        if calls:
            message["tool_calls"] = [
                {
                    "id": self._format.call_id(),
                    "type": "function",
                    "function": {"name": name, "arguments": arguments},
                }
                for name, arguments in calls
            ]
        return message

    def _piece(self, piece: Piece) -> Json:
        """The same as a delta."""
        if piece.kind == "content":
            return {"content": piece.text}
        if piece.kind == "reasoning":
            return {"reasoning": piece.text, "reasoning_content": piece.text}
        if piece.kind == "arguments":
            return {"tool_calls": [{"index": piece.index, "function": {"arguments": piece.text}}]}
        call = {
            "index": piece.index,
            "id": self._format.call_id(),
            "type": "function",
            "function": {"name": piece.text, "arguments": ""},
        }
        return {"tool_calls": [call]}

    def delta(self, index: int, delta: Json, **choice: Any) -> Json:
        """One chunk with a piece of choice `index`; choice: its other fields."""
        plain: Json = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
        return self._chunk({**plain, **choice})

    def _echoed(self) -> str:
        """The text of an open last message, where it is to be repeated."""
        last = self._body.messages[-1]
        if self._body.echo and last["role"] == "assistant":
            return last.get("content") or ""
        return ""

    def _token_ids(self, completion: CompletionOutput) -> Json:
        return {"token_ids": completion.token_ids} if self._body.return_token_ids else {}

    def _logprobs(self, completion: CompletionOutput) -> Json | None:
        if completion.logprobs is None:
            return None
        num_top = self._body.params.logprobs or 0
        content = []
        for token_id, entries in zip(completion.token_ids, completion.logprobs, strict=True):
            likeliest = sorted(entries.items(), key=lambda item: -item[1].logprob)[:num_top]
            content.append(
                {
                    **self._token(token_id, entries[token_id]),
                    "top_logprobs": [self._token(*item) for item in likeliest],
                }
            )
        return {"content": content, "refusal": None}

    def _token(self, token_id: int, entry: Logprob) -> Json:
        name = self._name(token_id, entry)
        data = name.encode("utf-8", "replace")
        if self._tokenizer is not None:
            data = self._tokenizer.token_bytes(token_id)
        return {"token": name, "logprob": _number(entry.logprob), "bytes": list(data)}


def prompt_logprobs(entries: Sequence[TokenLogprobs | None] | None) -> list[Json | None] | None:
    """vLLM's form: for each prompt token {id: {"logprob", "rank", "decoded_token"}}."""
    if entries is None:
        return None
    return [
        None
        if entry is None
        else {
            str(token_id): {
                "logprob": _number(one.logprob),
                "rank": one.rank,
                "decoded_token": one.decoded_token,
            }
            for token_id, one in entry.items()
        }
        for entry in entries
    ]


def _ending(completion: CompletionOutput, finish: str | None = None) -> Json:
    """finish_reason and stop_reason; for what failed or was given up, null and an `error`."""
    reason = completion.finish_reason
    if reason in ("error", "abort"):
        told = completion.stop_reason if reason == "error" else "the request was aborted"
        error = error_body(ApiError(f"generation failed: {told}", status=500))
        return {"finish_reason": None, "stop_reason": None, **error}
    stop_reason = None if finish else completion.stop_reason
    return {"finish_reason": finish or reason, "stop_reason": stop_reason}


def _calling(ending: Json, has_calls: bool) -> Json:
    """The same, where a message that ended by itself is a call of tools."""
    if has_calls and ending["finish_reason"] == "stop":
        return {**ending, "finish_reason": "tool_calls"}
    return ending


def _number(logprob: float) -> float:
    return logprob if logprob > LOWEST_LOGPROB else LOWEST_LOGPROB
