"""What every test shares: a private JIT cache, no network, and where the repository is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# A test that reaches for the hub fails at once instead of waiting for a network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def repository() -> Path:
    """Root of the checkout."""
    return Path(__file__).resolve().parent.parent
