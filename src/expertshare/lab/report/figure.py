"""One figure of the page."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from expertshare.lab.report.sources import Source
from expertshare.lab.report.tables import Table


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """A picture, a table, or both. alt: the picture in words; draw: puts it at a path; sources: what it comes from."""

    slug: str
    title: str
    caption: str
    sources: tuple[Source, ...]
    alt: str = ""
    table: Table | None = None
    draw: Callable[[Path], None] | None = None

    def __post_init__(self) -> None:
        assert self.draw is None or self.alt, f"{self.slug} has a picture without words"
