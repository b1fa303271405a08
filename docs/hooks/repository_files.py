"""Pages link to files of the repository outside docs/ (reports, examples): this puts these files beside the pages.

So links work on the site as they do in the repository, and from disk. A link to a file that does not exist stays as
it is, and the strict build names it.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
FOLDER = "repository"
LINK = re.compile(r"\]\(\.\./((?!\.\./)[^)#\s]+)\)")


def on_files(files: Files, config: Any) -> Files:
    """Add what pages link to."""
    for page in list(files.documentation_pages()):
        for target in LINK.findall(_text(page)):
            where = ROOT / target
            name = _name(target)
            if where.is_file() and files.get_file_from_path(name) is None:
                files.append(File.generated(config, name, abs_src_path=str(where)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Point links at the added copies; only pages directly in docs/ have such links."""
    return LINK.sub(lambda m: f"]({_name(m[1])})" if (ROOT / m[1]).is_file() else m[0], markdown)


def _name(target: str) -> str:
    """Where a file goes. Markdown would be taken for a page of the site."""
    path = PurePosixPath(FOLDER, target)
    return str(path.with_suffix(".md.txt") if path.suffix == ".md" else path)


def _text(page: File) -> str:
    return Path(page.abs_src_path).read_text(encoding="utf-8") if page.abs_src_path and "/" not in page.src_uri else ""
