"""compile_ahead.py: a second process fills the cache, and nothing depends on it."""

from __future__ import annotations

import pytest

from pace_nb import compile_ahead
from pace_nb.compile_ahead import AHEAD, CompileAhead, compile_kernels
from pace_nb.kernels import jit

pytestmark = pytest.mark.skipif(jit.cache_dir() is None, reason="no cache of machine code")


def test_the_kernels_are_in_the_cache_afterwards_and_no_process_is_started_for_them():
    compile_kernels("bfloat16")
    assert all(map(jit.is_cached, AHEAD))
    with CompileAhead("bfloat16") as ahead:
        assert ahead._process is None
        ahead.wait()


def test_its_signatures_are_those_of_the_engine():
    from pace_nb import LLM

    compile_kernels("bfloat16")
    with LLM() as llm:
        llm.generate([[0]], use_tqdm=False)
        names = {path.name for kernel in AHEAD for path in jit.cache_dir().glob(f"*/{kernel}-*")}
        llm.warm_up()
        after = {path.name for kernel in AHEAD for path in jit.cache_dir().glob(f"*/{kernel}-*")}
    assert after == names, "the engine compiled another signature"


def test_the_second_process_ends_well_or_with_the_block(monkeypatch: pytest.MonkeyPatch):
    compile_kernels("bfloat16")
    monkeypatch.setattr(compile_ahead, "AHEAD", ("no._such_kernel",))
    monkeypatch.setattr(jit, "allowed_threads", lambda: 2)
    with CompileAhead("bfloat16") as ahead:
        ahead.wait()
        assert ahead._process.returncode == 0
    with pytest.raises(KeyboardInterrupt), CompileAhead("bfloat16") as ahead:
        raise KeyboardInterrupt
    assert ahead._process.returncode != 0


def test_one_cpu_compiles_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compile_ahead, "AHEAD", ("no._such_kernel",))
    monkeypatch.setattr(jit, "allowed_threads", lambda: 1)
    assert CompileAhead("bfloat16")._process is None
