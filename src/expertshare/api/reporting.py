"""A page of figures and claims from stored results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from expertshare.lab.report import WrittenReport, write_report

DEFAULT_TITLE = "Expert sharing: what was measured"


def report(
    runs: Sequence[str | Path], out: str | Path, *, title: str = DEFAULT_TITLE, claims: bool = True
) -> WrittenReport:
    """One self-contained HTML page from stored results, nothing measured anew.

    runs: run directories of `eval`, and files of `compare`, `bench`, `tune` and the scripts in benchmarks/. out: a
    name ending in .html for the page alone, else a folder for the page (report.html) and its pictures as PNG. claims:
    whether what papers claim is a part of it. Raises InputError, naming the file, for anything that is no known result.
    """
    return write_report(runs, out, title=title, claims=claims)
