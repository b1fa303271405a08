"""How much memory this process may take, and how much it has taken."""

from __future__ import annotations

from pathlib import Path

from expertshare.lab.bench.machine import available_memory_bytes

_CGROUPS = Path("/sys/fs/cgroup")


def usable_memory_bytes(
    meminfo: Path = Path("/proc/meminfo"),
    cgroups: Path = _CGROUPS,
    membership: Path = Path("/proc/self/cgroup"),
) -> int | None:
    """Memory that can be had without swapping: what the system has, or what a control group leaves of its limit.

    None where neither says. Pages of files that a group has cached count as free, because the kernel drops them.
    """
    known = [available_memory_bytes(meminfo), *(_left(group) for group in _groups(cgroups, membership))]
    return min((value for value in known if value is not None), default=None)


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
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
