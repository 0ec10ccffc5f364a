"""LLM inference on CPUs from NumPy and Numba.

The public names are `LLM`, `AsyncLLM`, `SamplingParams`, `RequestOutputKind`, `EngineConfig` and
`__version__`. Each is imported on first use: `import pace_nb` alone loads neither NumPy nor Numba,
so `pace-nb --help` and a script that only asks for the version stay quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pace_nb.async_llm import AsyncLLM
    from pace_nb.config import EngineConfig
    from pace_nb.llm import LLM
    from pace_nb.sampling_params import RequestOutputKind, SamplingParams

__version__ = "0.1.0.dev0"

__all__ = [
    "LLM",
    "AsyncLLM",
    "SamplingParams",
    "RequestOutputKind",
    "EngineConfig",
    "__version__",
]

_HOME = {
    "LLM": "pace_nb.llm",
    "AsyncLLM": "pace_nb.async_llm",
    "SamplingParams": "pace_nb.sampling_params",
    "RequestOutputKind": "pace_nb.sampling_params",
    "EngineConfig": "pace_nb.config",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'pace_nb' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
