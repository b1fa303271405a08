"""The files of the page, read once from the package."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from importlib.resources import files

_MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
"""Nothing is loaded from anywhere else, nothing inline is run, nobody frames the page; caches ask for changes."""


@dataclass(frozen=True, slots=True)
class PageFile:
    """One file as it is sent."""

    content: bytes
    media_type: str
    etag: str


def read_page() -> Mapping[str, PageFile]:
    """Every file of the page by its name; a name that is not here does not exist, whatever lies on the disk."""
    page: dict[str, PageFile] = {}
    for entry in files(__package__).joinpath("static").iterdir():
        suffix = entry.name[entry.name.rfind(".") :]
        if suffix in _MEDIA_TYPES:
            content = entry.read_bytes()
            page[entry.name] = PageFile(content, _MEDIA_TYPES[suffix], f'"{sha256(content).hexdigest()[:32]}"')
    return page


def page_paths() -> tuple[str, ...]:
    """Where the page and its files are: what a browser has to get before it can ask for an API key. They tell nothing
    of the model."""
    return ("/", *(f"/live/{name}" for name in read_page()))
