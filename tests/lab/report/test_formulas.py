"""Names with dollar signs are names: no picture reads them as formulas."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from expertshare.lab.report.page import write_report


def _rename(value: Any) -> Any:
    """Every name that a picture shows, spoilt."""
    if isinstance(value, list):
        return [_rename(entry) for entry in value]
    if isinstance(value, dict):
        names = ("label", "case", "backend", "policy")
        return {key: f"{x}:$x^$" if key in names and isinstance(x, str) else _rename(x) for key, x in value.items()}
    return value


@pytest.mark.parametrize("name", ["block-length-32", "forward-mini", "experts-mini-width", "steps-distribution"])
def test_a_name_that_is_no_formula(changed: Callable[..., Path], tmp_path: Path, name: str) -> None:
    def spoil(value: dict[str, Any]) -> None:
        value.update(_rename({key: entry for key, entry in value.items() if key in ("runs", "reference", "results")}))

    done = write_report([changed(name, spoil)], tmp_path / "page.html")
    assert ":$x^$" in done.page.read_text(encoding="utf-8")
