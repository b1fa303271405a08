"""The parts of the page, and which stored results give figures to them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from expertshare.lab.report import compared, measured
from expertshare.lab.report.figure import Figure
from expertshare.lab.report.sources import Source


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """A part of the page. text: what to know before its figures; missing: the command that gives it one."""

    slug: str
    title: str
    text: str
    missing: str
    figures: tuple[Figure, ...]


def sections(sources: Sequence[Source]) -> list[Section]:
    """All parts in the order of the page, those without a figure included."""
    makers: tuple[tuple[str, str, str, str, Callable[[Sequence[Source]], list[Figure]]], ...] = (
        (
            "main",
            "Main table",
            "Unique experts: of one block in one layer, mean over denoising forwards. Retained: accuracy as a share of "
            "vanilla's, mean over tasks; capped: no task counts for more than 100 %. Small figures are 95 % intervals.",
            "expertshare compare MODEL --prompts FILE --json > out.json, or expertshare eval",
            compared.main,
        ),
        (
            "p-sweep",
            "Sweep of p",
            "Block top-p keeps the experts that hold a share p of a block's votes.",
            "expertshare compare with block-top-p at three or more values of top_p_experts",
            compared.p_sweeps,
        ),
        (
            "block-lengths",
            "Sweep of the block length",
            "A block is what shares experts: longer blocks have larger unions, of which more can be saved. A model "
            "loses accuracy at lengths that it was not trained at.",
            "expertshare compare ... --block-length N --json > N.json, for two or more N",
            compared.block_lengths,
        ),
        (
            "quality",
            "Quality against experts",
            "Up and to the left is better.",
            "expertshare compare or eval with several policies",
            compared.quality,
        ),
        (
            "steps",
            "Unique experts over steps",
            "CV: coefficient of variation, standard deviation by mean.",
            "python benchmarks/steps_distribution.py MODEL --json FILE",
            measured.steps,
        ),
        (
            "weights",
            "Router weight against loss increase",
            "One expert at a time is taken out of one layer for one block.",
            "python benchmarks/weight_against_loss.py MODEL --json FILE",
            measured.weights,
        ),
        (
            "growth",
            "Experts against tokens",
            "What a block needs as it gets longer, and how much work each byte of weights then does.",
            "python benchmarks/expert_growth.py MODEL --json FILE",
            measured.growth,
        ),
        (
            "parts",
            "Latency by part",
            "Sharing makes the experts' part smaller and leaves the others as they are.",
            "expertshare bench forward --report FILE",
            measured.parts,
        ),
        (
            "latency",
            "Latency against unique experts",
            "One expert layer; the bound is what memory bandwidth and arithmetic allow.",
            "expertshare bench experts --report FILE",
            measured.latency,
        ),
        (
            "answers",
            "Whole answers",
            "Tokens per second of complete generations.",
            "expertshare bench generate --report FILE",
            measured.answers,
        ),
        (
            "tuning",
            "Tuning",
            "What the tuner tried on its prompts, and what it certified on others.",
            "expertshare tune MODEL --prompts FILE --out policy.json",
            measured.tuning,
        ),
    )
    return [
        Section(slug=slug, title=title, text=text, missing=missing, figures=tuple(make(sources)))
        for slug, title, text, missing, make in makers
    ]


def draw_all(parts: Sequence[Section], folder: Path) -> dict[str, Path]:
    """Draw every figure into `folder` as PNG, named by its slug. Raises InputError where it cannot be written."""
    drawn = {}
    for figure in (figure for part in parts for figure in part.figures):
        if figure.draw is not None:
            drawn[figure.slug] = folder / f"{figure.slug}.png"
            figure.draw(drawn[figure.slug])
    return drawn
