"""`make test-long`: which tests it runs, and with how many examples."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import pytest_collection_modifyitems


@pytest.fixture
def chosen(repository):
    """Files and folders that the Makefile names behind PACE_NB_TEST_LONG=1."""
    (line,) = re.findall(r"PACE_NB_TEST_LONG=1 .*", (repository / "Makefile").read_text())
    return [path for word in line.split() if word.startswith("tests/")
            for path in repository.glob(word)]  # fmt: skip


def test_a_property_has_twenty_times_as_many_examples_whatever_its_parameters(monkeypatch):
    """A test of five parameters is five items with one function."""

    @settings(max_examples=7)
    @given(st.integers())
    def one(number):
        pass

    @settings(max_examples=3)
    @given(st.integers())
    def other(number):
        pass

    def plain():
        pass

    items = [SimpleNamespace(obj=f) for f in (one, one, one, plain, other)] + [SimpleNamespace()]
    monkeypatch.delenv("PACE_NB_TEST_LONG", raising=False)
    pytest_collection_modifyitems(items)
    assert one._hypothesis_internal_use_settings.max_examples == 7
    monkeypatch.setenv("PACE_NB_TEST_LONG", "1")
    pytest_collection_modifyitems(items)
    assert one._hypothesis_internal_use_settings.max_examples == 140
    assert other._hypothesis_internal_use_settings.max_examples == 60


def test_every_test_that_can_be_long_is_among_them(repository, chosen):
    """Those that ask for the variable themselves."""
    asking = {
        path
        for path in (repository / "tests").rglob("test_*.py")
        if "PACE_NB_TEST_LONG" in path.read_text() and "architecture" not in path.parts
    }
    covered = {p for path in chosen for p in ([path] if path.is_file() else path.rglob("*.py"))}
    assert asking and asking <= covered
