"""What the lines of an evaluation say: accuracy, what is retained of vanilla's, and cost, with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from expertshare.evaluation.statistics import (
    PairedCounts,
    Proportion,
    capped_mean_interval,
    paired_difference,
    proportion,
    retained,
)
from expertshare.measure.cost import FORWARD_KINDS

Line = Mapping[str, Any]


def summarise(
    lines: Sequence[Line], *, tasks: Sequence[str], policies: Sequence[str], baseline: str = "vanilla"
) -> dict[str, Any]:
    """Plain values: "rows" by task and policy, "summary" by policy. Intervals are [low, high] at the 95 % level.

    The lines hold every item of every task under every policy; their order does not matter. baseline: the one that
    others are held against, the model's own routing.
    """
    cells = {(task, policy): _cell(lines, task, policy) for task in tasks for policy in policies}
    rows = [
        _row(task, policy, cells[task, policy], cells[task, baseline], policy == baseline)
        for task in tasks
        for policy in policies
    ]
    return {
        "tasks": list(tasks),
        "policies": list(policies),
        "baseline": baseline,
        "num_answers": len(lines),
        "rows": rows,
        "summary": [_summary(policy, baseline, tasks, cells) for policy in policies],
    }


def _cell(lines: Sequence[Line], task: str, policy: str) -> list[Line]:
    """Lines of one task and policy, in an order that does not depend on how they came about."""
    return sorted((x for x in lines if (x["task"], x["policy"]) == (task, policy)), key=lambda x: str(x["id"]))


def _outcomes(cell: Sequence[Line]) -> dict[str, bool]:
    return {line["id"]: line["correct"] for line in cell if line["correct"] is not None}


def _paired(cell: Sequence[Line], base: Sequence[Line]) -> tuple[list[bool], list[bool]]:
    """Outcomes of the items that were judged under both."""
    mine, theirs = _outcomes(cell), _outcomes(base)
    both = [key for key in mine if key in theirs]
    return [mine[key] for key in both], [theirs[key] for key in both]


def _row(task: str, policy: str, cell: Sequence[Line], base: Sequence[Line], is_baseline: bool) -> dict[str, Any]:
    judged = list(_outcomes(cell).values())
    share = proportion(judged) if judged else None
    by_harness = [line["harness_correct"] for line in cell if line.get("harness_correct") is not None]
    mine, theirs = _paired(cell, base)
    difference = paired_difference(mine, theirs) if mine and not is_baseline else None
    ratio = sum(mine) / sum(theirs) if any(theirs) else None
    return {
        "task": task,
        "policy": policy,
        "count": len(cell),
        "judged": len(judged),
        "unjudged_because": sorted({str(line["reason"]) for line in cell if line["correct"] is None}),
        "correct": sum(judged),
        "accuracy": share.value if share else None,
        "interval": [share.low, share.high] if share else None,
        "harness_accuracy": sum(by_harness) / len(by_harness) if by_harness else None,
        "difference": asdict(difference) if difference else None,
        "retained": ratio,
        "retained_capped": min(1.0, ratio) if ratio is not None else None,
        **costs(cell, base),
    }


def costs(cell: Sequence[Line], base: Sequence[Line]) -> dict[str, Any]:
    """Experts by kind of forward (mean over blocks), and means per item of steps, forwards and tokens."""
    unique = {kind: _unique(cell, kind) for kind in FORWARD_KINDS}
    base_unique = _unique(base, "denoise")
    count = max(1, len(cell))
    return {
        "unique_experts": unique,
        "unique_experts_reduction": 1.0 - unique["denoise"] / base_unique if base_unique else None,
        "steps": sum(line["steps"] for line in cell) / count,
        "forwards": {kind: sum(line["forwards"][kind] for line in cell) / count for kind in FORWARD_KINDS},
        "tokens": sum(line["tokens"] for line in cell) / count,
    }


def _unique(cell: Sequence[Line], kind: str) -> float:
    blocks = sum(line["blocks"][kind] for line in cell)
    total: float = sum(line["unique_experts"][kind] * line["blocks"][kind] for line in cell)
    return total / blocks if blocks else 0.0


def _summary(
    policy: str, baseline: str, tasks: Sequence[str], cells: Mapping[tuple[str, str], Sequence[Line]]
) -> dict[str, Any]:
    accuracy: dict[str, Proportion] = {}
    base_accuracy: dict[str, Proportion] = {}
    pairs: dict[str, PairedCounts] = {}
    for task in tasks:
        mine, theirs = _paired(cells[task, policy], cells[task, baseline])
        if mine:
            accuracy[task], base_accuracy[task] = proportion(mine), proportion(theirs)
            pairs[task] = PairedCounts.of(mine, theirs)
    kept = retained(accuracy, base_accuracy)
    counted = list(kept.by_task)
    low_high = capped_mean_interval([pairs[task] for task in counted]) if counted else None
    everything = [line for task in tasks for line in cells[task, policy]]
    base = [line for task in tasks for line in cells[task, baseline]]
    return {
        "policy": policy,
        "tasks_counted": counted,
        "tasks_without_ratio": [task for task in tasks if task not in kept.by_task],
        "retained": kept.mean,
        "retained_capped": kept.capped_mean,
        "retained_capped_interval": list(low_high) if low_high else None,
        **costs(everything, base),
    }
