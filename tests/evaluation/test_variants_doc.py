"""The figures of docs/variants.md are those of the measurement, and every policy it names can be asked for."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from expertshare.routing import POLICIES, parse_policy

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "variants.md").read_text(encoding="utf-8")
REPORT = json.loads((ROOT / "benchmarks" / "results" / "variants.json").read_text(encoding="utf-8"))
ROWS = [line.split(" | ") for line in PAGE.splitlines() if re.match(r"\| .* \| .*`[a-z-]+:", line)]
PAIRS = [(row[1].strip("`"), row[2].strip("`"), row[3]) for row in ROWS if row[1].startswith("`") and ":" in row[1]]


def _shown(comparison: dict[str, Any]) -> str:
    value, low, high = (f"{100 * part:+.1f}" for part in comparison["difference"])
    return f"{value} [{low}, {high}]"


@pytest.mark.parametrize(("variant", "plain", "told"), PAIRS)
def test_a_row_of_the_table_is_one_that_was_measured(variant: str, plain: str, told: str) -> None:
    measured = [c for c in REPORT["comparisons"] if (c["variant"], c["plain"]) == (variant, plain)]
    assert told in [_shown(comparison) for comparison in measured]


def test_the_table_was_read() -> None:
    assert len(PAIRS) >= 14


def test_every_interval_of_the_page_was_measured() -> None:
    shown = {_shown(comparison) for comparison in REPORT["comparisons"]}
    named = re.findall(r"([+-]\d+\.\d) (?:points )?(\[[^\]]*\])", PAGE)
    assert len(named) > 20
    for value, interval in named:
        assert f"{value} {interval}" in shown


def test_policies_that_the_page_names_can_be_asked_for() -> None:
    named = [text for text in re.findall(r"`([a-z-]+:[a-z_=,0-9.-]+)`", PAGE) if text.split(":")[0] in POLICIES]
    assert len(named) > 20
    for text in named:
        parse_policy(text)
