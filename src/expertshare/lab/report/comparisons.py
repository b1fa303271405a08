"""Comparisons and evaluations in one form: what the main table and the quality figures are made from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from expertshare.evaluation.statistics import proportion
from expertshare.lab.report.sources import Source

Values = Mapping[str, Any]


def comparison_of(source: Source) -> Values:
    """What `compare` writes: as it is, or an evaluation brought into its form (accuracy over all judged items)."""
    if source.kind == "compare":
        return source.results
    results, policies = source.results, {p["label"]: p for p in source.config["policies"]}
    runs = [_run(summary, policies[summary["policy"]], results["rows"]) for summary in results["summary"]]
    reference = next(run for run in runs if run["policy"] == "vanilla")
    return {"runs": runs, "reference": reference, "num_prompts": results["num_answers"] // len(results["policies"])}


def _run(summary: Values, policy: Values, rows: list[Values]) -> dict[str, Any]:
    mine = [row for row in rows if row["policy"] == summary["policy"]]
    correct, judged = sum(row["correct"] for row in mine), sum(row["judged"] for row in mine)
    share = proportion([True] * correct + [False] * (judged - correct)) if judged else None
    return {
        "policy": policy["policy"],
        "label": policy["label"],
        "knobs": policy["knobs"],
        "unique_experts": summary["unique_experts"],
        "unique_experts_reduction": summary["unique_experts_reduction"],
        "accuracy": share.value if share else None,
        "accuracy_interval": [share.low, share.high] if share else None,
        "tasks": {
            row["task"]: {"accuracy": row["accuracy"], "interval": row["interval"], "count": row["judged"]}
            for row in mine
            if row["judged"]
        },
        "retained": summary["retained"],
        "retained_capped": summary["retained_capped"],
        "retained_capped_interval": summary["retained_capped_interval"],
        "agreement": None,
        "difference": None,
    }


def is_drawable(comparison: Values) -> bool:
    """Whether there is a quality to draw: accuracy, or agreement with vanilla."""
    return comparison["reference"]["accuracy"] is not None or comparison["reference"]["agreement"] is not None


def p_sweep_of(comparison: Values) -> list[Values]:
    """The runs of block top-p that differ in p alone, ascending; the largest such set, empty below three."""
    sets: dict[str, list[Values]] = {}
    for run in comparison["runs"]:
        if run["policy"] == "block-top-p" and "top_p_experts" in run["knobs"]:
            others = {knob: value for knob, value in run["knobs"].items() if knob != "top_p_experts"}
            sets.setdefault(json.dumps(others, sort_keys=True), []).append(run)
    largest = max(sets.values(), key=len, default=[])
    return sorted(largest, key=lambda run: float(run["knobs"]["top_p_experts"])) if len(largest) > 2 else []


def block_length_sweeps(sources: list[Source]) -> list[dict[int, Source]]:
    """Comparisons of one model on as many prompts, with the same seeds, answer length and threshold, that differ in
    the block length."""
    groups: dict[tuple[Any, ...], dict[int, Source]] = {}
    for source in sources:
        if source.kind != "compare":
            continue
        decoding = source.config["decoding"]
        rest = tuple(sorted((k, str(v)) for k, v in decoding.items() if k not in ("block_length", "steps_per_block")))
        policies = tuple(run["label"] for run in source.results["runs"])
        key = (source.config["model"], source.results["num_prompts"], rest, policies)
        groups.setdefault(key, {}).setdefault(decoding["block_length"], source)
    return [dict(sorted(group.items())) for group in groups.values() if len(group) > 1]
