"""The public names, and how they come about."""

from __future__ import annotations

import subprocess
import sys

import pytest

import pace_nb


def test_every_public_name_exists():
    from pace_nb.async_llm import AsyncLLM
    from pace_nb.config import EngineConfig
    from pace_nb.llm import LLM
    from pace_nb.sampling_params import RequestOutputKind, SamplingParams

    public = [LLM, AsyncLLM, SamplingParams, RequestOutputKind, EngineConfig]
    for value in public:
        assert getattr(pace_nb, value.__name__) is value
    assert set(pace_nb.__all__) == {value.__name__ for value in public} | {"__version__"}
    assert set(pace_nb.__all__) <= set(dir(pace_nb))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Llm'"):
        pace_nb.Llm  # noqa: B018
    with pytest.raises(ImportError, match="Llm"):
        from pace_nb import Llm  # noqa: F401


def test_python_m_pace_nb_is_the_command():
    result = subprocess.run(
        [sys.executable, "-m", "pace_nb", "--version"], capture_output=True, text=True, check=True
    )
    assert result.stdout == f"pace-nb {pace_nb.__version__}\n"
