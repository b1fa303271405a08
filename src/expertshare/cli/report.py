"""`expertshare report`: a page of figures from stored results."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from expertshare import api
from expertshare.cli import flags
from expertshare.cli.console import print_json
from expertshare.cli.options import option


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUNS...", help="Run directories of eval; files of compare, bench, tune, benchmarks/."),
    ],
    out: Path = option("Folder for report.html and PNG files; FILE.html: the page alone.", metavar="DIR"),
    title: str = option("Heading of the page.", api.DEFAULT_TITLE),
    claims: bool = option(
        "What papers claim, beside what was measured for this version.", True, "--claims/--no-claims"
    ),
    as_json: flags.Json = False,
) -> None:
    """Draw stored results as one HTML page that loads nothing, and as PNG files. Nothing is measured.

    A file that is no known result is refused by name. Captions hold file and command of every figure.

    Example: expertshare report runs/first compare.json benchmarks/results/experts-mini-3.json --out report/
    """
    written = api.report(runs, out, title=title, claims=claims)
    if as_json:
        images = [str(image) for image in written.images]
        print_json({"page": str(written.page), "images": images, "missing": list(written.missing)})
        return
    typer.echo(f"{written.page}" + (f" and {len(written.images)} PNG files beside it" if written.images else ""))
    if written.missing:
        typer.echo(f"no file had anything for: {', '.join(written.missing)}")
