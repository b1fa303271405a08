"""The parts of the search, on values made by hand."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from expertshare.errors import InputError, PolicyError
from expertshare.evaluation.prompts import PromptRecord
from expertshare.evaluation.statistics import PairedCounts
from expertshare.routing import Layerwise, make_policy
from expertshare.tuning.certificate import chance_to_pass
from expertshare.tuning.options import TuningOptions, resolve_quality, split_prompts
from expertshare.tuning.replay import LayerOption, Point, Sensitivity
from expertshare.tuning.search import (
    around,
    best_chain,
    dials,
    find_edge,
    fronts_by_policy,
    pareto_front,
    thin_front,
)
from tiny_models import ROUTER


def option(budget: int, divergence: float) -> LayerOption:
    return LayerOption(
        policy=make_policy("des-vote", {"budget": budget}), unique_experts=float(budget), divergence=divergence
    )


def point(experts: float, divergence: float) -> Point:
    policy = make_policy("des-vote", {"budget": int(experts)})
    return Point(policy=policy, unique_experts=experts, divergence=divergence, flips=0.0, by_layer=(experts,))


def budgets(policy: object) -> list[object]:
    assert isinstance(policy, Layerwise)
    return [layer.budget for layer in policy.layers]  # type: ignore[attr-defined]


LAYERS = Sensitivity(
    options=(
        (option(16, 0.0), option(12, 0.01), option(8, 0.10)),  # robust: 0.0025, then 0.0225 per expert
        (option(16, 0.0), option(12, 0.20), option(8, 0.60)),  # sensitive: 0.05, then 0.1 per expert
    )
)


@pytest.mark.parametrize(
    ("price", "expected"), [(0.001, [16, 16]), (0.01, [12, 16]), (0.03, [8, 16]), (0.07, [8, 12]), (0.2, [8, 8])]
)
def test_the_robust_layer_gives_up_its_experts_first(price: float, expected: list[int]) -> None:
    assert budgets(LAYERS.allocate([price, price])) == expected


def test_prices_reach_from_no_change_to_the_last_one() -> None:
    low, high = LAYERS.price_range
    assert budgets(LAYERS.allocate([low] * 2)) == [16, 16]
    assert budgets(LAYERS.allocate([high] * 2)) == [8, 8]


def test_the_front_holds_what_nothing_beats() -> None:
    points = [point(30, 0.1), point(20, 0.2), point(25, 0.3), point(20, 0.4), point(10, 0.5), point(35, 0.1)]
    assert [p.unique_experts for p in pareto_front(points)] == [30, 20, 10]


def test_neighbours_on_the_front_are_worth_a_test_each() -> None:
    kept = thin_front([point(100, 0.0), point(99, 0.1), point(97, 0.2), point(90, 0.3)])
    assert [p.unique_experts for p in kept] == [100, 97, 90]


CHANCES = {50: 0.99, 45: 0.9, 40: 0.6, 35: 0.3, 30: 0.01}


def chance_of(p: Point) -> float:
    return CHANCES[int(p.unique_experts)]


def test_the_edge_is_the_cheapest_point_that_is_likely_to_pass() -> None:
    front = [point(experts, 1 / experts) for experts in CHANCES]
    assert find_edge(front, chance_of) == 2
    assert around(front, 2) == front
    assert find_edge(front[4:], chance_of) == 0


def test_the_chain_leaves_out_what_is_hopeless_and_what_a_cheaper_one_beats() -> None:
    front = [point(experts, 1 / experts) for experts in CHANCES]
    assert best_chain([*front, point(45, 0.0)], chance_of)[-1] == front[3]
    beaten = point(48, 0.1)
    chain = best_chain([*front, beaten], lambda p: 0.5 if p is beaten else chance_of(p))
    assert chain == front[:4]
    assert best_chain(front[4:], chance_of) == front[4:]


def test_each_policy_of_the_front_has_a_front_of_its_own() -> None:
    other = replace(point(20.0, 0.2), policy=make_policy("des-seq"))
    mixed = replace(other, policy=Layerwise(layers=(other.policy, make_policy("vanilla"))))
    points = [point(30, 0.1), point(25, 0.3), other]
    assert fronts_by_policy(points, [points[0]]) == [points[:2]]
    assert fronts_by_policy(points, [mixed]) == [[other]]


def test_too_few_prompts_pass_nothing() -> None:
    perfect = PairedCounts(kept=100, lost=0, gained=0, neither=0)
    assert chance_to_pass(perfect, 0.99, confidence=0.95, prompts=298) == 0.0
    assert chance_to_pass(perfect, 0.99, confidence=0.95, prompts=3000) > 0.3


def test_dials_reach_from_the_smallest_coreset_to_all_experts() -> None:
    (dial,) = dials(["des-vote"], ROUTER)
    assert (dial.settings(5)[0], dial.settings(5)[-1]) == (6.0, 16.0)
    for value in dial.settings(5):
        dial.at(value).bind(ROUTER)


def test_a_budget_starts_where_the_policy_s_own_group_limit_allows() -> None:
    (dial,) = dials(["block-max"], ROUTER)
    smallest = ROUTER.min_coreset_size("ignore")
    assert (dial.settings(5)[0], smallest < ROUTER.min_coreset_size("inside")) == (smallest, True)


def test_every_setting_of_every_policy_works() -> None:
    for dial in dials(None, ROUTER):
        for value in dial.settings(4):
            dial.at(value).bind(ROUTER)


@pytest.mark.parametrize(("name", "message"), [("des-vot", "Did you mean 'des-vote'"), ("vanilla", "nothing to tune")])
def test_policies_that_cannot_be_tuned_are_refused(name: str, message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        dials([name], ROUTER)


RECORDS = [PromptRecord(prompt=f"{t} {n}", task=t, reference="1") for t in ("arith", "math") for n in range(20)]


def test_the_split_parts_every_task_alike_and_loses_nothing() -> None:
    searched, certified = split_prompts(RECORDS, search_share=0.25, seed=3)
    assert Counter(r.task for r in searched) == {"arith": 5, "math": 5}
    assert sorted(r.prompt for r in searched + certified) == sorted(r.prompt for r in RECORDS)
    assert split_prompts(RECORDS, search_share=0.25, seed=3) == (searched, certified)
    assert split_prompts(RECORDS, search_share=0.25, seed=4) != (searched, certified)


def test_a_small_share_still_leaves_both_sides_a_prompt() -> None:
    assert [len(part) for part in split_prompts(RECORDS[:2], search_share=0.01, seed=0)] == [1, 1]


@pytest.mark.parametrize(("records", "message"), [(RECORDS[:1], "at least 2"), (RECORDS[:2] * 2, "every prompt once")])
def test_prompts_that_cannot_be_split_are_refused(records: list[PromptRecord], message: str) -> None:
    with pytest.raises(InputError, match=message):
        split_prompts(records, search_share=0.5, seed=0)


def test_what_is_kept_follows_from_the_labels() -> None:
    plain = [PromptRecord(prompt="a"), PromptRecord(prompt="b")]
    assert resolve_quality(RECORDS, "auto") == "accuracy"
    assert resolve_quality(plain, "auto") == "agreement"
    assert resolve_quality(RECORDS, "agreement") == "agreement"
    for records, wanted in ((plain, "accuracy"), (plain + RECORDS, "auto")):
        with pytest.raises(InputError, match='expected a "reference" or "tests" with every prompt'):
            resolve_quality(records, wanted)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "values",
    [{"retain": 1.0}, {"confidence": 0.4}, {"search_share": 0.0}, {"trials": -1}, {"cost": "euros"}, {"quality": "x"}],
)
def test_options_out_of_range_are_refused(values: dict[str, object]) -> None:
    with pytest.raises(InputError, match=next(iter(values))):
        TuningOptions(**values)  # type: ignore[arg-type]
