"""How large the package may be. Lines are those of formatted code, blank ones and docstrings included; code that moves
into data, generated files or another language counts. Whoever raises a limit says why in CHANGELOG.md."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks" / "figures"))
from code_map import ENGINE, files_of, lines_of, parts

NATIVE = ("native/csrc",)


@pytest.mark.parametrize(
    ("names", "kinds", "most"),
    [
        pytest.param(ENGINE, (".py",), 10_000, id="engine", marks=pytest.mark.xfail(reason="12,152 lines")),
        pytest.param(parts(), (".py",), 30_000, id="package", marks=pytest.mark.xfail(reason="37,100 lines")),
        pytest.param(NATIVE, (".cpp", ".h"), 4_500, id="native"),
    ],
)
def test_lines(names: Sequence[str], kinds: Sequence[str], most: int) -> None:
    assert lines_of(files_of(names, kinds)) <= most


@pytest.mark.xfail(reason="120 files")
def test_files_of_the_engine() -> None:
    assert len(files_of(ENGINE)) <= 80


def test_every_file_of_the_package_is_counted() -> None:
    counted = set(files_of(parts()))
    assert counted == {path for path in files_of(["."]) if path.suffix == ".py"}
