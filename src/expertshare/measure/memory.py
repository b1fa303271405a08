"""Memory of this process and what is left of the machine's, as the kernel counts them; what was read from storage."""

from __future__ import annotations

import resource
import sys
import threading
from pathlib import Path
from typing import Self

import torch

_STATUS, _IO = Path("/proc/self/status"), Path("/proc/self/io")
INTERVAL_S = 0.02


def peak_resident_bytes() -> int:
    """Most memory ever resident, file pages included. Linux: VmHWM, which counts from the start of this program; the
    ru_maxrss of other systems may begin with that of the program that started it."""
    status = _kilobytes(_STATUS, "VmHWM")
    if status is not None:
        return status
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def peak_memory_bytes(device: torch.device | None = None) -> int:
    """Most memory ever in use: of the device's allocator on a GPU, else resident memory of this process, pages of files
    included."""
    if device is not None and device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_resident_bytes()


def anonymous_bytes() -> int | None:
    """Memory of its own that is resident now (RssAnon): without pages of files. None where the kernel does not say."""
    return _kilobytes(_STATUS, "RssAnon")


def storage_bytes_read() -> int | None:
    """Bytes that this process made the storage deliver so far (not the page cache). None where nobody says."""
    lines = _read(_IO).splitlines()
    return next((int(line.split()[1]) for line in lines if line.startswith("read_bytes:")), None)


def available_memory_bytes(meminfo: Path = Path("/proc/meminfo")) -> int | None:
    """Memory that can be had without swapping, None where the system does not say."""
    return _kilobytes(meminfo, "MemAvailable")


def usable_memory_bytes(
    meminfo: Path = Path("/proc/meminfo"),
    cgroups: Path = Path("/sys/fs/cgroup"),
    membership: Path = Path("/proc/self/cgroup"),
) -> int | None:
    """Memory that can be had without swapping: what the system has, or what a control group leaves of its limit.

    None where neither says. Pages of files that a group has cached count as free, because the kernel drops them.
    """
    known = [available_memory_bytes(meminfo), *(_left(group) for group in _groups(cgroups, membership))]
    return min((value for value in known if value is not None), default=None)


def free_memory_bytes(device: torch.device) -> int | None:
    """Memory that can be had on a device: of the host as `usable_memory_bytes` says it; of a GPU what is free, and what
    torch holds of it without using it."""
    if device.type == "cpu":
        return usable_memory_bytes()
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + unused


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


def _kilobytes(file: Path, name: str) -> int | None:
    """Bytes of a line such as `VmHWM: 12 kB`; None where there is none."""
    line = next((line for line in _read(file).splitlines() if line.startswith(f"{name}:")), None)
    return None if line is None else int(line.split()[1]) * 1024


def _groups(cgroups: Path, membership: Path) -> list[Path]:
    """The directory of this process's memory group and those above it: the tightest limit holds."""
    lines = _read(membership).splitlines()
    for line in lines:
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers in ("", "memory"):
            root = cgroups if controllers == "" else cgroups / "memory"
            below = root / path.strip("/")
            return [below, *(parent for parent in below.parents if parent.is_relative_to(root))]
    return []


def _left(group: Path) -> int | None:
    """Limit less use of one group, by the names of version 2, then of version 1; None where there is no limit."""
    for limit, usage in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
        most, used = _read(group / limit).strip(), _read(group / usage).strip()
        if most.isdigit() and used.isdigit():
            stat = dict(line.split(" ", 1) for line in _read(group / "memory.stat").splitlines() if " " in line)
            return max(0, int(most) - int(used) + int(stat.get("inactive_file", "0")))
    return None


def _read(path: Path) -> str:
    """A file's text; nothing where it does not exist or may not be read, as in many containers."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
