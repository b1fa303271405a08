"""How far two runs say the same, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Agreement:
    """tokens: share of answer positions with the same token, mean over prompts. exact: share of equal answers."""

    tokens: float
    exact: float


def token_agreement(answer: Sequence[int], reference: Sequence[int]) -> float:
    """Share of positions at which two answers have the same token; a position that only one has is a disagreement."""
    length = max(len(answer), len(reference))
    if length == 0:
        return 1.0
    return sum(mine == theirs for mine, theirs in zip(answer, reference, strict=False)) / length


def agreement(answers: Sequence[Sequence[int]], references: Sequence[Sequence[int]]) -> Agreement:
    """Compare the answers to the same prompts, at least one."""
    pairs = list(zip(answers, references, strict=True))
    return Agreement(
        tokens=sum(token_agreement(mine, theirs) for mine, theirs in pairs) / len(pairs),
        exact=sum(list(mine) == list(theirs) for mine, theirs in pairs) / len(pairs),
    )
