"""docs/add-a-verb.md, done as it says: the file is written, the line stands in the table, and the verb works."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import expertshare.cli
from expertshare.cli import main

ROOT = Path(__file__).parents[2]
PROGRAM = importlib.import_module("expertshare.cli.app")
LINE, FILE = re.findall(
    r"```python\n(.*?)```", (ROOT / "docs" / "add-a-verb.md").read_text(encoding="utf-8"), re.DOTALL
)


@pytest.fixture
def count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "count.py").write_text(FILE, encoding="utf-8")
    monkeypatch.setattr(expertshare.cli, "__path__", [*expertshare.cli.__path__, str(tmp_path)])
    (name, text) = re.findall(r'"(.*?)"', LINE)
    monkeypatch.setitem(PROGRAM.VERBS, name, text)
    PROGRAM.app.command(name, help=text)(lambda: None)
    yield
    PROGRAM.app.registered_commands.pop()
    importlib.invalidate_caches()


@pytest.mark.usefixtures("count")
def test_the_verb_of_the_page_works(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["count", str(ROOT / "models" / "reference"), "--experts", "16", "--json"])
    assert left.value.code == 0
    facts = expertshare.api.info(str(ROOT / "models" / "reference"))
    assert json.loads(capsys.readouterr().out) == {"expert_bytes": 16 * facts.bytes_per_expert}
    with pytest.raises(SystemExit) as left:
        main(["count", str(ROOT / "models" / "reference"), "--experts", "2"])
    assert left.value.code == 2
    assert "expected at least" in capsys.readouterr().err


@pytest.mark.usefixtures("count")
def test_it_stands_in_the_programs_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "count" in capsys.readouterr().out
