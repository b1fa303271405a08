"""The page: one HTML file that loads nothing, and its pictures."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from tempfile import TemporaryDirectory

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

import expertshare
from expertshare.errors import InputError
from expertshare.lab.report import comparisons, measured
from expertshare.lab.report.figures import Section
from expertshare.lab.report.sources import VERDICTS, Claim, Source, read_sources, stored_claims

PAGE = "report.html"
ORDER = (
    *(comparisons.main, comparisons.p_sweep, comparisons.block_lengths, comparisons.quality),
    *(measured.steps, measured.weights, measured.growth),
    *(measured.parts, measured.latency, measured.answers, measured.tuning),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class WrittenReport:
    """What was written. page: the HTML file; images: the PNG files, in the order of the page; missing: titles of
    sections that no file had anything for."""

    page: Path
    images: tuple[Path, ...]
    missing: tuple[str, ...]


def write_report(
    paths: Sequence[str | Path],
    out: str | Path,
    *,
    title: str = "Expert sharing: what was measured",
    claims: bool = True,
) -> WrittenReport:
    """Make a page from stored results: at `out`, if that ends in .html, else with its PNG files in the folder `out`.

    claims: what papers claim too, from the repository. Raises InputError for anything that is no known result, for a
    path that cannot be written, and for claims outside of a clone.
    """
    sources = read_sources(paths)
    parts = sections(sources)
    resolved = stored_claims() if claims else []
    target = Path(out)
    alone = target.suffix == ".html"
    with TemporaryDirectory() as folder:
        if not alone:
            with _writing("a folder that can be made, or a name ending in .html", target):
                target.mkdir(parents=True, exist_ok=True)
        drawn = draw_all(parts, Path(folder) if alone else target)
        page = target if alone else target / PAGE
        text = render(sources, parts, drawn, title=title, claims=resolved)
        with _writing("a path that can be written", page):
            page.write_text(text, encoding="utf-8")
    images = () if alone else tuple(drawn.values())
    return WrittenReport(page=page, images=images, missing=tuple(part.title for part in parts if not part.figures))


def sections(sources: Sequence[Source]) -> list[Section]:
    """All parts in the order of the page, those without a figure included."""
    return [make(sources) for make in ORDER]


def draw_all(parts: Sequence[Section], folder: Path) -> dict[str, Path]:
    """Draw every figure into `folder` as PNG, named by its slug. Raises InputError where it cannot be written."""
    drawn = {}
    for figure in (figure for part in parts for figure in part.figures):
        if figure.draw is not None:
            drawn[figure.slug] = folder / f"{figure.slug}.png"
            figure.draw(drawn[figure.slug])
    return drawn


def render(
    sources: Sequence[Source],
    parts: Sequence[Section],
    drawn: Mapping[str, Path],
    *,
    title: str,
    claims: Sequence[Claim],
) -> str:
    """The page as text. drawn: the picture of each figure by its slug."""
    package = resources.files("expertshare.lab.report")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["unbroken"] = lambda text: text.replace(" %", "\N{NO-BREAK SPACE}%")  # no line ends there
    template = environment.from_string(package.joinpath("page.html.jinja").read_text(encoding="utf-8"))
    found = Counter(claim.verdict for claim in claims)
    text = template.render(
        title=title,
        version=expertshare.__version__,
        style=Markup(package.joinpath("style.css").read_text(encoding="utf-8")),
        sources=sources,
        shown=[part for part in parts if part.figures],
        missing=[part for part in parts if not part.figures],
        images={slug: _data_uri(path) for slug, path in drawn.items()},
        claims=claims,
        verdicts=[(verdict, found[verdict]) for verdict in VERDICTS if found[verdict]],
    )
    return text.lstrip() + "\n"


def _data_uri(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii")


@contextmanager
def _writing(what: str, path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"expected {what}, got {path}: {error.strerror}") from error
