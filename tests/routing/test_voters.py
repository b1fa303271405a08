"""Who votes, and coresets that are kept: what decoding tells a policy beside its scores."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch

from expertshare.errors import PolicyError
from expertshare.routing import POLICIES, Layerwise, make_policy, parse_policy, policy_label, route
from expertshare.types import Coreset, RouterScores

from .cases import members, one_group, plain_spec
from .contract import assert_same_plan

SHARING = [name for name, kind in POLICIES.items() if "voters" in {f.name for f in fields(kind)}]
SPEC = plain_spec(16, 2)


def _scores(masked: torch.Tensor | None, live: torch.Tensor | None = None) -> RouterScores:
    affinity = torch.rand(2, 5, 16, generator=torch.Generator().manual_seed(3))
    return RouterScores(affinity, affinity, torch.ones(2, 5, dtype=torch.bool) if live is None else live, masked)


def _policy(name: str, **knobs: Any) -> Any:
    sizes = {"budget": 3} if "budget" in {f.name for f in fields(POLICIES[name])} else {}
    return make_policy(name, {**sizes, **knobs}).bind(SPEC)


def test_masked_tokens_alone_elect_and_all_tokens_route() -> None:
    """Two decided tokens want 0 and 1, the masked one 2 and 3."""
    scores = one_group([[0.5, 0.4, 0.06, 0.04], [0.5, 0.4, 0.06, 0.04], [0.04, 0.06, 0.4, 0.5]])
    scores = replace(scores, masked_GL=torch.tensor([[False, False, True]]))
    spec = plain_spec(4, 1)
    for voters, elected in (("all", 0), ("masked", 3)):
        coreset, plan = route(scores, make_policy("des-vote", {"budget": 1, "voters": voters}), spec)
        assert members(coreset.member_GE[0]) == [elected]
        assert plan.expert_ids_TK.tolist() == [[elected]] * 3


@pytest.mark.parametrize("name", SHARING)
def test_what_decided_tokens_and_padding_score_does_not_matter(name: str) -> None:
    masked = torch.tensor([[True, False, True, False, True], [False, True, True, False, False]])
    live = torch.tensor([[True, True, True, True, False]] * 2)
    scores, policy = _scores(masked, live), _policy(name, voters="masked")
    other = torch.where((masked & live).unsqueeze(-1), scores.affinity_GLE, scores.affinity_GLE.flip(-1))
    changed = RouterScores(other, other, live, masked)
    assert torch.equal(policy.select(scores, SPEC).member_GE, policy.select(changed, SPEC).member_GE)


@pytest.mark.parametrize("name", SHARING)
@pytest.mark.parametrize("masked", [None, torch.zeros(2, 5, dtype=torch.bool), torch.ones(2, 5, dtype=torch.bool)])
def test_where_none_or_all_are_masked_all_vote(name: str, masked: torch.Tensor | None) -> None:
    plain = _policy(name).select(_scores(None), SPEC)
    assert torch.equal(_policy(name, voters="masked").select(_scores(masked), SPEC).member_GE, plain.member_GE)


@pytest.mark.parametrize("name", SHARING)
def test_by_default_masks_change_nothing(name: str) -> None:
    masked = torch.tensor([[True, False, True, False, True]] * 2)
    coreset, plan = route(_scores(masked), _policy(name), SPEC)
    expected_coreset, expected = route(_scores(None), _policy(name), SPEC)
    assert torch.equal(coreset.member_GE, expected_coreset.member_GE)
    assert_same_plan(plan, expected)


@pytest.mark.parametrize("name", SHARING)
def test_a_group_keeps_its_coreset_and_an_empty_one_is_selected(name: str) -> None:
    scores, policy = _scores(None), _policy(name)
    chosen = policy.select(scores, SPEC)
    kept = torch.zeros(2, 16, dtype=torch.bool)
    kept[0, 9:13] = True
    coreset, plan = route(scores, policy, SPEC, previous=Coreset(kept))
    assert members(coreset.member_GE[0]) == [9, 10, 11, 12]
    assert torch.equal(coreset.member_GE[1], chosen.member_GE[1])
    assert set(plan.expert_ids_TK[:5].flatten().tolist()) <= {9, 10, 11, 12}
    kept[1] = kept[0]
    coreset, _ = route(scores, policy, SPEC, previous=Coreset(kept))
    assert torch.equal(coreset.member_GE, kept)


@pytest.mark.parametrize("steps", [0, -1])
def test_reuse_is_a_number_of_steps(steps: int) -> None:
    with pytest.raises(PolicyError, match="reuse must be a number of steps, at least 1"):
        make_policy("des-vote", {"reuse": steps})


@pytest.mark.parametrize(
    ("text", "needs"),
    [("skip", False), ("des-vote:reuse=1", False), ("des-vote:reuse=2", True), ("des-seq:voters=masked", True)],
)
def test_a_policy_says_whether_it_needs_to_know_of_steps(text: str, needs: bool) -> None:
    policy = parse_policy(text)
    assert policy.needs_steps == Layerwise(layers=(make_policy("vanilla"), policy)).needs_steps == needs


def test_labels_name_what_was_set() -> None:
    label = policy_label(parse_policy("des-vote:budget=4,voters=masked,reuse=8"))
    assert parse_policy(label) == make_policy("des-vote", {"budget": 4, "voters": "masked", "reuse": 8})
    assert policy_label(parse_policy("des-vote:budget=4")) == "des-vote:budget=4"
