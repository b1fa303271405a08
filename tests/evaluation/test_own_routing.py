"""LLaDA2.2 shares experts by itself: its own routing, block max at its capacity, is what policies are held against."""

from __future__ import annotations

from dataclasses import replace

import pytest

from expertshare import api
from expertshare.evaluation.evaluating import bind_policies
from expertshare.evaluation.prompts import PromptRecord
from expertshare.evaluation.runner import own_policy
from expertshare.evaluation.summary import summarise
from expertshare.models import LoadedModel
from expertshare.routing import policy_label
from tiny_models import ROUTER, tiny_loaded

CAPACITY = 6
OWN = f"block-max:budget={CAPACITY}"
RECORDS = [PromptRecord(prompt=f"What is {n} plus 8?", reference=f"#### {n + 8}", task="arith") for n in range(3)]


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return tiny_loaded(expert_capacity=CAPACITY, router=replace(ROUTER, num_groups=1, kept_groups=1))


def test_a_model_with_a_capacity_is_its_own_baseline(loaded: LoadedModel) -> None:
    assert policy_label(own_policy(loaded)) == OWN
    assert policy_label(own_policy(tiny_loaded())) == "vanilla"


def test_compare_holds_policies_against_it(loaded: LoadedModel) -> None:
    comparison = api.compare(loaded, RECORDS, [OWN, "vanilla", "des-vote:budget=4"], gen_length=8)
    found = comparison.to_json()
    assert found["baseline"] == found["reference"]["label"] == OWN
    own, vanilla, shared = found["runs"]
    assert (own["unique_experts_reduction"], own["agreement"], own["difference"]) == (0.0, 1.0, None)
    assert vanilla["unique_experts"]["denoise"] > own["unique_experts"]["denoise"] > shared["unique_experts"]["denoise"]
    assert vanilla["unique_experts_reduction"] < 0 < shared["unique_experts_reduction"]


def test_eval_runs_both_and_names_the_baseline(loaded: LoadedModel) -> None:
    labels = [policy_label(policy) for policy in bind_policies([], loaded)]
    assert labels == [OWN, "vanilla"]
    kinds = {"prefill": 1, "denoise": 1, "commit": 1}
    lines = [
        {
            "task": "arith", "id": str(n), "policy": label, "correct": right, "reason": None, "tokens": 1, "steps": 1,
            "forwards": kinds, "blocks": kinds, "unique_experts": dict.fromkeys(kinds, experts),
        }
        for label, experts, solved in ((OWN, 6.0, 3), ("vanilla", 8.0, 4))
        for n, right in enumerate([True] * solved + [False] * (4 - solved))
    ]  # fmt: skip
    found = summarise(lines, tasks=["arith"], policies=labels, baseline=labels[0])
    assert found["baseline"] == OWN
    own, vanilla = found["rows"]
    assert (own["difference"], own["retained"], vanilla["retained"]) == (None, 1.0, 4 / 3)
    assert vanilla["unique_experts_reduction"] == pytest.approx(-1 / 3)
