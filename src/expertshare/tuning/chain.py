"""Which policies are put to the test, and in which order: from the one most like vanilla to the cheapest."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from expertshare.tuning.search import Point

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


def find_edge(front: Sequence[Point], chance: Callable[[Point], float]) -> int:
    """Place on the front (many experts first) of the cheapest point that is likely to pass; 0 where none is.

    Bisection, as quality is taken to fall along the front. chance: predicted from generation on prompts of the search.
    """
    low, high = 0, len(front) - 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if chance(front[middle]) >= _SAFE else (low, middle - 1)
    return low


def around(front: Sequence[Point], edge: int) -> list[Point]:
    """The points on both sides of the edge."""
    return list(front[max(0, edge - _DEARER) : edge + _CHEAPER + 1])


def best_chain(points: Sequence[Point], chance: Callable[[Point], float]) -> list[Point]:
    """Points that stand a chance, and a better one than every cheaper point, the dearest first; where none stands
    one, the likeliest alone."""
    chain: list[Point] = []
    for point in sorted(points, key=lambda p: (p.replayed.unique_experts, -chance(p))):
        if chance(point) >= _WORTH_A_TEST and (not chain or chance(point) > chance(chain[-1])):
            chain.append(point)
    return chain[::-1] or [max(points, key=chance)]
