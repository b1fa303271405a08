"""Stored figures as tables of text, for the page and for who cannot see its pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Values = Mapping[str, Any]


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


def percent(share: float | None, digits: int = 1) -> str:
    """A share as a percentage; a dash where there is none."""
    return "–" if share is None else f"{100 * share:.{digits}f}"  # noqa: RUF001


def number(value: float | None, digits: int = 1) -> str:
    """With a fixed number of digits, and a dash for none."""
    return "–" if value is None else f"{value:,.{digits}f}"  # noqa: RUF001


def within(share: float | None, interval: Sequence[float] | None) -> Cell:
    """A share with its interval, in per cent."""
    if share is None or interval is None:
        return Cell(percent(share))
    return Cell(percent(share), f"{percent(interval[0])} to {percent(interval[1])}")


def main_table(comparison: Values) -> Table:
    """A row for every policy: experts, accuracy by task, what is retained, the difference to vanilla."""
    runs = comparison["runs"]
    tasks = list(dict.fromkeys(task for run in runs for task in run["tasks"]))
    columns: dict[str, Callable[[Values], Cell]] = {
        "policy": lambda run: Cell(run["label"]),
        "unique experts": lambda run: Cell(number(run["unique_experts"]["denoise"])),
        "fewer, %": lambda run: Cell(percent(run["unique_experts_reduction"])),
    }
    for task in tasks:
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
        return within(found["accuracy"], found["interval"]) if found else Cell(percent(None))

    return cell


def _difference(found: Values | None) -> Cell:
    if found is None:
        return Cell(percent(None))
    return Cell(f"{100 * found['value']:+.1f}", f"{100 * found['low']:+.1f} to {100 * found['high']:+.1f}")


def plain_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Cells without notes."""
    return Table(head=tuple(head), rows=tuple(tuple(Cell(text) for text in row) for row in rows))


def tuning_table(tuned: Values) -> Table:
    """Vanilla and every tested policy, in the order of testing."""
    runs = [tuned["vanilla"], *tuned["tested"]]
    bound = f"{100 * tuned['options']['confidence']:g} % bound, %"
    verdicts = {None: "–", True: "yes", False: "no"}  # noqa: RUF001
    return plain_table(
        ("policy", "unique experts", "kept, %", bound, "lost", "gained", "certified"),
        [
            (
                run["label"],
                number(run["unique_experts"]),
                percent(run["retained"], 2),
                percent(run["lower_bound"], 2),
                f"{run['counts']['lost']}",
                f"{run['counts']['gained']}",
                verdicts[run.get("passed")],
            )
            for run in runs
        ],
    )


def latency_table(cases: Sequence[Values]) -> Table:
    """Milliseconds of an expert layer by unique experts, a column for each contender. The bound is that of weights
    that are not quantised, where there are any."""
    backends = list(dict.fromkeys(case["backend"] for case in cases))
    places = list(dict.fromkeys((case["case"], case["tokens"], case["unique"]) for case in cases))
    found = {(case["case"], case["tokens"], case["unique"], case["backend"]): case for case in cases}
    rows = []
    for place in places:
        here = [case for case in cases if (case["case"], case["tokens"], case["unique"]) == place]
        plain = [case for case in here if case.get("quantisation") is None]
        bound = min(case["bound_ms"] for case in plain or here)
        cells = [found.get((*place, backend)) for backend in backends]
        shown = [number(case["ms"] if case else None, 2) for case in cells]
        rows.append([place[0], f"{place[1]}", f"{place[2]}", number(bound, 2), *shown])
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
