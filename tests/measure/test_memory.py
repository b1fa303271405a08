"""Memory that can be had, from files made up here."""

from __future__ import annotations

from pathlib import Path

from expertshare.measure.memory import available_memory_bytes, usable_memory_bytes


def test_free_memory(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 100 kB\nMemAvailable:     42 kB\n")
    assert available_memory_bytes(meminfo) == 42 * 1024
    assert available_memory_bytes(tmp_path / "absent") is None


def test_the_tighter_of_system_and_control_group_holds(tmp_path: Path) -> None:
    meminfo, membership = tmp_path / "meminfo", tmp_path / "cgroup"
    meminfo.write_text("MemTotal: 100 kB\nMemAvailable: 50 kB\n", encoding="utf-8")
    membership.write_text("0::/a/b\n", encoding="utf-8")
    group = tmp_path / "cgroups" / "a" / "b"
    group.mkdir(parents=True)
    files = {"memory.max": "max", "memory.current": "1000", "memory.stat": "anon 5\ninactive_file 300\n"}
    for name, text in files.items():
        (group / name).write_text(text, encoding="utf-8")
    assert usable_memory_bytes(meminfo, tmp_path / "cgroups", membership) == 50 * 1024
    (group / "memory.max").write_text("2000", encoding="utf-8")
    assert usable_memory_bytes(meminfo, tmp_path / "cgroups", membership) == 2000 - 1000 + 300
    (group.parent / "memory.max").write_text("1100", encoding="utf-8")
    (group.parent / "memory.current").write_text("1000", encoding="utf-8")
    assert usable_memory_bytes(meminfo, tmp_path / "cgroups", membership) == 100
    assert usable_memory_bytes(tmp_path / "absent", tmp_path / "absent", tmp_path / "absent") is None
