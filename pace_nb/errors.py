"""Every exception that pace_nb raises on purpose.

Knows nothing else of the package; everything but `kernels/` may import it (kernels raise plain
ValueError and TypeError). Each message is one line that names the thing (file, tensor, field,
argument), what was found and what was expected. The command line prints it and exits with code 2,
without a traceback; a traceback therefore always means a defect of ours.
"""

from __future__ import annotations


class PaceError(Exception):
    """Base of all. `str(error)` is one line, whatever text a file or a library put into it."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class ModelFormatError(PaceError):
    """A file of a model (weights, config.json, tokenizer.json) is missing, damaged or lies."""


class ModelNotFoundError(PaceError):
    """A model's name leads nowhere: no such directory, not on the hub, or not to be had from it."""


class UnsupportedModelError(PaceError):
    """A sound model that this engine does not run: architecture, rope type, activation, dtype."""


class InvalidRequestError(PaceError, ValueError):
    """A request cannot be served: sampling values, token ids, a prompt longer than the context."""


class ApiError(InvalidRequestError):
    """A request over an OpenAI-shaped API that is answered with an error object.

    param: the field at fault, None where it is no single one. status: the HTTP status to answer
    with; it also says which of OpenAI's types of error this is.
    """

    def __init__(self, message: str, *, param: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.param = param
        self.status = status


class ShapeError(PaceError, ValueError):
    """Arrays of the wrong shape or dtype; the message holds both shapes."""


class OutOfMemoryError(PaceError):
    """A pool (KV cache, batch) has no room for what was asked."""


class WrongThreadError(PaceError, RuntimeError):
    """An engine was called from a thread that is not its own; see EngineThread."""


class EngineBusyError(PaceError):
    """An engine has as many requests as it takes. Nothing is wrong; try again later."""


class EngineClosedError(PaceError):
    """An engine takes no requests any more: it was closed, or it failed."""


class ConfigError(PaceError, ValueError):
    """An engine setting, a command-line option or an environment variable is wrong."""


def one_line(text: str) -> str:
    """`text` on one line: runs of white space become a space, other control characters `\\xNN`."""
    return "".join(
        character if character.isprintable() else ascii(character)[1:-1]
        for character in " ".join(text.split())
    )
