"""The JSON file that says what was run, where, how, and what came of it."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expertshare.errors import InputError
from expertshare.measure.environment import Environment

SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """One command's record. config: the resolved configuration; results: what the command measured."""

    command: str
    environment: Environment
    seeds: Mapping[str, int]
    config: Mapping[str, Any]
    results: Any

    def to_json(self) -> dict[str, Any]:
        """Plain values by name, `schema_version` first."""
        return {
            "schema_version": SCHEMA_VERSION,
            "command": self.command,
            "environment": self.environment.to_json(),
            "seeds": dict(self.seeds),
            "config": dict(self.config),
            "results": self.results,
        }

    def write(self, path: str | Path) -> None:
        """Put the report at `path`, whole or not at all. Raises InputError where the file cannot be written."""
        write_json(path, self.to_json())


def write_json(path: str | Path, value: Any) -> None:
    """Put `value` at `path` as JSON, whole or not at all. Raises InputError where the file cannot be written."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    target = Path(path)
    try:
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            Path(name).chmod(0o666 & ~_umask())  # mkstemp makes files that only their owner can read
            Path(name).replace(target)
        finally:
            Path(name).unlink(missing_ok=True)  # there is one only where something failed
    except OSError as error:
        raise _unwritable(target, error.strerror or str(error)) from error


def check_writable(path: str | Path) -> None:
    """Raise InputError unless a file can be put at `path`; leaves nothing behind."""
    target = Path(path)
    if target.is_dir():
        raise _unwritable(target, "it is a directory")
    try:
        with tempfile.TemporaryFile(dir=target.parent):
            pass
    except OSError as error:
        raise _unwritable(target, error.strerror or str(error)) from error


def _unwritable(path: Path, reason: str) -> InputError:
    return InputError(
        f"expected a path that can be written, got {path}: {reason}; choose another or make its directory"
    )


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
