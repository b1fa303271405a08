"""Figures of comparisons and evaluations: the main table, sweeps, quality against experts."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from expertshare.lab import plots
from expertshare.lab.report.comparisons import Values, block_length_sweeps, comparison_of, is_drawable, p_sweep_of
from expertshare.lab.report.figure import Figure
from expertshare.lab.report.sources import Source
from expertshare.lab.report.tables import main_table, number, percent, plain_table

COMPARISONS = ("compare", "eval")


def _compared(sources: Sequence[Source]) -> list[tuple[Source, Values]]:
    """Comparisons and evaluations, but for those of a block-length sweep at lengths that are not the model's own."""
    in_sweeps = {id(source) for sweep in block_length_sweeps(list(sources)) for source in sweep.values()}
    return [
        (source, comparison_of(source))
        for source in sources
        if source.kind in COMPARISONS and (id(source) not in in_sweeps or _own_length(source))
    ]


def _own_length(source: Source) -> bool:
    return bool(source.config["decoding"]["block_length"] == source.config["model_facts"]["block_length"])


def main(sources: Sequence[Source]) -> list[Figure]:
    """The main table of every comparison."""
    return [
        Figure(
            slug=f"main-{index}",
            title=f"{source.config['model']}, {comparison['num_prompts']:,} prompts",
            caption="",
            sources=(source,),
            table=main_table(comparison),
        )
        for index, (source, comparison) in enumerate(_compared(sources), 1)
    ]


def p_sweeps(sources: Sequence[Source]) -> list[Figure]:
    """What is kept and used against p."""
    found: list[Figure] = []
    for source, comparison in _compared(sources):
        runs, reference = p_sweep_of(comparison), comparison["reference"]
        if not runs or not is_drawable(comparison):
            continue
        rows = [
            (
                f"{run['knobs']['top_p_experts']}",
                number(run["unique_experts"]["denoise"]),
                percent(run["unique_experts_reduction"]),
                percent(run["accuracy"]),
                percent(run["retained_capped"]),
            )
            for run in runs
        ]
        first, last = runs[0], runs[-1]
        found.append(
            Figure(
                slug=f"p-sweep-{len(found) + 1}",
                title=f"{source.config['model']}: p from {rows[0][0]} to {rows[-1][0]}",
                caption="Left: what is kept. Right: what is used. Dashed: vanilla routing.",
                alt=f"Line charts over p. Unique experts go from {rows[0][1]} at p = {rows[0][0]} to {rows[-1][1]} "
                f"at p = {rows[-1][0]}, retained accuracy from {percent(first['retained_capped'])} to "
                f"{percent(last['retained_capped'])} per cent.",
                sources=(source,),
                table=plain_table(("p", "unique experts", "fewer, %", "accuracy, %", "capped, %"), rows),
                draw=partial(plots.plot_p_sweep, runs, reference),
            )
        )
    return found


def block_lengths(sources: Sequence[Source]) -> list[Figure]:
    """What is saved and kept against the block length."""
    found: list[Figure] = []
    for sweep in block_length_sweeps(list(sources)):
        comparisons = {length: source.results for length, source in sweep.items()}
        labels = ["vanilla", *plots.common_labels(comparisons)]
        rows = []
        for length, comparison in comparisons.items():
            named = {run["label"]: run for run in [comparison["reference"], *comparison["runs"]]}
            for label in labels:
                run = named[label]
                shares = [run["unique_experts_reduction"], run["accuracy"], run["retained_capped"]]
                experts = number(run["unique_experts"]["denoise"])
                rows.append((f"{length}, {label}", experts, *(percent(share) for share in shares)))
        lengths = ", ".join(str(length) for length in comparisons)
        found.append(
            Figure(
                slug=f"block-lengths-{len(found) + 1}",
                title=f"{next(iter(sweep.values())).config['model']}: blocks of {lengths}",
                caption="Left: experts saved. Right: accuracy kept; dashed: vanilla's own accuracy at each length.",
                alt=f"Two line charts over the block lengths {lengths}, a line for each policy; all points are tabled.",
                sources=tuple(sweep.values()),
                table=plain_table(
                    ("block length, policy", "unique experts", "fewer, %", "accuracy, %", "capped, %"), rows
                ),
                draw=partial(plots.plot_block_lengths, comparisons),
            )
        )
    return found


def quality(sources: Sequence[Source]) -> list[Figure]:
    """Quality against experts, all policies."""
    found: list[Figure] = []
    for source, comparison in _compared(sources):
        policies = {run["policy"] for run in comparison["runs"]} - {"vanilla"}
        if not is_drawable(comparison) or not policies or (policies == {"block-top-p"} and p_sweep_of(comparison)):
            continue
        found.append(
            Figure(
                slug=f"quality-{len(found) + 1}",
                title=f"{source.config['model']}: {len(policies)} policies",
                caption="A colour for each policy, its settings joined by a line; the diamond is vanilla routing.",
                alt=f"Scatter chart of accuracy against unique experts for {', '.join(sorted(policies))}; the "
                "main table holds all points.",
                sources=(source,),
                draw=partial(plots.plot_comparison, comparison),
            )
        )
    return found
