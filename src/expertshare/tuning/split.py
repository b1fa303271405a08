"""Which prompts the search sees, and which only certify; and what counts as a right answer to them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Literal

from expertshare.errors import InputError
from expertshare.evaluation import PolicyRun, judge
from expertshare.evaluation.prompts import PromptRecord
from expertshare.evaluation.scoring import check_scorable, is_scorable
from expertshare.tuning.options import Quality

Judged = Literal["accuracy", "agreement"]


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


def right_answers(records: Sequence[PromptRecord], run: PolicyRun, vanilla: PolicyRun, quality: Judged) -> list[bool]:
    """For each prompt whether the answer is right; under "agreement", whether its tokens are vanilla's."""
    if quality == "agreement":
        pairs = zip(run.answers, vanilla.answers, strict=True)
        return [mine.token_ids == theirs.token_ids for mine, theirs in pairs]
    return [bool(outcome) for outcome in judge(records, [answer.text for answer in run.answers])]
