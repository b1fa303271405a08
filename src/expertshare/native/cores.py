"""How many threads are worth having: one for each physical core that this process may use."""

from __future__ import annotations

import math
import os
from pathlib import Path

_ROOT = Path("/sys")


def usable_cores(root: Path = _ROOT) -> int:
    """Physical cores among the processors of this process, no more than the control group's quota; at least 1.

    Two hardware threads of a core share its vector units and its way to memory, which is all that kernels wait for.
    Where the system does not say what belongs to one core, every processor counts. root: where sysfs is mounted.
    """
    processors = _processors()
    cores = {_core_of(root, processor) for processor in processors}
    quota = _quota(root / "fs/cgroup")
    return max(1, len(cores) if quota is None else min(len(cores), math.ceil(quota)))


def _processors() -> list[int]:
    """Those that the scheduler may give us."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _core_of(root: Path, processor: int) -> str:
    """What the hardware threads of one core have in common."""
    topology = root / f"devices/system/cpu/cpu{processor}/topology"
    for name in ("core_cpus_list", "thread_siblings_list"):
        if (topology / name).is_file():
            return (topology / name).read_text().strip()
    return f"processor {processor}"


def _quota(cgroup: Path) -> float | None:
    """Processors' worth of time, by version 2 or 1 of control groups; None for no limit."""
    if (cgroup / "cpu.max").is_file():
        quota, period = (cgroup / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    if (cgroup / "cpu/cpu.cfs_quota_us").is_file():
        quota = (cgroup / "cpu/cpu.cfs_quota_us").read_text()
        period = (cgroup / "cpu/cpu.cfs_period_us").read_text()
        return None if int(quota) < 0 else int(quota) / int(period)
    return None
