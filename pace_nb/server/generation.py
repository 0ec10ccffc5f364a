"""A generation on its way through the server: from body to prompts, to engines, to the answer.

Knows the order of things and that whatever is begun is ended. Does not know OpenAI's shapes
(`pace_nb/openai_api/`) or how engines are reached.

    read the body      -> ChatBody or CompletionBody     400, 404, 413
    admit              its sequences are counted         503
    prompts            text -> token ids, in a thread    400
    submit             to engines                        503
    answer             one JSON object, or events as news comes

What ends it, besides its own end: the client goes (its sequences are aborted, at once), its engine
dies, the server shuts down, it waits or is read too slowly. Before anything was sent that is an
HTTP status; in a stream it is an event with an error, then `[DONE]`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass, replace
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import Response

from pace_nb.errors import ApiError, InvalidRequestError
from pace_nb.openai_api import request_body
from pace_nb.openai_api.request_body import ChatBody, CompletionBody
from pace_nb.openai_api.response_body import ChatResponse, CompletionResponse, Json, error_body
from pace_nb.outputs import RequestOutput
from pace_nb.prompts import last_tokens
from pace_nb.server.answers import DONE, EventStream, as_json, comment, event, json_around
from pace_nb.server.engine_client import EngineClient, Ticket
from pace_nb.server.guard import CLIENT_CLOSED, request_id
from pace_nb.server.incoming import read_json_body
from pace_nb.server.mailbox import Mailbox
from pace_nb.server.router import Admission
from pace_nb.server.service import Service
from pace_nb.server.turns import Turns

CHARACTERS_PER_TOKEN: Final = 8  # a prompt of more than so many times the context is not even read
CHARACTERS_MARGIN: Final = 4096
PROGRESS_SECONDS: Final = 1.0  # between two looks at how far a prompt is


@dataclass(frozen=True)
class Prompt:
    """text: None where it came as token ids."""

    text: str | None
    token_ids: list[int]


async def chat_completions(request: Request) -> Response:
    """POST /v1/chat/completions"""
    service: Service = request.app.state.service
    raw = await read_json_body(request, service.settings.limits)
    body = request_body.read_chat(raw, service.default_params)
    answer = ChatAnswer(
        ChatResponse(
            body,
            message_format=service.message_format,
            response_id=f"chatcmpl-{request_id(request.scope)}",
            model=service.settings.served_model_names[0],
            tokenizer=service.tokenizer,
        )
    )
    return await generate(request, service, body, raw, answer)


async def completions(request: Request) -> Response:
    """POST /v1/completions"""
    service: Service = request.app.state.service
    raw = await read_json_body(request, service.settings.limits)
    body = request_body.read_completion(raw, service.default_params)
    answer = CompletionAnswer(
        CompletionResponse(
            body,
            response_id=f"cmpl-{request_id(request.scope)}",
            model=service.settings.served_model_names[0],
            tokenizer=service.tokenizer,
        )
    )
    return await generate(request, service, body, raw, answer)


class ChatAnswer:
    """What a chat's outputs become."""

    def __init__(self, response: ChatResponse) -> None:
        self._response = response

    def choices(self, outputs: list[RequestOutput]) -> Iterator[Json]:
        """Of the answer that does not stream."""
        return self._response.choices(outputs[0])

    def around(self, outputs: list[RequestOutput]) -> Json:
        """The rest of that answer's body; its choices are empty."""
        return self._response.around([], outputs[0])

    def chunks(self, prompt_index: int, news: RequestOutput) -> list[Json]:
        """The events for news."""
        return self._response.chunks(news)

    def usage_chunk(self) -> Json:
        """The last event, where it was asked for."""
        return self._response.usage_chunk()

    def silent_chunk(self) -> Json:
        """An event that says nothing, where the last one was asked for."""
        return self._response.silent_chunk()


class CompletionAnswer:
    """What the outputs of prompts become."""

    def __init__(self, response: CompletionResponse) -> None:
        self._response = response

    def choices(self, outputs: list[RequestOutput]) -> Iterator[Json]:
        """Of the answer that does not stream."""
        return self._response.choices(outputs)

    def around(self, outputs: list[RequestOutput]) -> Json:
        """The rest of that answer's body; its choices are empty."""
        return self._response.around([], outputs)

    def chunks(self, prompt_index: int, news: RequestOutput) -> list[Json]:
        """The events for news."""
        return self._response.chunks(prompt_index, news)

    def usage_chunk(self) -> Json:
        """The last event, where it was asked for."""
        return self._response.usage_chunk()

    def silent_chunk(self) -> Json:
        """An event that says nothing, where the last one was asked for."""
        return self._response.silent_chunk()


async def generate(
    request: Request,
    service: Service,
    body: ChatBody | CompletionBody,
    raw: Json,
    answer: ChatAnswer | CompletionAnswer,
) -> Response:
    """The answer to a body that was read."""
    request_body.check_model(body.model, service.settings.served_model_names)
    num_prompts = len(body.prompts) if isinstance(body, CompletionBody) else 1
    exchange = Exchange(request, service, num_prompts)
    try:
        exchange.admit(num_prompts * body.params.n)
        prompts = [_cut(service, body, prompt) for prompt in await read_prompts(service, body)]
        for prompt in prompts:
            _check_length(service, body, raw, prompt)
        if isinstance(body, ChatBody):
            params = service.message_format.params(body, prompts[0].text or "")
            body = replace(body, params=params)
        exchange.submit(prompts, body)
        await exchange.accepted(service.settings.limits.keep_alive_interval)
        if not body.stream:
            return await _whole(answer, await exchange.outputs(), service.turns)
    except asyncio.CancelledError:  # how Ray Serve says that the client went
        exchange.client_gone()
        exchange.close()
        raise
    except BaseException:
        exchange.close()
        raise
    finally:
        if not body.stream:
            exchange.close()
    return EventStream(
        _events(exchange, body, answer), service.settings.limits.send_timeout, exchange.close
    )


class Exchange:
    """One HTTP request's sequences in the engines, from admission to `close`."""

    def __init__(self, request: Request, service: Service, num_prompts: int) -> None:
        self.mailbox: Mailbox = service.open_mailbox(num_prompts)
        self._service = service
        self._request = request
        self._num_prompts = num_prompts
        self._admission: Admission | None = None
        self._tickets: list[tuple[EngineClient, Ticket]] = []
        self._watching: asyncio.Task[None] | None = asyncio.create_task(self._watch())

    @property
    def keep_alive_interval(self) -> float:
        """Seconds that a stream may be silent."""
        return self._service.settings.limits.keep_alive_interval

    def admit(self, num_sequences: int) -> None:
        """Count them. ApiError 503: no room, no engine, or the server is about to go; 429: too
        much for this client."""
        if self._service.draining:
            self._service.metrics.rejected("draining")
            raise ApiError("the server is shutting down", status=503)
        try:
            client = self._request.scope["state"]["client"]
            self._admission = self._service.router.admit(num_sequences, client)
        except ApiError as error:
            reason = "full" if self._service.ready else "not_ready"
            self._service.metrics.rejected("client" if error.status == 429 else reason)
            raise

    def submit(self, prompts: list[Prompt], body: ChatBody | CompletionBody) -> None:
        """Give the prompts to engines. ApiError as from `Router.submit`."""
        self.mailbox.check()  # the client may have gone while its prompts were read
        arrival: float = self._request.scope["state"]["arrival_time"]
        for index, prompt in enumerate(prompts):
            try:
                found = self._service.router.submit(
                    self.mailbox,
                    index,
                    prompt.text,
                    prompt.token_ids,
                    body.params,
                    cache_salt=body.cache_salt,
                    priority=body.priority,
                    arrival_time=arrival,
                )
            except ApiError:
                self._service.metrics.rejected("tokens")
                raise
            self._tickets.append(found)

    async def accepted(self, timeout: float) -> None:
        """Wait until the engines have judged all prompts, at most so long. ApiError: refused."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                await self.mailbox.accepted.wait()
        try:
            self.mailbox.check()
        except ApiError as error:
            if error.status == 400 and error.param is None:
                error.param = request_body.named_field(str(error))
            raise

    async def outputs(self) -> list[RequestOutput]:
        """All prompts' finished outputs. ApiError: the request failed."""
        whole: dict[int, RequestOutput] = {}
        while not self.mailbox.finished:
            for index, news in await self.mailbox.get(self._service.settings.limits.send_timeout):
                if index in whole:
                    whole[index].add(news)
                else:
                    whole[index] = news
        outputs = [whole[index] for index in range(self._num_prompts)]
        for output in outputs:
            output.outputs.sort(key=lambda one: one.index)
        return outputs

    def close(self) -> None:
        """Take out what has not finished; twice is once."""
        if self._watching is not None:
            self._watching.cancel()
            self._watching = None  # its CancelledError holds frames that hold this: no cycle
        for engine, ticket in self._tickets:
            engine.abort(ticket)
        self._tickets.clear()
        if self._admission is not None:
            self._admission.release()
        self._service.close_mailbox(self.mailbox)

    async def _watch(self) -> None:
        """When the client goes, so do its sequences, whatever is being waited for."""
        while (await self._request.receive())["type"] != "http.disconnect":
            pass
        self.client_gone()

    def client_gone(self) -> None:
        """Nobody waits for the rest; twice is once."""
        if self.mailbox.finished or self.mailbox.error is not None:
            return
        self._service.metrics.disconnected()
        for engine, ticket in self._tickets:
            engine.abort(ticket)
        self.mailbox.fail(ApiError("the client closed the connection", status=CLIENT_CLOSED))


async def read_prompts(service: Service, body: ChatBody | CompletionBody) -> list[Prompt]:
    """A body's prompts as token ids. ApiError for those that cannot be."""
    try:
        if isinstance(body, ChatBody):
            check_characters(service, _characters(body.messages), "messages")
            chat = await service.in_reader(
                lambda: service.tokenizer.encode_chat(body.messages, **body.chat_options)
            )
            return [Prompt(chat.text, chat.token_ids)]
        special = body.add_special_tokens is not False
        prompts = []
        for prompt in body.prompts:
            if isinstance(prompt, str):
                check_characters(service, len(prompt), "prompt")
                ids = await service.in_reader(service.tokenizer.encode, prompt, special)
                prompts.append(Prompt(prompt, ids))
            else:
                prompts.append(Prompt(None, prompt))
        return prompts
    except InvalidRequestError as error:
        if isinstance(error, ApiError):
            raise
        name = "messages" if isinstance(body, ChatBody) else "prompt"
        raise ApiError(str(error), param=name) from None


async def _whole(
    answer: ChatAnswer | CompletionAnswer, outputs: list[RequestOutput], turns: Turns
) -> Response:
    """The answer that does not stream, made choice by choice: with the logprobs of many prompts it
    takes seconds, in which others want to be served."""
    choices = []
    for choice in answer.choices(outputs):
        choices.append(as_json(choice))
        await turns.wait()
    return json_around(answer.around(outputs), "choices", choices)


async def _events(
    exchange: Exchange, body: ChatBody | CompletionBody, answer: ChatAnswer | CompletionAnswer
) -> AsyncGenerator[bytes]:
    """The bytes of a stream; ends with `[DONE]`, whatever happens."""
    mailbox = exchange.mailbox
    interval = exchange.keep_alive_interval
    look = min(interval, PROGRESS_SECONDS)
    silent, told = 0.0, ""
    try:
        while not mailbox.finished:
            news = await mailbox.get(look)
            if not news:
                silent += look
                if silent >= interval or (mailbox.progress and _progress(mailbox) != told):
                    silent, told = 0.0, _progress(mailbox)
                    if body.stream_options.include_usage:
                        # vLLM's client (0.32) strips the line ends of what it reads at a time: what
                        # follows a comment that came alone would be a part of the comment.
                        yield comment(told) + event(answer.silent_chunk())
                    else:
                        yield comment(told)
                continue
            silent = 0.0
            for index, output in news:
                chunks = answer.chunks(index, output)
                if chunks:
                    yield b"".join(map(event, chunks))
                if len(news) > 1:  # of many prompts, maybe with their logprobs
                    await asyncio.sleep(0)
        if body.stream_options.include_usage:
            yield event(answer.usage_chunk())
    except ApiError as error:
        yield event(error_body(error))
    except asyncio.CancelledError:
        exchange.client_gone()
        raise
    yield DONE


def _progress(mailbox: Mailbox) -> str:
    """mlx-lm's form: tokens of prompts that were computed, of all that are being computed."""
    computed = sum(one.num_computed for one in mailbox.progress.values())
    total = sum(one.num_tokens for one in mailbox.progress.values())
    return f"keepalive {computed}/{total}"


def _cut(service: Service, body: ChatBody | CompletionBody, prompt: Prompt) -> Prompt:
    """What is left of a prompt where the body wants less of it: what is counted and told."""
    kept, longest = body.params.truncate_prompt_tokens, service.max_model_len
    if kept is None or longest is None:
        return prompt
    return replace(prompt, token_ids=last_tokens(prompt.token_ids, kept, longest))


def _check_length(
    service: Service, body: ChatBody | CompletionBody, raw: Json, prompt: Prompt
) -> None:
    """Refuse what cannot fit, in the words that clients look for."""
    longest = service.max_model_len
    if longest is None or body.params.truncate_prompt_tokens is not None:
        return
    names = ("max_tokens", "max_completion_tokens")[: 1 + isinstance(body, ChatBody)]
    given = any(raw.get(name) is not None for name in names)  # a default gives way to the context
    asked = (body.params.max_tokens or 1) if given else 1
    if len(prompt.token_ids) + asked > longest:
        raise ApiError(
            f"This model's maximum context length is {longest} tokens. However, you requested "
            f"{len(prompt.token_ids) + asked} tokens ({len(prompt.token_ids)} in the "
            f"{'messages' if isinstance(body, ChatBody) else 'prompt'}, {asked} in the completion)",
            param="messages" if isinstance(body, ChatBody) else "prompt",
        )


def check_characters(service: Service, num_characters: int, name: str) -> None:
    """Refuse, before it is read, text that no context could hold."""
    longest = service.max_model_len
    if longest is None:
        return
    most = CHARACTERS_PER_TOKEN * longest + CHARACTERS_MARGIN
    if num_characters > most:
        raise ApiError(
            f"This model's maximum context length is {longest} tokens. However, your {name} has "
            f"{num_characters} characters, more than {most}",
            param=name,
        )


def _characters(messages: list[dict[str, Any]]) -> int:
    return sum(len(one["content"]) for one in messages if isinstance(one.get("content"), str))
