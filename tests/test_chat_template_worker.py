"""Rendering as Hugging Face does it, and a sandbox that lets nothing out (S3). In this process."""

from __future__ import annotations

import io
import json
import re
from datetime import datetime
from typing import Any

import pytest

from pace_nb import chat_template_worker as worker

NOW = datetime(2026, 11, 23, 12, 30, 5)
MESSAGES = [
    {"role": "user", "content": "Hi <b> & 'you'"},
    {"role": "assistant", "content": " Hello "},
]


def render(source: str, **variables: Any) -> str:
    reply = worker.render(source, {"messages": MESSAGES, **variables}, NOW)
    assert "text" in reply, reply
    return reply["text"]


def failure(source: str, **variables: Any) -> str:
    return worker.render(source, {"messages": MESSAGES, **variables}, NOW)["error"]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        # lstrip_blocks and trim_blocks: a line that is only a block leaves nothing behind
        ("a\n  {% if true %}\nb\n  {% endif %}\nc", "a\nb\nc"),
        ("{% for m in messages %}\n{{ m.role }}\n{% endfor %}", "user\nassistant\n"),
        # no HTML escaping, neither of output nor in tojson
        ("{{ messages[0].content }}", "Hi <b> & 'you'"),
        ("{{ messages[0] | tojson }}", '{"role": "user", "content": "Hi <b> & \'you\'"}'),
        ("{{ {'a': 'é☕'} | tojson }}", '{"a": "é☕"}'),
        ("{{ {'a': 'é'} | tojson(ensure_ascii=True) }}", '{"a": "\\u00e9"}'),
        ("{{ {'b': 1, 'a': [1]} | tojson(indent=1) }}", '{\n "b": 1,\n "a": [\n  1\n ]\n}'),
        ("{{ {'b': 1, 'a': 2} | tojson(separators=(',', ':'), sort_keys=true) }}", '{"a":2,"b":1}'),
        # loop controls
        ("{% for i in range(9) %}{% if i == 1 %}{% continue %}{% endif %}"
         "{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}", "02"),
        # the tag that marks what the model says
        ("{% generation %}{{ messages[1].content }}{% endgeneration %}", " Hello "),
        ("{{ strftime_now('%d %b %Y') }}", "23 Nov 2026"),
        ("{{ messages[1]['content'] | trim }}", "Hello"),
        ("{{ messages[-1].role }}{{ messages[:1] | length }}", "assistant1"),
        ("{{ nothing }}|{{ nothing is defined }}", "|False"),
        ("{{ bos_token }}{{ loop is defined }}", "<s>False"),
        ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
         "{% endfor %}{{ ns.n }}", "2"),
        ("{{ 'a' ~ 1 ~ none }}", "a1None"),
        ("{%- macro f(x) %}[{{ x }}]{% endmacro -%}\n {{ f(1) }}", "[1]"),
    ],
)  # fmt: skip
def test_it_renders_as_hugging_face_does(source: str, expected: str) -> None:
    assert render(source, bos_token="<s>") == expected  # noqa: S106


def test_a_template_refuses_in_its_own_words() -> None:
    source = "{{ raise_exception('roles must\n alternate') }}"
    assert failure(source) == "roles must alternate"
    assert len(failure("{{ raise_exception('x' * 100000) }}")) == worker.MAX_ERROR


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{% if %}", "line 1: "),
        ("a\n{{ messages[ }}", "line 2: "),
        ("{{ x.y.z }}", "'x' is undefined"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ messages | nofilter }}", "No filter named 'nofilter'"),
        ("{% include 'x' %}", "no loader"),
        ("{{ messages[0].content | int + 'a' }}", "TypeError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "too deep"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "too deep"),
    ],
)
def test_a_broken_template_says_where(source: str, expected: str) -> None:
    message = failure(source)
    assert expected in message
    assert len(message.splitlines()) == 1


ESCAPES = [
    "{{ ''.__class__ }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''['__class__']['__base__']['__subclasses__']() }}",
    "{{ messages.__init__.__globals__ }}",
    "{{ '' | attr('__class__') | attr('__base__') }}",
    "{{ ''|attr('__cla' ~ 'ss__') }}",
    "{{ ['']|map(attribute='__class__')|list|first.__base__ }}",
    "{{ ['']|map('attr', '__class__')|list }}",
    "{{ '{0.__class__.__base__}'.format('') }}",
    "{{ '{0.__class__}'.format_map({'0': ''}) }}",
    "{{ ('{0.__class__}'|string).format('') }}",
    "{{ '%s' | format(''.__class__) }}",
    "{{ ['{0.__class__}']|map('format', '')|list }}{{ ''.format.__self__.__class__ }}",
    "{% set f = '{0.__class__}'.format %}{{ f('') }}",
    "{{ ['{0.__class__}'.format]|map('call', '')|list }}",
    "{{ cycler.__init__.__globals__.os }}",
    "{{ joiner.__init__.__globals__ }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ lipsum.__globals__['os'].popen('id').read() }}",
    "{{ lipsum | attr('__globals__') }}",
    "{{ range.__class__ }}",
    "{{ self.__init__.__globals__ }}",
    "{{ self._TemplateReference__context }}",
    "{{ raise_exception.__globals__ }}",
    "{{ raise_exception.__code__.co_consts }}",
    "{{ strftime_now.__self__ }}",
    "{{ dict.mro() }}",
    "{{ (messages|groupby('role'))[0].__class__ }}",
    "{{ messages.append(1) }}",
    "{{ messages.clear() }}",
    "{{ messages[0].update({'role': 'system'}) }}",
    "{{ messages[0].pop('role') }}",
    "{{ messages[0].setdefault('x', 1) }}",
    "{% set _ = messages.insert(0, 1) %}",
    "{% for m in messages %}{{ m.update(role='x') }}{% endfor %}",
    "{{ (1).__class__ }}",
    "{% macro m() %}{% endmacro %}{{ m.__globals__ }}",
    "{% macro m() %}{% endmacro %}{{ m._func.__globals__ }}",
    "{% set x = [''.__class__] %}{{ x }}",
    "{{ (x for x in messages) }}",
    "{% import 'os' as os %}{{ os.system('id') }}",
    "{{ import('os') }}",
    "{{ open('/etc/passwd').read() }}",
    "{{ config.items() }}",
    "{{ get_flashed_messages.__globals__ }}",
]
HARMLESS = re.compile(r"Undefined|[^A-Za-z]")


@pytest.mark.parametrize("source", ESCAPES)
def test_nothing_of_python_gets_out(source: str) -> None:
    """S3: an error, or a text that says nothing; and the messages as they were."""
    messages = json.loads(json.dumps(MESSAGES))
    reply = worker.render(source, {"messages": messages}, NOW)
    assert not HARMLESS.sub("", reply.get("text", "")), reply
    assert messages == MESSAGES


def test_unsafe_attributes_are_named_as_such() -> None:
    assert "a template may not do" in failure("{{ ''.__class__.__mro__ }}")
    assert "a template may not do" in failure("{{ messages.append(1) }}")


def test_output_is_capped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "MAX_RENDERED", 100)
    assert failure("{{ 'a' * 101 }}") == "it made more than 100 characters"
    assert render("{{ 'a' * 100 }}") == "a" * 100


def test_memory_is_for_the_caller_to_handle(monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(source: str) -> None:
        raise MemoryError

    monkeypatch.setattr(worker, "compile_template", exhausted)
    with pytest.raises(MemoryError):
        worker.render("", {}, NOW)


def test_serving_answers_in_frames_until_the_input_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "_limit", lambda kind, value: None)
    request = {"template": "{{ x }}", "variables": {"x": "é"}, "now": NOW.timetuple()[:6]}
    body = json.dumps(request | {"seconds": 30}).encode()
    frame = len(body).to_bytes(8, "big") + body
    replies = io.BytesIO()
    worker.serve(io.BytesIO(frame + frame + frame[:20]), replies, 0)
    answer = json.dumps({"text": "é"}).encode()
    assert replies.getvalue() == 2 * (len(answer).to_bytes(8, "big") + answer)


def test_serving_ends_when_memory_does(monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(body: bytes) -> dict[str, str]:
        raise MemoryError

    monkeypatch.setattr(worker, "_limit", lambda kind, value: None)
    monkeypatch.setattr(worker, "_answer", exhausted)
    requests, replies = io.BytesIO((2).to_bytes(8, "big") + b"{}" + b"more"), io.BytesIO()
    worker.serve(requests, replies, 0)
    assert b"stopped" in replies.getvalue()
    assert requests.read() == b"more"  # the next request is for another process
