"""Physical cores and quotas, from the files of machines that are not this one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

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
        (range(8), {"cpu_max": "250000 100000"}, 2),
        (range(8), {"cpu_max": "20000 100000"}, 1),
        (range(8), {"cpu_max": "1600000 100000"}, 4),
        (range(8), {"cfs": (-1, 100000)}, 4),
        (range(8), {"cfs": (200000, 100000)}, 2),
        (range(8), {"cpu_max": "199999 100000"}, 1),
        ([0, 4], {}, 1),
        ([1, 2, 5], {}, 2),
    ],
)
def test_cores_that_may_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, allowed: list[int], limits: dict[str, object], expected: int
) -> None:
    monkeypatch.setattr(loading, "_processors", lambda: list(allowed))
    assert loading.usable_cores(machine(tmp_path, FOUR_OF_EIGHT, **limits), tmp_path / "none") == expected  # type: ignore[arg-type]


def test_a_system_that_says_nothing_counts_processors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "_processors", lambda: [0, 1, 2])
    assert loading.usable_cores(tmp_path, tmp_path / "none") == 3


def test_this_machine_has_one() -> None:
    assert loading.usable_cores() >= 1


GROUPS = {
    "v2 service": ("0::/system.slice/app.service\n", {"system.slice/app.service/cpu.max": "200000 100000"}, 2),
    "v2 pod above": (
        "0::/kubepods/pod1/box\n",
        {"kubepods/pod1/cpu.max": "350000 100000", "kubepods/pod1/box/cpu.max": "max 100000"},
        3,
    ),
    "v2 tightest of two": ("0::/a/b\n", {"a/cpu.max": "100000 100000", "a/b/cpu.max": "300000 100000"}, 1),
    "v2 inside a container": ("0::/../elsewhere\n", {"cpu.max": "200000 100000"}, 2),
    "v1 child": (
        "9:memory:/docker/x\n4:cpu:/docker/x\n",
        {
            "cpu/docker/x/cpu.cfs_quota_us": "200000",
            "cpu/docker/x/cpu.cfs_period_us": "100000",
            "memory/docker/x/y": "",
        },
        2,
    ),
    "v1 joined mount": (
        "4:cpu,cpuacct:/box\n0::/\n",
        {"cpu,cpuacct/box/cpu.cfs_quota_us": "300000", "cpu,cpuacct/box/cpu.cfs_period_us": "100000"},
        3,
    ),
    "v1 joined, mounted by one name": (
        "4:cpuacct,cpu:/box\n",
        {"cpu/box/cpu.cfs_quota_us": "100000", "cpu/box/cpu.cfs_period_us": "100000"},
        1,
    ),
    "no limit": ("0::/a\n", {"a/cpu.max": "max 100000"}, 4),
}


@pytest.mark.parametrize("name", GROUPS)
def test_quotas_of_nested_groups(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    member, files, expected = GROUPS[name]
    monkeypatch.setattr(loading, "_processors", lambda: list(range(8)))
    root = machine(tmp_path / "sys", FOUR_OF_EIGHT)
    for path, text in files.items():
        file = root / "fs/cgroup" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    membership = tmp_path / "cgroup"
    membership.write_text(member)
    assert loading.usable_cores(root, membership) == expected


def test_torch_s_threads_are_lowered_and_never_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(loading, "_threads_chosen", False)
    try:
        torch.set_num_threads(2)
        for cores, left in ((8, 2), (1, 1), (2, 1)):
            monkeypatch.setattr(loading, "usable_cores", lambda cores=cores: cores)
            loading.keep_to_quota()
            assert torch.get_num_threads() == left
        torch.set_num_threads(2)
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
        monkeypatch.setattr(loading, "usable_cores", lambda: 1)
        loading.keep_to_quota()
        assert torch.get_num_threads() == 2
        monkeypatch.delenv("OMP_NUM_THREADS")
        loading.choose_threads(2)
        loading.keep_to_quota()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
