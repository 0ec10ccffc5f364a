"""Log lines: one line each, as text or as JSON, whatever was put into them.

Knows how to write; what is written is chosen where it happens. Names, paths and ids come from
outside, so control characters are written out: nobody can forge a line or drive a terminal.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Literal

from pace_nb.errors import one_line


class TextFormatter(logging.Formatter):
    """INFO 11-23 15:04:05 engine 0: ready"""

    def format(self, record: logging.LogRecord) -> str:
        """One line; an exception follows in lines of its own."""
        stamp = time.strftime("%m-%d %H:%M:%S", time.localtime(record.created))
        line = f"{record.levelname} {stamp} {one_line(record.getMessage())}"
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


class JsonFormatter(logging.Formatter):
    """{"time": ..., "level": "INFO", "logger": ..., "message": ...}"""

    def format(self, record: logging.LogRecord) -> str:
        """One line; an exception is a field."""
        content = {
            "time": round(record.created, 3),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            content["exception"] = self.formatException(record.exc_info)
        return json.dumps(content)


def set_up(level: str, kind: Literal["text", "json"]) -> None:
    """Send this process's log to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if kind == "json" else TextFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.getLogger("uvicorn").setLevel(max(logging.WARNING, logging.getLogger().level))
    logging.getLogger("asyncio").setLevel(logging.WARNING)
