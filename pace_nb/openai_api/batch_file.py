"""`answer_lines`: OpenAI's batch file, line by line, through an `LLM`.

Knows a batch's lines (vLLM's `run_batch` and OpenAI's Batch API), that answers come in the order of
the lines, and how many lines to have under way. Does not know files, terminals or HTTP.

    in   {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {...}}
    out  {"id": "batch_req_...", "custom_id": "a",
          "response": {"status_code": 200, "request_id": "...", "body": {...}}, "error": null}

A line that is wrong, or whose request fails, gives a line with an `error`, which is also what its
response's body holds; the others are answered all the same. Memory is bounded: lines are read as
there is room among those under way, however many there are.

Source: https://platform.openai.com/docs/guides/batch; vLLM `vllm/entrypoints/openai/run_batch.py`.
"""

from __future__ import annotations

import logging
import secrets
from collections import deque
from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from pace_nb.errors import ApiError, PaceError
from pace_nb.openai_api.message_format import MessageFormat
from pace_nb.openai_api.request_body import (
    ChatBody,
    CompletionBody,
    RequestBody,
    check_model,
    read_chat,
    read_completion,
    read_json,
)
from pace_nb.openai_api.response_body import ChatResponse, CompletionResponse, error_body

if TYPE_CHECKING:
    from pace_nb.engine.completion import Submission
    from pace_nb.llm import LLM

MAX_LINE_BYTES: Final = 8 * 2**20
MAX_PENDING_BYTES: Final = 64 * 2**20  # of the lines under way
LINES_PER_SEQUENCE: Final = 8  # lines under way per sequence that can run: short ones overtake
URLS: Final = ("/v1/chat/completions", "/v1/completions")

_log = logging.getLogger(__name__)


class _Line:
    """A line on its way to its answer."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.custom_id: str | None = None
        self.body: RequestBody | None = None
        self.submissions: list[Submission] = []
        self.error: Exception | None = None

    @property
    def done(self) -> bool:
        return self.error is not None or all(one.finished for one in self.submissions)


def answer_lines(llm: LLM, lines: Iterable[bytes], served: Collection[str]) -> Iterator[Any]:
    """The answer to each line, in order; blank lines have none.

    lines: without a bound on their number; one of more than MAX_LINE_BYTES is an error. served:
    the names that `model` may have. What was under way is taken out when the iterator is closed.
    """
    numbered = ((number, line) for number, line in enumerate(lines, start=1) if line.strip())
    pending: deque[_Line] = deque()
    pending_bytes = 0
    most = LINES_PER_SEQUENCE * llm.config.max_num_seqs
    exhausted = False
    try:
        while True:
            while not exhausted and len(pending) < most and pending_bytes < MAX_PENDING_BYTES:
                number, data = next(numbered, (0, None))
                if data is None:
                    exhausted = True
                else:
                    pending.append(_begin(llm, data, number, served))
                    pending_bytes += pending[-1].size
            if not pending:
                return
            if pending[0].done:
                line = pending.popleft()
                pending_bytes -= line.size
                yield _answer(llm, line, served)
            else:
                llm.step()
    finally:
        for line in pending:
            for submission in line.submissions:
                llm.withdraw(submission)


def _begin(llm: LLM, data: bytes, number: int, served: Collection[str]) -> _Line:
    """Read a line and submit what it asks for; whatever is wrong is the line's error."""
    line = _Line(len(data))
    try:
        if len(data) > MAX_LINE_BYTES:
            raise ApiError(f"line {number} has more than {MAX_LINE_BYTES} bytes")
        line.body = _read(llm, line, data, number, served)
        if isinstance(line.body, CompletionBody):
            for prompt in line.body.prompts:
                line.submissions.append(_submit(llm, line.body, _as_prompt(llm, line.body, prompt)))
        elif isinstance(line.body, ChatBody):
            chat = llm.get_tokenizer().encode_chat(line.body.messages, **line.body.chat_options)
            params = _message_format(llm).params(line.body, chat.text)
            line.body = replace(line.body, params=params)
            rendered = {"prompt": chat.text, "prompt_token_ids": chat.token_ids}
            line.submissions.append(_submit(llm, line.body, rendered))
    except Exception as error:
        if not isinstance(error, PaceError):
            _log.exception("line %d failed", number)
        line.error = error
        for submission in line.submissions:
            llm.withdraw(submission)
    return line


def _read(llm: LLM, line: _Line, data: bytes, number: int, served: Collection[str]) -> RequestBody:
    try:
        found = read_json(data)
    except ApiError as error:
        raise ApiError(str(error).replace("the body", f"line {number}", 1)) from None
    custom_id = found.get("custom_id")
    if not isinstance(custom_id, str):
        raise ApiError(f"line {number} has no custom_id, expected text", param="custom_id")
    line.custom_id = custom_id
    if found.get("method") != "POST":
        raise ApiError("method is not 'POST', expected it", param="method")
    url = found.get("url")
    if url not in URLS:
        raise ApiError(f"url is not one that is served, expected {' or '.join(URLS)}", param="url")
    body = found.get("body")
    if not isinstance(body, dict):
        raise ApiError("body is missing, expected an object", param="body")
    suggested = llm.get_suggested_sampling()
    asked: RequestBody
    asked = read_chat(body, suggested) if url == URLS[0] else read_completion(body, suggested)
    check_model(asked.model, served)
    if asked.stream:
        raise ApiError("stream is true, expected false in a batch", param="stream")
    return asked


def _message_format(llm: LLM) -> MessageFormat:
    """How the model writes reasoning and calls, by its template."""
    return MessageFormat.of_templates(llm.get_tokenizer().chat_template.templates)


def _as_prompt(llm: LLM, body: CompletionBody, prompt: str | list[int]) -> dict[str, Any]:
    if isinstance(prompt, list):
        return {"prompt_token_ids": prompt}
    if body.add_special_tokens is False:
        token_ids = llm.get_tokenizer().encode(prompt, add_special_tokens=False)
        return {"prompt": prompt, "prompt_token_ids": token_ids}
    return {"prompt": prompt}


def _submit(llm: LLM, body: RequestBody, prompt: dict[str, Any]) -> Submission:
    if body.cache_salt is not None:
        prompt["cache_salt"] = body.cache_salt
    return llm.submit(prompt, body.params, priority=body.priority)


def _answer(llm: LLM, line: _Line, served: Collection[str]) -> dict[str, Any]:
    """The output object of a line that is done."""
    answer: dict[str, Any] = {"id": f"batch_req_{secrets.token_hex(16)}"}
    request_id = f"req_{secrets.token_hex(16)}"
    error = line.error
    if error is None:
        try:
            body = _response_body(llm, line, served)
        except PaceError as failed:
            error = failed
    status = 200
    if error is not None:
        body = error_body(error)
        status = body["error"]["code"]
    return {
        **answer,
        "custom_id": line.custom_id,
        "response": {"status_code": status, "request_id": request_id, "body": body},
        "error": None if error is None else body["error"],
    }


def _response_body(llm: LLM, line: _Line, served: Collection[str]) -> dict[str, Any]:
    outputs = [submission.output() for submission in line.submissions]
    number = secrets.token_hex(16)
    options: dict[str, Any] = {
        "model": (line.body.model if line.body else None) or next(iter(served)),
        "tokenizer": llm.get_tokenizer(),
    }
    if isinstance(line.body, ChatBody):
        (output,) = outputs
        options["message_format"] = _message_format(llm)
        return ChatResponse(line.body, response_id=f"chatcmpl-{number}", **options).whole(output)
    if not isinstance(line.body, CompletionBody):
        raise PaceError("a line without a body was submitted")
    return CompletionResponse(line.body, response_id=f"cmpl-{number}", **options).whole(outputs)
