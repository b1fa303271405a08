"""Words and tables for people, JSON for programs, progress on a terminal, and files that a verb will write."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import typer
from rich import box, progress
from rich.console import Console
from rich.progress import Progress, ProgressColumn, TaskID
from rich.table import Table

from expertshare.measure.report import check_writable

PLAIN_WIDTH, WIDEST_LABEL = 120, 40
Row = TypeVar("Row")
VERDICTS = {None: "-", True: "yes", False: "no"}


def people(*, as_json: bool) -> Console:
    """stdout, or stderr where stdout is for JSON. A pipe has no width of its own."""
    stream = sys.stderr if as_json else sys.stdout
    return Console(file=stream, width=None if stream.isatty() else PLAIN_WIDTH, highlight=False)


def print_json(value: Any) -> None:
    """One line on stdout. A number that JSON does not have is a bug, not output."""
    typer.echo(json.dumps(value, ensure_ascii=False, allow_nan=False))


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


def check_outputs(*paths: Path | None, plot: Path | None = None) -> None:
    """Refuse files that could not be written, before hours of work. Raises InputError."""
    if plot is not None:
        from expertshare.lab.plots.style import check_plot_path  # only here: a picture needs matplotlib

        check_plot_path(plot)
    for path in (plot, *paths):
        if path is not None:
            check_writable(path)


class Bars(Progress):
    """A progress bar for each stage, e.g. a policy, on stderr, on a terminal only."""

    def __init__(self, *columns: ProgressColumn, shown: bool = True) -> None:
        console = Console(stderr=True)
        first, last = (progress.TextColumn("{task.description}"), progress.BarColumn()), progress.TimeRemainingColumn()
        columns = (*first, *(columns or (progress.MofNCompleteColumn(),)), last)
        super().__init__(*columns, console=console, disable=not (shown and console.is_terminal))
        self._bars: dict[str, TaskID] = {}

    def hear(self, label: str, done: int, total: int, **shown: Any) -> None:
        """So much of a stage is done. shown: fields of this bar's further columns."""
        if label not in self._bars:
            self._bars[label] = self.add_task(label, total=total, **shown)
        self.update(self._bars[label], completed=done, **shown)


def told_bars(*, shown: bool = True) -> Bars:
    """Bars with a word on how it goes (`said`) and the time gone by."""
    said = progress.TextColumn("{task.completed:.0f}/{task.total:.0f} {task.fields[said]}")
    return Bars(said, progress.TimeElapsedColumn(), shown=shown)


@contextmanager
def bytes_progress() -> Iterator[Callable[[str, int, int], None]]:
    """For gigabytes to be written: what to call with the file, bytes done and bytes in all."""
    console = Console(stderr=True)
    columns = (
        *(progress.TextColumn("{task.description}"), progress.BarColumn(), progress.DownloadColumn()),
        *(progress.TransferSpeedColumn(), progress.TimeRemainingColumn()),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as shown:
        bar = shown.add_task("", total=None)
        yield lambda name, done, total: shown.update(bar, description=name, completed=done, total=total)
