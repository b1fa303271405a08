"""Physical cores and quotas, from the files of machines that are not this one."""

from __future__ import annotations

from pathlib import Path

import pytest

from expertshare.native import loading


def machine(root: Path, siblings: list[str], cpu_max: str | None = None, cfs: tuple[int, int] | None = None) -> Path:
    for processor, listed in enumerate(siblings):
        topology = root / f"devices/system/cpu/cpu{processor}/topology"
        topology.mkdir(parents=True)
        (topology / "thread_siblings_list").write_text(f"{listed}\n")
    group = root / "fs/cgroup"
    group.mkdir(parents=True)
    if cpu_max is not None:
        (group / "cpu.max").write_text(f"{cpu_max}\n")
    if cfs is not None:
        (group / "cpu").mkdir()
        (group / "cpu/cpu.cfs_quota_us").write_text(f"{cfs[0]}\n")
        (group / "cpu/cpu.cfs_period_us").write_text(f"{cfs[1]}\n")
    return root


FOUR_OF_EIGHT = ["0,4", "1,5", "2,6", "3,7"] * 2


@pytest.mark.parametrize(
    ("allowed", "limits", "expected"),
    [
        (range(8), {}, 4),
        (range(8), {"cpu_max": "max 100000"}, 4),
        (range(8), {"cpu_max": "300000 100000"}, 3),
        (range(8), {"cpu_max": "150000 100000"}, 2),
        (range(8), {"cpu_max": "20000 100000"}, 1),
        (range(8), {"cpu_max": "1600000 100000"}, 4),
        (range(8), {"cfs": (-1, 100000)}, 4),
        (range(8), {"cfs": (200000, 100000)}, 2),
        ([0, 4], {}, 1),
        ([1, 2, 5], {}, 2),
    ],
)
def test_cores_that_may_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, allowed: list[int], limits: dict[str, object], expected: int
) -> None:
    monkeypatch.setattr(loading, "_processors", lambda: list(allowed))
    assert loading.usable_cores(machine(tmp_path, FOUR_OF_EIGHT, **limits)) == expected  # type: ignore[arg-type]


def test_a_system_that_says_nothing_counts_processors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "_processors", lambda: [0, 1, 2])
    assert loading.usable_cores(tmp_path) == 3


def test_this_machine_has_one() -> None:
    assert loading.usable_cores() >= 1
