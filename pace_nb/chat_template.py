"""A conversation as the text a model was trained on: find the template, check the messages, render.

Knows where Hugging Face repositories keep templates, what a message looks like and what may be
passed to a template. Rendering itself happens in a child process with hard limits, because a
template is a program from outside: see `pace_nb/chat_template_worker.py`. The process starts with
the first conversation (0.1 s), then waits for the next (0.2 ms each), and ends with `close()` or
with the object.

Source: transformers `PreTrainedTokenizerBase.apply_chat_template`; OpenAI's message format;
limits: see SECURITY.md.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from pace_nb.errors import InvalidRequestError, ModelFormatError, PaceError

PROCESSOR_SECONDS: Final = 1.0  # of the template; ordinary ones take a millisecond
WALL_SECONDS: Final = 60.0  # only for a process that is stopped, or a machine that is overrun
MAX_TEMPLATE: Final = 2**20  # characters
MAX_MESSAGES: Final = 4096
MAX_OPTIONS: Final = 16 * 2**10  # bytes of JSON of the extra template variables together
MAX_OPTION_NODES: Final = 128
MAX_OPTION_DEPTH: Final = 16

# What the caller may not set by the back door of extra variables: names with a meaning of their
# own here or in transformers (CVE-2025-62426).
RESERVED: Final = frozenset(
    {
        "add_generation_prompt",
        "chat_template",
        "continue_final_message",
        "conversation",
        "documents",
        "max_length",
        "messages",
        "padding",
        "return_dict",
        "return_tensors",
        "self",
        "special_tokens_in_content",
        "tokenize",
        "tools",
        "truncation",
    }
)


class ChatTemplate:
    """The templates of one model and the process that renders them.

    Args:
        templates: Name -> Jinja source. `default` is used, or `tool_use` where tools are given.
            Empty where the model has none.
        special_tokens: What templates may name: `bos_token`, `eos_token` and so on, as text.
        processor_seconds: Most processor time for one conversation.
    """

    def __init__(
        self,
        templates: Mapping[str, str],
        special_tokens: Mapping[str, str] | None = None,
        processor_seconds: float = PROCESSOR_SECONDS,
    ) -> None:
        self.templates = dict(templates)
        self._special_tokens = dict(special_tokens or {})
        self._seconds = processor_seconds
        self._worker: _Worker | None = None
        self._lock = threading.Lock()

    @classmethod
    def from_directory(
        cls,
        directory: Path,
        tokenizer_config: Mapping[str, Any],
        special_tokens: Mapping[str, str],
    ) -> ChatTemplate:
        """The templates of a model directory; a model without any gets an empty ChatTemplate.

        `chat_template.jinja` goes before `tokenizer_config.json`, that before `chat_template.json`.

        Raises:
            ModelFormatError: a template is no text, or too long.
        """
        file = directory / "chat_template.jinja"
        if file.exists():
            found, where = _read_text(file), file.name
        elif tokenizer_config.get("chat_template") is not None:
            found, where = tokenizer_config["chat_template"], "tokenizer_config.json: chat_template"
        elif (file := directory / "chat_template.json").exists():
            where = file.name
            try:
                found = json.loads(_read_text(file))["chat_template"]
            except (ValueError, RecursionError, KeyError, TypeError):
                raise ModelFormatError(f"{file}: expected an object with chat_template") from None
        else:
            return cls({}, special_tokens)
        named = _named_templates(found)
        if named is None:
            raise ModelFormatError(
                f"{directory / where}: expected a template, or a list of name and template"
            )
        for name, source in named.items():
            if len(source) > MAX_TEMPLATE:
                raise ModelFormatError(
                    f"{directory / where}: template {name[:40]!r} has {len(source)} characters, "
                    f"expected at most {MAX_TEMPLATE}"
                )
        return cls(named, special_tokens)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        **variables: Any,
    ) -> str:
        """The text of a conversation. It holds its special tokens: encode it without adding any.

        Args:
            messages: `{"role": str, "content": str | list of text parts, ...}`, oldest first. The
                role "developer", OpenAI's newer word, is "system" to templates without it.
            add_generation_prompt: End with the beginning of an answer.
            continue_final_message: Leave the last message open, so that the model goes on with it.
                Excludes `add_generation_prompt`.
            tools: JSON schemas of functions the model may call.
            documents: For templates that quote sources.
            chat_template: The name of one of the model's templates, or another template's source.
            **variables: Whatever else the template reads, such as `enable_thinking`.

        Raises:
            InvalidRequestError: wrong messages or variables, no template, or the template failed,
                refused the conversation, or took too much time or memory.
        """
        checked = check_messages(messages)
        if continue_final_message and add_generation_prompt:
            raise InvalidRequestError(
                "continue_final_message is true, expected add_generation_prompt to be false then"
            )
        check_variables(variables)
        template = self._choose(chat_template, with_tools=bool(tools))
        if "developer" not in template:
            for message in checked:
                if message["role"] == "developer":
                    message["role"] = "system"
        values: dict[str, Any] = {
            **self._special_tokens,
            **variables,
            "messages": checked,
            "tools": list(tools) if tools else None,
            "documents": list(documents) if documents else None,
            "add_generation_prompt": bool(add_generation_prompt),
        }
        text = self._run(template, values)
        return _open_final_message(text, checked) if continue_final_message else text

    def close(self) -> None:
        """End the rendering process. The next `render` starts another."""
        with self._lock:
            if self._worker is not None:
                self._worker.close()
                self._worker = None

    def _choose(self, wanted: str | None, with_tools: bool) -> str:
        if wanted is not None:
            if not isinstance(wanted, str) or len(wanted) > MAX_TEMPLATE:
                raise InvalidRequestError(
                    f"chat_template is wrong, expected text of at most {MAX_TEMPLATE} characters"
                )
            return self.templates.get(wanted, wanted)
        name = "tool_use" if with_tools and "tool_use" in self.templates else "default"
        if name in self.templates:
            return self.templates[name]
        if not self.templates:
            raise InvalidRequestError(
                "this model has no chat template, expected a plain prompt, or a chat_template"
            )
        names = ", ".join(sorted(self.templates))
        raise InvalidRequestError(f"chat_template is not given, expected one of: {names[:200]}")

    def _run(self, source: str, values: dict[str, Any]) -> str:
        try:
            request = json.dumps(
                {
                    "template": source,
                    "variables": values,
                    "now": datetime.now().timetuple()[:6],
                    "seconds": self._seconds,
                }
            ).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise InvalidRequestError(
                f"messages or template variables are no JSON values: {str(error)[:200]}"
            ) from None
        with self._lock:
            if self._worker is None or not self._worker.usable():
                self._worker = _Worker()
            reply = self._worker.ask(request, self._seconds)
            if "stopped" in reply:
                self._worker.close()
                self._worker = None
                raise InvalidRequestError(f"the chat template was stopped: {reply['stopped']}")
        if "error" in reply:
            raise InvalidRequestError(f"the chat template failed: {reply['error']}")
        return reply["text"]


# ---- what is passed to a template ----


def check_messages(messages: object) -> list[dict[str, Any]]:
    """The messages as templates expect them: a copy, with text parts joined by newlines.

    Raises:
        InvalidRequestError: naming the message by its number.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise InvalidRequestError(
            f"messages is a {type(messages).__name__}, expected a list of role and content"
        )
    if not 1 <= len(messages) <= MAX_MESSAGES:
        raise InvalidRequestError(
            f"messages has {len(messages)} entries, expected 1 to {MAX_MESSAGES}"
        )
    return [_check_message(f"messages[{i}]", message) for i, message in enumerate(messages)]


def _check_message(where: str, message: object) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise InvalidRequestError(
            f"{where} is a {type(message).__name__}, expected an object with role and content"
        )
    role = message.get("role")
    if not isinstance(role, str) or not 1 <= len(role) <= 64:
        raise InvalidRequestError(f"{where}.role is wrong, expected text such as 'user'")
    if not all(isinstance(key, str) for key in message):
        raise InvalidRequestError(f"{where} has a key that is no text")
    checked = dict(message)
    content = message.get("content")
    if isinstance(content, str):
        pass
    elif content is None:  # an assistant's message may be nothing but tool calls
        if role != "assistant":
            raise InvalidRequestError(f"{where}.content is missing, expected text")
    elif isinstance(content, Sequence) and not isinstance(content, (bytes, bytearray)):
        parts = [_text_part(f"{where}.content[{i}]", part) for i, part in enumerate(content)]
        checked["content"] = "\n".join(parts)
    else:
        raise InvalidRequestError(
            f"{where}.content is a {type(content).__name__}, expected text or a list of text parts"
        )
    return checked


def _text_part(where: str, part: object) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and part.get("type") == "text":
        text = part.get("text")
        if isinstance(text, str):
            return text
    raise InvalidRequestError(f'{where} is wrong, expected {{"type": "text", "text": ...}}')


def check_variables(variables: Mapping[str, Any]) -> None:
    """Refuse reserved names and values that are deep, many or large.

    Who takes variables from outside calls it before they stand among the arguments of `render` or
    `Tokenizer.encode_chat`, where a reserved name would be that argument.
    """
    for name in variables:
        if name in RESERVED:
            raise InvalidRequestError(f"{name} may not be a template variable")
    nodes = 0
    level: list[object] = list(variables.values())
    for _depth in range(MAX_OPTION_DEPTH + 1):
        nodes += len(level)
        if not level or nodes > MAX_OPTION_NODES:
            break
        level = [
            item
            for value in level
            if isinstance(value, (Mapping, list, tuple))
            for item in (value.values() if isinstance(value, Mapping) else value)
        ]
    if level:
        raise InvalidRequestError(
            f"template variables are too many, expected at most {MAX_OPTION_NODES} values "
            f"in {MAX_OPTION_DEPTH} levels"
        )
    try:
        size = len(json.dumps(variables))
    except (TypeError, ValueError, RecursionError):
        raise InvalidRequestError("template variables are wrong, expected JSON values") from None
    if size > MAX_OPTIONS:
        raise InvalidRequestError(
            f"template variables take {size} bytes as JSON, expected at most {MAX_OPTIONS}"
        )


def _open_final_message(text: str, messages: Sequence[Mapping[str, Any]]) -> str:
    """Cut `text` after the last message's content, so that its end tokens are gone."""
    content = messages[-1].get("content") or ""
    start = text.rfind(content.strip())
    if not content.strip() or start < 0:
        raise InvalidRequestError(
            "the last message cannot be continued: the chat template does not show its text as is"
        )
    whole = content.lstrip()
    kept = whole if text.startswith(whole, start) else content.strip()
    return text[: start + len(kept)]


# ---- where templates are kept ----


def _read_text(file: Path) -> str:
    if not file.is_file():
        raise ModelFormatError(f"{file}: expected a regular file")
    if file.stat().st_size > 8 * MAX_TEMPLATE:
        raise ModelFormatError(f"{file}: {file.stat().st_size} bytes, expected a chat template")
    try:
        return file.read_text("utf-8")
    except UnicodeDecodeError:
        raise ModelFormatError(f"{file}: expected UTF-8 text") from None


def _named_templates(found: object) -> dict[str, str] | None:
    """One template, a list of `{"name", "template"}` or an object, as name -> source."""
    if isinstance(found, str):
        return {"default": found}
    if isinstance(found, list) and all(isinstance(entry, Mapping) for entry in found):
        found = {entry.get("name"): entry.get("template") for entry in found}
    if not isinstance(found, Mapping):
        return None
    if not all(isinstance(k, str) and isinstance(v, str) for k, v in found.items()):
        return None
    return dict(found)


# ---- the process ----


class _Worker:
    """One rendering process. Not thread-safe; `ChatTemplate` holds a lock around it."""

    def __init__(self) -> None:
        script = Path(__file__).with_name("chat_template_worker.py")
        # Nothing of our own environment: it may hold tokens and keys.
        search_path = os.pathsep.join(os.path.abspath(path) for path in sys.path if path)
        try:
            self._process = subprocess.Popen(  # noqa: S603 (our interpreter, our script)
                [sys.executable, "-P", str(script)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                bufsize=0,
                cwd="/",
                env={"PYTHONPATH": search_path},
                start_new_session=True,  # Ctrl-C is for the caller
            )
        except OSError as error:
            raise PaceError(
                f"no process for the chat template could be started: {error.strerror}"
            ) from None
        if self._process.stdin is None or self._process.stdout is None:
            raise RuntimeError("a process without pipes")
        self._input = self._process.stdin.fileno()
        self._output = self._process.stdout.fileno()
        os.set_blocking(self._input, False)
        os.set_blocking(self._output, False)
        self._owner = os.getpid()
        self._finalizer = weakref.finalize(self, _end, self._process, self._owner)

    def usable(self) -> bool:
        """False after a fork, where parent and child would share one pipe, or when it has ended."""
        return self._owner == os.getpid() and self._process.poll() is None

    def ask(self, request: bytes, processor_seconds: float) -> dict[str, str]:
        """Send a request, wait for the reply: `text`, `error`, or `stopped` (close it then)."""
        deadline = time.monotonic() + WALL_SECONDS
        try:
            self._write(len(request).to_bytes(8, "big") + request, deadline)
            reply = self._read(int.from_bytes(self._read(8, deadline), "big"), deadline)
        except (BrokenPipeError, EOFError):
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=5)
            if self._process.returncode == -signal.SIGPROF:
                why = f"it took more than {processor_seconds:g} s of processor time"
            else:
                why = f"its process ended with code {self._process.returncode}"
            return {"stopped": why}
        except TimeoutError:
            return {"stopped": f"it took more than {WALL_SECONDS:g} s"}
        except BaseException:  # Ctrl-C in the middle: the reply would answer the next request
            self.close()
            raise
        answer: dict[str, str] = json.loads(reply)
        return answer

    def close(self) -> None:
        self._finalizer()

    def _write(self, data: bytes, deadline: float) -> None:
        view = memoryview(data)
        while view:
            _wait(self._input, select.POLLOUT, deadline)
            view = view[os.write(self._input, view) :]

    def _read(self, size: int, deadline: float) -> bytes:
        data = bytearray()
        while len(data) < size:
            _wait(self._output, select.POLLIN, deadline)
            piece = os.read(self._output, min(size - len(data), 2**20))
            if not piece:
                raise EOFError
            data += piece
        return bytes(data)


def _wait(descriptor: int, event: int, deadline: float) -> None:
    """Until the pipe is ready, or broken."""
    poller = select.poll()
    poller.register(descriptor, event)
    if not poller.poll(max(0.0, deadline - time.monotonic()) * 1000):
        raise TimeoutError


def _end(process: subprocess.Popen[bytes], owner: int) -> None:
    """Kill and reap (in the process that started it), close both pipes."""
    if owner == os.getpid():
        process.kill()
        process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
