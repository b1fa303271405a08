"""Which policies are put to the test, and in which order: from the one most like vanilla to the cheapest."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from expertshare.tuning.certificate import PairedCounts, chance_to_pass
from expertshare.tuning.search import Point

TryOut = Callable[[Point], PairedCounts]
# Predicted chance of a certificate with which a point is taken for safe, and from which it is worth a test.
_SAFE, _WORTH_A_TEST = 0.5, 0.25
# Points tested on either side of the edge.
_DEARER, _CHEAPER = 2, 4
# Neighbours on the front differ by this share of the experts at least.
_LEAST_SAVING = 0.02


def thin_front(front: Sequence[Point]) -> list[Point]:
    """Points that save something worth a test of its own, from many experts to few."""
    kept: list[Point] = []
    for point in front:
        if not kept or point.replayed.unique_experts <= (1.0 - _LEAST_SAVING) * kept[-1].replayed.unique_experts:
            kept.append(point)
    return kept


def find_edge(front: Sequence[Point], try_out: TryOut, retain: float, *, confidence: float, prompts: int) -> int:
    """Place on the front (many experts first) of the cheapest point that is likely to pass; 0 where none is.

    Bisection: quality is taken to fall along the front, and a point is tried out by generation on prompts of the
    search. prompts: how many there will be to certify with.
    """
    low, high = 0, len(front) - 1
    while low < high:
        middle = (low + high + 1) // 2
        chance = chance_to_pass(try_out(front[middle]), retain, confidence=confidence, prompts=prompts)
        low, high = (middle, high) if chance >= _SAFE else (low, middle - 1)
    return low


def make_chain(
    front: Sequence[Point], edge: int, try_out: TryOut, retain: float, *, confidence: float, prompts: int
) -> list[Point]:
    """The points around the edge that stand a chance on the prompts of the search, the dearest first; where none
    does, the dearest alone."""
    around = front[max(0, edge - _DEARER) : edge + _CHEAPER + 1]
    worth = [
        point
        for point in around
        if chance_to_pass(try_out(point), retain, confidence=confidence, prompts=prompts) >= _WORTH_A_TEST
    ]
    return worth or [around[0]]
