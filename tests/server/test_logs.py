"""S30: nothing that comes from outside can forge a line of the log or drive a terminal."""

from __future__ import annotations

import json
import logging
import sys

import pytest

from pace_nb.server import logs

EVIL = "GET /\r\nERROR forged \x1b[31mred\x07 \u2028"


def record(message, exc_info=None):
    return logging.LogRecord("pace_nb.x", logging.INFO, __file__, 1, "%s", (message,), exc_info)


def test_S30_text_lines_are_one_line_without_control_characters():
    line = logs.TextFormatter().format(record(EVIL))
    assert line.isprintable() and line.startswith("INFO ") and "forged" in line


def test_S30_json_lines_are_one_line():
    line = logs.JsonFormatter().format(record(EVIL))
    assert "\n" not in line and "\r" not in line and "\x1b" not in line
    found = json.loads(line)
    assert found["message"] == EVIL and found["level"] == "INFO" and found["logger"] == "pace_nb.x"


@pytest.mark.parametrize("formatter", [logs.TextFormatter(), logs.JsonFormatter()])
def test_tracebacks_are_kept(formatter):
    try:
        raise ValueError("why")
    except ValueError:
        line = formatter.format(record("it failed", sys.exc_info()))
    assert "it failed" in line and "ValueError: why" in line
