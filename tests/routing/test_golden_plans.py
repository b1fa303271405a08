"""Hand-computed plans: the group limit inside a coreset, and the policies that act on each token alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import pytest
import torch

from expertshare.config import GroupLimit, ModelConfig
from expertshare.routing import SharingRule, assign, everything, make_policy, native_policy, route, router_scores
from expertshare.types import Coreset, RouterScores

from .cases import SPECS, one_group, plain_spec

FOUR_GROUPS = plain_spec(8, 2, num_groups=4, kept_groups=2)


class TestGroupLimitInsideACoreset:
    """Eight experts in four groups of two, keep two groups, K = 2. Scores fall from e7 to e0."""

    scores = one_group([[0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]])

    @pytest.mark.parametrize(
        ("coreset", "group_limit", "ids"),
        [
            (
                [2, 3, 7],
                "inside",
                [3, 2],
            ),  # e7 is alone in its group (-inf), which loses to the empty group 0
            ([2, 3, 7], "ignore", [7, 3]),
            ([0, 4, 5], "inside", [5, 4]),  # groups 2 and 0 are kept; e0 is reachable but lighter
            ([1, 3, 5, 7], "inside", [3, 1]),  # all groups score -inf: the two lower ones are kept
            ([1, 3, 5, 7], "ignore", [7, 5]),
            ([5, 7], "inside", [-1, -1]),  # both out of reach: unused slots, never an expert outside
            ([5, 7], "ignore", [7, 5]),
            ([1, 7], "inside", [1, -1]),
        ],
    )
    def test_by_hand(self, coreset: list[int], group_limit: GroupLimit, ids: list[int]) -> None:
        member = torch.zeros(1, 8, dtype=torch.bool)
        member[0, coreset] = True
        rule = SharingRule(group_limit=group_limit)
        plan = assign(self.scores, Coreset(member), rule, FOUR_GROUPS)
        assert plan.expert_ids_TK.tolist() == [ids]
        expected = [0.0 if e == -1 else (e + 1) / 10 for e in ids]
        torch.testing.assert_close(plan.weights_TK, torch.tensor([expected]))


class TestSkip:
    # K = 4 of 5: shares .5 .25 .125 .125 once e4 (not chosen) is left out. From the lightest: .125, .25, .5, 1.
    spec = plain_spec(5, 4)
    scores = one_group([[0.125, 0.5, 0.125, 0.25, 0.0]])

    @pytest.mark.parametrize(
        ("share", "ids"),
        [
            (0.0, [1, 3, 0, 2]),
            (0.125, [1, 3, 0, 2]),  # .125 is not under .125
            (0.2, [1, 3, 0, -1]),  # of the two lightest, the higher id goes first
            (0.25, [1, 3, 0, -1]),
            (0.3, [1, 3, -1, -1]),
            (0.6, [1, -1, -1, -1]),
            (0.99, [1, -1, -1, -1]),  # the heaviest always stays
        ],
    )
    def test_walk_from_the_lightest(self, share: float, ids: list[int]) -> None:
        _, plan = route(self.scores, make_policy("skip", {"skip_share": share}), self.spec)
        assert plan.expert_ids_TK.tolist() == [ids]
        row = self.scores.affinity_GLE[0, 0].tolist()
        assert plan.weights_TK.tolist() == [[0.0 if e == -1 else row[e] for e in ids]]

    def test_a_renormalising_router_renormalises_over_what_remains(self) -> None:
        spec = replace(self.spec, renormalise=True, scaling=2.5)
        _, plan = route(self.scores, make_policy("skip", {"skip_share": 0.3}), spec)
        torch.testing.assert_close(plan.weights_TK, torch.tensor([[2.5 * 2 / 3, 2.5 / 3, 0.0, 0.0]]))

    def test_lightest_means_the_mixing_weight_not_the_biased_rank(self) -> None:
        """The bias puts e0 first, but it is the lightest in the mix: it is the one that is dropped."""
        affinity = torch.tensor([[[0.125, 0.5, 0.25, 0.125, 0.0]]])
        choice = affinity + torch.tensor([1.0, 0.0, 0.0, 0.5, 0.0])  # ranks 0, 3, 1, 2
        scores = RouterScores(affinity, choice, torch.ones(1, 1, dtype=torch.bool))
        _, plan = route(scores, make_policy("skip", {"skip_share": 0.2}), self.spec)
        assert plan.expert_ids_TK.tolist() == [[0, -1, 1, 2]]

    def test_it_shares_no_coreset(self) -> None:
        coreset, _ = route(self.scores, make_policy("skip"), self.spec)
        assert coreset.member_GE.all()


class TestTopKCap:
    def test_by_hand(self) -> None:
        _, plan = route(
            one_group([[0.1, 0.4, 0.2, 0.3]]),
            make_policy("top-k-cap", {"experts_per_token": 2}),
            plain_spec(4, 3, renormalise=True),
        )
        assert plan.expert_ids_TK.tolist() == [[1, 3, -1]]
        torch.testing.assert_close(plan.weights_TK, torch.tensor([[4 / 7, 3 / 7, 0.0]]))

    @pytest.mark.parametrize("cap", [1, 3, 4])
    @pytest.mark.parametrize("spec_name", SPECS)
    def test_equals_the_router_with_a_smaller_k(self, spec_name: str, cap: int) -> None:
        spec = SPECS[spec_name]
        generator = torch.Generator().manual_seed(4)
        logits = torch.randn(2, 9, spec.num_experts, generator=generator)
        bias_E = torch.randn(spec.num_experts, generator=generator) if spec.has_bias else None
        scores = router_scores(logits, torch.ones(2, 9, dtype=torch.bool), spec, bias_E)
        _, capped = route(scores, make_policy("top-k-cap", {"experts_per_token": cap}).bind(spec), spec)
        smaller = assign(scores, everything(scores), SharingRule(), replace(spec, top_k=cap))
        assert torch.equal(capped.expert_ids_TK[:, :cap], smaller.expert_ids_TK)
        torch.testing.assert_close(capped.weights_TK[:, :cap], smaller.weights_TK)
        assert (capped.expert_ids_TK[:, cap:] == -1).all()
        assert torch.equal(capped.active_E, smaller.active_E)


def test_vanilla_by_hand() -> None:
    scores = one_group([[0.1, 0.4, 0.2, 0.3], [0.25, 0.25, 0.25, 0.25]])
    coreset, plan = route(scores, make_policy("vanilla"), plain_spec(4, 2, renormalise=True))
    assert coreset.member_GE.all()
    assert plan.expert_ids_TK.tolist() == [[1, 3], [0, 1]]
    torch.testing.assert_close(plan.weights_TK, torch.tensor([[4 / 7, 3 / 7], [0.5, 0.5]]))
    assert plan.active_E.tolist() == [True, True, False, True]


@pytest.mark.parametrize("capacity", [None, 48])
def test_native_policy_is_block_max_at_the_expert_capacity(capacity: Literal[48] | None) -> None:
    config = ModelConfig(
        family="llada2_moe",
        vocab_size=99,
        hidden_size=8,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=4,
        rotary_dim=2,
        rope_theta=1e4,
        rms_norm_eps=1e-6,
        num_dense_layers=1,
        dense_hidden=8,
        expert_hidden=4,
        shared_hidden=4,
        router=plain_spec(256, 8),
        attention="block_causal",
        block_length=32,
        max_positions=64,
        mask_id=1,
        eos_ids=(2,),
        pad_id=0,
        expert_capacity=capacity,
    )
    expected = make_policy("vanilla") if capacity is None else make_policy("block-max", {"budget": 48})
    assert native_policy(config) == expected
