"""Write every figure of README.md and docs/ from the stored results, and the claims that a report shows.

    make figures, or python benchmarks/figures

    --check    write nothing; name the documents that hold something else than the results say, and fail

A document says where a figure stands:

    <!-- figures: NAME --> ... <!-- end -->

within a line, or on lines of their own around a table, a paragraph or a list. What stands between is replaced by what
the function NAME (with _ for -) of the files beside this one makes of benchmarks/results. No marker begins a line of a
paragraph, where Markdown would take it for a block.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import claims
import code_map
import gpus
import memory
import peers
import speed
from writing import ROOT

import models

BLOCK = re.compile(r"<!-- figures: (?P<name>[a-z0-9-]+) -->(?P<text>.*?)<!-- end -->", re.DOTALL)
MODULES = (claims, code_map, gpus, memory, models, peers, speed)


def blocks() -> dict[str, Callable[[], str]]:
    """Every block by its name: the functions that are defined in the files beside this one and have no argument."""
    found: dict[str, Callable[[], str]] = {}
    for module in MODULES:
        for name in module.BLOCKS:
            key = name.replace("_", "-")
            assert key not in found, f"two blocks are called {key}"
            found[key] = getattr(module, name)
    return found


def documents() -> Iterator[Path]:
    """README and the pages of docs/."""
    yield ROOT / "README.md"
    yield from sorted((ROOT / "docs").glob("*.md"))


def rewritten(text: str, known: dict[str, Callable[[], str]]) -> str:
    """The document with every block as the results say. Raises KeyError for a name that is no block."""

    def fill(match: re.Match[str]) -> str:
        name, before = match["name"], text[: match.start()]
        made = known[name]()
        alone = not before or before.endswith("\n")
        around = "\n\n" if alone else ""
        made = made if alone else " ".join(made.split())
        return f"<!-- figures: {name} -->{around}{made}{around}<!-- end -->"

    return BLOCK.sub(fill, text)


def main() -> None:
    """Rewrite, or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check, known, changed = parser.parse_args().check, blocks(), []
    for document, new in (
        *((page, rewritten(page.read_text("utf-8"), known)) for page in documents()),
        claims.stored(),
    ):
        if not document.exists() or new != document.read_text(encoding="utf-8"):
            changed.append(str(document.relative_to(ROOT)))
            if not check:
                document.write_text(new, encoding="utf-8")
    told = "differs from the results: run make figures" if check else "written"
    print("\n".join(f"{name}: {told}" for name in changed) or "every document holds what the results say")
    sys.exit(check and bool(changed))


if __name__ == "__main__":
    main()
