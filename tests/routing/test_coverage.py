"""Coverage: cases counted by hand, and greedy steps against a plain loop over whole numbers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expertshare.errors import PolicyError
from expertshare.routing import make_policy
from expertshare.routing.select import greedy_cover
from expertshare.types import RouterScores

from .cases import members, one_group, plain_spec
from .test_golden_coresets import coreset_ids

# Top two of each token: 0 and 1 for the first three, 2 and 3 for the last. Affinity: e0 1.5, e1 1.125, e2 .5, e3 .25.
ONE_APART = one_group([[0.5, 0.375, 0.0, 0.125]] * 3 + [[0.0, 0.125, 0.5, 0.25]])
FOUR_CHOOSE_TWO = plain_spec(4, 2)


def test_the_vote_of_a_token_with_enough_counts_no_more() -> None:
    """Half of .875 is less than e0's .5: after e0 the three are content, and e2 is all the gain that is left."""
    assert coreset_ids("des-vote", ONE_APART, FOUR_CHOOSE_TWO, budget=2) == [0, 1]
    assert coreset_ids("coverage", ONE_APART, FOUR_CHOOSE_TWO, budget=2, saturation=0.5) == [0, 2]


def test_with_a_saturation_of_one_it_is_a_vote() -> None:
    """Gains are then what is voted: e1's 1.125 before e2's .5."""
    assert coreset_ids("coverage", ONE_APART, FOUR_CHOOSE_TWO, budget=2, saturation=1.0) == [0, 1]


def test_once_all_have_enough_the_votes_decide() -> None:
    """e0 and e2 content everyone; of e1 (1.125) and e3 (.25) the votes take e1."""
    assert coreset_ids("coverage", ONE_APART, FOUR_CHOOSE_TWO, budget=3, saturation=0.5) == [0, 1, 2]


def test_equal_gains_go_to_the_lower_id() -> None:
    scores = one_group([[0.25, 0.25, 0.25, 0.25], [0.0, 0.0, 0.5, 0.5]])
    assert coreset_ids("coverage", scores, plain_spec(4, 1), budget=2) == [0, 2]


@pytest.mark.parametrize("saturation", [0.0, -0.5, 1.5])
def test_a_saturation_outside_its_range_is_refused(saturation: float) -> None:
    with pytest.raises(PolicyError, match=r"saturation must lie in \(0, 1\]"):
        make_policy("coverage", {"saturation": saturation}).bind(FOUR_CHOOSE_TWO)


def _by_loop(mass: list[list[int]], saturation: float, size: int) -> list[int]:
    room = [int(sum(token) * saturation) for token in mass]
    votes = [sum(token[e] for token in mass) for e in range(len(mass[0]))]
    chosen: list[int] = []
    while len(chosen) < size:
        left = [e for e in range(len(votes)) if e not in chosen]
        gain = {e: sum(min(token[e], r) for token, r in zip(mass, room, strict=True)) for e in left}
        best = max(left, key=lambda e: (gain[e], -e) if any(gain.values()) else (votes[e], -e))
        room = [max(0, r - token[best]) for token, r in zip(mass, room, strict=True)]
        chosen.append(best)
    return sorted(chosen)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    mass=st.lists(st.lists(st.integers(0, 9), min_size=7, max_size=7), min_size=1, max_size=6),
    saturation=st.sampled_from((0.125, 0.5, 0.75, 1.0)),
    size=st.integers(1, 7),
)
def test_greedy_steps_are_those_of_a_plain_loop(mass: list[list[int]], saturation: float, size: int) -> None:
    chosen = greedy_cover(torch.tensor([mass], dtype=torch.float64), saturation, size)
    assert members(chosen[0]) == _by_loop(mass, saturation, size)


def test_scores_that_are_no_numbers_choose_somebody() -> None:
    """What the model makes of them is not finite either, and decoding says so."""
    nan = torch.full((2, 3, 4), float("nan"))
    scores = RouterScores(nan, nan, torch.ones(2, 3, dtype=torch.bool))
    coreset = make_policy("coverage", {"budget": 2}).select(scores, FOUR_CHOOSE_TWO)
    assert coreset.member_GE.sum(dim=1).tolist() == [2, 2]
