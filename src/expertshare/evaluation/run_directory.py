"""A directory that holds one evaluation: run.json says which, items.jsonl has a line per answer, report.json sums up.

A line is one append. A process that is killed leaves at most a cut last line, which the next run drops and says so.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from expertshare.errors import EvaluationError, InputError
from expertshare.measure.report import write_json

RUN, ITEMS, REPORT = "run.json", "items.jsonl", "report.json"
Key = tuple[str, str, str]
DOCUMENTS = frozenset({".md", ".jsonl", ".png"})
"""Files beside a model that change nothing about it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Opened:
    """What a run directory holds already. dropped_bytes: length of a cut last line that was removed."""

    lines: tuple[dict[str, Any], ...]
    dropped_bytes: int


class RunDirectory:
    """The directory while one process evaluates into it; a second one is refused."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None

    def open(self, run: Mapping[str, Any]) -> Opened:
        """Start or take up the evaluation that run["identity"] describes.

        Raises EvaluationError if the directory holds another evaluation, something else, or is in use.
        """
        self._make()
        stored = self._stored_run()
        if stored is not None:
            _check_same(stored["identity"], run["identity"], self.path)
        else:
            write_json(self.path / RUN, run)
        self._descriptor = os.open(self.path / ITEMS, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise EvaluationError(f"{self.path} is in use by another process: wait, or choose another") from error
        return self._read()

    def append(self, line: Mapping[str, Any]) -> None:
        """Add one answer to the run's file."""
        assert self._descriptor is not None
        data = (json.dumps(line, ensure_ascii=True, allow_nan=False) + "\n").encode("ascii")
        written = os.write(self._descriptor, data)
        if written != len(data):
            raise EvaluationError(f"{self.path / ITEMS} could not be written whole: is the disk full?")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._descriptor is not None:
            with suppress(OSError):  # a file system that cannot sync; what was written is there all the same
                os.fsync(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = None

    def _make(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            names = [name for name in os.listdir(self.path) if not name.startswith(".")]
        except OSError as error:
            raise InputError(
                f"expected a directory that can be made or written, got {self.path}: {error.strerror}; choose another"
            ) from error
        if names and RUN not in names:
            raise EvaluationError(
                f"expected an empty directory or one with a {RUN}, got {self.path} with {sorted(names)[0]}: "
                "choose another"
            )

    def _stored_run(self) -> dict[str, Any] | None:
        path = self.path / RUN
        if not path.exists():
            return None
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise EvaluationError(f"{path} cannot be read ({error}): choose another directory") from error
        if not isinstance(value, dict) or "identity" not in value:
            raise EvaluationError(f"{path} is not an evaluation's: choose another directory")
        return value

    def _read(self) -> Opened:
        assert self._descriptor is not None
        data = (self.path / ITEMS).read_bytes()
        kept = data.rfind(b"\n") + 1
        if kept < len(data):
            os.ftruncate(self._descriptor, kept)
        return Opened(
            lines=tuple(parse_lines(data[:kept], self.path / ITEMS)),
            dropped_bytes=len(data) - kept,
        )


def parse_lines(data: bytes, path: Path) -> list[dict[str, Any]]:
    """The objects of whole lines; EvaluationError for a line that is none, or a second answer to one question."""
    found: list[dict[str, Any]] = []
    seen: set[Key] = set()
    for number, line in enumerate(data.splitlines(), 1):
        try:
            value = json.loads(line)
            key = key_of(value)
        except (ValueError, KeyError, TypeError) as error:
            raise EvaluationError(f"{path}, line {number}: expected an answer as JSON; the file was changed") from error
        if key in seen:
            raise EvaluationError(f"{path}, line {number}: {key} is there twice; the file was changed")
        seen.add(key)
        found.append(value)
    return found


def key_of(line: Mapping[str, Any]) -> Key:
    """What makes a line the only one of its kind: task, item, policy."""
    return line["task"], line["id"], line["policy"]


def check_known(lines: Iterable[Mapping[str, Any]], planned: Sequence[Key], path: Path) -> set[Key]:
    """The keys of `lines`; EvaluationError if one is not among those planned."""
    keys = {key_of(line) for line in lines}
    strange = sorted(keys - set(planned))
    if strange:
        raise EvaluationError(f"{path / ITEMS} answers {strange[0]}, which this evaluation does not ask: changed?")
    return keys


def _check_same(stored: Mapping[str, Any], wanted: Mapping[str, Any], path: Path) -> None:
    plain = json.loads(json.dumps(wanted))
    differing = [name for name in sorted({*stored, *plain}) if stored.get(name) != plain.get(name)]
    if differing:
        name = differing[0]
        raise EvaluationError(
            f"{path} holds another evaluation, which differs in {', '.join(differing)} "
            f"({name} there: {_short(stored.get(name))}, here: {_short(plain.get(name))}): choose another directory"
        )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 100 else text[:97] + "..."


def model_sha256(path: Path) -> str:
    """Hash of every file of a model's directory, names included; documents and hidden files aside."""
    total = hashlib.sha256()
    for name in sorted(os.listdir(path)):
        file = path / name
        if file.is_file() and not name.startswith(".") and file.suffix not in DOCUMENTS:
            with file.open("rb") as opened:
                total.update(f"{name} {hashlib.file_digest(opened, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()
