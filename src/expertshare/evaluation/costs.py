"""The cost of several batches as one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from expertshare.measure.cost import FORWARD_KINDS, Cost, ForwardCost, ForwardKind


def join_costs(costs: Sequence[Cost], first_rows: Sequence[int]) -> Cost:
    """Totals over batches, at least one; means are weighted as in a single cost. first_rows: number of each batch's
    first row among all rows, by which its turns are renumbered."""
    steps = [_shifted(step, by) for cost, by in zip(costs, first_rows, strict=True) for step in cost.steps]
    by_kind = {kind: [step for step in steps if step.kind == kind] for kind in FORWARD_KINDS}
    groups = {kind: sum(step.groups for step in of_kind) for kind, of_kind in by_kind.items()}
    forwards = {kind: len(of_kind) for kind, of_kind in by_kind.items()}
    by_layer = {kind: _unique_by_layer(costs, by_kind[kind], kind) for kind in FORWARD_KINDS}
    return Cost(
        forwards=forwards,
        unique_experts={kind: _mean(by_layer[kind]) if groups[kind] else 0.0 for kind in FORWARD_KINDS},
        union_experts={
            kind: sum(cost.union_experts[kind] * cost.forwards[kind] for cost in costs) / max(1, forwards[kind])
            for kind in FORWARD_KINDS
        },
        expert_bytes=_sum([cost.expert_bytes for cost in costs]),
        pairs=_sum([cost.pairs for cost in costs]),
        unique_experts_by_layer=by_layer,
        steps=tuple(steps),
    )


def _shifted(step: ForwardCost, by: int) -> ForwardCost:
    return replace(step, turns=tuple(replace(turn, row=turn.row + by) for turn in step.turns)) if by else step


def _unique_by_layer(costs: Sequence[Cost], steps: Sequence[ForwardCost], kind: ForwardKind) -> tuple[float, ...]:
    """Mean over sharing groups, so that a batch of many counts for more than a batch of few."""
    num_layers = len(costs[0].unique_experts_by_layer[kind])
    groups = max(1, sum(step.groups for step in steps))
    return tuple(sum(step.unique_experts[n] * step.groups for step in steps) / groups for n in range(num_layers))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _sum(totals: Sequence[Mapping[ForwardKind, int]]) -> dict[ForwardKind, int]:
    return {kind: sum(total[kind] for total in totals) for kind in FORWARD_KINDS}
