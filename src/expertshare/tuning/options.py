"""What to tune for: the promise, which prompts the search sees and which only certify, and what a right answer is."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from expertshare.errors import InputError
from expertshare.evaluation.prompts import PromptRecord
from expertshare.evaluation.scoring import check_scorable, is_scorable

CostKind = Literal["experts", "bytes", "latency"]
Quality = Literal["auto", "accuracy", "agreement"]
Judged = Literal["accuracy", "agreement"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TuningOptions:
    """The promise, and how much work to spend on it.

    retain: share of vanilla's accuracy (or of answers equal to vanilla's) that must be kept; confidence: of this
    promise. cost: what to make small: unique experts per block and layer, expert bytes per prompt, or measured seconds
    per block. quality: "accuracy" needs prompts with references or tests, "agreement" none; "auto" is accuracy where
    all prompts can be judged, agreement where none can. policies: names to choose from (None: all with a knob to tune).
    trials: proposals of the search. recorded_prompts: prompts whose denoising steps the search replays. search_share:
    share of the prompts that the search may see; the others certify. seed: of split and search.
    """

    retain: float = 0.99
    confidence: float = 0.95
    cost: CostKind = "experts"
    quality: Quality = "auto"
    policies: tuple[str, ...] | None = None
    trials: int = 100
    recorded_prompts: int = 64
    search_share: float = 0.25
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises InputError for a value that is out of range."""
        for name, low in (("retain", 0.0), ("confidence", 0.5), ("search_share", 0.0)):
            if not low < (share := getattr(self, name)) < 1.0:
                raise InputError(f"{name} must lie between {low:g} and 1, both left out, got {share}")
        for name, least in (("trials", 0), ("recorded_prompts", 1), ("seed", 0)):
            if (count := getattr(self, name)) < least:
                raise InputError(f"{name} must be at least {least}, got {count}")
        for name, known in (("cost", get_args(CostKind)), ("quality", get_args(Quality))):
            if (word := getattr(self, name)) not in known:
                raise InputError(f"{name} must be one of {', '.join(known)}, got {word!r}")


def split_prompts(
    records: Sequence[PromptRecord], *, search_share: float, seed: int
) -> tuple[list[PromptRecord], list[PromptRecord]]:
    """Prompts for the search and for the certificate, each task at the same share in both, in random order.

    Raises InputError for fewer than two prompts, or for a prompt that is there twice: it could be on both sides.
    """
    texts = [record.prompt for record in records]
    if len(set(texts)) < len(texts):
        repeated = next(text for text in texts if texts.count(text) > 1)
        raise InputError(f"expected every prompt once, got {repeated[:60]!r} again: drop it, it is no new evidence")
    if len(records) < 2:
        raise InputError(f"expected at least 2 prompts, one to search with and one to certify with, got {len(records)}")
    generator = random.Random(seed)
    searched: list[PromptRecord] = []
    certified: list[PromptRecord] = []
    for task in dict.fromkeys(record.task for record in records):
        of_task = [record for record in records if record.task == task]
        generator.shuffle(of_task)
        cut = round(search_share * len(of_task))
        searched, certified = searched + of_task[:cut], certified + of_task[cut:]
    if not searched or not certified:
        rich, poor = (certified, searched) if certified else (searched, certified)
        poor.append(rich.pop())
    generator.shuffle(searched)
    generator.shuffle(certified)
    return searched, certified


def resolve_quality(records: Sequence[PromptRecord], wanted: Quality) -> Judged:
    """What is to be kept. Raises InputError where some prompts can be judged and others cannot."""
    if wanted == "agreement":
        return "agreement"
    check_scorable(records)
    judged = sum(is_scorable(record) for record in records)
    if judged == len(records):
        return "accuracy"
    if wanted == "auto" and not judged:
        return "agreement"
    raise InputError(
        f'expected a "reference" or "tests" with every prompt, got them with {judged} of {len(records)}: add the '
        "missing ones, drop those prompts, or ask for agreement with vanilla (--quality agreement)"
    )
