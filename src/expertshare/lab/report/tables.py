"""Figures and sections of the page, and stored numbers as tables of text, also for readers who cannot see pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
    caption: str
    sources: tuple[Source, ...]
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


def section(slug: str, title: str, text: str, missing: str) -> Callable[[Callable[..., list[Figure]]], Maker]:
    """Make the decorated function, which gives the figures of some results, give their section."""

    def wrap(figures: Callable[[Sequence[Source]], list[Figure]]) -> Maker:
        def make(sources: Sequence[Source]) -> Section:
            found = tuple(replace(each, slug=f"{slug}-{n}") for n, each in enumerate(figures(sources), 1))
            return Section(slug=slug, title=title, text=text, missing=missing, figures=found)

        return make

    return wrap


def percent(share: float | None, digits: int = 1) -> str:
    """A share as a percentage; a dash where there is none."""
    return DASH if share is None else f"{100 * share:.{digits}f}"


def number(value: float | None, digits: int = 1) -> str:
    """With a fixed number of digits, and a dash for none."""
    return DASH if value is None else f"{value:,.{digits}f}"


def within(share: float | None, interval: Sequence[float] | None) -> Cell:
    """A share with its interval, in per cent."""
    if share is None or interval is None:
        return Cell(percent(share))
    return Cell(percent(share), f"{percent(interval[0])} to {percent(interval[1])}")


def plain_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A table of cells without notes."""
    return Table(head=tuple(head), rows=tuple(tuple(Cell(text) for text in row) for row in rows))


def main_table(comparison: Values) -> Table:
    """A row for every policy: experts, accuracy by task, what is retained, the difference to vanilla."""
    runs = comparison["runs"]
    columns: dict[str, Callable[[Values], Cell]] = {
        "policy": lambda run: Cell(run["label"]),
        "unique experts": lambda run: Cell(number(run["unique_experts"]["denoise"])),
        "fewer, %": lambda run: Cell(percent(run["unique_experts_reduction"])),
    }
    for task in dict.fromkeys(task for run in runs for task in run["tasks"]):
        columns[f"{task}, %"] = _task_column(task)
    if any(run["accuracy"] is not None for run in runs):
        columns["retained, %"] = lambda run: Cell(percent(run["retained"]))
        columns["capped, %"] = lambda run: within(run["retained_capped"], run.get("retained_capped_interval"))
    if any(run["difference"] for run in runs):
        columns["against vanilla, points"] = lambda run: _difference(run["difference"])
    if any(run["agreement"] is not None for run in runs):
        columns["tokens as vanilla, %"] = lambda run: Cell(percent(run["agreement"]))
    return Table(head=tuple(columns), rows=tuple(tuple(cell(run) for cell in columns.values()) for run in runs))


def _task_column(task: str) -> Callable[[Values], Cell]:
    def cell(run: Values) -> Cell:
        found = run["tasks"].get(task)
        return within(found["accuracy"], found["interval"]) if found else Cell(DASH)

    return cell


def _difference(found: Values | None) -> Cell:
    if found is None:
        return Cell(DASH)
    return Cell(f"{100 * found['value']:+.1f}", f"{100 * found['low']:+.1f} to {100 * found['high']:+.1f}")


def tuning_table(tuned: Values) -> Table:
    """Vanilla and every tested policy, in the order of testing."""
    bound = f"{100 * tuned['options']['confidence']:g} % bound, %"
    verdicts = {None: DASH, True: "yes", False: "no"}
    rows = [
        (
            run["label"],
            number(run["unique_experts"]),
            percent(run["retained"], 2),
            percent(run["lower_bound"], 2),
            f"{run['counts']['lost']}",
            f"{run['counts']['gained']}",
            verdicts[run.get("passed")],
        )
        for run in (tuned["vanilla"], *tuned["tested"])
    ]
    return plain_table(("policy", "unique experts", "kept, %", bound, "lost", "gained", "certified"), rows)


def latency_table(cases: Sequence[Values]) -> Table:
    """Milliseconds of an expert layer by unique experts, a column for each contender. The bound is that of weights
    that are not quantised, where there are any."""
    backends = list(dict.fromkeys(case["backend"] for case in cases))
    points: dict[tuple[str, int, int], list[Values]] = {}
    for case in cases:
        points.setdefault((case["case"], case["tokens"], case["unique"]), []).append(case)
    rows = []
    for (name, tokens, unique), here in points.items():
        plain = [case for case in here if case.get("quantisation") is None]
        ms = {case["backend"]: case["ms"] for case in here}
        bound = min(case["bound_ms"] for case in plain or here)
        rows.append([name, f"{tokens}", f"{unique}", number(bound, 2), *(number(ms.get(b), 2) for b in backends)])
    return plain_table(("case", "tokens", "unique experts", "bound, ms", *(f"{b}, ms" for b in backends)), rows)


def parts_table(forwards: Sequence[Values]) -> Table:
    """Milliseconds of one forward by part of the model."""
    parts = list(dict.fromkeys(part for forward in forwards for part in forward.get("ms_by_part", {})))
    rows = [
        (
            f"{forward['backend']}, {forward['policy']}",
            number(forward.get("unique_experts")),
            number(forward["ms"]),
            *(number(forward.get("ms_by_part", {}).get(part)) for part in parts),
        )
        for forward in forwards
    ]
    return plain_table(("backend, policy", "unique experts", "all, ms", *(f"{part}, ms" for part in parts)), rows)
