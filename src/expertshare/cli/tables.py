"""The one way in which the verbs print a table for people, and how numbers are written in it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from rich import box
from rich.table import Table

WIDEST_LABEL = 40
Row = TypeVar("Row")


def table(
    title: str | None,
    columns: Mapping[str, Callable[[Row], str]],
    rows: Iterable[Row],
    *,
    words: int = 1,
    widest: int = WIDEST_LABEL,
    compact: bool = False,
) -> Table:
    """One line for each row. columns: heading and cell of each; the first `words` hold text and stand on the left,
    folded where they are longer than `widest` and the terminal is narrow; the others hold numbers. compact: without
    lines between columns, for tables of many.
    """
    cells = [[cell(row) for cell in columns.values()] for row in rows]
    look: dict[str, Any] = {"box": box.SIMPLE_HEAD, "pad_edge": False, "collapse_padding": True} if compact else {}
    made = Table(title=title, title_justify="left", caption_justify="left", **look)
    for position, heading in enumerate(columns):
        if position < words:
            longest = max((len(line[position]) for line in cells), default=0)
            made.add_column(heading, overflow="fold", min_width=min(longest, widest))
        else:
            made.add_column(heading, justify="right")
    for line in cells:
        made.add_row(*line)
    return made


def megabytes(count: int) -> str:
    """Bytes in units of a million."""
    return f"{count / 1e6:,.1f}"


def figure(value: float | None, digits: int = 1) -> str:
    """A number with so many digits behind the point; a dash where there is none."""
    return "-" if value is None else f"{value:.{digits}f}"


def percent(share: float | None) -> str:
    """A share as a percentage; a dash where there is none."""
    return "-" if share is None else f"{100 * share:.1f}"


def percent_within(share: float | None, interval: list[float] | None) -> str:
    """A share and its interval, in per cent."""
    if share is None or interval is None:
        return percent(share)
    return f"{percent(share)} [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"
