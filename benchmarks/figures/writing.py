"""What all blocks of figures share: reading results, picking entries, and writing Markdown."""

from __future__ import annotations

import functools
import json
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
GIB = 2**30


@functools.cache
def stored(name: str) -> Any:
    """The result NAME.json: its "results", where it is a report of a command."""
    value = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return value["results"] if isinstance(value, dict) and "schema_version" in value and "results" in value else value


def pick(entries: Iterable[dict[str, Any]], **wanted: Any) -> dict[str, Any]:
    """The one entry with these values. Raises ValueError where there is none or several."""
    (found,) = (entry for entry in entries if all(entry[key] == value for key, value in wanted.items()))
    return found


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, words: int = 1) -> str:
    """A table whose first `words` columns are words, the others numbers."""
    rule = "|" + "---|" * words + "--:|" * (len(head) - words)
    return "\n".join([line(head), rule, *(line(row) for row in rows)])


def line(cells: Sequence[str]) -> str:
    """One row of a table."""
    return "| " + " | ".join(cells) + " |"


def paragraph(text: str, first: str = "", rest: str = "") -> str:
    """Text in lines of 120 characters."""
    return textwrap.fill(
        " ".join(text.split()),
        width=120,
        initial_indent=first,
        subsequent_indent=rest,
        break_long_words=False,
        break_on_hyphens=False,
    )


def bullets(*texts: str) -> str:
    """A list, one entry for each text."""
    return "\n".join(paragraph(text, "- ", "  ") for text in texts)


def spanning(values: Iterable[float], digits: int = 1, scale: float = 1.0) -> str:
    """The least and the most, "2.1 to 2.4", or one number where they read alike."""
    shown = [f"{scale * value:.{digits}f}" for value in sorted(values)]
    return shown[0] if shown[0] == shown[-1] else f"{shown[0]} to {shown[-1]}"


def each(values: Iterable[float], digits: int = 1, scale: float = 1.0) -> str:
    """All of them: "5.0, 4.9 and 4.9"."""
    shown = [f"{scale * value:.{digits}f}" for value in values]
    return f"{', '.join(shown[:-1])} and {shown[-1]}" if len(shown) > 1 else shown[0]


def percent(share: float, digits: int = 1) -> str:
    """A share as a number of per cent, without the sign."""
    return f"{100 * share:.{digits}f}"


def significant(value: float) -> str:
    """Three digits of a time: 2.54, 15.2."""
    return f"{value:.2f}" if value < 9.995 else f"{value:.1f}"


def linked(name: str, text: str | None = None) -> str:
    """A link to a result, as a page of docs/ writes it."""
    return f"[{text or f'{name}.json'}](../benchmarks/results/{name}.json)"
