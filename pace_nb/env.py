"""Every environment variable that the package reads, once, with its type.

    | variable            | type            | default                        | also read by   |
    |---------------------|-----------------|--------------------------------|----------------|
    | PACE_NB_CACHE_DIR   | path            | $XDG_CACHE_HOME or ~/.cache,   | kernels/jit.py |
    |                     |                 | and pace_nb in it              |                |
    | PACE_NB_NUM_THREADS | integer from 1  | affinity and cgroup            | kernels/jit.py |
    | PACE_NB_DEBUG       | 0/1, false/true | 0                              |                |
    | PACE_NB_API_KEY     | text            | none                           |                |
    | OPENAI_API_KEY      | text            | none                           |                |

`kernels/` imports nothing of the package, so it reads its two variables itself (and numba reads
`NUMBA_*`). `HF_HOME`, `HF_HUB_OFFLINE` and `HF_TOKEN` belong to huggingface_hub, which reads them;
glibc's MALLOC_TRIM_THRESHOLD_ and MALLOC_MMAP_THRESHOLD_ are looked for only.
A variable is read when its function is called, never at import; an empty one counts as unset.
"""

from __future__ import annotations

import os
from pathlib import Path

from pace_nb.errors import ConfigError

_TRUE = {"1", "true", "yes", "on"}
_FALSE = {"", "0", "false", "no", "off"}


def cache_dir() -> Path:
    """PACE_NB_CACHE_DIR: where compiled kernels are kept. Nothing is created here."""
    value = os.environ.get("PACE_NB_CACHE_DIR")
    if value:
        return Path(value)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pace_nb"


def with_cache_dir(folder: Path) -> dict[str, str]:
    """The environment for a process that is to keep its compiled kernels in `folder`."""
    return {**os.environ, "PACE_NB_CACHE_DIR": str(folder)}


def num_threads() -> int | None:
    """PACE_NB_NUM_THREADS: threads of the kernels; None where it is not set.

    ConfigError unless it is an integer from 1.
    """
    value = os.environ.get("PACE_NB_NUM_THREADS", "").strip()
    if not value:
        return None
    if not (value.isascii() and value.isdigit() and len(value) <= 9 and int(value) >= 1):
        raise ConfigError(f"PACE_NB_NUM_THREADS={value!r}: expected an integer from 1")
    return int(value)


def debug() -> bool:
    """PACE_NB_DEBUG: tracebacks instead of one-line errors. ConfigError unless it is a switch."""
    value = os.environ.get("PACE_NB_DEBUG", "").strip().lower()
    if value in _TRUE | _FALSE:
        return value in _TRUE
    raise ConfigError(f"PACE_NB_DEBUG={value!r}: expected 0 or 1")


def malloc_is_tuned() -> bool:
    """Has the user set one of glibc's thresholds, which are then to stay?"""
    return bool({"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"} & os.environ.keys())


def api_key() -> str | None:
    """PACE_NB_API_KEY: what clients of the server must send; None where it is not set."""
    return os.environ.get("PACE_NB_API_KEY") or None


def openai_api_key() -> str | None:
    """OPENAI_API_KEY: what we send as a client of a server; None where it is not set."""
    return os.environ.get("OPENAI_API_KEY") or None
