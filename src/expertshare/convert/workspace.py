"""A directory that is built file by file, survives interruption, and takes its name only when it is whole.

Work happens in `OUT.partial`. Its journal lists the finished files with size and checksum; a later run with the same
settings checks those and goes on behind them. `publish` renames the directory to OUT, with the journal as
`checksums.json`, so that OUT either does not exist or is complete.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from expertshare.errors import CheckpointError, InputError
from expertshare.experts.layout import FileRecord
from expertshare.models.checkpoint import read_json

JOURNAL, CHECKSUMS, LOCK = "journal.json", "checksums.json", ".lock"
FORMAT = 1
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""No space, no quota, or a file larger than may be: in each case the disk takes no more."""


def read_records(path: Path) -> tuple[dict[str, Any], dict[str, FileRecord]]:
    """Settings and files, by name, of a journal or of checksums.json; CheckpointError if it is neither."""
    raw = read_json(path)
    settings, files = raw.get("settings"), raw.get("files")
    if raw.get("format") != FORMAT or not isinstance(settings, dict) or not isinstance(files, dict):
        raise CheckpointError(
            f"{path} is not a list of checksums of format {FORMAT}: remove {path.parent} and convert again"
        )
    try:
        return settings, {name: FileRecord(name, **record) for name, record in files.items()}
    except TypeError as error:
        raise CheckpointError(f"{path} is damaged ({error}): remove {path.parent} and convert again") from error


def is_complete(out: Path, settings: Mapping[str, Any]) -> bool:
    """Whether `out` already is what a run with these settings would make, as far as its checksums and sizes say.

    False where there is nothing yet (or an empty directory). Raises InputError where `out` is something else.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    if not (out / CHECKSUMS).is_file():
        raise InputError(f"{out} exists and was not made by this command: choose another directory or remove it")
    made_with, files = read_records(out / CHECKSUMS)
    _refuse_other(out, made_with, _plain(settings), "choose another directory, or remove it")
    for name, record in files.items():
        size = (out / name).stat().st_size if (out / name).is_file() else None
        if size != record.num_bytes:
            raise CheckpointError(
                f"{out} was finished, but its file {name} now has {size} bytes, expected {record.num_bytes}: remove "
                "the directory and convert again"
            )
    return True


class Workspace:
    """`OUT.partial` while it is being filled, by one process at a time. Made by `open_workspace`."""

    def __init__(self, out: Path, directory: Path, settings: dict[str, Any], files: dict[str, FileRecord]) -> None:
        self.out, self.directory = out, directory
        self._settings, self._files = settings, files

    def has(self, name: str) -> bool:
        """Whether this file is finished and its bytes are still those that were written; reads all of it."""
        path, record = self.directory / name, self._files.get(name)
        if record is not None and path.is_file() and FileRecord.of(path) == record:
            return True
        self._files.pop(name, None)
        return False

    def check_space(self, sizes: Mapping[str, int]) -> None:
        """Raise CheckpointError unless the files of `sizes` (bytes by name) that are not finished fit on the disk."""
        needed = sum(size for name, size in sizes.items() if name not in self._files)
        free = shutil.disk_usage(self.directory).free
        if needed > free:
            raise CheckpointError(
                f"{self.out} needs {needed:,} bytes more, but its disk has {free:,} bytes free: make "
                f"{needed - free:,} bytes free or choose another disk"
            )

    def record(self, name: str) -> FileRecord:
        """Size and checksum of a finished file."""
        return self._files[name]

    def add(self, name: str, write: Callable[[Path], str | None]) -> None:
        """Make one file: `write` fills the path that it gets, and may return the sha256 of the bytes, if it knows it,
        so that the file need not be read again. Raises CheckpointError where the disk is full."""
        path = self.directory / name
        try:
            with _replacing(path) as partial:
                digest = write(partial)
            self._files[name] = FileRecord(name, path.stat().st_size, digest) if digest else FileRecord.of(path)
            self._write_journal(JOURNAL)
        except OSError as error:
            if error.errno in _FULL:
                free = shutil.disk_usage(self.directory).free
                raise CheckpointError(
                    f"the disk is full ({free:,} bytes free, or a limit on file sizes) while {name} was written; "
                    f"{len(self._files)} finished files are kept in {self.directory}. Free space and run the same "
                    "command again: it goes on from there"
                ) from error
            raise CheckpointError(
                f"{path} cannot be written ({error.strerror}): see to the disk, then run the same command again"
            ) from error

    def publish(self) -> None:
        """Give the finished directory its name."""
        self._write_journal(CHECKSUMS)
        (self.directory / JOURNAL).unlink(missing_ok=True)
        (self.directory / LOCK).unlink()
        _flush(self.directory)
        os.rename(self.directory, self.out)
        _flush(self.out.parent)

    def _write_journal(self, name: str) -> None:
        files = {
            file: {"num_bytes": record.num_bytes, "sha256": record.sha256}
            for file, record in sorted(self._files.items())
        }
        text = json.dumps({"format": FORMAT, "settings": self._settings, "files": files}, indent=1) + "\n"
        with _replacing(self.directory / name) as partial:
            partial.write_text(text, encoding="utf-8")


@contextmanager
def open_workspace(out: Path, settings: Mapping[str, Any]) -> Iterator[Workspace]:
    """Begin `out`, or go on where an interrupted run with the same settings stopped.

    settings: everything that decides about the bytes, as JSON values. Raises CheckpointError where `OUT.partial` was
    begun with other settings or is in use by another process, InputError where it cannot be made.
    """
    directory = out.with_name(out.name + ".partial")
    wanted = _plain(settings)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = (directory / LOCK).open("w", encoding="utf-8")
    except OSError as error:
        raise InputError(f"{directory} cannot be made ({error.strerror}): choose another place for {out}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CheckpointError(
                f"another process is writing {directory}: wait for it, or choose another name"
            ) from error
        files: dict[str, FileRecord] = {}
        if (directory / JOURNAL).exists():
            begun_with, files = read_records(directory / JOURNAL)
            _refuse_other(directory, begun_with, wanted, "remove it to begin anew, or choose another name")
        yield Workspace(out, directory, wanted, files)


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON gives it back, so that both sides of a comparison have the same types."""
    value: dict[str, Any] = json.loads(json.dumps(dict(settings)))
    return value


def _refuse_other(where: Path, found: Mapping[str, Any], wanted: Mapping[str, Any], advice: str) -> None:
    for key in sorted({*found, *wanted}):
        if found.get(key) != wanted.get(key):
            raise CheckpointError(
                f"{where} was begun with another {key}: found {found.get(key)!r}, expected {wanted.get(key)!r}. "
                f"You can {advice}"
            )


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A place to write to, which becomes `path` when its bytes are on the disk; an error, or an interruption, leaves
    nothing half written."""
    partial = path.with_name(path.name + ".writing")
    try:
        yield partial
        _flush(partial)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _flush(path: Path) -> None:
    """Put the bytes of a file, or the names in a directory, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
