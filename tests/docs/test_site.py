"""The documentation site builds without a warning, has every page, and asks nothing of a network."""

from __future__ import annotations

import importlib.util
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from expertshare import api

from .examples import PAGES, ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="the extra `docs` is not installed"),
]
FETCHED = re.compile(r"<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)=\"?(?:https?:)?//(?!$)[^\">\s]+", re.IGNORECASE)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(out)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_every_page_is_there(site: Path) -> None:
    for page in PAGES:
        if page.parent.name == "docs":
            assert (site / f"{page.stem}.html").is_file(), page


def test_every_page_can_be_reached(site: Path) -> None:
    """A page that is in no menu is found by nobody."""
    menu = (site / "index.html").read_text(encoding="utf-8")
    for page in site.glob("*.html"):
        if page.name not in ("404.html", "index.html"):
            assert f'href="{page.name}"' in menu, page.name


def test_the_reference_has_the_public_names(site: Path) -> None:
    verbs = (site / "reference" / "api.html").read_text(encoding="utf-8")
    functions = [name for name in api.__all__ if inspect.isfunction(getattr(api, name))]
    assert len(functions) >= 8
    for name in functions:
        assert f'id="expertshare.api.{name}"' in verbs, name
    values = (site / "reference" / "types.html").read_text(encoding="utf-8")
    assert 'id="expertshare.types.RoutingPlan"' in values


def test_linked_files_of_the_repository_come_along(site: Path) -> None:
    assert (site / "repository" / "examples" / "prompts.jsonl").is_file()
    contracts = (site / "contracts.html").read_text(encoding="utf-8")
    assert 'href="repository/examples/prompts.jsonl"' in contracts


def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    for path in site.rglob("*.html"):
        assert not FETCHED.findall(path.read_text(encoding="utf-8")), path
    for path in site.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(?:https?:)?//|@import ['\"]?http", path.read_text(encoding="utf-8")), path
