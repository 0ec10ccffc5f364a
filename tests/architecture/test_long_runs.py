"""`make test-long`: which tests it runs, and with how many examples."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from tests.conftest import pytest_collection_modifyitems


@pytest.fixture
def command(repository):
    """Words of the Makefile behind PACE_NB_TEST_LONG=1."""
    (line,) = re.findall(r"PACE_NB_TEST_LONG=1 .*", (repository / "Makefile").read_text())
    return line.split()


@pytest.fixture
def chosen(repository, command):
    """Files and folders that are run."""
    return [path for word in command if word.startswith("tests/")
            for path in repository.glob(word)]  # fmt: skip


def test_a_test_of_five_minutes_is_not_reported_as_one_that_hangs(command, pytestconfig):
    """The crowd in tests/server/test_service.py takes 300 s, as long as the suite's limit."""
    (seconds,) = (word for word in command if word.startswith("faulthandler_timeout="))
    assert command[command.index(seconds) - 1] == "-o"
    assert int(seconds.partition("=")[2]) >= 2 * float(pytestconfig.getini("faulthandler_timeout"))


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


def test_a_state_machine_has_twenty_times_as_many_examples(monkeypatch):
    """Its settings lie with the class; here as pytest finds it, and run."""
    histories = []

    class Machine(RuleBasedStateMachine):
        def __init__(self):
            super().__init__()
            histories.append(self)

        @rule(number=st.integers())
        def act(self, number):
            pass

    case = Machine.TestCase
    case.settings = settings(max_examples=5, stateful_step_count=2, deadline=None, database=None)
    monkeypatch.setenv("PACE_NB_TEST_LONG", "1")
    pytest_collection_modifyitems([SimpleNamespace(obj=case("runTest").runTest)])
    assert case.settings.max_examples == 100 and case.settings.stateful_step_count == 2
    case("runTest").runTest()
    assert len(histories) >= 100


def test_every_test_that_can_be_long_is_among_them(repository, chosen):
    """Properties, and those that ask for the variable themselves."""
    folder = repository / "tests"
    long = {
        path
        for path in folder.rglob("test_*.py")
        if re.search(r"PACE_NB_TEST_LONG|^from hypothesis import", path.read_text(), re.MULTILINE)
        and path.parent != folder / "architecture"
    }
    covered = {p for path in chosen for p in ([path] if path.is_file() else path.rglob("*.py"))}
    assert len(long) > 20
    assert not {str(path.relative_to(repository)) for path in long - covered}
