"""One hand-computed coreset, or a few, for every policy that shares one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from expertshare.config import RouterSpec
from expertshare.routing import make_policy, route
from expertshare.routing.select import ballots, tally
from expertshare.types import RouterScores

from .cases import members, one_group, plain_spec

SIX_CHOOSE_TWO = plain_spec(6, 2)
# Top two of each token: 0 and 1; 2 and 1; 4 and 2. Votes: e0 .5, e1 .3+.35=.65, e2 .4+.3=.7, e4 .45; e3, e5 none.
THREE_TOKENS = one_group(
    [
        [0.50, 0.30, 0.10, 0.05, 0.03, 0.02],
        [0.10, 0.35, 0.40, 0.05, 0.05, 0.05],
        [0.05, 0.05, 0.30, 0.10, 0.45, 0.05],
    ]
)
LLADA2: dict[str, Any] = {
    "top_k": 8,
    "activation": "sigmoid",
    "renormalise": True,
    "num_groups": 8,
    "kept_groups": 4,
    "has_bias": True,
}


def coreset_ids(text_policy: str, scores: RouterScores, spec: RouterSpec, **knobs: float | str) -> list[int]:
    coreset, _ = route(scores, make_policy(text_policy, knobs).bind(spec), spec)
    return members(coreset.member_GE[0])


class TestDesVote:
    @pytest.mark.parametrize(("budget", "ids"), [(2, [1, 2]), (3, [0, 1, 2]), (4, [0, 1, 2, 4]), (5, [0, 1, 2, 3, 4])])
    def test_elects_by_summed_weight(self, budget: int, ids: list[int]) -> None:
        assert coreset_ids("des-vote", THREE_TOKENS, SIX_CHOOSE_TWO, budget=budget) == ids

    def test_tokens_route_inside_with_the_weights_they_had(self) -> None:
        _, plan = route(THREE_TOKENS, make_policy("des-vote", {"budget": 3}), SIX_CHOOSE_TWO)
        assert plan.expert_ids_TK.tolist() == [
            [0, 1],
            [2, 1],
            [2, 0],
        ]  # 0 and 1 tie at .05 for the third token
        torch.testing.assert_close(plan.weights_TK, torch.tensor([[0.5, 0.3], [0.4, 0.35], [0.3, 0.05]]))
        assert members(plan.active_E) == [0, 1, 2]

    @pytest.mark.parametrize(
        ("experts", "fraction", "count"),
        [(256, 0.15, 38), (256, 0.10, 25), (64, 0.6, 38), (64, 0.4, 25), (100, 0.29, 29), (64, 1.0, 64)],
    )
    def test_a_fraction_is_rounded_down(self, experts: int, fraction: float, count: int) -> None:
        spec = plain_spec(experts, 8)
        policy = make_policy("des-vote", {"budget": fraction}).bind(spec)
        assert policy == make_policy("des-vote", {"budget": count})
        scores = torch.rand(1, 32, experts, generator=torch.Generator().manual_seed(0))
        coreset = policy.select(RouterScores(scores, scores, torch.ones(1, 32, dtype=torch.bool)), spec)
        assert coreset.member_GE.sum() == count

    def test_the_default_is_k_above_the_minimum(self) -> None:
        assert make_policy("des-vote").bind(plain_spec(256, **LLADA2)) == make_policy("des-vote", {"budget": 20})
        assert make_policy("des-vote").bind(plain_spec(64, 8)) == make_policy("des-vote", {"budget": 16})
        assert make_policy("des-vote").bind(plain_spec(10, 8)) == make_policy("des-vote", {"budget": 10})

    def test_a_negative_sum_still_ranks_before_no_vote(self) -> None:
        """Votes e0 -.1, e1 -.2-.05=-.25, e2 -.3; e3 has none, and a sum over nobody is not zero."""
        scores = one_group([[-0.1, -0.2, -0.9, -0.8], [-0.9, -0.05, -0.3, -0.8]])
        spec = plain_spec(4, 2)
        assert coreset_ids("des-vote", scores, spec, budget=3) == [0, 1, 2]
        assert coreset_ids("des-vote", scores, spec, budget=2) == [0, 1]

    def test_votes_do_not_depend_on_the_order_of_real_scores(self) -> None:
        """Float32 sums would: these are not on a grid."""
        scores = torch.rand(1, 32, 64, generator=torch.Generator().manual_seed(2))
        spec, live = plain_spec(64, 8), torch.ones(1, 32, dtype=torch.bool)
        straight = RouterScores(scores, scores, live)
        backward = RouterScores(scores.flip(1), scores.flip(1), live)
        votes = [tally(s, ballots(s, spec, 8, "ungrouped")) for s in (straight, backward)]
        assert torch.equal(votes[0], votes[1])


class TestBlockTopP:
    # Token 0 votes e3 .5, e0 .25; token 1 votes e1 .125, e5 .125. Sorted: e3, e0, e1, e5; shares .5, .75, .875, 1.
    votes = one_group([[0.25, 0.0, 0.0, 0.5, 0.0, 0.0], [0.0, 0.125, 0.0625, 0.0, 0.0625, 0.125]])

    @pytest.mark.parametrize(
        ("p", "ids"),
        [
            (0.4, [0, 3]),  # e3 alone passes .4; the guard (K = 2) adds the next by votes
            (0.5, [0, 3]),  # after e3 the share is .5, which is not past .5: e0 is the first past it
            (0.6, [0, 3]),
            (0.75, [0, 1, 3]),
            (0.8, [0, 1, 3]),
            (0.9, [0, 1, 3, 5]),
            (1.0, [0, 1, 3, 5]),  # never an expert that nobody voted for
        ],
    )
    def test_the_first_expert_past_p_is_included(self, p: float, ids: list[int]) -> None:
        assert coreset_ids("block-top-p", self.votes, SIX_CHOOSE_TWO, top_p_experts=p) == ids

    def test_one_expert_may_be_enough_where_k_is_one(self) -> None:
        """Votes e3 .5 and e1 .125, total .625: .4 of it is .25, which e3 passes."""
        assert coreset_ids("block-top-p", self.votes, plain_spec(6, 1), top_p_experts=0.4) == [3]
        assert coreset_ids("block-top-p", self.votes, plain_spec(6, 1), top_p_experts=0.9) == [1, 3]

    def test_the_guard_adds_by_votes_then_by_id(self) -> None:
        assert coreset_ids("block-top-p", self.votes, SIX_CHOOSE_TWO, top_p_experts=0.6, guard=5) == [
            0,
            1,
            2,
            3,
            5,
        ]

    @pytest.mark.parametrize("experts", [64, 256])
    def test_the_guard_is_derived(self, experts: int) -> None:
        """8 experts + 8 groups - 4 kept groups."""
        policy = make_policy("block-top-p").bind(plain_spec(experts, **LLADA2))
        assert policy == make_policy("block-top-p", {"guard": 12})

    def test_without_the_group_limit_the_guard_is_k(self) -> None:
        policy = make_policy("block-top-p", {"group_limit": "ignore"}).bind(plain_spec(64, **LLADA2))
        assert policy == make_policy("block-top-p", {"group_limit": "ignore", "guard": 8})

    def test_negative_votes_carry_no_mass(self) -> None:
        """Votes e0 .5+.25=.75, e2 -.125, e1 -.25. The mass is .75, all of it e0's; the guard takes e2 before e1."""
        scores = one_group([[0.5, -0.25, -1.0, -0.5], [0.25, -0.75, -0.125, -0.5]])
        spec = plain_spec(4, 2)
        assert coreset_ids("block-top-p", scores, spec, top_p_experts=0.6) == [0, 2]
        assert coreset_ids("block-top-p", scores, spec, top_p_experts=1.0) == [0, 1, 2]

    def test_without_any_positive_vote_all_that_were_voted_for_stay(self) -> None:
        scores = one_group([[-0.5, -0.25, -0.75, -1.0], [-0.75, -0.5, -0.25, -1.0]])
        assert coreset_ids("block-top-p", scores, plain_spec(4, 2), top_p_experts=0.1) == [0, 1, 2]


class TestDesSeq:
    @pytest.mark.parametrize(("experts_per_vote", "ids"), [(1, [0, 2, 4]), (2, [0, 1, 2, 4])])
    def test_union_of_every_token_s_best(self, experts_per_vote: int, ids: list[int]) -> None:
        assert coreset_ids("des-seq", THREE_TOKENS, SIX_CHOOSE_TWO, experts_per_vote=experts_per_vote) == ids

    def test_a_union_that_is_too_small_grows_by_votes(self) -> None:
        """Both tokens want e5 first; e3 has .2+.1 of votes, e1 .25."""
        scores = one_group([[0.0, 0.0, 0.0, 0.2, 0.0, 0.8], [0.0, 0.25, 0.0, 0.1, 0.0, 0.6]])
        assert coreset_ids("des-seq", scores, SIX_CHOOSE_TWO) == [1, 5]
        assert coreset_ids("des-seq", scores, plain_spec(6, 3)) == [1, 3, 5]


class TestBlockMax:
    # The highest score of each expert: .5, .9, .2, .3, 0; the last row is padding and would put e4 first.
    rows = ((0.1, 0.9, 0.2, 0.3, 0.0), (0.5, 0.1, 0.2, 0.3, 0.0), (0.0, 0.0, 0.0, 0.0, 1.0))
    scores = one_group([list(row) for row in rows], [True, True, False])

    @pytest.mark.parametrize(("budget", "ids"), [(1, [1]), (2, [0, 1]), (3, [0, 1, 3]), (4, [0, 1, 2, 3])])
    def test_highest_over_the_live_tokens(self, budget: int, ids: list[int]) -> None:
        assert coreset_ids("block-max", self.scores, plain_spec(5, 1), budget=budget) == ids

    def test_ties_go_to_the_lower_id(self) -> None:
        scores = one_group([[0.1, 0.4, 0.2, 0.3], [0.3, 0.1, 0.4, 0.2]])  # maxima .3 .4 .4 .3
        assert coreset_ids("block-max", scores, plain_spec(4, 1), budget=1) == [1]
        assert coreset_ids("block-max", scores, plain_spec(4, 1), budget=3) == [0, 1, 2]

    def test_ignores_the_group_limit_unless_told(self) -> None:
        """Inside the coreset {0, 2, 4, 6} every group holds one expert: the limit keeps groups 0 and 1."""
        spec = plain_spec(8, 2, num_groups=4, kept_groups=2)
        scores = one_group([[0.5, 0.0, 0.6, 0.0, 0.7, 0.0, 0.8, 0.0]])
        _, free = route(scores, make_policy("block-max", {"budget": 4}), spec)
        _, limited = route(scores, make_policy("block-max", {"budget": 4, "group_limit": "inside"}), spec)
        assert free.expert_ids_TK.tolist() == [[6, 4]]
        assert limited.expert_ids_TK.tolist() == [[2, 0]]


class TestProtectedVote:
    # Votes e0 .25+.35+.4=1.0, e1 .4+.45=.85, e5 .3; first choices e5, e1, e1.
    scores = one_group(
        [[0.25, 0.1, 0.1, 0.1, 0.1, 0.3], [0.35, 0.4, 0.0, 0.0, 0.0, 0.0], [0.4, 0.45, 0.0, 0.0, 0.0, 0.0]]
    )

    def test_first_choices_stay_before_votes_count(self) -> None:
        assert coreset_ids("des-vote", self.scores, SIX_CHOOSE_TWO, budget=2) == [0, 1]
        assert coreset_ids("protected-vote", self.scores, SIX_CHOOSE_TWO, budget=2) == [1, 5]
        assert coreset_ids("protected-vote", self.scores, SIX_CHOOSE_TWO, budget=3) == [0, 1, 5]

    def test_of_too_many_first_choices_those_with_most_votes_stay(self) -> None:
        """Five first choices with votes e0 .5, e1 .4, e2 .3+.3=.6, e3 .45, e4 .2 and room for three."""
        first = {0: 0.5, 1: 0.4, 2: 0.3, 3: 0.45, 4: 0.2}
        rows = [[score if e == expert else 0.0 for e in range(5)] for expert, score in first.items()]
        scores = one_group([*rows, [0.0, 0.0, 0.3, 0.0, 0.0]])
        assert coreset_ids("protected-vote", scores, plain_spec(5, 1), budget=3) == [0, 2, 3]


class TestBallots:
    def test_grouped_ballots_go_to_what_the_token_can_reach(self) -> None:
        """Group sums .9+.1=1.0 and .6+.5=1.1: the token is confined to experts 2 and 3, though e0 is its favourite."""
        spec = plain_spec(8, 2, num_groups=4, kept_groups=1)
        scores = one_group([[0.9, 0.1, 0.6, 0.5, 0.0, 0.0, 0.0, 0.0]])
        assert members(ballots(scores, spec, 2, "ungrouped")[0, 0]) == [0, 2]
        assert members(ballots(scores, spec, 2, "grouped")[0, 0]) == [2, 3]

    def test_the_knob_reaches_the_policy(self) -> None:
        """Budget 5 is the minimum (2 + 4 - 1); the places without a vote are filled from id 0."""
        spec = plain_spec(8, 2, num_groups=4, kept_groups=1)
        scores = one_group([[0.1, 0.1, 0.0, 0.0, 0.6, 0.5, 0.1, 0.9]])
        assert coreset_ids("des-vote", scores, spec, budget=5) == [0, 1, 2, 4, 7]
        assert coreset_ids("des-vote", scores, spec, budget=5, ballots="grouped") == [0, 1, 2, 4, 5]
