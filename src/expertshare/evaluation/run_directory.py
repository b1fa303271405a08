"""A directory that holds one evaluation: run.json says which, items.jsonl has a line per answer, report.json sums up.

A line is one append. A process that is killed leaves at most a cut last line, which the next run drops and says so.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expertshare.errors import EvaluationError, InputError
from expertshare.measure.report import write_json

RUN, ITEMS, REPORT = "run.json", "items.jsonl", "report.json"
Key = tuple[str, str, str]
DOCUMENTS = frozenset({".md", ".jsonl", ".png"})
"""Files beside a model that change nothing about it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenRun:
    """The answers that a directory holds already, and the file for more. dropped_bytes: length of a cut last line that
    was removed."""

    lines: tuple[dict[str, Any], ...]
    dropped_bytes: int
    path: Path
    descriptor: int

    def append(self, line: Mapping[str, Any]) -> None:
        """Add one answer to the run's file."""
        data = (json.dumps(line, ensure_ascii=True, allow_nan=False) + "\n").encode("ascii")
        if os.write(self.descriptor, data) != len(data):
            raise EvaluationError(f"{self.path} could not be written whole: is the disk full?")


@contextmanager
def open_run(path: Path, run: Mapping[str, Any]) -> Iterator[OpenRun]:
    """Start or take up the evaluation that run["identity"] describes, as the only process that does.

    Raises EvaluationError if the directory holds another evaluation, something else, or is in use.
    """
    _make(path)
    stored = _stored_run(path / RUN)
    if stored is not None:
        _check_same(stored["identity"], run["identity"], path)
    else:
        write_json(path / RUN, run)
    items = path / ITEMS
    descriptor = os.open(items, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise EvaluationError(f"{path} is in use by another process: wait, or choose another") from error
        data = items.read_bytes()
        kept = data.rfind(b"\n") + 1
        if kept < len(data):
            os.ftruncate(descriptor, kept)
        lines = tuple(parse_lines(data[:kept], items))
        yield OpenRun(lines=lines, dropped_bytes=len(data) - kept, path=items, descriptor=descriptor)
    finally:
        with suppress(OSError):  # a file system that cannot sync; what was written is there all the same
            os.fsync(descriptor)
        os.close(descriptor)


def _make(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
        names = [name for name in os.listdir(path) if not name.startswith(".")]
    except OSError as error:
        raise InputError(
            f"expected a directory that can be made or written, got {path}: {error.strerror}; choose another"
        ) from error
    if names and RUN not in names:
        raise EvaluationError(
            f"expected an empty directory or one with a {RUN}, got {path} with {sorted(names)[0]}: choose another"
        )


def _stored_run(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EvaluationError(f"{path} cannot be read ({error}): choose another directory") from error
    if not isinstance(value, dict) or "identity" not in value:
        raise EvaluationError(f"{path} is not an evaluation's: choose another directory")
    return value


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
