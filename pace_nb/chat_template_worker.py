"""Renders chat templates in a process of its own, with hard limits on time, memory and files.

A chat template is a program that came with a model. Jinja's sandbox keeps it from Python's
internals, but not from counting to 10**12 or from doubling a string forty times, and no list of
forbidden operations is ever complete. So the template runs here, in a child process that the kernel
stops: a second of processor time, 64 MiB of memory, no files, no sockets, no children. Within those
walls the environment is exactly that of Hugging Face transformers, so a prompt comes out the same.

`pace_nb.chat_template` starts this file as a script and talks to it over its standard input and
output: an 8-byte length, then JSON, both ways. It imports nothing of pace_nb.

Source: transformers `utils/chat_template_utils.py` (`_compile_jinja_template`).
"""

from __future__ import annotations

import contextlib
import json
import resource
import signal
import sys
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, Final, NoReturn

import jinja2
import jinja2.ext
from jinja2.exceptions import SecurityError, TemplateError, TemplateSyntaxError
from jinja2.nodes import CallBlock, Node
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment

MEMORY: Final = 64 * 2**20  # bytes on top of the idle process ...
MEMORY_PER_BYTE: Final = 16  # ... and for each byte of the request, which holds the conversation
MAX_RENDERED: Final = 32 * 2**20  # characters
MAX_ERROR: Final = 300  # characters of a template's own error message

# Rendered before files are closed off: what Python and Jinja import on first use is then there.
WARM_UP: Final = """{{ 'a\\n' ~ strftime_now('%c') ~ [1]|pprint ~ lipsum(1) ~ [1]|random }}
{{ 'a b'|urlencode ~ 'a b'|urlize ~ 'a b'|wordwrap(1) ~ 'a'|title ~ '<a>'|striptags|e }}
{{ 1.5|round(0, 'ceil') ~ {'a': 1}|tojson|indent ~ {'a': 1}|xmlattr }}{{ undefined.name }}"""


class GenerationTag(jinja2.ext.Extension):
    """`{% generation %} ... {% endgeneration %}` marks the model's part for training."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: Parser) -> Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Macro) -> str:
        return caller()


def raise_exception(message: str) -> NoReturn:
    """How a template refuses a conversation."""
    raise TemplateError(message)


def tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON for a prompt. Jinja's own filter writes for HTML and escapes `<`, `>`, `&` and `'`."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


@lru_cache(maxsize=16)
def compile_template(source: str) -> jinja2.Template:
    """A template in the environment of Hugging Face transformers."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[GenerationTag, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    return environment.from_string(source)


def render(source: str, variables: dict[str, Any], now: datetime) -> dict[str, str]:
    """`{"text": ...}`, or `{"error": ...}` with one line that says what went wrong.

    `now` is the caller's local time, for templates that tell the model the date.

    Raises:
        MemoryError: the template needed more than the process may have.
    """
    try:
        text = compile_template(source).render(variables, strftime_now=now.strftime)
        if len(text) > MAX_RENDERED:
            return {"error": f"it made more than {MAX_RENDERED} characters"}
        return {"text": text}
    except MemoryError:
        raise
    except RecursionError:
        return {"error": "it nests too deep"}
    except TemplateSyntaxError as error:
        return {"error": _line(f"line {error.lineno}: {error.message}")}
    except SecurityError as error:
        return {"error": _line(f"it tried what a template may not do: {error}")}
    except TemplateError as error:  # raise_exception and undefined names
        return {"error": _line(str(error))}
    except Exception as error:
        return {"error": _line(f"{type(error).__name__}: {error}")}


def _line(message: str) -> str:
    return " ".join(message[: 4 * MAX_ERROR].split())[:MAX_ERROR]


def serve(requests: BinaryIO, replies: BinaryIO, idle_bytes: int) -> None:
    """Answer requests until the input ends, or until one needed more memory than it may have."""
    while len(header := requests.read(8)) == 8:
        size = int.from_bytes(header, "big")
        body = requests.read(size)
        if len(body) < size:
            return
        _limit(resource.RLIMIT_AS, idle_bytes + MEMORY + MEMORY_PER_BYTE * size)
        try:
            reply = _answer(body)
        except MemoryError:
            reply = {"stopped": f"it needed more than {MEMORY // 2**20} MiB of memory"}
        _limit(resource.RLIMIT_AS, resource.RLIM_INFINITY)
        data = json.dumps(reply).encode()
        replies.write(len(data).to_bytes(8, "big") + data)
        replies.flush()
        if "stopped" in reply:  # what it left behind would count against the next request
            return


def _answer(body: bytes) -> dict[str, str]:
    request = json.loads(body)  # template, variables, now (six numbers), seconds
    # SIGPROF is not handled, so it ends the process, also inside a C function that never returns.
    signal.setitimer(signal.ITIMER_PROF, request["seconds"])
    try:
        return render(request["template"], request["variables"], datetime(*request["now"]))
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _limit(kind: int, value: int) -> None:
    """Lower (or restore) a limit as far as the system lets us; macOS has no RLIMIT_AS."""
    hard = resource.getrlimit(kind)[1]
    if hard != resource.RLIM_INFINITY and (value > hard or value == resource.RLIM_INFINITY):
        value = hard
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(kind, (value, hard))


def main() -> None:
    """Close every door, then serve."""
    render(WARM_UP, {}, datetime(2000, 1, 1))
    statm = Path("/proc/self/statm")
    pages = int(statm.read_text().split()[0]) if statm.exists() else 0
    for kind in (
        resource.RLIMIT_CORE,
        resource.RLIMIT_FSIZE,
        resource.RLIMIT_NOFILE,
        resource.RLIMIT_NPROC,
    ):
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(kind, (0, 0))
    serve(sys.stdin.buffer, sys.stdout.buffer, pages * resource.getpagesize())


if __name__ == "__main__":
    main()
