"""A policy per layer: equal layers are the plain policy, and what cannot be is refused."""

from __future__ import annotations

import json

import pytest
import torch

from expertshare.config import RouterSpec
from expertshare.errors import PolicyError
from expertshare.routing import Layerwise, knobs, make_policy, policy_at, policy_label
from expertshare.types import RouterScores

SPEC = RouterSpec(num_experts=8, top_k=2, activation="softmax", renormalise=True)
VANILLA, VOTE = make_policy("vanilla"), make_policy("des-vote", {"budget": 0.5})


def test_each_layer_has_its_own_policy() -> None:
    policy = Layerwise(layers=(VANILLA, VOTE))
    assert [policy_at(policy, n, 2) for n in range(2)] == [VANILLA, VOTE]


def test_a_plain_policy_decides_in_every_layer() -> None:
    assert [policy_at(VOTE, n, 3) for n in range(3)] == [VOTE] * 3


def test_binding_makes_the_knobs_of_every_layer_concrete() -> None:
    bound = Layerwise(layers=(VANILLA, VOTE)).bind(SPEC)
    assert knobs(bound.layers[1])["budget"] == 4


def test_binding_refuses_a_layer_that_the_model_cannot_work_with() -> None:
    with pytest.raises(PolicyError, match="the budget must lie in"):
        Layerwise(layers=(VANILLA, make_policy("des-vote", {"budget": 1}))).bind(SPEC)


def test_another_number_of_layers_is_refused() -> None:
    with pytest.raises(PolicyError, match="model's 3 MoE layers, got 2"):
        policy_at(Layerwise(layers=(VANILLA, VOTE)), 0, 3)


@pytest.mark.parametrize("layers", [(), (Layerwise(layers=(VANILLA,)),)])
def test_no_layer_and_a_layerwise_layer_are_refused(layers: tuple[Layerwise, ...]) -> None:
    with pytest.raises(PolicyError, match="expected"):
        Layerwise(layers=layers)


def test_it_does_not_select_without_a_layer() -> None:
    scores = RouterScores(torch.rand(1, 2, 8), torch.rand(1, 2, 8), torch.ones(1, 2, dtype=torch.bool))
    with pytest.raises(PolicyError, match="one layer"):
        Layerwise(layers=(VOTE,)).select(scores, SPEC)


def test_knobs_are_json_and_the_label_names_every_layer() -> None:
    policy = Layerwise(layers=(VANILLA, make_policy("des-vote", {"budget": 4})))
    assert json.loads(json.dumps(knobs(policy)))["layers"][1]["policy"] == "des-vote"
    assert policy_label(policy) == "layerwise(vanilla; des-vote:budget=4)"
