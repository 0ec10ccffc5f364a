"""Readers chosen for a model and a request, and the answers that come out of them."""

from __future__ import annotations

import http.server
import json
import threading

import openai
import pytest

from pace_nb.errors import ConfigError
from pace_nb.openai_api.message_format import PLAIN, MessageFormat
from pace_nb.openai_api.request_body import read_chat
from pace_nb.openai_api.response_body import ChatResponse
from pace_nb.outputs import CompletionOutput, Logprob, RequestOutput
from pace_nb.server.answers import DONE, EVENT_STREAM, event

TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}}
    for name in ("weather", "time")
]
QWEN = MessageFormat("qwen3", "hermes")
CALLING = (
    "<think>\nWhich city?\n</think>\n\nI look.\n"
    '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'
)


def body(**options):
    return read_chat({"messages": [{"role": "user", "content": "Hi"}], "tools": TOOLS, **options})


def news(text, finish_reason=None, prompt="<|user|>Hi", ids=(5,)):
    entries = [{one: Logprob(-1.0, 1)} for one in ids]
    one = CompletionOutput(0, text, list(ids), 0.0, entries, finish_reason, None)
    return RequestOutput(
        request_id="1", prompt=prompt, prompt_token_ids=[1], prompt_logprobs=None, outputs=[one],
        finished=finish_reason is not None, num_cached_tokens=0, metrics=None,
    )  # fmt: skip


def response(message_format, **options):
    return ChatResponse(
        body(**options), message_format=message_format, response_id="chatcmpl-1", model="m"
    )


def whole(message_format, text, finish_reason="stop", **options):
    (choice,) = response(message_format, **options).whole(news(text, finish_reason))["choices"]
    return choice


def test_reasoning_content_and_calls_of_one_message():
    choice = whole(QWEN, CALLING)
    message = choice["message"]
    assert choice["finish_reason"] == "tool_calls"
    assert message["reasoning"] == message["reasoning_content"] == "Which city?"
    assert message["content"] == "I look."
    assert [one["function"]["name"] for one in message["tool_calls"]] == ["weather", "time"]
    assert json.loads(message["tool_calls"][0]["function"]["arguments"]) == {"city": "Köln"}
    assert {one["type"] for one in message["tool_calls"]} == {"function"}
    assert len({one["id"] for one in message["tool_calls"]}) == 2


def test_the_stream_says_the_same_in_the_order_clients_expect():
    streamed = response(QWEN, stream=True)
    chunks = []
    for i, character in enumerate(CALLING):
        chunks += streamed.chunks(news(character, "stop" if i == len(CALLING) - 1 else None))
    choices = [chunk["choices"][0] for chunk in chunks]
    deltas = [choice["delta"] for choice in choices]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(one.get("reasoning_content", "") for one in deltas) == "Which city?"
    assert "".join(one.get("content", "") for one in deltas) == "I look."
    calls = [one["tool_calls"][0] for one in deltas if "tool_calls" in one]
    first = calls[0]
    assert first["index"] == 0 and first["id"] and first["type"] == "function"
    assert first["function"] == {"name": "weather", "arguments": ""}
    begun = [i for i, one in enumerate(calls) if "id" in one]
    assert [calls[i]["index"] for i in begun] == [0, 1]
    assert begun[1] > 5  # the first one's arguments came in pieces
    arguments = ["", ""]
    for one in calls:
        arguments[one["index"]] += one["function"]["arguments"]
        assert "id" in one or set(one) == {"index", "function"}
    assert arguments == ['{"city": "Köln"}', "{}"]
    assert deltas[-1] == {} and choices[-1]["finish_reason"] == "tool_calls"
    assert all(choice["finish_reason"] is None for choice in choices[:-1])


def test_openais_client_reads_the_stream():
    """A scripted model behind a socket: the demo model calls no tools by itself."""
    streamed = response(QWEN, stream=True)
    chunks = []
    for start in range(0, len(CALLING), 7):
        last = start + 7 >= len(CALLING)
        chunks += streamed.chunks(news(CALLING[start : start + 7], "stop" if last else None))
    events = b"".join(event(chunk) for chunk in chunks) + DONE

    class Scripted(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["content-length"]))
            self.send_response(200)
            self.send_header("content-type", EVENT_STREAM)
            self.end_headers()
            self.wfile.write(events)

        def log_message(self, *arguments):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Scripted) as served:
        thread = threading.Thread(target=served.handle_request)
        thread.start()
        url = f"http://127.0.0.1:{served.server_port}/v1"
        with (
            openai.OpenAI(base_url=url, api_key="x", max_retries=0) as client,
            client.chat.completions.stream(
                model="m", messages=[{"role": "user", "content": "Hi"}], tools=TOOLS
            ) as stream,
        ):
            (choice,) = stream.get_final_completion().choices
        thread.join()
    first, second = choice.message.tool_calls
    assert (first.function.name, first.function.arguments) == ("weather", '{"city": "Köln"}')
    assert (second.function.name, second.function.arguments) == ("time", "{}")
    assert choice.message.content == "I look." and choice.finish_reason == "tool_calls"
    assert choice.message.reasoning_content == "Which city?"


def test_what_the_request_does_not_want_is_left_out():
    message = whole(QWEN, CALLING, include_reasoning=False, parallel_tool_calls=False)["message"]
    assert "reasoning" not in message and "reasoning_content" not in message
    assert [one["function"]["name"] for one in message["tool_calls"]] == ["weather"]
    message = whole(QWEN, CALLING, tool_choice="none")["message"]
    assert "tool_calls" not in message and "<tool_call>" in message["content"]


def test_a_message_cut_by_its_length_says_so():
    choice = whole(QWEN, '<tool_call>{"name": "time", "arguments": {"a', "length")
    assert choice["finish_reason"] == "length" and choice["message"]["content"] is None
    assert choice["message"]["tool_calls"][0]["function"]["arguments"] == '{"a'
    choice = whole(QWEN, "<think>so long", "length")
    assert choice["message"]["content"] is None
    assert choice["message"]["reasoning_content"] == "so long"


def test_without_a_format_the_text_is_the_content():
    assert whole(PLAIN, CALLING)["message"]["content"] == CALLING
    assert whole(PLAIN, "")["message"]["content"] == ""


def test_calls_that_a_grammar_forced():
    named = {"type": "function", "function": {"name": "time"}}
    choice = whole(PLAIN, '{"zone": "CET"}', tool_choice=named)
    assert choice["finish_reason"] == "tool_calls"
    (call,) = choice["message"]["tool_calls"]
    assert call["function"] == {"name": "time", "arguments": '{"zone": "CET"}'}
    text = '[{"name": "time", "parameters": {}}, {"name": "weather", "parameters": {"a": 1}}]'
    message = whole(QWEN, "<think>x</think>" + text, tool_choice="required")["message"]
    assert [one["function"]["arguments"] for one in message["tool_calls"]] == ["{}", '{"a": 1}']
    assert message["reasoning_content"] == "x" and message["content"] is None


def test_gpt_oss_and_the_prompt_that_opens_the_reasoning():
    gpt_oss = MessageFormat("openai_gptoss", "openai")
    text = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant to=functions.time<|channel|>"
    text += "commentary json<|message|>{}"
    message = whole(gpt_oss, text)["message"]
    assert message["reasoning_content"] == "Hm." and message["content"] is None
    assert message["tool_calls"][0]["function"]["name"] == "time"
    opened = response(QWEN).whole(news("Hm.</think>Hi", "stop", prompt="...<think>\n"))
    assert opened["choices"][0]["message"]["content"] == "Hi"


def test_logprobs_and_ids_of_a_stream_come_once_each():
    streamed = response(QWEN, stream=True, logprobs=True, return_token_ids=True)
    pieces = ["<think>", "a", "</think>b", '<tool_call>{"name": "time", ', '"arguments": {}}', "x"]
    chunks = []
    for i, piece in enumerate(pieces):
        end = "stop" if i == len(pieces) - 1 else None
        chunks += streamed.chunks(news(piece, end, ids=(100 + i,)))
    choices = [chunk["choices"][0] for chunk in chunks]
    told = [one for choice in choices for one in choice.get("token_ids", [])]
    assert told == [100 + i for i in range(len(pieces))]
    assert sum(len(c["logprobs"]["content"]) for c in choices if c["logprobs"]) == len(pieces)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ messages }}", PLAIN),
        ("<tool_call></tool_call> {% if '</think>' in content %}", QWEN),
        ("<tool_call>\n<function=example>", PLAIN),
        ("[AVAILABLE_TOOLS] [TOOL_CALLS]", MessageFormat(None, "mistral")),
        ("Environment: ipython", MessageFormat(None, "llama3_json")),
        ("<|start|>assistant<|channel|>final", MessageFormat("openai_gptoss", "openai")),
    ],
)
def test_a_template_tells_the_format(template, expected):
    assert MessageFormat.of_templates({"default": template}) == expected


def test_special_tokens_are_in_the_text_where_readers_look_for_them():
    mistral = MessageFormat(None, "mistral")
    assert mistral.params(body(), "").skip_special_tokens is False
    assert mistral.params(body(tool_choice="none"), "").skip_special_tokens is True
    assert mistral.params(read_chat({"messages": body().messages}), "").skip_special_tokens is True
    assert MessageFormat("openai_gptoss").params(body(), "").skip_special_tokens is False
    ids = {mistral.call_id() for _ in range(20)}
    assert len(ids) == 20 and all(len(one) == 9 and one.isalnum() for one in ids)


def test_names_that_there_are_not():
    with pytest.raises(ConfigError, match=r"reasoning_parser is 'deep', expected .*qwen3"):
        MessageFormat("deep", None)
    with pytest.raises(ConfigError, match=r"tool_call_parser is 'x', expected hermes"):
        MessageFormat(None, "x")


@pytest.mark.parametrize(
    ("message_format", "prompt", "markers"),
    [
        (PLAIN, "<think>", {}),
        (QWEN, "<|assistant|>", {"reasoning_start": "<think>", "reasoning_end": "</think>"}),
        (QWEN, "<|assistant|><think>\n", {"reasoning_end": "</think>"}),
        (QWEN, "<|assistant|><think>\n\n</think>\n\n", {}),
        (MessageFormat("deepseek_r1"), "<|assistant|>", {"reasoning_end": "</think>"}),
        (
            MessageFormat("openai_gptoss"),
            "<|start|>assistant",
            {"reasoning_end": "<|channel|>final<|message|>"},
        ),
    ],
)
def test_a_form_holds_after_the_reasoning(message_format, prompt, markers):
    params = message_format.params(body(response_format={"type": "json_object"}), prompt)
    assert params.structured_outputs.to_json() == {"json_object": True, **markers}
