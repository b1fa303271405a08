"""Tables of `expertshare eval`, from its results as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from expertshare.cli.console import percent, percent_within

Results = Mapping[str, Any]
MAX_LABEL_WIDTH = 18
"""Longer labels are folded where a terminal of 120 columns has no room for them."""


def task_table(results: Results) -> Table:
    """Accuracy of every policy at every task, beside vanilla's."""
    title = "Accuracy, %, with its 95 % interval; difference to vanilla on the same items; % retained of vanilla's"
    table = _table(title, results, "task", ["right", "accuracy %", "difference %", "p", "retained", "capped"])
    for row in results["rows"]:
        difference = row["difference"]
        table.add_row(
            row["policy"],
            row["task"],
            f"{row['correct']}/{row['judged']}" if row["judged"] else "-",
            percent_within(row["accuracy"], row["interval"]),
            percent_within(difference["value"], [difference["low"], difference["high"]]) if difference else "-",
            f"{difference['p_value']:.3f}" if difference else "-",
            percent(row["retained"]),
            percent(row["retained_capped"]),
        )
    unjudged = sorted({reason for row in results["rows"] for reason in row["unjudged_because"]})
    table.caption = f"Not judged: {'; '.join(unjudged)}" if unjudged else None
    return table


def cost_table(results: Results) -> Table:
    """Experts by kind of forward, and what an answer takes."""
    title = "Unique experts per block and layer, by kind of forward; saved: of vanilla's, denoising. Means per answer"
    columns = ["denoise", "prefill", "commit", "saved %", "steps", "tokens"]
    table = _table(title, results, "task", columns)
    for row in results["rows"]:
        unique = row["unique_experts"]
        table.add_row(
            row["policy"],
            row["task"],
            *(f"{unique[kind]:.1f}" for kind in ("denoise", "prefill", "commit")),
            percent(row["unique_experts_reduction"]),
            f"{row['steps']:.1f}",
            f"{row['tokens']:.1f}",
        )
    return table


def summary_table(results: Results) -> Table:
    """Each policy over all tasks."""
    title = "Over tasks: retained of vanilla's accuracy, plain mean, and with no task above 100 %"
    table = _table(title, results, "tasks", ["retained %", "capped %", "unique experts", "saved %"])
    for row in results["summary"]:
        without = len(row["tasks_without_ratio"])
        table.add_row(
            row["policy"],
            f"{len(row['tasks_counted'])}{f' (+{without} without a ratio)' if without else ''}",
            percent(row["retained"]),
            percent_within(row["retained_capped"], row["retained_capped_interval"]),
            f"{row['unique_experts']['denoise']:.1f}",
            percent(row["unique_experts_reduction"]),
        )
    return table


def _table(title: str, results: Results, second: str, columns: list[str]) -> Table:
    table = Table(title=title, title_justify="left", caption_justify="left")
    widest = max(len(label) for label in results["policies"])
    table.add_column("policy", overflow="fold", min_width=min(widest, MAX_LABEL_WIDTH))
    table.add_column(second)
    for column in columns:
        table.add_column(column, justify="right")
    return table
