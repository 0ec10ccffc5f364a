"""Conversations: where templates are, what messages may be, and what a template cannot do to us."""

from __future__ import annotations

import gc
import json
import os
import threading
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from pace_nb import chat_template as module
from pace_nb.chat_template import ChatTemplate, check_messages
from pace_nb.errors import InvalidRequestError, ModelFormatError, PaceError

USER = [{"role": "user", "content": "Hi"}]
CHAT = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def chat() -> Iterator[ChatTemplate]:
    template = ChatTemplate({"default": CHAT}, {"bos_token": "<s>"})
    yield template
    template.close()


def run(source: str, messages: Any = USER, **options: Any) -> str:
    template = ChatTemplate({"default": source}, processor_seconds=0.3)
    try:
        return template.render(messages, **options)
    finally:
        template.close()


# ---- rendering ----


def test_a_conversation_becomes_text(chat: ChatTemplate) -> None:
    assert chat.render(USER) == "<s><user>Hi</><assistant>"
    assert chat.render(USER, add_generation_prompt=False) == "<s><user>Hi</>"


def test_variables_tools_and_the_date_reach_the_template() -> None:
    source = "{{ enable_thinking }}{{ tools | length }}{{ documents is none }}{{ tools[0].name }}"
    text = run(source, enable_thinking=False, tools=[{"name": "f"}])
    assert text == "False1Truef"
    assert run("{{ tools is none }}") == "True"
    assert run("{{ strftime_now('%Y') }}") == str(datetime.now().year)


def test_the_last_message_can_be_continued(chat: ChatTemplate) -> None:
    for content, expected in (("I think", "I think"), ("I think ", "I think ")):
        messages = [*USER, {"role": "assistant", "content": content}]
        text = chat.render(messages, add_generation_prompt=False, continue_final_message=True)
        assert text == f"<s><user>Hi</><assistant>{expected}"
    with pytest.raises(InvalidRequestError, match="add_generation_prompt"):
        chat.render(USER, continue_final_message=True)
    with pytest.raises(InvalidRequestError, match="cannot be continued"):
        run("nothing", add_generation_prompt=False, continue_final_message=True)


def test_a_template_that_trims_can_be_continued() -> None:
    template = ChatTemplate(
        {"default": "{% for m in messages %}{{ m.content|trim }}</>{% endfor %}"}
    )
    messages = [*USER, {"role": "assistant", "content": " so "}]
    options = {"add_generation_prompt": False, "continue_final_message": True}
    assert template.render(messages, **options) == "Hi</>so"  # type: ignore[arg-type]
    template.close()


def test_developers_are_the_system_where_a_template_does_not_know_them() -> None:
    messages = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    roles = "{% for m in messages %}{{ m.role }} {% endfor %}"
    assert run(roles, messages=messages) == "system user "
    assert run(roles + "{# developer #}", messages=messages) == "developer user "
    assert messages[0]["role"] == "developer"


def test_surrogates_and_control_characters_pass() -> None:
    template = ChatTemplate({"default": "{{ messages[0].content }}"})
    text = 'a\x00\ud800\u2028\r\n"é😀'
    assert template.render([{"role": "user", "content": text}]) == text
    template.close()


def test_threads_share_one_process(chat: ChatTemplate) -> None:
    found: list[str] = []

    def ask(n: int) -> None:
        found.extend(chat.render([{"role": "user", "content": f"{n}-{i}"}]) for i in range(20))

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = [f"<s><user>{n}-{i}</><assistant>" for n in range(4) for i in range(20)]
    assert sorted(found) == sorted(expected)


# ---- which template ----


def test_named_templates() -> None:
    template = ChatTemplate({"default": "D", "tool_use": "T", "rag": "R"})
    assert template.render(USER) == "D"
    assert template.render(USER, tools=[{}]) == "T"
    assert template.render(USER, chat_template="rag") == "R"
    assert template.render(USER, chat_template="own {{ messages[0].role }}") == "own user"
    template.close()


def test_without_a_template_there_is_no_chat() -> None:
    with pytest.raises(InvalidRequestError, match="no chat template"):
        ChatTemplate({}).render(USER)
    with pytest.raises(InvalidRequestError, match="one of: a, b"):
        ChatTemplate({"b": "", "a": ""}).render(USER)


def test_files_in_their_order(tmp_path: Path) -> None:
    def found(config: dict[str, Any]) -> dict[str, str]:
        return ChatTemplate.from_directory(tmp_path, config, {}).templates

    config = {"chat_template": "from config"}
    assert found({}) == {}
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "from json"}))
    assert found({}) == {"default": "from json"}
    assert found({"chat_template": None}) == {"default": "from json"}
    assert found(config) == {"default": "from config"}
    (tmp_path / "chat_template.jinja").write_text("é from jinja", "utf-8")
    assert found(config) == {"default": "é from jinja"}
    (tmp_path / "chat_template.jinja").unlink()
    named = [{"name": "default", "template": "D"}, {"name": "../../x", "template": "X"}]
    assert found({"chat_template": named}) == {"default": "D", "../../x": "X"}
    assert [path.name for path in tmp_path.iterdir()] == ["chat_template.json"]


@pytest.mark.parametrize("wrong", [5, ["x"], [{"name": "a"}], {"a": 1}, [{"template": "x"}], True])
def test_what_is_no_template_is_refused(tmp_path: Path, wrong: object) -> None:
    with pytest.raises(ModelFormatError, match=r"tokenizer_config\.json: chat_template: expected"):
        ChatTemplate.from_directory(tmp_path, {"chat_template": wrong}, {})


def test_template_files_are_checked(tmp_path: Path) -> None:
    long = "x" * (module.MAX_TEMPLATE + 1)
    with pytest.raises(ModelFormatError, match="expected at most"):
        ChatTemplate.from_directory(tmp_path, {"chat_template": long}, {})
    file = tmp_path / "chat_template.json"
    for content in (b"{", b"[]", b"{}", b"\xff", b"[" * 100_000):
        file.write_bytes(content)
        with pytest.raises(ModelFormatError, match=r"chat_template\.json"):
            ChatTemplate.from_directory(tmp_path, {}, {})
    file.unlink()
    os.mkfifo(tmp_path / "chat_template.jinja")  # reading it would wait for ever
    with pytest.raises(ModelFormatError, match="regular file"):
        ChatTemplate.from_directory(tmp_path, {}, {})


# ---- messages and variables ----


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, "b", {"type": "text", "text": "c"}]
    message = {"role": "user", "content": parts, "name": "n"}
    assert check_messages([message]) == [{"role": "user", "content": "a\nb\nc", "name": "n"}]
    assert message["content"] is parts


def test_an_assistants_message_may_have_no_text() -> None:
    calls = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    assert check_messages([calls]) == [calls]
    assert check_messages([{**calls, "content": None}]) == [{**calls, "content": None}]


@pytest.mark.parametrize(
    ("messages", "named"),
    [
        (None, "messages"),
        ("hello", "messages"),
        ({"role": "user", "content": "x"}, "messages"),
        ([], "messages has 0 entries"),
        ([USER[0]] * 4097, "messages has 4097 entries"),
        (["x"], r"messages\[0\]"),
        ([USER[0], 3], r"messages\[1\]"),
        ([{"content": "x"}], r"messages\[0\].role"),
        ([{"role": 1, "content": "x"}], r"messages\[0\].role"),
        ([{"role": "", "content": "x"}], r"messages\[0\].role"),
        ([{"role": "r" * 65, "content": "x"}], r"messages\[0\].role"),
        ([{"role": "user"}], r"messages\[0\].content"),
        ([{"role": "user", "content": None}], r"messages\[0\].content"),
        ([{"role": "user", "content": 5}], r"messages\[0\].content"),
        ([{"role": "user", "content": b"x"}], r"messages\[0\].content"),
        ([{"role": "user", "content": {"text": "x"}}], r"messages\[0\].content"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], r"content\[0\]"),
        ([{"role": "user", "content": ["a", {"type": "text", "text": 1}]}], r"content\[1\]"),
        ([{"role": "user", "content": "x", 5: 1}], r"messages\[0\] has a key"),
    ],
)
def test_wrong_messages_are_named(messages: Any, named: str) -> None:
    with pytest.raises(InvalidRequestError, match=named) as refused:
        check_messages(messages)
    assert len(str(refused.value).splitlines()) == 1


def nested(depth: int) -> object:
    value: object = 1
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"tokenize": True}, "tokenize"),
        ({"messages": []}, "messages"),
        ({"return_tensors": "pt"}, "return_tensors"),
        ({"x": nested(17)}, "template variables"),
        ({"x": nested(100_000)}, "template variables"),
        ({"x": list(range(128))}, "template variables"),
        ({"x": "a" * 17_000}, "template variables take"),
        ({"x": object()}, "JSON"),
        ({"x": {1, 2}}, "JSON"),
        ({f"x{i}": 1 for i in range(129)}, "template variables"),
    ],
)
def test_wrong_variables_are_refused(variables: dict[str, Any], named: str) -> None:
    template = ChatTemplate({"default": ""})
    with pytest.raises((InvalidRequestError, TypeError), match=named):
        template.render(USER, **variables)


def test_messages_that_are_no_json_are_refused(chat: ChatTemplate) -> None:
    circular: list[object] = []
    circular.append(circular)
    for value in (object(), circular, nested(100_000)):
        with pytest.raises(InvalidRequestError, match="no JSON values"):
            chat.render([{"role": "user", "content": "x", "extra": value}])


# ---- limits (S4) ----

BOMBS = {
    "a long loop": "{% for i in range(10**9) %}{% endfor %}",
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}"
    "{% endfor %}",
    "a recursive loop": "{% for i in range(99999) recursive %}{{ loop(range(99999)) }}{% endfor %}",
    "a long string": "{{ 'a' * 10**9 }}",
    "a string that doubles": "{% set n = namespace(s='a') %}{% for i in range(60) %}"
    "{% set n.s = n.s ~ n.s %}{% endfor %}",
    "a block that doubles": "{% set n = namespace(s='a') %}{% for i in range(60) %}"
    "{% set t %}{{ n.s }}{{ n.s }}{% endset %}{% set n.s = t %}{% endfor %}",
    "a list that doubles": "{% set n = namespace(l=[1]) %}{% for i in range(60) %}"
    "{% set n.l = n.l + n.l %}{% endfor %}",
    "a nest that doubles": "{% set n = namespace(l=[1]) %}{% for i in range(60) %}"
    "{% set n.l = [n.l, n.l] %}{% endfor %}{{ n.l }}",
    "a nest that is compared": "{% set n = namespace(a=[1], b=[1]) %}{% for i in range(60) %}"
    "{% set n.a = [n.a, n.a] %}{% set n.b = [n.b, n.b] %}{% endfor %}{{ n.a == n.b }}",
    "a wide format": "{{ '%1000000000d' % 1 }}",
    "a wide str.format": "{{ '{:1000000000}'.format(1) }}",
    "a wide filter": "{{ 'a' | center(10**9) }}",
    "a wide method": "{{ 'a'.ljust(10**9) }}",
    "replace upon replace": "{{ ('a' * 9999).replace('a', 'a' * 9999).replace('a', 'a' * 9999) }}",
    "a large power": "{{ 10 ** (10 ** 9) }}",
    "long text": "{% for i in range(99999) %}" + "x" * 10_000 + "{% endfor %}",
    "long filler": "{{ lipsum(n=10**6) }}",
    "a join": "{{ range(99999) | join('x' * 99999) }}",
    "endless macros": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "branching macros": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}"
    "{% endmacro %}{{ f(60) }}",
    "deep parentheses": "{{ " + "(" * 100_000 + "1" + ")" * 100_000 + " }}",
    "a slow regular expression": "{{ ('<' * 99999 + 'a@') | striptags | urlize }}",
}


def peak_kib() -> int:
    """Most memory this process ever had, its children apart."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0])


@pytest.mark.parametrize("name", BOMBS)
def test_no_template_takes_time_or_memory(name: str) -> None:
    """An error within the template's share of a processor, and nothing of it in our memory."""
    before = peak_kib()
    with pytest.raises(InvalidRequestError) as refused:
        text = run(BOMBS[name])
        assert name == "a slow regular expression"  # some versions are quick
        assert len(text) < 10**6
        raise InvalidRequestError("the chat template was quick")
    message = str(refused.value)
    assert message.startswith("the chat template ")
    assert len(message.splitlines()) == 1
    assert peak_kib() - before < 50 * 1024


def test_the_time_is_one_second_unless_told() -> None:
    template = ChatTemplate({"default": BOMBS["nested loops"]})
    start = time.process_time(), os.times().children_user
    with pytest.raises(InvalidRequestError, match="more than 1 s of processor time"):
        template.render(USER)
    assert time.process_time() - start[0] < 0.5
    assert os.times().children_user - start[1] < 2
    template.close()


def test_after_a_bomb_the_next_conversation_is_rendered() -> None:
    source = "{% if boom %}" + BOMBS["nested loops"] + "{{ 'a' * 10**9 }}{% endif %}fine"
    template = ChatTemplate({"default": source}, processor_seconds=0.2)
    assert template.render(USER) == "fine"
    with pytest.raises(InvalidRequestError, match="processor time"):
        template.render(USER, boom=True)
    assert template.render(USER) == "fine"
    with pytest.raises(InvalidRequestError, match="memory"):
        template.render(USER, chat_template="{{ 'a' * 10**9 }}")
    assert template.render(USER) == "fine"
    template.close()


def test_a_long_conversation_is_within_the_limits(chat: ChatTemplate) -> None:
    messages = [{"role": "user", "content": "é" * 10_000}] * 400
    assert len(chat.render(messages)) > 4_000_000


# ---- the process ----

EVERY_FILTER = """{{ [-1|abs, 'a'|attr('b'), [1,2]|batch(1)|list, 'a'|capitalize, 'a'|center,
[1]|count, x|default(1), {'a':1}|dictsort, '<'|e, 1000|filesizeformat, [1]|first, '1.5'|float,
'<'|forceescape, '%s'|format(1), messages|groupby('role'), 'a'|indent, '1'|int, {'a':1}|items|list,
[1]|join, [1]|last, [1]|list, 'A'|lower, [1]|map('abs')|list, [1]|max, [1]|min, [1]|pprint,
[1]|random, [1]|reject('odd')|list, messages|rejectattr('x')|list, 'a'|replace('a', 'b'),
'ab'|reverse, 1.5|round, 'a'|safe, [1]|select('odd')|list, messages|selectattr('role')|list,
[1,2]|slice(2)|list, [2,1]|sort, 1|string, '<b>'|striptags, [1]|sum, 'a b'|title, ' a '|trim,
'a b c'|truncate(5), [1,1]|unique|list, 'a'|upper, 'a b'|urlencode, 'http://a.b'|urlize,
'a'|wordcount, 'a b'|wordwrap(1), {'a':1}|xmlattr, {'a':1}|tojson(indent=2)] | length }}
{{ 'é\\n'.encode('utf-8').decode() }}{{ '2'|int(base=16) }}"""


def test_every_filter_works_behind_closed_doors(chat: ChatTemplate) -> None:
    """The process cannot open a file any more, so nothing may be left to be imported."""
    assert chat.render(USER, chat_template=EVERY_FILTER).split() == ["51", "é", "2"]


def test_the_process_has_no_doors(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a template could do if it got out of the sandbox: nothing."""
    monkeypatch.setenv("SECRET_TOKEN", "hf_secret")
    template = ChatTemplate({"default": "x"})
    template.render(USER)
    assert template._worker is not None
    pid = template._worker._process.pid
    limits = Path(f"/proc/{pid}/limits").read_text()
    for name in ("Max open files", "Max processes", "Max file size", "Max core file size"):
        line = next(line for line in limits.splitlines() if line.startswith(name))
        assert line.removeprefix(name).split()[:2] == ["0", "0"]
    assert b"SECRET" not in Path(f"/proc/{pid}/environ").read_bytes()
    assert len(list(Path(f"/proc/{pid}/fd").iterdir())) == 3
    template.close()


def test_the_process_ends_with_close_and_with_the_object() -> None:
    for end in (ChatTemplate.close, lambda template: None):
        template = ChatTemplate({"default": "x"})
        template.close()  # nothing yet
        assert template.render(USER) == "x"
        assert template._worker is not None
        process = template._worker._process
        end(template)
        del template
        gc.collect()
        assert process.poll() is not None


def test_close_is_not_the_end() -> None:
    template = ChatTemplate({"default": "x"})
    for _ in range(2):
        assert template.render(USER) == "x"
        template.close()


def test_a_process_killed_from_outside_is_replaced(chat: ChatTemplate) -> None:
    chat.render(USER)
    assert chat._worker is not None
    chat._worker._process.kill()
    chat._worker._process.wait()
    assert chat.render(USER) == "<s><user>Hi</><assistant>"


def test_a_stopped_process_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WALL_SECONDS", 0.2)
    template = ChatTemplate({"default": "x"})
    monkeypatch.setattr(module._Worker, "_read", lambda self, size, deadline: module._wait(
        self._output, 0, deadline))  # fmt: skip
    with pytest.raises(InvalidRequestError, match=r"more than 0\.2 s"):
        template.render(USER)
    template.close()


def test_no_process_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.sys, "executable", "/nowhere/python")
    with pytest.raises(PaceError, match="could be started: No such file"):
        ChatTemplate({"default": "x"}).render(USER)
