"""Public functions and classes say what they are for, in more than four words."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "expertshare"
LEAST = 5


def short(path: Path) -> Iterator[str]:
    """Public functions, methods and classes of a file whose docstring is missing or too short."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    todo: list[tuple[ast.AST, str]] = [(tree, "")]
    while todo:
        node, prefix = todo.pop()
        for inner in ast.iter_child_nodes(node):
            if not isinstance(inner, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) or inner.name[0] == "_":
                continue
            words = (ast.get_docstring(inner) or "").split()
            if len(words) < LEAST and not overrides(inner):
                said = " ".join(words) or "nothing"
                yield f"{path.relative_to(PACKAGE)}:{inner.lineno}: {prefix}{inner.name}: {said}"
            if isinstance(inner, ast.ClassDef):
                todo.append((inner, f"{inner.name}."))


def overrides(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> bool:
    """Whether a method says that another class has its documentation."""
    return any(isinstance(mark, ast.Name) and mark.id in ("override", "overload") for mark in node.decorator_list)


PARTS = sorted({path.relative_to(PACKAGE).parts[0] for path in PACKAGE.rglob("*.py")})


@pytest.mark.parametrize("part", PARTS)
def test_docstrings_say_more_than_four_words(part: str) -> None:
    place = PACKAGE / part
    files = sorted(place.rglob("*.py")) if place.is_dir() else [place]
    assert [found for file in files for found in short(file)] == []
