"""The derived minimum coreset, against brute force: at it no token is short of K experts, below it one can be."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from expertshare.config import RouterSpec
from expertshare.routing import SharingRule, assign
from expertshare.types import Coreset, RouterScores

VANILLA = SharingRule()  # "inside" is its group rule; a token keeps all K experts


def grouped(num_experts: int, top_k: int, num_groups: int, kept_groups: int) -> RouterSpec:
    return RouterSpec(
        num_experts=num_experts,
        top_k=top_k,
        activation="sigmoid",
        renormalise=True,
        num_groups=num_groups,
        kept_groups=kept_groups,
        has_bias=True,
    )


def all_specs(num_experts: int) -> list[RouterSpec]:
    divisors = [n for n in range(2, num_experts + 1) if num_experts % n == 0]
    return [
        grouped(num_experts, k, n, kept)
        for n in divisors
        for kept in range(1, n)
        for k in range(1, min(num_experts, kept * num_experts // n) + 1)
    ]


def label(spec: RouterSpec) -> str:
    return f"E{spec.num_experts}-K{spec.top_k}-groups{spec.num_groups}-keep{spec.kept_groups}"


def fewest_experts(member_CE: Tensor, tastes_XE: Tensor, spec: RouterSpec) -> int:
    """The least number of experts that any token of any coreset is given. C coresets, X tokens, all tried together."""
    choice = tastes_XE.expand(len(member_CE), -1, -1)
    scores = RouterScores(choice, choice, torch.ones(choice.shape[:2], dtype=torch.bool))
    plan = assign(scores, Coreset(member_CE), VANILLA, spec)
    return int((plan.expert_ids_TK != -1).sum(dim=-1).min())


def coresets_of(size: int, num_experts: int) -> Tensor:
    subsets = list(itertools.combinations(range(num_experts), size))
    return torch.tensor([[e in subset for e in range(num_experts)] for subset in subsets])


def every_taste(num_experts: int) -> Tensor:
    """Every ranking of the experts, in scores that are linear in the rank and in ones that double with it."""
    ranks = torch.tensor(list(itertools.permutations(range(num_experts))), dtype=torch.float32)
    return torch.cat([ranks + 1, 2**ranks])


@pytest.mark.parametrize("spec", [*all_specs(4), *all_specs(6)], ids=label)
def test_exhaustively(spec: RouterSpec) -> None:
    least, tastes_XE = spec.min_coreset_size("inside"), every_taste(spec.num_experts)
    assert fewest_experts(coresets_of(least, spec.num_experts), tastes_XE, spec) == spec.top_k
    assert fewest_experts(coresets_of(least - 1, spec.num_experts), tastes_XE, spec) < spec.top_k


@pytest.mark.parametrize("spec", all_specs(8), ids=label)
def test_every_coreset_of_eight_experts(spec: RouterSpec) -> None:
    """All coresets, tokens that rank the groups in every order (up to four groups) or the experts at random."""
    generator = torch.Generator().manual_seed(0)
    tastes = [torch.rand(8, generator=generator) + 0.01 for _ in range(300)]
    if spec.num_groups <= 4:
        for order in itertools.permutations(range(spec.num_groups)):
            tastes.append(torch.tensor(order).repeat_interleave(spec.group_size).float() + 1)
    else:
        tastes.append(torch.arange(8, 0, -1).float())
    least, tastes_XE = spec.min_coreset_size("inside"), torch.stack(tastes)
    assert fewest_experts(coresets_of(least, 8), tastes_XE, spec) == spec.top_k
    assert fewest_experts(coresets_of(least - 1, 8), tastes_XE, spec) < spec.top_k


def climb(spec: RouterSpec, size: int, generator: torch.Generator, steps: int) -> int:
    """Hill climbing towards a coreset and a token that reach few experts: swap members, push groups up or down."""
    experts, rows = spec.num_experts, 64
    member = torch.zeros(rows, experts, dtype=torch.bool)
    for row in member:
        row[torch.randperm(experts, generator=generator)[:size]] = True
    taste = torch.rand(rows, experts, generator=generator)
    reached = torch.full((rows,), experts)
    for _ in range(steps):
        new_member, new_taste = member.clone(), taste.clone()
        for row in range(rows):
            inside, outside = new_member[row].nonzero().flatten(), (~new_member[row]).nonzero().flatten()
            if len(outside):
                new_member[row, inside[torch.randint(len(inside), (1,), generator=generator)]] = False
                new_member[row, outside[torch.randint(len(outside), (1,), generator=generator)]] = True
            group = int(torch.randint(spec.num_groups, (1,), generator=generator)) * spec.group_size
            new_taste[row, group : group + spec.group_size] += torch.randn(1, generator=generator)
        scores = RouterScores(new_taste.unsqueeze(1), new_taste.unsqueeze(1), torch.ones(rows, 1, dtype=torch.bool))
        # all reachable experts count, not only K of them, so that climbing has a slope
        wide = grouped(experts, spec.kept_groups * spec.group_size, spec.num_groups, spec.kept_groups)
        plan = assign(scores, Coreset(new_member), VANILLA, wide)
        now = (plan.expert_ids_TK != -1).sum(dim=-1)
        better = now <= reached
        member[better], taste[better], reached[better] = new_member[better], new_taste[better], now[better]
    return int(reached.min())


@pytest.mark.parametrize("spec", [grouped(16, 4, 4, 2), grouped(24, 7, 4, 2), grouped(64, 8, 8, 4)], ids=label)
def test_hill_climbing_does_not_get_below_k(spec: RouterSpec) -> None:
    generator = torch.Generator().manual_seed(11)
    assert climb(spec, spec.min_coreset_size("inside"), generator, steps=40) >= spec.top_k


def test_hill_climbing_can_find_a_coreset_that_is_too_small() -> None:
    """The search is worth something: one expert below the minimum of a small router it succeeds."""
    spec = grouped(16, 4, 4, 2)
    assert climb(spec, spec.min_coreset_size("inside") - 1, torch.Generator().manual_seed(11), steps=40) < spec.top_k


@pytest.mark.parametrize(("experts", "lone"), [(64, [32, 40, 48, 56]), (256, [128, 160, 192, 224])])
def test_eleven_experts_are_too_few_for_llada2_and_twelve_are_not(experts: int, lone: list[int]) -> None:
    """Seven experts in the first group, one in each of the last four: those four score -inf and are dropped."""
    spec = grouped(experts, 8, 8, 4)
    assert spec.min_coreset_size("inside") == 12
    member = torch.zeros(1, experts, dtype=torch.bool)
    member[0, [*range(7), *lone]] = True
    assert member.sum() == 11
    taste_XE = torch.ones(1, experts)
    assert fewest_experts(member, taste_XE, spec) == 7
    for twelfth in set(range(experts)) - {*range(7), *lone}:
        grown = member.clone()
        grown[0, twelfth] = True
        assert fewest_experts(grown, taste_XE, spec) == 8


@pytest.mark.parametrize(
    ("spec", "least"),
    [
        (RouterSpec(num_experts=64, top_k=8, activation="softmax", renormalise=False), 8),
        (grouped(64, 8, 8, 8), 8),  # all groups kept: no limit
        (grouped(12, 5, 3, 2), 9),  # 2 * 2 < 5: a whole group of four may be dropped, 5 + 4
        (grouped(16, 8, 4, 2), 16),  # 2 * 2 < 8: two whole groups of four, 8 + 8
        (grouped(8, 3, 8, 4), 3),  # groups of one: every coreset expert counts for its group
    ],
)
def test_written_out(spec: RouterSpec, least: int) -> None:
    assert spec.min_coreset_size("inside") == least
    assert spec.min_coreset_size("ignore") == spec.top_k
