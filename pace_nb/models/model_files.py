"""Opening one file of a model directory, and reading JSON from it, without trusting either.

Knows where a file may lie, what kind of file it may be, and how large and deep its JSON may be.
Does not know what any file means. A model directory is written by strangers: a name may be a link
to /etc, a FIFO that never answers, or JSON that two parsers read differently.

- A file is regular, and after all links it lies in the directory itself or, for a snapshot of the
  Hugging Face cache, among that cache's blobs.
- JSON is strict: UTF-8, no key twice, no NaN or Infinity (nor 1e999), bounded size and depth.
"""

from __future__ import annotations

import json
import math
import os
import reprlib
import stat
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn

from pace_nb.errors import ModelFormatError

MAX_JSON_BYTES = 10_000_000  # a config.json with 20000 labels is 1 MB
MAX_JSON_DEPTH = 64  # Python's parser gives up near 1000; real files need 5

_SHORT = reprlib.Repr()  # never spells out a value of 100 MB to cut it afterwards
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80


def open_file(directory: Path, name: str) -> int:
    """Descriptor (read only, to be closed by the caller) of the regular file `directory/name`.

    `name` is a plain name: the caller has made sure that it holds no separator. ModelFormatError
    when the file is missing, unreadable, not regular, or a link to somewhere else.
    """
    path = directory / name
    try:
        real_path = path.resolve(strict=True)
        if not any(real_path.is_relative_to(root) for root in _roots(directory.resolve())):
            raise ModelFormatError(f"{path}: a link to {real_path}, outside the model's directory")
        # Looked at before it is opened (opening a device may act on it) and after (it may have
        # been exchanged); O_NONBLOCK, or a FIFO would keep us waiting for a writer.
        _require_regular(path, os.stat(real_path))
        descriptor = os.open(real_path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise ModelFormatError(f"{path}: no such file") from None
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle, before Python 3.13
        reason = getattr(error, "strerror", None) or str(error)
        raise ModelFormatError(f"{path}: cannot be opened: {reason}") from error
    try:
        _require_regular(path, os.fstat(descriptor))
    except ModelFormatError:
        os.close(descriptor)
        raise
    return descriptor


def read_json(directory: Path, name: str, *, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The JSON object in `directory/name`; ModelFormatError in every other case."""
    path = directory / name
    with os.fdopen(open_file(directory, name), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > max_bytes:
            raise ModelFormatError(f"{path}: {size} bytes, expected at most {max_bytes}")
        return parse_json(file.read(max_bytes), str(path))


def parse_json(data: bytes, where: str) -> dict[str, Any]:
    """The JSON object that `data` spells; ModelFormatError beginning with `where` otherwise."""
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_object,
            parse_constant=_refuse_constant,
            parse_float=_finite_float,
        )
    except RecursionError:
        raise ModelFormatError(f"{where}: JSON nested too deep") from None
    except UnicodeDecodeError as error:
        raise ModelFormatError(f"{where}: not UTF-8 at byte {error.start}") from None
    except ValueError as error:  # JSONDecodeError, our own refusals, integers of 5000 digits
        raise ModelFormatError(f"{where}: not valid JSON: {error}") from None
    if type(value) is not dict:
        raise ModelFormatError(f"{where}: holds a JSON {_kind(value)}, expected an object")
    if _deeper_than(value, MAX_JSON_DEPTH):
        raise ModelFormatError(f"{where}: JSON nested deeper than {MAX_JSON_DEPTH} levels")
    return value


def shown(value: object) -> str:
    """`value` for an error message: its `repr`, at most 80 characters of it."""
    text = _SHORT.repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _roots(directory: Path) -> list[Path]:
    """Directories in which a file of the model may lie."""
    # <cache>/models--owner--name/snapshots/<commit>/<file> is a link to
    # <cache>/models--owner--name/blobs/<hash>, and that may be one to <cache>/blobs/<2 digits>/.
    model = directory.parent.parent
    if directory.parent.name == "snapshots" and model.name.startswith("models--"):
        return [directory, model / "blobs", model.parent / "blobs"]
    return [directory]


def _require_regular(path: Path, status: os.stat_result) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise ModelFormatError(f"{path}: is a directory, expected a file")
    if not stat.S_ISREG(status.st_mode):
        raise ModelFormatError(f"{path}: a FIFO, socket or device, expected a regular file")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        ((twice, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"key {shown(twice)} appears twice")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{shown(text)} is out of range")
    return value


def _kind(value: object) -> str:
    kinds = {list: "array", str: "string", bool: "boolean", type(None): "null"}
    return kinds.get(type(value), "number")


def _deeper_than(value: object, limit: int) -> bool:
    """True where arrays and objects are nested in more than `limit` levels (without recursion)."""
    level: list[object] = [value]
    for _ in range(limit):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return False
    return any(isinstance(outer, dict | list) for outer in level)
