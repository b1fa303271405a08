"""docs/how-it-works.md names the packages as the import contracts have them, and files that are there."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "how-it-works.md").read_text(encoding="utf-8")
PACKAGE = ROOT / "src" / "expertshare"


def test_the_packages_are_those_of_the_import_contracts() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    layers = next(c for c in contracts["contracts"] if c.get("containers") == ["expertshare"])["layers"]
    listed = re.search(r"## Packages.*?```\n(.*?)```", PAGE, re.DOTALL)
    assert listed is not None
    assert listed[1].splitlines() == [re.sub(r"[()]", "", layer) for layer in layers]


def test_every_file_that_it_names_is_there() -> None:
    named = set(re.findall(r"\b((?:[a-z_]+/)+[a-z_]+\.(?:py|cpp|h))\b", PAGE.replace("src/expertshare/", "")))
    assert len(named) > 15
    missing = sorted(
        name for name in named if not (PACKAGE / name).is_file() and not (PACKAGE / "native" / name).is_file()
    )
    assert missing == []
