"""README and docs hold what the stored results say: `make figures` writes every figure, and none is typed by hand."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"<!-- figures: ([a-z0-9-]+) -->.*?<!-- end -->", re.DOTALL)
UNIT = r"x|%|[KMGT]i?B(?:/s)?|ms|us|µs|s|tokens/s|G?MACs?(?:/s)?|times|points|experts|nats"
FIGURE = re.compile(rf"(?<![\w.=-])[+-]?\d[\d,]*(?:\.\d+)?\s?(?:{UNIT})(?![\w=(-])")
CODE = re.compile(r"^```.*?^```|^ {4}.*?$|`[^`]*`|\]\([^)]*\)|<[^>]*>", re.DOTALL | re.MULTILINE)

# Pages whose figures are records of their day, or of other people: never generated.
EXEMPT = {"experiments.md": "the log: an entry is not edited after its day"}

# What a page says in its own words, and why no result file holds it. A text that is gone must leave this list.
EVERYWHERE = {
    "95 %": "the level of all intervals",
    "100 %": "the end of a scale",
    "64 experts": "what the reference model and LLaDA-MoE have",
}
ALLOWED: dict[str, dict[str, str]] = {
    "README.md": {"99 % that papers report": "published"},
    "contracts.md": {"every 20 ms": "a constant of the sampler", "80 % chance": "a constant of the test"},
    "distillation.md": {"79.0 % fewer at 99.11 %": "published in dMoE"},
    "evaluation.md": {"480 MB": "size of an extra", "10,000 times": "draws of the bootstrap"},
    "live-page.md": {"for 30 s": "a constant of the server", "every 15 s": "the same"},
    "memory.md": {
        "samples of 4 KiB": "a constant of convert",
        "5 % of the memory": "a constant of plan",
        "reads of 4 MiB": "the same",
        "waits 100 ms": "a constant of the kernel",
        "8 GiB on the card": "an example",
        "up to 16 GiB": "an example",
        "at most 1 GiB": "torch's allocator",
        "or 10 % are masked": "a constant of make-checkpoint",
        "within 15 %": "the bound that a test holds",
        "by 2 % at a time": "a step of the search",
    },
    "peers.md": {"18 and 14 experts": "what another model gives; no result is kept"},
    "performance.md": {"16 times the last-level cache": "a constant of bench"},
    "ray.md": {"200 MB of object store": "a constant", "about 10 s": "Ray's autoscaler"},
    "report.md": {"30 to 80 % of the answer masked": "how the measurement is defined"},
    "scaling.md": {
        "(70 experts a block)": "what the records were made for",
        "27 experts a block": "of records in examples/routing",
    },
    "serving.md": {"within 30 s": "a constant of the server", "for 30 s": "the same"},
    "tuning.md": {"2 % of all": "a constant of the test", "80 % chance": "the same"},
}


def prose(page: Path) -> str:
    """The page without generated blocks, code, and targets of links."""
    return CODE.sub(" ", BLOCK.sub(" ", page.read_text(encoding="utf-8")))


def typed(page: Path) -> list[str]:
    """Lines of prose with a figure that no allowed text covers."""
    text = prose(page)
    for allowed in (*ALLOWED.get(page.name, {}), *EVERYWHERE):
        text = re.sub(re.escape(allowed).replace(r"\ ", r"\s+"), " ", text)
    return [line.strip() for line in text.splitlines() if FIGURE.search(line)]


def test_documents_hold_what_the_results_say() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "figures"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_figure_is_typed_by_hand(page: Path) -> None:
    if page.name in EXEMPT:
        pytest.skip(EXEMPT[page.name])
    assert typed(page) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_may_be_typed_is_still_said(page: Path) -> None:
    text = " ".join(prose(page).split())
    assert [allowed for allowed in ALLOWED.get(page.name, {}) if allowed not in text] == []


def test_no_figure_stands_in_more_than_two_documents() -> None:
    found = Counter(name for page in PAGES for name in set(BLOCK.findall(page.read_text(encoding="utf-8"))))
    assert [name for name, count in found.items() if count > 2] == []


def test_no_block_begins_a_line_of_a_paragraph() -> None:
    """Markdown takes a comment at the beginning of a line for a block of its own."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        starts = re.findall(r"^<!-- (?:figures: [a-z0-9-]+|end) -->[^\n]+$", text, re.MULTILINE)
        assert starts == [], page.name
        assert text.count("<!-- figures: ") == text.count("<!-- end -->") == len(BLOCK.findall(text)), page.name
