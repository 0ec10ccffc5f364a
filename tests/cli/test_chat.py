"""The conversation loop, with a scripted model and a scripted person."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pace_nb.cli import chat
from pace_nb.cli.main import main
from pace_nb.cli.text_output import TextOutput
from pace_nb.errors import InvalidRequestError
from pace_nb.models.hub import DEMO_MODEL


class Person:
    """Types the given lines; an exception among them is raised in their place."""

    def __init__(self, *lines):
        self.lines = list(lines)
        self.prompts = []

    def __call__(self, prompt):
        self.prompts.append(prompt)
        if not self.lines:
            raise EOFError
        line = self.lines.pop(0)
        if isinstance(line, type) and issubclass(line, BaseException):
            raise line
        return line


class Model:
    """Answers with the number of messages it sees, and remembers them."""

    def __init__(self):
        self.seen = []

    def __call__(self, messages):
        self.seen.append([dict(message) for message in messages])
        yield from ("answer ", str(len(messages)))


def converse(*lines, model=None, interactive=True, system_prompt=None):
    model = model or Model()
    stream = io.StringIO()
    code = chat.converse(
        model,
        Person(*lines),
        TextOutput(stream),
        interactive=interactive,
        system_prompt=system_prompt,
    )
    return code, stream.getvalue(), model


def roles(messages):
    return [(message["role"], message["content"]) for message in messages]


def test_the_conversation_grows():
    code, text, model = converse("one", "two")
    assert code == 0
    assert text == "answer 1\nanswer 3\n"
    assert roles(model.seen[1]) == [("user", "one"), ("assistant", "answer 1"), ("user", "two")]


def test_the_system_prompt_comes_first_and_outlives_a_reset():
    _, _, model = converse("one", "/reset", "two", system_prompt="be brief")
    assert roles(model.seen[1]) == [("system", "be brief"), ("user", "two")]


def test_exit_ends_and_what_follows_is_not_read():
    code, text, model = converse("/exit", "one")
    assert (code, text, model.seen) == (0, "", [])


def test_commands_and_blank_lines_do_not_reach_the_model(capsys):
    _, _, model = converse("/help", "", "   ", "/nonsense")
    assert model.seen == []
    shown = capsys.readouterr().err
    assert "/reset" in shown and "/exit" in shown
    assert "/nonsense is no command" in shown


def test_a_message_may_begin_with_a_slash():
    _, _, model = converse("/etc/passwd is what?")
    assert roles(model.seen[0]) == [("user", "/etc/passwd is what?")]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['"""one', "", 'two"""'], "one\n\ntwo"),
        (['"""', "one", "two", '"""'], "one\ntwo"),
        (['"""one"""'], "one"),
        (['"""', " /reset", '"""  '], " /reset"),
        (['"""one', "two"], "one\ntwo"),  # the input ends inside
    ],
)
def test_a_message_of_several_lines(lines, message):
    assert chat.read_message(Person(*lines)) == message


def test_the_prompt_shows_that_a_message_goes_on():
    person = Person('"""a', 'b"""')
    chat.read_message(person)
    assert person.prompts == [">>> ", "... "]


def test_ctrl_c_at_the_prompt_does_not_end_the_program(capsys):
    _, text, _ = converse(KeyboardInterrupt, "one")
    assert text == "answer 1\n"
    assert "Ctrl-D" in capsys.readouterr().err


def test_ctrl_c_in_a_script_does():
    with pytest.raises(KeyboardInterrupt):
        converse(KeyboardInterrupt, "one", interactive=False)


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said():
    closed = []

    class Interrupted(Model):
        def __call__(self, messages):
            self.seen.append(list(messages))
            try:
                yield "first "
                if len(self.seen) == 1:
                    os.kill(os.getpid(), signal.SIGINT)
                yield "second "
                yield "third"
            finally:
                closed.append(True)

    before = signal.getsignal(signal.SIGINT)
    _, text, model = converse("one", "two", model=Interrupted())
    assert text == "first second \nfirst second third\n"
    assert model.seen[1][1] == {"role": "assistant", "content": "first second "}
    assert len(closed) == 2, "the generator must end, so that the request is given up"
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_ends_a_script_between_two_pieces():
    reached = []

    def pieces(messages):
        os.kill(os.getpid(), signal.SIGINT)
        reached.append("one")
        yield "one"
        reached.append("two")
        yield "two"

    with pytest.raises(KeyboardInterrupt):
        converse("one", model=pieces, interactive=False)
    assert reached == ["one"]


def test_a_second_ctrl_c_is_for_good():
    def stubborn(messages):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        yield "never"

    with pytest.raises(KeyboardInterrupt):
        converse("one", model=stubborn)


def test_an_error_is_told_and_the_message_forgotten(capsys):
    class Full(Model):
        def __call__(self, messages):
            if "long" in messages[-1]["content"]:
                raise InvalidRequestError("the prompt is too long")
            yield from super().__call__(messages)

    _, text, model = converse("long", "short", model=Full())
    assert text == "answer 1\n"
    assert "the prompt is too long" in capsys.readouterr().err
    assert roles(model.seen[0]) == [("user", "short")]


def test_a_script_goes_on_after_an_error_and_fails_where_all_did(capsys):
    class Full(Model):
        def __call__(self, messages):
            if len(messages) > 1:
                raise InvalidRequestError("the prompt is too long")
            yield from super().__call__(messages)

    code, text, _ = converse("one", "two", "/reset", "three", model=Full(), interactive=False)
    assert (code, text) == (0, "answer 1\nanswer 1\n")
    error = capsys.readouterr().err
    assert "too long" in error and "/reset" in error and error.count("\n") == 1

    def broken(messages):
        raise InvalidRequestError("no")
        yield

    assert converse("one", "two", model=broken, interactive=False)[0] == 2
    assert converse("one", "two", model=broken, interactive=True)[0] == 0
    assert converse(interactive=False)[0] == 0


# ---- with the bundled model ----


def test_a_script_is_answered_line_by_line():
    """Nothing but answers on standard output; after /reset the same question has one answer."""
    result = subprocess.run(
        [sys.executable, *"-m pace_nb chat --kernels reference --temp 0 -n 24".split()],
        input="What color is the sky?\n/reset\nWhat color is the sky?\n",
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    first, second = result.stdout.splitlines()
    assert first == second != ""
    assert result.stderr == ""


def test_bytes_that_are_not_utf8_are_refused_by_line(capsys, monkeypatch):
    arguments = "chat --kernels reference --temp 0 -n 2".split()
    for data, code in ((b"caf\xe9\n", 2), (b"caf\xe9\nHello!\n", 0)):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))
        assert main(arguments) == code
        error = capsys.readouterr().err
        assert error == "pace-nb: error: the message: not UTF-8 at byte 3\n"
    assert main([*arguments, "--system-prompt", "a\udce9"]) == 2
    error = capsys.readouterr().err
    assert error == "pace-nb: error: --system-prompt: not UTF-8 at byte 1\n"


def test_a_closed_standard_input_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    for verb in ("chat", "generate"):
        assert main([verb, "--kernels", "reference"]) == 2
        error = capsys.readouterr().err
        assert "standard input" in error and "closed" in error and error.count("\n") == 1


def test_stats_follow_each_answer(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello!\n"))
    arguments = "chat --kernels reference --temp 0 -n 4 --stats".split()
    assert main(arguments) == 0
    captured = capsys.readouterr()
    assert captured.out.count("\n") == 1
    names = [line.split()[0] for line in captured.err.splitlines()]
    assert names == ["kernels", "seed", "prompt", "first", "decode", "roofline"]


def test_a_model_without_a_chat_template_is_refused(capsys, monkeypatch, tmp_path):
    for file in filter(Path.is_file, DEMO_MODEL.iterdir()):
        shutil.copy(file, tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello!\n"))
    assert main(["chat", "--kernels", "reference", "-m", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "chat template" in error and error.count("\n") == 1
