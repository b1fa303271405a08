"""Where words for people go, progress on a terminal, and files that a verb will write."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from expertshare.errors import InputError
from expertshare.measure.report import check_writable

PLAIN_WIDTH = 120


def people(*, as_json: bool) -> Console:
    """stdout, or stderr where stdout is for JSON. A pipe has no width of its own."""
    stream = sys.stderr if as_json else sys.stdout
    return Console(file=stream, width=None if stream.isatty() else PLAIN_WIDTH, highlight=False)


def print_json(value: Any) -> None:
    """One line on stdout. A number that JSON does not have is a bug, not output."""
    typer.echo(json.dumps(value, ensure_ascii=False, allow_nan=False))


def check_outputs(*paths: Path | None, plot: Path | None = None) -> None:
    """Refuse files that could not be written, before hours of work. Raises InputError."""
    if plot is not None:
        from expertshare.lab.plots.style import check_plot_path  # only here: a picture needs matplotlib

        check_plot_path(plot)
    for path in (plot, *paths):
        if path is not None:
            check_writable(path)


def check_at_least_one(name: str, value: int | None) -> None:
    """InputError for a number below 1; None was not given."""
    if value is not None and value < 1:
        raise InputError(f"{name} must be at least 1, got {value}")


def split_names(listed: str) -> list[str]:
    """Names parted by commas, without spaces around them."""
    return [name.strip() for name in listed.split(",") if name.strip()]


class Bars(AbstractContextManager["Bars"]):
    """A progress bar for each stage, e.g. a policy, on stderr, on a terminal only."""

    def __init__(self, *columns: ProgressColumn, shown: bool = True) -> None:
        console = Console(stderr=True)
        columns = columns or (MofNCompleteColumn(),)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            *columns,
            TimeRemainingColumn(),
            console=console,
            disable=not (shown and console.is_terminal),
        )
        self._bars: dict[str, TaskID] = {}

    def __enter__(self) -> Bars:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def hear(self, label: str, done: int, total: int, **shown: Any) -> None:
        """So much of a stage is done. shown: fields of this bar's further columns."""
        if label not in self._bars:
            self._bars[label] = self._progress.add_task(label, total=total, **shown)
        self._progress.update(self._bars[label], completed=done, **shown)


def told_bars(*, shown: bool = True) -> Bars:
    """Bars with a word on how it goes (`said`) and the time gone by."""
    return Bars(
        TextColumn("{task.completed:.0f}/{task.total:.0f} {task.fields[said]}"), TimeElapsedColumn(), shown=shown
    )


@contextmanager
def bytes_progress() -> Iterator[Callable[[str, int, int], None]]:
    """For gigabytes to be written: what to call with the file, bytes done and bytes in all."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        bar = progress.add_task("", total=None)
        yield lambda name, done, total: progress.update(bar, description=name, completed=done, total=total)
