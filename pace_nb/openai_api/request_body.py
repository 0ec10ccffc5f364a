"""`CompletionBody` and `ChatBody`: what an OpenAI request body asks for, validated once.

Knows the fields of `/v1/completions` and `/v1/chat/completions`, OpenAI's and vLLM's, their types
and how they become `SamplingParams`. Does not know HTTP, models, vocabularies or how long a context
is: token ids and lengths are judged by the engine, values in range by `SamplingParams`.

    read_json         bytes  -> object, refusing what JSON libraries let through
    read_completion   object -> CompletionBody
    read_chat         object -> ChatBody
    check_model       404 for a model that is not served

Every mistake is an ApiError: one line, and the field's name in `param`. `null` counts as left out.
Fields that nobody knows are ignored, as OpenAI's clients expect; their names are in
`unknown_fields`. Fields that would change the answer and are not built are refused by name.

Source: OpenAI's API reference; vLLM `vllm/entrypoints/openai/protocol.py`.
"""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Final, NoReturn

from pace_nb.chat_template import check_messages, check_variables
from pace_nb.errors import ApiError, InvalidRequestError
from pace_nb.sampling_params import MAX_LOGPROBS, SamplingParams
from pace_nb.structured_outputs import StructuredOutputsParams

MAX_JSON_DEPTH: Final = 64
MAX_JSON_VALUES: Final = 500_000  # a prompt of token ids has one for each
MAX_N: Final = 128  # OpenAI's
MAX_PROMPTS: Final = 256
MAX_COMPLETIONS: Final = 1024  # prompts x n
MAX_TOOLS: Final = 128
MAX_NAME: Final = 256  # characters of a model, request id, user or salt

# Body field -> SamplingParams field of the same name.
_SAMPLING_FIELDS: Final = (
    "n", "presence_penalty", "frequency_penalty", "repetition_penalty", "temperature", "top_p",
    "top_k", "min_p", "seed", "stop", "stop_token_ids", "ignore_eos", "min_tokens",
    "prompt_logprobs", "skip_special_tokens", "include_stop_str_in_output", "logit_bias",
    "allowed_token_ids", "bad_words", "truncate_prompt_tokens",
)  # fmt: skip
# vLLM's older names for the keys of `structured_outputs`.
_GUIDED_FIELDS: Final = {f"guided_{kind}": kind for kind in ("json", "regex", "choice", "grammar")}
_COMMON_FIELDS: Final = {
    *_SAMPLING_FIELDS,
    "model", "max_tokens", "logprobs", "echo", "stream", "stream_options", "cache_salt", "priority",
    "request_id", "user", "response_format", "structured_outputs", "return_token_ids",
    "return_tokens_as_token_ids", "add_special_tokens", *_GUIDED_FIELDS,
}  # fmt: skip
_COMPLETION_FIELDS: Final = _COMMON_FIELDS | {"prompt", "suffix", "best_of"}
_CHAT_FIELDS: Final = _COMMON_FIELDS | {
    "messages", "max_completion_tokens", "top_logprobs", "tools", "tool_choice",
    "parallel_tool_calls", "chat_template", "chat_template_kwargs", "reasoning_effort",
    "add_generation_prompt", "continue_final_message", "documents", "include_reasoning",
}  # fmt: skip
# Not built, and not to be ignored either: the answer would be another one.
_REFUSED: Final = {
    "prompt_embeds": "embeddings in place of a prompt are not supported",
    "use_beam_search": "beam search is not supported",
    "logits_processors": "code in a request is not supported",
    "functions": "give tools instead",
    "function_call": "give tool_choice instead",
    "audio": "only text is supported",
}


@dataclass(frozen=True, kw_only=True)
class StreamOptions:
    """What a stream tells besides its choices.

    include_usage: a last chunk with the usage. continuous_usage_stats: the usage in every chunk.
    """

    include_usage: bool = False
    continuous_usage_stats: bool = False


@dataclass(frozen=True, kw_only=True)
class RequestBody:
    """What both kinds of request have.

    Attributes:
        model: The name asked for; None or empty is the one that is served.
        params: How to sample. A chat without max_tokens has None there: what the context holds.
            `structured_outputs` is set by response_format, by the field of its name, by guided_json
            and its like (vLLM's older names), or by a tool that must be called.
        stream: Whether the answer comes in pieces.
        stream_options: What they tell.
        echo: Repeat the prompt (a chat: an open last message) before the text.
        cache_salt: Share the KV cache only with requests of the same salt.
        priority: Lower runs first.
        request_id: The caller's own name for it, or None.
        user: As given; nothing depends on it.
        return_token_ids: Add token ids to the answer.
        return_tokens_as_token_ids: In logprobs, write tokens as "token_id:123".
        add_special_tokens: Add BOS and its like; None is the default of the kind.
        unknown_fields: Names that were ignored, sorted.
    """

    model: str | None
    params: SamplingParams
    stream: bool
    stream_options: StreamOptions
    echo: bool
    cache_salt: str | None
    priority: int
    request_id: str | None
    user: str | None
    return_token_ids: bool
    return_tokens_as_token_ids: bool
    add_special_tokens: bool | None
    unknown_fields: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class CompletionBody(RequestBody):
    """A body of /v1/completions.

    Attributes:
        prompts: At least one, each text or token ids.
        prompt_only: `echo` with max_tokens 0: the prompt and its logprobs, and nothing new.
            `params` asks for one token even so, and the answer leaves it out.
    """

    prompts: tuple[str | list[int], ...]
    prompt_only: bool


@dataclass(frozen=True, kw_only=True)
class ChatBody(RequestBody):
    """A body of /v1/chat/completions.

    Attributes:
        messages: As `Tokenizer.encode_chat` takes them.
        tools: JSON schemas of functions; None where there are none or tool_choice is "none".
        tool_choice: "none", "auto", "required", or {"type": "function", "function": {"name": ...}}.
        parallel_tool_calls: Whether one answer may hold several calls.
        add_generation_prompt, continue_final_message: As `Tokenizer.encode_chat` takes them.
        documents: For templates that quote sources.
        template_variables: What else the template reads (chat_template_kwargs, reasoning_effort).
        include_reasoning: Whether reasoning is part of the answer.
    """

    messages: list[dict[str, Any]]
    tools: list[Any] | None
    tool_choice: str | Mapping[str, Any]
    parallel_tool_calls: bool
    add_generation_prompt: bool
    continue_final_message: bool
    documents: list[Any] | None
    template_variables: Mapping[str, Any]
    include_reasoning: bool

    @property
    def chat_options(self) -> dict[str, Any]:
        """Keyword arguments for `Tokenizer.encode_chat` and `LLM.chat`."""
        return {
            "add_generation_prompt": self.add_generation_prompt,
            "continue_final_message": self.continue_final_message,
            "tools": self.tools,
            "documents": self.documents,
            **self.template_variables,
        }


def read_json(data: bytes | str) -> dict[str, Any]:
    """A body as an object. ApiError for anything else: NaN, Infinity, 1e999, deep or huge values,
    bytes that are not UTF-8.

    A server's other clients wait while this runs, so what would take long is refused unread: the
    commas, colons and brackets of the body, those in its texts too, are no fewer than its values.
    """
    collects = gc.isenabled()
    try:
        text = data if isinstance(data, str) else data.decode("utf-8-sig")  # Windows' tools add one
        if sum(map(text.count, ",:[{")) > MAX_JSON_VALUES:
            raise ApiError(
                f"the body has more than {MAX_JSON_VALUES} values (commas, colons and brackets "
                "are counted, in texts too)"
            )
        gc.disable()  # it would look through all that was made so far, again and again
        found = json.loads(text, parse_constant=_no_constant)
    except ApiError:
        raise
    except UnicodeDecodeError as error:
        raise ApiError(f"the body is not UTF-8 at byte {error.start}") from None
    except RecursionError:
        raise ApiError(f"the body is nested deeper than {MAX_JSON_DEPTH}") from None
    except ValueError as error:  # not JSON, or an integer of more digits than Python reads
        place = f" at character {error.pos}" if isinstance(error, json.JSONDecodeError) else ""
        raise ApiError(f"the body is not valid JSON{place}") from None
    finally:
        if collects:
            gc.enable()
    if not isinstance(found, dict):
        raise ApiError(f"the body is {_kind(found)}, expected an object")
    _check_depth(found)
    return found


def read_completion(
    body: Mapping[str, Any], defaults: Mapping[str, Any] | None = None
) -> CompletionBody:
    """What a body of /v1/completions asks for.

    defaults: `SamplingParams` fields for what the body leaves out, such as those that the model's
    generation_config.json suggests. max_tokens is 16 where neither names it.
    """
    found = _Fields(body)
    if found.get("suffix"):
        found.refuse("suffix", "nothing: text that goes in between is not supported")
    n = found.integer("n", 1, 1, MAX_N)
    if found.integer("best_of", n, 1, MAX_N) != n:
        found.refuse("best_of", f"n ({n}) or nothing")
    prompts = _prompts(found)
    if len(prompts) * n > MAX_COMPLETIONS:
        raise ApiError(
            f"{len(prompts)} prompts with n = {n} are {len(prompts) * n} completions, expected at "
            f"most {MAX_COMPLETIONS}",
            param="n",
        )
    echo = found.boolean("echo", False)
    max_tokens = found.get("max_tokens")
    prompt_only = echo and type(max_tokens) is int and max_tokens == 0
    if prompt_only and found.boolean("stream", False):
        found.refuse("max_tokens", "at least 1 in a stream")
    logprobs = None
    if found.get("logprobs") is not None:
        logprobs = found.integer("logprobs", 0, 0, MAX_LOGPROBS)
    own: dict[str, Any] = {"logprobs": logprobs}
    if prompt_only:
        own |= {"max_tokens": 1, "min_tokens": 0}
    elif max_tokens is not None:
        own["max_tokens"] = max_tokens
    if echo and logprobs is not None:
        own["prompt_logprobs"] = logprobs
    return CompletionBody(
        **_common(found, _COMPLETION_FIELDS, own, defaults or {}),
        prompts=prompts,
        prompt_only=prompt_only,
    )


def read_chat(body: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> ChatBody:
    """What a body of /v1/chat/completions asks for.

    defaults: as in `read_completion`. max_tokens is None, what the context holds, where neither
    names it.
    """
    found = _Fields(body)
    found.integer("n", 1, 1, MAX_N)
    if found.get("chat_template") is not None:
        found.refuse("chat_template", "nothing: a template is a program, and the model has its own")
    logprobs = None
    if found.boolean("logprobs", False):
        logprobs = found.integer("top_logprobs", 0, 0, MAX_LOGPROBS)
    elif found.integer("top_logprobs", 0, 0, MAX_LOGPROBS):
        found.refuse("top_logprobs", "logprobs to be true beside it")
    own: dict[str, Any] = {"logprobs": logprobs, "max_tokens": (defaults or {}).get("max_tokens")}
    for name in ("max_completion_tokens", "max_tokens"):
        if found.get(name) is not None:
            own["max_tokens"] = found.integer(name, 0, 1, 2**31 - 1)
            break
    tools, tool_choice = _tools(found)
    parallel = found.boolean("parallel_tool_calls", True)
    forced = _forced_call(tools or [], tool_choice, parallel)
    if forced is not None:
        own["structured_outputs"] = forced
    continued = found.boolean("continue_final_message", False)
    add_generation_prompt = found.boolean("add_generation_prompt", not continued)
    if continued and add_generation_prompt:
        found.refuse("add_generation_prompt", "false where continue_final_message is true")
    variables = dict(found.mapping("chat_template_kwargs") or {})
    try:
        check_variables(variables)
    except InvalidRequestError as error:
        raise ApiError(f"chat_template_kwargs: {error}", param="chat_template_kwargs") from None
    effort = found.text("reasoning_effort", 16)
    if effort is not None:
        variables.setdefault("reasoning_effort", effort)
    return ChatBody(
        **_common(found, _CHAT_FIELDS, own, defaults or {}),
        messages=_messages(found),
        tools=tools,
        tool_choice=tool_choice,
        parallel_tool_calls=parallel,
        add_generation_prompt=add_generation_prompt,
        continue_final_message=continued,
        documents=found.objects("documents", MAX_JSON_VALUES),
        template_variables=variables,
        include_reasoning=found.boolean("include_reasoning", True),
    )


def check_model(model: str | None, served: Collection[str]) -> None:
    """ApiError 404 for a name that is not served; no name is any."""
    if model and model not in served:
        raise ApiError(
            f"the model {_shown(model)} is not served here, expected one of: {', '.join(served)}",
            param="model",
            status=404,
        )


class _Fields:
    """A body's fields by name, with `null` as left out; each read says what was expected."""

    def __init__(self, body: Mapping[str, Any]) -> None:
        if not isinstance(body, Mapping):
            raise ApiError(f"the body is {_kind(body)}, expected an object")
        self._body = body
        for name, reason in _REFUSED.items():
            if body.get(name) not in (None, False, [], {}, "", "none"):  # a client's way to say no
                raise ApiError(f"{name} is given: {reason}", param=name)

    def get(self, name: str) -> Any:
        """A number without a fraction as an integer: some clients write 5 as 5.0."""
        value = self._body.get(name)
        return int(value) if type(value) is float and value.is_integer() else value

    def refuse(self, name: str, expected: str) -> NoReturn:
        raise ApiError(f"{name} is {_shown(self.get(name))}, expected {expected}", param=name)

    def boolean(self, name: str, default: bool) -> bool:
        value = self.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            self.refuse(name, "true or false")
        return value

    def integer(self, name: str, default: int, low: int = -(2**31), high: int = 2**31 - 1) -> int:
        value = self.get(name)
        if value is None:
            return default
        if type(value) is not int or not low <= value <= high:
            self.refuse(name, f"an integer from {low} to {high}")
        return value

    def text(self, name: str, most: int = MAX_NAME) -> str | None:
        value = self.get(name)
        if value is not None and not (isinstance(value, str) and 1 <= len(value) <= most):
            self.refuse(name, f"text of 1 to {most} characters")
        return value

    def mapping(self, name: str) -> Mapping[str, Any] | None:
        value = self.get(name)
        if value is not None and not isinstance(value, Mapping):
            self.refuse(name, "an object")
        return value

    def objects(self, name: str, most: int) -> list[Any] | None:
        value = self.get(name)
        if value is None or value == []:
            return None
        if not isinstance(value, list) or not all(isinstance(item, Mapping) for item in value):
            self.refuse(name, "a list of objects")
        if len(value) > most:
            self.refuse(name, f"at most {most}")
        return value

    def unknown(self, known: Collection[str]) -> tuple[str, ...]:
        return tuple(sorted(str(name)[:MAX_NAME] for name in self._body if name not in known))


def _common(
    found: _Fields, known: Collection[str], own: Mapping[str, Any], defaults: Mapping[str, Any]
) -> dict[str, Any]:
    """The fields of `RequestBody`. own: SamplingParams fields that the kind has decided."""
    stream = found.boolean("stream", False)
    stream_options = found.mapping("stream_options")
    if stream_options is not None and not stream:
        found.refuse("stream_options", "stream to be true beside it")
    if stream and found.get("prompt_logprobs") is not None:
        found.refuse("prompt_logprobs", "nothing in a stream")
    options = _Fields(stream_options or {})
    for name in (field.name for field in fields(StreamOptions)):
        if not isinstance(options.get(name), bool | None):
            raise ApiError(
                f"stream_options.{name} is {_shown(options.get(name))}, expected true or false",
                param="stream_options",
            )
    model = found.get("model")
    own = {"structured_outputs": _form(found), **own}
    return {
        "model": found.text("model") if model != "" else None,
        "params": _sampling_params(found, own, defaults),
        "stream": stream,
        "stream_options": StreamOptions(
            include_usage=options.boolean("include_usage", False),
            continuous_usage_stats=options.boolean("continuous_usage_stats", False),
        ),
        "echo": found.boolean("echo", False),
        "cache_salt": found.text("cache_salt"),
        "priority": found.integer("priority", 0),
        "request_id": found.text("request_id"),
        "user": found.get("user") if isinstance(found.get("user"), str) else None,
        "return_token_ids": found.boolean("return_token_ids", False),
        "return_tokens_as_token_ids": found.boolean("return_tokens_as_token_ids", False),
        "add_special_tokens": (
            None
            if found.get("add_special_tokens") is None
            else found.boolean("add_special_tokens", True)
        ),
        "unknown_fields": found.unknown(known),
    }


def _sampling_params(
    found: _Fields, own: Mapping[str, Any], defaults: Mapping[str, Any]
) -> SamplingParams:
    given = {name: value for name in _SAMPLING_FIELDS if (value := found.get(name)) is not None}
    try:
        return SamplingParams(**{**defaults, **given, **own})
    except InvalidRequestError as error:
        raise ApiError(str(error), param=named_field(str(error))) from None


def named_field(message: str) -> str | None:
    """The field that the message of an InvalidRequestError begins with, where it is one."""
    word = message.partition(" ")[0].rstrip(",:")
    return word if word in _COMPLETION_FIELDS | _CHAT_FIELDS else None


def _prompts(found: _Fields) -> tuple[str | list[int], ...]:
    """Text, texts, token ids, or lists of them."""
    expected = "text, a list of texts, token ids, or a list of lists of token ids"
    prompt = found.get("prompt")
    if isinstance(prompt, str):
        return (prompt,)
    if not isinstance(prompt, list) or not prompt:
        found.refuse("prompt", expected)
    if _are_token_ids(prompt):
        return (prompt,)
    if len(prompt) > MAX_PROMPTS:
        found.refuse("prompt", f"at most {MAX_PROMPTS} prompts")
    if all(isinstance(item, str) for item in prompt) or all(
        isinstance(item, list) and _are_token_ids(item) for item in prompt
    ):
        return tuple(prompt)
    found.refuse("prompt", expected)


def _are_token_ids(items: Iterable[Any]) -> bool:
    return all(type(item) is int for item in items)


def _messages(found: _Fields) -> list[dict[str, Any]]:
    messages = found.get("messages")
    for i, message in enumerate(messages if isinstance(messages, list) else ()):
        content = message.get("content") if isinstance(message, Mapping) else None
        for part in content if isinstance(content, list) else ():
            kind = part.get("type") if isinstance(part, Mapping) else None
            if isinstance(kind, str) and kind != "text":
                raise ApiError(
                    f"messages[{i}] has a part of type {_shown(kind)}, expected text only",
                    param="messages",
                )
    if messages is None:
        raise ApiError("messages is missing, expected a list of role and content", param="messages")
    try:
        return [_for_template(message) for message in check_messages(messages)]
    except InvalidRequestError as error:
        raise ApiError(str(error), param="messages") from None


def _for_template(message: dict[str, Any]) -> dict[str, Any]:
    """Earlier reasoning and tool calls as chat templates look for them: reasoning under each of its
    names, arguments, which clients send as text, as the object that they are."""
    reasoning = message.get("reasoning_content") or message.get("reasoning")
    if message["role"] == "assistant" and isinstance(reasoning, str):
        message |= {"reasoning": reasoning, "reasoning_content": reasoning}
        if not message.get("content"):
            message.setdefault("thinking", reasoning)  # gpt-oss takes one of the two
    calls = message.get("tool_calls")
    if isinstance(calls, list):
        message["tool_calls"] = [_call_for_template(call) for call in calls]
    return message


def _call_for_template(call: Any) -> Any:
    function = call.get("function") if isinstance(call, Mapping) else None
    arguments = function.get("arguments") if isinstance(function, Mapping) else None
    if not isinstance(arguments, str) or function is None:
        return call
    try:
        found = json.loads(arguments)
    except (ValueError, RecursionError):  # an earlier answer that was cut off
        return call
    if not isinstance(found, dict):
        return call
    return {**call, "function": {**function, "arguments": found}}


def _tools(found: _Fields) -> tuple[list[Any] | None, str | Mapping[str, Any]]:
    """The tools that the model may see, and the choice among them."""
    tools = found.objects("tools", MAX_TOOLS)
    names = []
    for i, tool in enumerate(tools or ()):
        function = tool.get("function")
        name = function.get("name") if isinstance(function, Mapping) else None
        if tool.get("type") != "function" or not isinstance(name, str) or not name:
            raise ApiError(
                f'tools[{i}] is wrong, expected {{"type": "function", "function": '
                '{"name": ..., "parameters": ...}}',
                param="tools",
            )
        if len(name) > MAX_NAME:
            raise ApiError(
                f"tools[{i}] has a name of {len(name)} characters, expected at most {MAX_NAME}",
                param="tools",
            )
        names.append(name)
    choice = found.get("tool_choice")
    if choice is None or (choice == "auto" and not tools):
        return tools, "auto" if tools else "none"
    if choice == "none":
        return None, "none"
    if not tools:
        found.refuse("tool_choice", "tools to be given beside it, or 'none'")
    if isinstance(choice, Mapping):
        function = choice.get("function")
        name = function.get("name") if isinstance(function, Mapping) else None
        if choice.get("type") != "function" or name not in names:
            found.refuse("tool_choice", f"a function among {', '.join(names)[:200]}")
    elif choice not in ("auto", "required"):
        found.refuse("tool_choice", "'none', 'auto', 'required' or a function")
    return tools, choice


def _forced_call(
    tools: Sequence[Mapping[str, Any]], choice: str | Mapping[str, Any], parallel: bool
) -> StructuredOutputsParams | None:
    """The form of an answer that must call tools: one function's arguments, or a list of
    {"name", "parameters"}; None where none must be called."""
    functions = {tool["function"]["name"]: tool["function"] for tool in tools}
    if isinstance(choice, Mapping):
        return _checked_form("tools", {"json": _parameters(functions[choice["function"]["name"]])})
    if choice != "required":
        return None
    definitions: dict[str, Any] = {}
    calls = []
    for name, function in functions.items():
        parameters = dict(_parameters(function))
        for kind in ("$defs", "definitions"):  # references begin at the root
            below = parameters.pop(kind, None) or {}
            if not isinstance(below, Mapping):
                raise ApiError(
                    f"a tool's {kind} are {_shown(below)}, expected an object", param="tools"
                )
            for key, value in below.items():
                if definitions.setdefault(kind, {}).setdefault(key, value) != value:
                    raise ApiError(
                        f"tools have different {kind} of the name {_shown(key)}, expected one",
                        param="tools",
                    )
        properties = {"name": {"const": name}, "parameters": parameters}
        calls.append(
            {
                "type": "object",
                "properties": properties,
                "required": [*properties],
                "additionalProperties": False,
            }
        )
    most = {} if parallel else {"maxItems": 1}
    schema = {"type": "array", "minItems": 1, **most, "items": {"anyOf": calls}, **definitions}
    return _checked_form("tools", {"json": schema})


def _parameters(function: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schema of a function's arguments, which are an object whether it says so or not."""
    parameters = function.get("parameters") or {"properties": {}}
    if not isinstance(parameters, Mapping):
        raise ApiError("a tool's parameters are wrong, expected a JSON schema", param="tools")
    kind = parameters.get("type", "object")
    if kind != "object" and not (isinstance(kind, list) and "object" in kind):
        raise ApiError(
            f"a tool's parameters are of type {_shown(kind)}, expected 'object'", param="tools"
        )
    return {**parameters, "type": "object"}


def _form(found: _Fields) -> StructuredOutputsParams | None:
    """The form of the answer that a body asks for, however it does."""
    wanted = [
        (name, {kind: found.get(name)})
        for name, kind in _GUIDED_FIELDS.items()
        if found.get(name) is not None
    ]
    if (own := found.mapping("structured_outputs")) is not None:
        wanted.append(("structured_outputs", dict(own)))
    if (form := _response_format(found)) is not None:
        wanted.append(("response_format", form))
    if not wanted:
        return None
    if len(wanted) > 1:
        found.refuse(wanted[0][0], "one kind of structured output at a time")
    return _checked_form(*wanted[0])


def _checked_form(name: str, wanted: Mapping[str, Any]) -> StructuredOutputsParams:
    try:
        return StructuredOutputsParams.of(wanted)
    except InvalidRequestError as error:
        raise ApiError(str(error).replace("structured_outputs", name, 1), param=name) from None


def _response_format(found: _Fields) -> dict[str, Any] | None:
    wanted = found.mapping("response_format")
    if wanted is None or wanted.get("type") == "text":
        return None
    if wanted.get("type") == "json_object":
        return {"json_object": True}
    schema = wanted.get("json_schema")
    if wanted.get("type") == "json_schema" and isinstance(schema, Mapping):
        if isinstance(schema.get("schema"), Mapping):
            return {"json": schema["schema"]}
        found.refuse("response_format", "a json_schema with a schema")
    found.refuse("response_format", "type 'text', 'json_object' or 'json_schema'")


def _no_constant(name: str) -> NoReturn:
    raise ApiError(f"the body holds {name}, which is not JSON")


def _check_depth(body: Mapping[str, Any]) -> None:
    """Refuse a body that is deep, or has numbers that no float holds."""
    level: Collection[Any] = body.values()
    for _ in range(MAX_JSON_DEPTH):
        below: list[Any] = []
        for value in level:
            kind = type(value)
            if kind is list:
                below += value
            elif kind is dict:
                below += value.values()
            elif kind is float and not math.isfinite(value):
                raise ApiError("the body holds a number that is too large")
        if not below:
            return
        level = below
    raise ApiError(f"the body is nested deeper than {MAX_JSON_DEPTH}")


def _kind(value: object) -> str:
    """JSON's word for a value's type."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, int | float):
        return "a number"
    return (
        "text" if isinstance(value, str) else "a list" if isinstance(value, list) else "an object"
    )


def _shown(value: object) -> str:
    """A short form of a value from outside."""
    if value is None:
        return "missing"
    if isinstance(value, str):
        return ascii(value[:60]) + ("..." if len(value) > 60 else "")
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int) and value.bit_length() > 130:
        return "an integer of more than 39 digits"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list | Mapping):
        return f"{_kind(value)} of {len(value)}"
    return _kind(value)
