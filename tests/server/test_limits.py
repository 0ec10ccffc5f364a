"""Limits: every one is a positive number, or may be nothing, or may be 0."""

from __future__ import annotations

from dataclasses import fields

import pytest

from pace_nb.errors import ConfigError
from pace_nb.server.limits import Limits


def test_each_is_documented_and_bounded():
    for field in fields(Limits):
        assert f"        {field.name}" in Limits.__doc__.replace(":", " ") or field.name in (
            Limits.__doc__
        )
        assert field.default is None or field.default > 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_body_bytes": 0},
        {"header_timeout": -1.0},
        {"queue_timeout": "5"},
        {"send_timeout": True},
        {"max_queued_requests": -1},
        {"max_mailbox_bytes": None},
        {"body_timeout": float("nan")},
    ],
)
def test_what_is_no_limit_is_refused(wrong):
    (name,) = wrong
    with pytest.raises(ConfigError, match=name):
        Limits(**wrong)


def test_what_may_be_zero():
    limits = Limits(shutdown_timeout=0, max_queued_requests=0, max_queued_tokens=0, max_restarts=0)
    assert limits.shutdown_timeout == 0
