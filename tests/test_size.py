"""How large the package may be. Lines are those of formatted code, empty ones and docstrings included; code that moves
into data, generated files or another language counts. A limit that is raised has its reason in CHANGELOG.md."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks" / "figures"))
from code_map import ENGINE, files_of, lines_of, parts

NATIVE = ("native/csrc",)

# The aim is 10,000 lines in 80 files for the engine and 30,000 for the package: these limits only go down.
MOST_LINES = {"engine": 10_850, "package": 33_100, "native": 4_500}
MOST_FILES_OF_THE_ENGINE = 70


@pytest.mark.parametrize(
    ("what", "names", "kinds"),
    [("engine", ENGINE, (".py",)), ("package", parts(), (".py",)), ("native", NATIVE, (".cpp", ".h"))],
)
def test_lines(what: str, names: Sequence[str], kinds: Sequence[str]) -> None:
    assert lines_of(files_of(names, kinds)) <= MOST_LINES[what]


def test_files_of_the_engine() -> None:
    assert len(files_of(ENGINE)) <= MOST_FILES_OF_THE_ENGINE


def test_every_file_of_the_package_is_counted() -> None:
    counted = set(files_of(parts()))
    assert counted == {path for path in files_of(["."]) if path.suffix == ".py"}
