"""Stored results of this repository, and pages made from them."""

from __future__ import annotations

import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from expertshare.lab.report.page import WrittenReport, write_report

ROOT = Path(__file__).parents[3]
RESULTS = ROOT / "benchmarks" / "results"
NAMES = (
    *("policies", "p-sweep", "block-length-8", "block-length-16", "block-length-24", "block-length-32"),
    *("steps-distribution", "weight-against-loss", "expert-growth", "forward-mini", "experts-mini-width"),
    *("generate-reference", "tuning"),
)


def stored(name: str) -> Path:
    return RESULTS / f"{name}.json"


def content(name: str) -> dict[str, Any]:
    value = json.loads(stored(name).read_text(encoding="utf-8"))
    assert isinstance(value, dict)
    return value


class Elements(HTMLParser):
    """Every element of a page with its attributes, and all text outside of style."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self._in_style = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        self._in_style = tag == "style"

    def handle_endtag(self, tag: str) -> None:
        self._in_style = False

    def handle_data(self, data: str) -> None:
        if not self._in_style:
            self.text.append(data)

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> WrittenReport:
    """A page with every section."""
    return write_report([stored(name) for name in NAMES], tmp_path_factory.mktemp("page") / "out")


@pytest.fixture
def changed(tmp_path: Path) -> Callable[..., Path]:
    """A copy of a stored result after `change` has seen it."""

    def make(name: str, change: Callable[[dict[str, Any]], None]) -> Path:
        value = content(name)
        change(value)
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(value), encoding="utf-8")
        return path

    return make
