"""Scripts of benchmarks/ import what is there: none is run by a test, and names move."""

from __future__ import annotations

import ast
import importlib
from importlib.util import find_spec
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.parametrize("script", sorted(BENCHMARKS.rglob("*.py")), ids=lambda path: path.name)
def test_a_script_imports_what_is_there(script: Path) -> None:
    for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "expertshare":
            module = importlib.import_module(node.module or "")
            gone = [name.name for name in node.names if not hasattr(module, name.name)]
            assert [name for name in gone if find_spec(f"{node.module}.{name}") is None] == []
