"""Figures of comparisons and evaluations, brought into one form: the main table, sweeps, quality against experts."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from expertshare.evaluation.statistics import proportion
from expertshare.lab.plots.quality import common_labels, plot_block_lengths, plot_comparison, plot_p_sweep
from expertshare.lab.report.figures import (
    DASH,
    Cell,
    Columns,
    Figure,
    Values,
    number,
    percent,
    plain_table,
    section,
    table_of,
)
from expertshare.lab.report.sources import Source


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
        **{key: policy[key] for key in ("policy", "label", "knobs")},
        **{key: summary[key] for key in ("unique_experts", "unique_experts_reduction")},
        **{key: summary[key] for key in ("retained", "retained_capped", "retained_capped_interval")},
        "accuracy": share.value if share else None,
        "accuracy_interval": [share.low, share.high] if share else None,
        "tasks": {
            row["task"]: {"accuracy": row["accuracy"], "interval": row["interval"], "count": row["judged"]}
            for row in mine
            if row["judged"]
        },
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


def block_length_sweeps(sources: Sequence[Source]) -> list[dict[int, Source]]:
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


def _compared(sources: Sequence[Source]) -> list[tuple[Source, Values]]:
    """Comparisons and evaluations, but for those of a block-length sweep at lengths that are not the model's own."""
    in_sweeps = {id(source) for sweep in block_length_sweeps(sources) for source in sweep.values()}

    def own_length(source: Source) -> bool:
        return bool(source.config["decoding"]["block_length"] == source.config["model_facts"]["block_length"])

    return [
        (source, comparison_of(source))
        for source in sources
        if source.kind in ("compare", "eval") and (id(source) not in in_sweeps or own_length(source))
    ]


@section("Main table", "expertshare compare MODEL --prompts FILE --json > out.json, or expertshare eval")
def main(sources: Sequence[Source]) -> list[Figure]:
    """Unique experts: of one block in one layer, mean over denoising forwards. Retained: accuracy as a share of
    vanilla's, mean over tasks; capped: no task counts for more than 100 %. Small figures are 95 % intervals."""
    return [
        Figure(
            title=f"{source.config['model']}, {comparison['num_prompts']:,} prompts",
            sources=(source,),
            table=table_of(comparison["runs"], _main_columns(comparison["runs"])),
        )
        for source, comparison in _compared(sources)
    ]


def _main_columns(runs: Sequence[Values]) -> Columns:
    """For every policy: experts, accuracy by task, what is retained, the difference to vanilla."""
    columns: dict[str, Callable[[Values], str | Cell]] = {
        "policy": lambda run: run["label"],
        "unique experts": lambda run: number(run["unique_experts"]["denoise"]),
        "fewer, %": lambda run: percent(run["unique_experts_reduction"]),
    }
    for task in dict.fromkeys(task for run in runs for task in run["tasks"]):
        columns[f"{task}, %"] = partial(_accuracy, task)
    if any(run["accuracy"] is not None for run in runs):
        columns["retained, %"] = lambda run: percent(run["retained"])
        columns["capped, %"] = lambda run: _within(run["retained_capped"], run.get("retained_capped_interval"))
    if any(run["difference"] for run in runs):
        columns["against vanilla, points"] = lambda run: _difference(run["difference"])
    if any(run["agreement"] is not None for run in runs):
        columns["tokens as vanilla, %"] = lambda run: percent(run["agreement"])
    return columns


def _accuracy(task: str, run: Values) -> Cell:
    found = run["tasks"].get(task)
    return _within(found["accuracy"], found["interval"]) if found else Cell(DASH)


def _within(share: float | None, interval: Sequence[float] | None) -> Cell:
    """A share with its interval, in per cent."""
    if share is None or interval is None:
        return Cell(percent(share))
    return Cell(percent(share), f"{percent(interval[0])} to {percent(interval[1])}")


def _difference(found: Values | None) -> Cell:
    if found is None:
        return Cell(DASH)
    return Cell(f"{100 * found['value']:+.1f}", f"{100 * found['low']:+.1f} to {100 * found['high']:+.1f}")


def _kept_and_used(run: Values) -> tuple[str, ...]:
    shares = (run["unique_experts_reduction"], run["accuracy"], run["retained_capped"])
    return (number(run["unique_experts"]["denoise"]), *(percent(share) for share in shares))


KEPT_AND_USED = ("unique experts", "fewer, %", "accuracy, %", "capped, %")


@section("Sweep of p", "expertshare compare with block-top-p at three or more values of top_p_experts")
def p_sweep(sources: Sequence[Source]) -> list[Figure]:
    """Block top-p keeps the experts that hold a share p of a block's votes."""
    found: list[Figure] = []
    for source, comparison in _compared(sources):
        runs = p_sweep_of(comparison)
        if not runs or not is_drawable(comparison):
            continue
        rows = [(f"{run['knobs']['top_p_experts']}", *_kept_and_used(run)) for run in runs]
        first, last = rows[0], rows[-1]
        found.append(
            Figure(
                title=f"{source.config['model']}: p from {first[0]} to {last[0]}",
                caption="Left: what is kept. Right: what is used. Dashed: vanilla routing.",
                alt=f"Line charts over p. Unique experts go from {first[1]} at p = {first[0]} to {last[1]} "
                f"at p = {last[0]}, retained accuracy from {first[-1]} to {last[-1]} per cent.",
                sources=(source,),
                table=plain_table(("p", *KEPT_AND_USED), rows),
                draw=partial(plot_p_sweep, runs, comparison["reference"]),
            )
        )
    return found


@section("Sweep of the block length", "expertshare compare ... --block-length N --json > N.json, for two or more N")
def block_lengths(sources: Sequence[Source]) -> list[Figure]:
    """A block is what shares experts: longer blocks have larger unions, of which more can be saved. A model loses
    accuracy at lengths that it was not trained at."""
    found: list[Figure] = []
    for sweep in block_length_sweeps(sources):
        comparisons = {length: source.results for length, source in sweep.items()}
        labels = ["vanilla", *common_labels(comparisons)]
        rows = []
        for length, comparison in comparisons.items():
            named = {run["label"]: run for run in [comparison["reference"], *comparison["runs"]]}
            rows += [(f"{length}, {label}", *_kept_and_used(named[label])) for label in labels]
        lengths = ", ".join(str(length) for length in comparisons)
        found.append(
            Figure(
                title=f"{next(iter(sweep.values())).config['model']}: blocks of {lengths}",
                caption="Left: experts saved. Right: accuracy kept; dashed: vanilla's own accuracy at each length.",
                alt=f"Two line charts over the block lengths {lengths}, a line for each policy; all points are tabled.",
                sources=tuple(sweep.values()),
                table=plain_table(("block length, policy", *KEPT_AND_USED), rows),
                draw=partial(plot_block_lengths, comparisons),
            )
        )
    return found


@section("Quality against experts", "expertshare compare or eval with several policies")
def quality(sources: Sequence[Source]) -> list[Figure]:
    """Up and to the left is better."""
    found: list[Figure] = []
    for source, comparison in _compared(sources):
        policies = {run["policy"] for run in comparison["runs"]} - {"vanilla"}
        if not is_drawable(comparison) or not policies or (policies == {"block-top-p"} and p_sweep_of(comparison)):
            continue
        found.append(
            Figure(
                title=f"{source.config['model']}: {len(policies)} policies",
                caption="A colour for each policy, its settings joined by a line; the diamond is vanilla routing.",
                alt=f"Scatter chart of accuracy against unique experts for {', '.join(sorted(policies))}; the "
                "main table holds all points.",
                sources=(source,),
                draw=partial(plot_comparison, comparison),
            )
        )
    return found
