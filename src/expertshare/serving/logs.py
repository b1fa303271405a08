"""Log lines as JSON objects, for machines."""

from __future__ import annotations

import json
import logging
import time
from typing import Any

from expertshare.errors import InputError, nearest

LEVELS = ("debug", "info", "warning", "error")
LOGGER = logging.getLogger("expertshare.serving")


class JSONLines(logging.Formatter):
    """One object per record: time, level, event, and the record's own fields."""

    def format(self, record: logging.LogRecord) -> str:
        """A line. What a field holds that JSON does not know is written as text."""
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{seconds}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=True, default=str)


def log(event: str, **fields: Any) -> None:
    """Write one line of JSON to the log."""
    LOGGER.info(event, extra={"fields": fields})


def checked_level(name: str) -> str:
    """A level as logging spells it. Raises InputError for another word."""
    if name.lower() not in LEVELS:
        raise InputError(f"expected a log level, got {name!r}. {nearest(name.lower(), LEVELS)}")
    return name.upper()


def log_config(level: str) -> dict[str, Any]:
    """For logging.config: our lines and uvicorn's, as JSON on stderr."""
    handler = {"class": "logging.StreamHandler", "formatter": "json", "stream": "ext://sys.stderr"}
    quiet = {"handlers": ["stderr"], "level": level, "propagate": False}
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"json": {"()": f"{__name__}.JSONLines"}},
        "handlers": {"stderr": handler},
        "loggers": {"expertshare.serving": quiet, "uvicorn": quiet},
    }
