"""Where words for people go, and how numbers are written in tables."""

from __future__ import annotations

import json
import sys
from typing import Any

import typer
from rich.console import Console

from expertshare.experts import StoreStatistics

PLAIN_WIDTH = 120


def people(*, as_json: bool) -> Console:
    """stdout, or stderr where stdout is for JSON. A pipe has no width of its own."""
    stream = sys.stderr if as_json else sys.stdout
    return Console(file=stream, width=None if stream.isatty() else PLAIN_WIDTH, highlight=False)


def print_json(value: Any) -> None:
    """One line on stdout. A number that JSON does not have is a bug, not output."""
    typer.echo(json.dumps(value, ensure_ascii=False, allow_nan=False))


def megabytes(count: int) -> str:
    """Bytes in units of a million."""
    return f"{count / 1e6:,.1f}"


def store_summary(statistics: StoreStatistics) -> str:
    """What was asked of an expert store, in a line."""
    total = statistics.total
    if statistics.kind == "mmap":
        return f"experts: mapped, {total.requests:,} borrowed"
    room = f"{statistics.slots:,} slots of {megabytes(statistics.slot_bytes)} MB"
    copied = f", {megabytes(total.copies * statistics.slot_bytes)} MB copied to the GPU" if total.copies else ""
    read = f"{megabytes(total.reads * statistics.slot_bytes)} MB read{copied}, {total.stall_s:.2f} s waited"
    return f"experts: {room}; {percent(total.hit_rate)} % of {total.requests:,} there; {read}"


def percent(share: float | None) -> str:
    """A share as a percentage; a dash where there is none."""
    return "-" if share is None else f"{100 * share:.1f}"


def percent_within(share: float | None, interval: list[float] | None) -> str:
    """A share and its interval, in per cent."""
    if share is None or interval is None:
        return percent(share)
    return f"{percent(share)} [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"
