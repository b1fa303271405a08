"""Memory of this process as the kernel counts it, and what it read from storage."""

from __future__ import annotations

import resource
import sys
import threading
from pathlib import Path
from typing import Self

_STATUS, _IO = Path("/proc/self/status"), Path("/proc/self/io")
INTERVAL_S = 0.02


def peak_resident_bytes() -> int:
    """Most memory ever resident, file pages included. Linux: VmHWM, which counts from the start of this program; the
    ru_maxrss of other systems may begin with that of the program that started it."""
    status = _status_bytes("VmHWM")
    if status is not None:
        return status
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def anonymous_bytes() -> int | None:
    """Memory of its own that is resident now (RssAnon): without pages of files. None where the kernel does not say."""
    return _status_bytes("RssAnon")


def storage_bytes_read() -> int | None:
    """Bytes that this process made the storage deliver so far (not the page cache). None where nobody says."""
    try:
        lines = _IO.read_text(encoding="ascii").splitlines()
    except OSError:  # no such file, or hidden in a container
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("read_bytes:")), None)


class MemoryWatch:
    """Samples RssAnon every 20 ms in a thread, inside a `with`, because the kernel keeps no peak of it.

    What comes and goes between two samples is missed. Entering a watch that already runs does nothing.
    """

    def __init__(self) -> None:
        self._peak: int | None = None
        self._depth = 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def peak_anonymous_bytes(self) -> int | None:
        """Most that a sample showed; None where the kernel does not say."""
        self._sample()
        return self._peak

    def __enter__(self) -> Self:
        self._depth += 1
        if self._depth == 1:
            self._stop.clear()
            self._thread = threading.Thread(target=self._watch, name="memory-watch", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if self._depth == 0 and self._thread is not None:
            self._stop.set()
            self._thread.join()
            self._sample()

    def _watch(self) -> None:
        while not self._stop.wait(INTERVAL_S):
            self._sample()

    def _sample(self) -> None:
        now = anonymous_bytes()
        if now is not None:
            self._peak = max(now, self._peak or 0)


def _status_bytes(name: str) -> int | None:
    try:
        lines = _STATUS.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:  # not Linux
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)
