"""Every field has its effect, every wrong type one line that names it, and nothing else a say."""

from __future__ import annotations

import gc
import inspect
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pace_nb.chat_template import RESERVED, ChatTemplate
from pace_nb.errors import ApiError
from pace_nb.openai_api import request_body
from pace_nb.openai_api.request_body import check_model, read_chat, read_completion, read_json
from pace_nb.sampling_params import SamplingParams
from pace_nb.tokenizer import Tokenizer

HI = [{"role": "user", "content": "Hi"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}


def completion(**fields):
    return read_completion({"prompt": "a", **fields})


def chat(**fields):
    return read_chat({"messages": HI, **fields})


@pytest.mark.parametrize(
    "prompt, prompts",
    [
        ("text", ("text",)),
        ("", ("",)),
        (["a", "b"], ("a", "b")),
        ([1, 2], ([1, 2],)),
        ([[1, 2], [3]], ([1, 2], [3])),
    ],
)
def test_every_form_of_prompt(prompt, prompts):
    assert read_completion({"prompt": prompt}).prompts == prompts


def test_what_is_left_out_has_the_usual_defaults():
    plain = completion()
    assert plain.params == SamplingParams()  # max_tokens 16, as OpenAI has it
    assert (plain.model, plain.stream, plain.echo, plain.priority) == (None, False, False, 0)
    assert plain.add_special_tokens is None and plain.unknown_fields == ()
    talk = chat()
    assert talk.params == SamplingParams(max_tokens=None)
    assert talk.chat_options == {
        "add_generation_prompt": True,
        "continue_final_message": False,
        "tools": None,
        "documents": None,
    }
    assert (talk.tool_choice, talk.parallel_tool_calls) == ("none", True)


def test_the_model_may_suggest_defaults_and_the_body_wins():
    suggested = {"temperature": 0.6, "top_k": 20, "max_tokens": 99}
    for read, body in ((read_completion, {"prompt": "a"}), (read_chat, {"messages": HI})):
        params = read({**body, "top_k": 5}, suggested).params
        assert (params.temperature, params.top_k, params.max_tokens) == (0.6, 5, 99)
        assert read({**body, "max_tokens": 7}, suggested).params.max_tokens == 7


def test_every_sampling_field_arrives():
    given = {
        "n": 3, "presence_penalty": 0.5, "frequency_penalty": -0.5, "repetition_penalty": 1.1,
        "temperature": 0.3, "top_p": 0.9, "top_k": 4, "min_p": 0.1, "seed": 7, "stop": ["x"],
        "stop_token_ids": [3], "ignore_eos": True, "min_tokens": 2, "prompt_logprobs": 1,
        "skip_special_tokens": False, "include_stop_str_in_output": True,
        "logit_bias": {"5": 1.5}, "allowed_token_ids": [3, 5], "bad_words": ["no"],
        "truncate_prompt_tokens": 9, "max_tokens": 30,
    }  # fmt: skip
    expected = SamplingParams(**given)
    assert completion(**given).params == expected
    assert chat(**given).params == expected
    assert set(request_body._SAMPLING_FIELDS) <= set(given), "a field without a test"


def test_null_is_left_out():
    nothing = dict.fromkeys(request_body._COMPLETION_FIELDS - {"prompt"})
    assert completion(**nothing) == completion()
    assert chat(**dict.fromkeys(request_body._CHAT_FIELDS - {"messages"})) == chat()


def test_max_completion_tokens_is_the_newer_name():
    assert chat(max_tokens=5).params.max_tokens == 5
    assert chat(max_completion_tokens=6).params.max_tokens == 6
    assert chat(max_tokens=5, max_completion_tokens=6).params.max_tokens == 6


def test_logprobs():
    assert completion(logprobs=3).params.logprobs == 3
    assert completion(logprobs=3).params.prompt_logprobs is None
    assert completion(logprobs=3, echo=True).params.prompt_logprobs == 3
    assert chat(logprobs=True).params.logprobs == 0
    assert chat(logprobs=True, top_logprobs=5).params.logprobs == 5
    assert chat(logprobs=False).params.logprobs is None
    assert chat(top_logprobs=0).params.logprobs is None


def test_an_echo_of_nothing_but_the_prompt():
    body = completion(echo=True, max_tokens=0, logprobs=1, min_tokens=5)
    assert body.prompt_only
    assert (body.params.max_tokens, body.params.prompt_logprobs) == (1, 1)
    assert not completion(echo=True, max_tokens=1).prompt_only


def test_what_is_not_built_may_be_declined():
    """vLLM's older clients always send use_beam_search, OpenAI's older ones function_call."""
    declined = {"use_beam_search": False, "logits_processors": [], "prompt_embeds": None}
    assert completion(**declined).unknown_fields == chat(**declined).unknown_fields
    assert chat(functions=[], function_call="none").tools is None


def test_a_whole_number_may_have_a_point():
    """As JSON has it, where clients know one kind of number only."""
    given = {"max_tokens": 5.0, "n": 2.0, "top_k": 3.0, "seed": 7.0, "min_tokens": 1.0}
    for read in (completion, chat):
        assert (
            read(**given, priority=1.0).params
            == read(max_tokens=5, n=2, top_k=3, seed=7, min_tokens=1).params
        )
    with pytest.raises(ApiError, match=r"max_tokens is 5\.5"):
        chat(max_tokens=5.5)


def test_what_is_passed_through():
    body = chat(
        tools=[TOOL], tool_choice="auto", priority=-3,
        cache_salt="s", request_id="r-1", user="u", chat_template_kwargs={"enable_thinking": False},
        reasoning_effort="low", documents=[{"text": "d"}], stream=True,
        stream_options={"include_usage": True}, structured_outputs={"regex": "a*"},
        parallel_tool_calls=False, include_reasoning=False, return_token_ids=True, model="m",
        return_tokens_as_token_ids=True, add_special_tokens=False,
    )  # fmt: skip
    assert (body.tools, body.tool_choice) == ([TOOL], "auto")
    assert (body.priority, body.cache_salt, body.request_id, body.user) == (-3, "s", "r-1", "u")
    assert body.template_variables == {"enable_thinking": False, "reasoning_effort": "low"}
    assert body.chat_options["enable_thinking"] is False
    assert body.documents == [{"text": "d"}] and form(body) == {"regex": "a*"}
    assert body.stream and body.stream_options.include_usage
    assert not body.stream_options.continuous_usage_stats
    assert not body.parallel_tool_calls and not body.include_reasoning
    assert body.return_token_ids and body.return_tokens_as_token_ids
    assert body.add_special_tokens is False and body.model == "m"


def test_tools_and_the_choice_among_them():
    assert chat(tools=[TOOL]).tool_choice == "auto"
    assert chat(tools=[]).tools is None
    for without in ({}, {"tools": []}):  # some clients always send the choice
        body = chat(tool_choice="auto", **without)
        assert (body.tools, body.tool_choice) == (None, "none")
    hidden = chat(tools=[TOOL], tool_choice="none")
    assert (hidden.tools, hidden.tool_choice) == (None, "none")
    named = {"type": "function", "function": {"name": "f"}}
    assert chat(tools=[TOOL], tool_choice=named).tool_choice == named


def tool(name, parameters):
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def form(body):
    """The form that the answer must have, as plain data."""
    wanted = body.params.structured_outputs
    return None if wanted is None else wanted.to_json()


def test_response_formats():
    assert form(chat()) is None
    assert form(chat(response_format={"type": "text"})) is None
    assert form(chat(response_format={"type": "json_object"})) == {"json_object": True}
    assert form(completion(response_format=SCHEMA)) == {"json": SCHEMA["json_schema"]["schema"]}


def test_the_older_names_of_structured_outputs():
    assert form(chat(guided_regex="a+")) == {"regex": "a+"}
    assert form(completion(guided_choice=["a", "b"])) == {"choice": ("a", "b")}
    for other in ({"structured_outputs": {"regex": "b"}}, {"guided_json": {}}):
        with pytest.raises(ApiError, match="expected one kind of structured output at a time"):
            chat(guided_regex="a+", **other)
    with pytest.raises(ApiError, match="guided_json: json is wrong, expected a JSON schema") as e:
        chat(guided_json="{")
    assert e.value.param == "guided_json"


def test_tools_that_must_be_called_give_the_form():
    place = {"type": "object", "properties": {"at": {"$ref": "#/$defs/P"}}, "$defs": {"P": {}}}
    tools = [tool("f", place), {"type": "function", "function": {"name": "g"}}]
    named = {"type": "function", "function": {"name": "f"}}
    assert form(chat(tools=tools, tool_choice=named)) == {"json": place}
    found = form(chat(tools=tools, tool_choice="required", parallel_tool_calls=False))["json"]
    assert (found["type"], found["minItems"], found["maxItems"]) == ("array", 1, 1)
    first, second = found["items"]["anyOf"]
    assert first["properties"]["name"] == {"const": "f"} and first["required"][0] == "name"
    assert first["properties"]["parameters"] == {
        "type": "object", "properties": {"at": {"$ref": "#/$defs/P"}}
    }  # fmt: skip
    assert found["$defs"] == {"P": {}} and second["properties"]["name"] == {"const": "g"}
    assert "maxItems" not in form(chat(tools=tools, tool_choice="required"))["json"]
    other = tool("h", {"type": "object", "$defs": {"P": {"type": "null"}}})
    with pytest.raises(ApiError, match=r"tools have different \$defs of the name 'P'"):
        chat(tools=[*tools, other], tool_choice="required")
    with pytest.raises(ApiError, match="parameters are wrong"):
        chat(tools=[tool("f", "x")], tool_choice="required")
    for kind in ("$defs", "definitions"):
        wrong = tool("f", {"type": "object", kind: 5})
        with pytest.raises(ApiError, match="are 5, expected an object") as error:
            chat(tools=[wrong], tool_choice="required")
        assert error.value.param == "tools"


@pytest.mark.parametrize("kind", [{}, {"type": "object"}, {"type": ["object", "null"]}])
def test_arguments_are_an_object_whether_the_schema_says_so_or_not(kind):
    properties = {"properties": {"a": {"type": "boolean"}}, "required": ["a"]}
    tools = [tool("f", {**kind, **properties})]
    wanted = {"type": "object", **properties}
    named = {"type": "function", "function": {"name": "f"}}
    assert form(chat(tools=tools, tool_choice=named)) == {"json": wanted}
    (call,) = form(chat(tools=tools, tool_choice="required"))["json"]["items"]["anyOf"]
    assert call["properties"]["parameters"] == wanted


@pytest.mark.parametrize("kind", ["string", ["string", "null"], 5, None])
def test_arguments_that_are_none(kind):
    with pytest.raises(ApiError, match=r"a tool.s parameters are of type .*, expected .object."):
        chat(tools=[tool("f", {"type": kind})], tool_choice="required")


def test_a_message_may_be_in_parts_and_may_be_gone_on_with():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    body = chat(
        messages=[{"role": "user", "content": parts}, {"role": "assistant", "content": "S"}],
        continue_final_message=True,
    )
    assert body.messages[0]["content"] == "a\nb"
    assert body.chat_options["continue_final_message"]
    assert body.chat_options["add_generation_prompt"] is False


def test_an_empty_name_of_a_model_is_the_one_that_is_served():
    assert completion(model="").model is None
    for served in (None, "", "a"):
        check_model(served, ["a", "b"])
    with pytest.raises(ApiError, match="the model 'c' is not served here, expected") as caught:
        check_model("c", ["a", "b"])
    assert (caught.value.status, caught.value.param) == (404, "model")


def test_unknown_fields_are_ignored_and_named():
    body = completion(store=True, metadata={"a": 1}, temperature=0.5)
    assert body.unknown_fields == ("metadata", "store")
    assert body.params.temperature == 0.5


@pytest.mark.parametrize(
    "fields, param, message",
    [
        ({"prompt": None}, "prompt", "prompt is missing, expected text, a list of texts"),
        ({"prompt": []}, "prompt", "prompt is a list of 0, expected text"),
        ({"prompt": 5}, "prompt", "prompt is 5"),
        ({"prompt": ["a", 5]}, "prompt", "prompt is a list of 2"),
        ({"prompt": [True]}, "prompt", "prompt is a list of 1"),
        ({"prompt": [1.5]}, "prompt", "prompt is a list of 1"),
        ({"prompt": ["a"] * 257}, "prompt", "at most 256 prompts"),
        ({"prompt": ["a"] * 9, "n": 128}, "n", "9 prompts with n = 128 are 1152 completions"),
        ({"n": 0}, "n", "n is 0, expected an integer from 1 to 128"),
        ({"n": True}, "n", "n is true"),
        ({"best_of": 2}, "best_of", r"best_of is 2, expected n \(1\)"),
        ({"suffix": "x"}, "suffix", "suffix is 'x', expected nothing"),
        ({"model": 5}, "model", "model is 5, expected text"),
        ({"temperature": "hot"}, "temperature", "temperature is 'hot', expected a number"),
        ({"temperature": -1}, "temperature", "temperature is -1"),
        ({"max_tokens": 0}, "max_tokens", "max_tokens is 0, expected an integer from 1"),
        ({"max_tokens": False, "echo": True}, "max_tokens", "max_tokens is False"),
        ({"max_tokens": 0, "echo": True, "stream": True}, "max_tokens", "at least 1 in a stream"),
        ({"logprobs": 21}, "logprobs", "logprobs is 21, expected an integer from 0 to 20"),
        ({"logprobs": True}, "logprobs", "logprobs is true"),
        ({"stop": 5}, "stop", "stop is 5"),
        ({"stop": [""]}, "stop", "stop entry is ''"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "logit_bias key is 'x'"),
        ({"logit_bias": {"5": 1000}}, "logit_bias", "logit_bias of token 5 is 1000"),
        ({"seed": 2**64}, "seed", "seed is"),
        ({"stream": "yes"}, "stream", "stream is 'yes', expected true or false"),
        ({"stream_options": {}}, "stream_options", "expected stream to be true"),
        ({"stream": True, "stream_options": 5}, "stream_options", "5, expected an object"),
        (
            {"stream": True, "stream_options": {"include_usage": 1}},
            "stream_options",
            "stream_options.include_usage is 1, expected true or false",
        ),
        ({"stream": True, "prompt_logprobs": 1}, "prompt_logprobs", "expected nothing in a stream"),
        ({"priority": 1.5}, "priority", "priority is 1.5, expected an integer"),
        ({"cache_salt": ""}, "cache_salt", "cache_salt is '', expected text of 1 to 256"),
        ({"response_format": "json"}, "response_format", "expected an object"),
        ({"response_format": {"type": "xml"}}, "response_format", "expected type 'text'"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {}}},
            "response_format",
            "a json_schema with a schema",
        ),
        ({"prompt_embeds": "AAAA"}, "prompt_embeds", "not supported"),
        ({"use_beam_search": True}, "use_beam_search", "not supported"),
    ],
)
def test_a_mistake_in_a_completion(fields, param, message):
    with pytest.raises(ApiError, match=message) as caught:
        completion(**fields)
    assert (caught.value.param, caught.value.status) == (param, 400)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "fields, param, message",
    [
        ({"messages": None}, "messages", "messages is missing"),
        ({"messages": []}, "messages", "messages has 0 entries"),
        ({"messages": "Hi"}, "messages", "messages is a str"),
        ({"messages": [{"content": "x"}]}, "messages", r"messages\[0\].role is wrong"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages",
            r"messages\[0\] has a part of type 'image_url', expected text only",
        ),
        ({"logprobs": 1}, "logprobs", "logprobs is 1, expected true or false"),
        ({"top_logprobs": 3}, "top_logprobs", "expected logprobs to be true"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "from 0 to 20"),
        ({"max_completion_tokens": 0}, "max_completion_tokens", "max_completion_tokens is 0"),
        ({"max_tokens": "5"}, "max_tokens", "max_tokens is '5'"),
        ({"tools": {}}, "tools", "a list of objects"),
        ({"tools": [{"type": "function"}]}, "tools", r"tools\[0\] is wrong"),
        ({"tools": [TOOL] * 129}, "tools", "at most 128"),
        ({"tool_choice": "required"}, "tool_choice", "expected tools to be given"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice", "expected tools to be given"),
        ({"tools": [TOOL], "tool_choice": "any"}, "tool_choice", "'required' or a function"),
        (
            {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}},
            "tool_choice",
            "expected a function among f",
        ),
        ({"chat_template": "{{ 1 }}"}, "chat_template", "a template is a program"),
        ({"chat_template_kwargs": []}, "chat_template_kwargs", "expected an object"),
        (
            {"add_generation_prompt": True, "continue_final_message": True},
            "add_generation_prompt",
            "expected false where",
        ),
        ({"functions": [{"name": "f"}]}, "functions", "give tools instead"),
        ({"function_call": "auto"}, "function_call", "give tool_choice instead"),
        ({"tools": [tool("f" * 257, {})]}, "tools", r"tools\[0\] has a name of 257 characters"),
        ({"reasoning_effort": 5}, "reasoning_effort", "expected text of 1 to 16"),
    ],
)
def test_a_mistake_in_a_chat(fields, param, message):
    with pytest.raises(ApiError, match=message) as caught:
        chat(**fields)
    assert (caught.value.param, caught.value.status) == (param, 400)


@pytest.mark.parametrize("name", sorted(RESERVED))
def test_no_argument_of_ours_comes_by_way_of_template_variables(name):
    """Above all no template, which is a program, and no leave for special tokens in messages."""
    for value in ("{{ 1 }}", True, [], 5):
        with pytest.raises(ApiError, match=f"{name} may not be a template variable") as caught:
            chat(chat_template_kwargs={"enable_thinking": True, name: value})
        assert (caught.value.param, caught.value.status) == ("chat_template_kwargs", 400)


def test_reserved_is_every_argument_of_the_functions_that_take_variables():
    for function in (Tokenizer.encode_chat, Tokenizer.apply_chat_template, ChatTemplate.render):
        named = inspect.signature(function).parameters.values()
        assert {one.name for one in named if one.kind is not one.VAR_KEYWORD} <= RESERVED


@pytest.mark.parametrize(
    "data, message",
    [
        (b"", "not valid JSON at character 0"),
        (b'{"a": ', "not valid JSON at character 6"),
        (b"[]", "a list, expected an object"),
        (b"null", "null, expected an object"),
        (b'"a"', "text, expected an object"),
        (b'{"a": NaN}', "holds NaN, which is not JSON"),
        (b'{"a": [-Infinity]}', "holds -Infinity"),
        (b'{"a": {"b": 1e999}}', "a number that is too large"),
        (b'{"a": "\xff"}', "not UTF-8 at byte 7"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b'{"a": ' + b"[" * 70 + b"]" * 70 + b"}", "deeper than 64"),
        (b'{"a": ' + b"[" * 10**5 + b"]" * 10**5 + b"}", "deeper than 64"),
    ],
)
def test_json_that_is_none(data, message):
    with pytest.raises(ApiError, match=message):
        read_json(data)


def test_a_body_with_too_many_values(monkeypatch):
    monkeypatch.setattr(request_body, "MAX_JSON_VALUES", 10)
    assert read_json('{"a": [1, 2, 3, 4, 5, 6, 7, 8]}')
    monkeypatch.setattr(request_body.json, "loads", None)  # they are not even read
    for text in ('{"a": [[1, 2, 3, 4], [5, 6, 7, 8, 9]]}', '{"a": [{}, {}, {}, {}, {}]}'):
        with pytest.raises(ApiError, match="more than 10 values"):
            read_json(text)
    assert gc.isenabled()


@pytest.mark.parametrize(
    "one", [b"1,", b"{},", b"[],", b'"",', b"[[1]],", b'{"a":{"b":0}},', b"1.5,", b"true,"]
)
def test_S21_commas_and_brackets_are_no_fewer_than_values(one):
    """The bound that is checked before a body is read holds for what is read."""
    data = b'{"a": [' + one * 50 + b'1], "b": {"c": [], "d": "x"}}'
    num, level = 0, [read_json(data)]
    while level:
        num += len(level)
        level = [
            item for value in level if isinstance(value, dict | list)
            for item in (value.values() if isinstance(value, dict) else value)
        ]  # fmt: skip
    assert num - 1 <= sum(map(data.decode().count, ",:[{"))


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=5,
)
FIELDS = sorted(request_body._COMPLETION_FIELDS | request_body._CHAT_FIELDS)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(FIELDS), ANY_JSON, max_size=4), st.booleans())
def test_any_value_in_any_field_is_taken_or_refused_in_one_line(fields, is_chat):
    body = {"messages": HI, **fields} if is_chat else {"prompt": "a", **fields}
    try:
        found = (read_chat if is_chat else read_completion)(body)
    except ApiError as error:
        assert error.param is not None and "\n" not in str(error) and len(str(error)) < 600
        assert error.status == 400
    else:
        assert isinstance(found.params, SamplingParams)


def test_a_byte_order_mark_is_none_of_the_body():
    assert read_json(b'\xef\xbb\xbf{"a": 1}') == {"a": 1}


def test_a_body_reads_the_same_from_bytes_and_text():
    body = {"prompt": "é\u2028", "temperature": 0}
    assert read_json(json.dumps(body)) == read_json(json.dumps(body).encode()) == body


def test_earlier_calls_and_reasoning_as_templates_look_for_them():
    def call(arguments):
        return {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}

    message = {"role": "assistant", "reasoning": "Hm.", "content": None}
    calls = [call('{"a": 1}'), call("[1]"), call('{"a'), call({"b": 2}), "?"]
    asked = [{"role": "user", "content": "Hi"}, {**message, "tool_calls": calls}]
    first, found = request_body.read_chat({"messages": asked}).messages
    assert first == asked[0]
    assert found["reasoning_content"] == found["reasoning"] == found["thinking"] == "Hm."
    assert found["tool_calls"] == [call({"a": 1}), call("[1]"), call('{"a'), call({"b": 2}), "?"]
    assert asked[1]["tool_calls"][0]["function"]["arguments"] == '{"a": 1}'  # a copy
