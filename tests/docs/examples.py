"""What README.md and docs/*.md tell a reader to type: commands and Python, found where they stand."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"`(expertshare [^`]+)`")
SHELLS = ("sh", "bash", "console")


@dataclass(frozen=True, slots=True)
class Example:
    """page: by name. line: where it begins, from 1. text: a command on one line, or the code of a block."""

    page: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def words(self) -> list[str]:
        """Of a command, without comments."""
        return shlex.split(self.text, comments=True)


def python_blocks() -> list[Example]:
    """Fenced blocks in Python."""
    return [block for page in PAGES for language, block in _blocks(page) if language == "python"]


def command_lines() -> list[Example]:
    """Lines of shell blocks, and of blocks without a language or indented ones that begin with `expertshare`."""
    return [line for page in PAGES for line in (*_fenced(page), *_indented(page))]


def inline_commands() -> list[Example]:
    """`expertshare ...` within sentences."""
    found = []
    for page in PAGES:
        text = FENCE.sub(lambda m: "\n" * m[0].count("\n"), page.read_text(encoding="utf-8"))
        found += [_example(page, text, match.start(), " ".join(match[1].split())) for match in INLINE.finditer(text)]
    return found


def _blocks(page: Path) -> list[tuple[str, Example]]:
    text = page.read_text(encoding="utf-8")
    return [(match[1], _example(page, text, match.start(), match[2])) for match in FENCE.finditer(text)]


def _fenced(page: Path) -> list[Example]:
    found = []
    for language, block in _blocks(page):
        joined = _joined(block)
        if language in SHELLS:
            found += joined
        elif language == "":
            found += [line for line in joined if line.text.startswith(("expertshare ", "pytest "))]
    return found


def _indented(page: Path) -> list[Example]:
    text = FENCE.sub(lambda m: "\n" * m[0].count("\n"), page.read_text(encoding="utf-8"))
    return [
        _example(page, text, match.start(), match[1]) for match in re.finditer(r"^    (expertshare .*)$", text, re.M)
    ]


def _joined(block: Example) -> list[Example]:
    """The commands of a block, lines that end in a backslash joined with the next."""
    found: list[Example] = []
    begun, at = "", 0
    for number, line in enumerate(block.text.splitlines(), block.line + 1):
        at = at or number
        begun += line.removesuffix("\\") + " "
        if line.endswith("\\"):
            continue
        if begun.strip() and not begun.lstrip().startswith("#"):
            found.append(Example(block.page, at, begun.strip()))
        begun, at = "", 0
    return found


def _example(page: Path, text: str, offset: int, what: str) -> Example:
    return Example(str(page.relative_to(ROOT)), text.count("\n", 0, offset) + 1, what)
