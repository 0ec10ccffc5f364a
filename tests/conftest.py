"""What all tests share: a JIT cache of the checkout's own, no network, the repository's path."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

pytest_plugins = ["tests.servers"]  # fixtures: real servers, started when a test asks for one

ROOT = Path(__file__).resolve().parent.parent

# Kernels that a test run compiles are kept with the checkout: the next run loads them, and the
# user's own cache is neither used nor cleaned up. Set here, before anything imports Numba.
os.environ.setdefault("PACE_NB_CACHE_DIR", str(ROOT / ".pytest_cache" / "pace_nb"))

# A test that reaches for the hub fails at once instead of waiting for a network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`make test-long`: the same property tests, 20 times as many examples."""
    if not os.environ.get("PACE_NB_TEST_LONG"):
        return
    places = set()  # where Hypothesis keeps settings: one for all parameters of a function
    for item in items:
        function = getattr(item, "obj", None)
        machine = getattr(function, "_hypothesis_state_machine_class", None)
        kept = (function, "_hypothesis_internal_use_settings")
        places.add((machine.TestCase, "settings") if machine else kept)
    for place, name in places:
        found = getattr(place, name, None)
        if found is not None:
            more = settings(found, max_examples=20 * found.max_examples, deadline=None)
            setattr(place, name, more)


@pytest.fixture(scope="session")
def repository() -> Path:
    """Root of the checkout."""
    return ROOT
