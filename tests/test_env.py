from __future__ import annotations

import re
from pathlib import Path

import pytest

from pace_nb import env
from pace_nb.errors import ConfigError


@pytest.mark.parametrize(
    ("value", "expected"),
    [(None, None), ("", None), ("  ", None), ("1", 1), (" 16 ", 16), ("007", 7)],
)
def test_num_threads(monkeypatch, value, expected):
    set_or_delete(monkeypatch, "PACE_NB_NUM_THREADS", value)
    assert env.num_threads() == expected


@pytest.mark.parametrize("value", ["0", "-1", "two", "1.5", "1e3", "²", "１", "9" * 5000, "1 2"])
def test_num_threads_refuses(monkeypatch, value):
    monkeypatch.setenv("PACE_NB_NUM_THREADS", value)
    with pytest.raises(ConfigError, match=r"^PACE_NB_NUM_THREADS=.*expected an integer from 1$"):
        env.num_threads()


@pytest.mark.parametrize(
    ("value", "expected"),
    [(None, False), ("", False), ("0", False), ("no", False), ("1", True), ("TRUE", True)],
)
def test_debug(monkeypatch, value, expected):
    set_or_delete(monkeypatch, "PACE_NB_DEBUG", value)
    assert env.debug() is expected


def test_debug_refuses(monkeypatch):
    monkeypatch.setenv("PACE_NB_DEBUG", "perhaps")
    with pytest.raises(ConfigError, match="PACE_NB_DEBUG='perhaps': expected 0 or 1"):
        env.debug()


def test_cache_dir(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("PACE_NB_CACHE_DIR", "")
    assert env.cache_dir() == tmp_path / "home" / ".cache" / "pace_nb"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert env.cache_dir() == tmp_path / "xdg" / "pace_nb"
    monkeypatch.setenv("PACE_NB_CACHE_DIR", str(tmp_path / "mine"))
    assert env.cache_dir() == tmp_path / "mine"
    assert not list(tmp_path.iterdir())  # a question creates nothing


def test_every_variable_is_in_the_table():
    """Those that env.py reads and those that kernels/jit.py reads without it."""
    package = Path(env.__file__).parent
    read = re.compile(r'"(PACE_NB_[A-Z_]+)"')
    names = {
        name
        for path in (package / "env.py", package / "kernels" / "jit.py")
        for name in read.findall(path.read_text())
    }
    assert len(names) >= 3
    assert not [name for name in names if f"| {name} " not in (env.__doc__ or "")]


def set_or_delete(monkeypatch, name, value):
    if value is None:
        monkeypatch.delenv(name, raising=False)
    else:
        monkeypatch.setenv(name, value)


def test_glibcs_thresholds_are_seen(monkeypatch):
    for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"):
        monkeypatch.delenv(name, raising=False)
    assert not env.malloc_is_tuned()
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    assert env.malloc_is_tuned()
