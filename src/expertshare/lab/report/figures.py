"""Figures and sections of the page, and tables of text, also for readers who cannot see pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from expertshare.lab.report.sources import Source

Values = Mapping[str, Any]
DASH = "–"  # noqa: RUF001


@dataclass(frozen=True, slots=True)
class Cell:
    """What stands in a cell; note: smaller, behind it, for example an interval."""

    text: str
    note: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """Rows of cells, the first of each naming the row; as many as `head` has."""

    head: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """A picture, a table, or both. alt: the picture in words; draw: writes it to a path; sources: what it comes from.
    slug: given by the section."""

    title: str
    caption: str = ""
    sources: tuple[Source, ...] = ()
    alt: str = ""
    table: Table | None = None
    draw: Callable[[Path], None] | None = None
    slug: str = ""

    def __post_init__(self) -> None:
        assert self.draw is None or self.alt, f"{self.title} has a picture without words"


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """A part of the page. text: what to know before its figures; missing: the command that gives it one."""

    slug: str
    title: str
    text: str
    missing: str
    figures: tuple[Figure, ...] = ()


Maker = Callable[[Sequence[Source]], Section]


def section(title: str, missing: str, *, kind: str = "", needs: str = "") -> Callable[[Callable[..., Any]], Maker]:
    """Make the decorated function, which gives the figures of some results, give their section: the page shows its
    docstring above them. With a `kind` it draws one result, and is given every one of that kind which holds any
    `needs`."""

    def wrap(draw: Callable[..., Any]) -> Maker:
        slug, text = draw.__name__.replace("_", "-"), " ".join((draw.__doc__ or "").split())

        def make(sources: Sequence[Source]) -> Section:
            figures = each_of(kind, draw, sources, needs) if kind else draw(sources)
            found = tuple(replace(each, slug=f"{slug}-{n}") for n, each in enumerate(figures, 1))
            return Section(slug=slug, title=title, text=text, missing=missing, figures=found)

        return make

    return wrap


def each_of(kind: str, draw: Callable[[Source], Figure], sources: Sequence[Source], needs: str) -> list[Figure]:
    """A figure of every result of a kind that holds any `needs`."""
    mine = [each for each in sources if each.kind == kind and (not needs or each.results[needs])]
    return [replace(draw(each), sources=(each,)) for each in mine]


def percent(share: float | None, digits: int = 1) -> str:
    """A share as a percentage; a dash where there is none."""
    return DASH if share is None else f"{100 * share:.{digits}f}"


def number(value: float | None, digits: int = 1) -> str:
    """With a fixed number of digits, and a dash for none."""
    return DASH if value is None else f"{value:,.{digits}f}"


Columns = Mapping[str, Callable[[Any], str | Cell]]
"""Of a table: what stands in a row, under the name of its column."""


def table_of(rows: Iterable[Any], columns: Columns) -> Table:
    """A table with a row for each of `rows`."""
    cells = [tuple(column(row) for column in columns.values()) for row in rows]
    return plain_table(tuple(columns), cells)


def plain_table(head: Sequence[str], rows: Sequence[Sequence[str | Cell]]) -> Table:
    """A table of cells, without notes where they are only text."""
    full = tuple(tuple(Cell(text) if isinstance(text, str) else text for text in row) for row in rows)
    return Table(head=tuple(head), rows=full)
