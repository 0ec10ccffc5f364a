"""tests/ mirrors the code one to one: a reader of a module knows where its tests are."""

from __future__ import annotations

from pathlib import Path

NOT_MIRRORED = {"architecture", "demo", "golden", "e2e", "notebooks"}  # rules, data, whole runs


def mirror(root):
    """Module below `root` -> its test file's path below tests/, as far as it is mirrored there.

    `__init__` and `__main__` are exercised by the tests of what they export.
    """
    return {
        path: path.relative_to(root).with_name(f"test_{path.name}")
        for path in sorted(root.rglob("*.py"))
        if not path.name.startswith("__")
    }


def test_every_module_has_its_test_file(repository):
    missing = [
        f"{source}: tests/{test}"
        for source, test in mirror(repository / "pace_nb").items()
        if not (repository / "tests" / test).is_file()
    ]
    assert not missing, "\n".join(missing)


def test_every_test_file_has_its_module(repository):
    expected = set(mirror(repository / "pace_nb").values()) | {Path("test_init.py")}
    expected |= {Path("bench") / test for test in mirror(repository / "bench").values()}
    tests = repository / "tests"
    stray = [
        str(path)
        for path in sorted(tests.rglob("test_*.py"))
        if (relative := path.relative_to(tests)).parts[0] not in NOT_MIRRORED
        and relative not in expected
    ]
    assert not stray, "\n".join(stray)


def test_every_test_file_tests_something(repository):
    empty = [
        str(path)
        for path in sorted((repository / "tests").rglob("test_*.py"))
        if "assert" not in (text := path.read_text()) and "pytest.raises" not in text
    ]
    assert not empty, "\n".join(empty)
