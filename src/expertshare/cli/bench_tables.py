"""Benchmark results as tables for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

from expertshare.cli.console import percent
from expertshare.lab.bench import Case, Machine

Found = Mapping[str, Any]
WORD_WIDTH = {"backend": len("transformers-grouped-mm")}
PEERS_TITLE = "x: times as fast as torch's loop, transformers' eager and grouped_mm, vanilla"


def case_table(cases: Mapping[str, Case]) -> Table:
    """The registry."""
    table = _table("Cases", ["case"], ["hidden", "expert", "experts", "K", "MB/expert", "tokens", "unique"], "note")
    for name, case in cases.items():
        config = case.config
        table.add_row(
            name,
            str(config.hidden_size),
            str(config.expert_hidden),
            str(config.router.num_experts),
            str(config.router.top_k),
            f"{config.num_expert_parameters * 2 / 1e6:.2f}",
            str(case.tokens),
            ",".join(map(str, case.unique)),
            case.note,
        )
    return table


def machine_line(machine: Machine) -> str:
    """The machine and its measured limits in one line."""
    peaks = ", ".join(f"{rate / 1e9:.0f} GMAC/s in {name}" for name, rate in machine.macs_per_s.items())
    facts = machine.facts
    if "gpu" in facts:
        gpu = facts["gpu"]
        return (
            f"{gpu['name']}, driver {gpu['driver']}, CUDA {gpu['cuda']}, Triton {gpu['triton']}; "
            f"measured {machine.bytes_per_s / 1e9:.0f} GB/s (copy), {peaks}"
        )
    return (
        f"{facts['cpu']}, {facts['threads']} threads, our kernel: {machine.instruction_set or 'not built'}; "
        f"measured {machine.bytes_per_s / 1e9:.1f} GB/s, {peaks}"
    )


def experts_tables(found: Found) -> list[Table]:
    """A table for each case and number of tokens, then the lines through the points."""
    columns = ["unique", "ms", "quartiles", "GB/s", "GMAC/s", "bound", "% of it", "x loop", "x eager", "x grouped"]
    tables = []
    for case, tokens in dict.fromkeys((point["case"], point["tokens"]) for point in found["cases"]):
        title = f"{case}: one layer's experts, {tokens} tokens, {PEERS_TITLE}"
        table = _table(title, ["backend"], columns)
        for point in found["cases"]:
            if (point["case"], point["tokens"]) == (case, tokens):
                table.add_row(*_experts_row(point))
        tables.append(table)
    if not found["fits"]:
        return tables
    numbers = ["us/expert", "as GB/s", "us/pair", "R^2", "largest residual ms"]
    fits = _table("latency = b * unique + a * pairs", ["case", "backend"], numbers)
    for fit in found["fits"]:
        fits.add_row(
            fit["case"],
            fit["backend"],
            f"{fit['us_per_expert']:.1f}",
            "-" if fit["gb_per_s"] is None else f"{fit['gb_per_s']:.1f}",
            f"{fit['us_per_pair']:.2f}",
            f"{fit['r_squared']:.4f}",
            f"{max(map(abs, fit['residuals_ms'])):.3f}",
        )
    return [*tables, fits]


def _experts_row(point: Mapping[str, Any]) -> list[str]:
    return [
        point["backend"],
        str(point["unique"]),
        f"{point['ms']:.2f}",
        _between(point["ms_quartiles"]),
        f"{point['gb_per_s']:.1f}",
        f"{point['gmac_per_s']:.1f}",
        f"{point['bound_ms']:.2f}",
        percent(point["share_of_bound"]),
        *(_times(point, other) for other in ("torch", "transformers-eager", "transformers-grouped-mm")),
    ]


def forward_tables(found: Found) -> list[Table]:
    """Every contender, then where our time goes."""
    columns = ["unique", "ms", "quartiles", "bound", "% of bound", "x eager", "x grouped", "x vanilla", "argmax %"]
    whole = _table(f"One denoising forward, {PEERS_TITLE}", ["backend", "policy"], columns)
    parts = ["router", "experts", "attention", "head", "other"]
    split = _table("ms by part (medians)", ["backend", "policy"], [*parts, "router % of experts"])
    for point in found["forwards"]:
        whole.add_row(
            point["backend"],
            point["policy"],
            f"{point['unique_experts']:.1f}" if "unique_experts" in point else "-",
            f"{point['ms']:.2f}",
            _between(point["ms_quartiles"]),
            f"{point['bound_ms']:.2f}" if "bound_ms" in point else "-",
            percent(point.get("share_of_bound")),
            *(_times(point, other) for other in ("transformers-eager", "transformers-grouped-mm", "vanilla")),
            percent(point["same_argmax"]),
        )
        if "ms_by_part" in point:
            by_part = [f"{point['ms_by_part'][part]:.2f}" for part in parts]
            split.add_row(point["backend"], point["policy"], *by_part, percent(point["router_over_experts"]))
    return [whole, split]


def generate_tables(found: Found) -> list[Table]:
    """Every contender."""
    columns = ["graph", "batch", "tokens/s", "range", "unique", "x grouped", "x vanilla", "same %", "peer %"]
    table = _table(f"Whole answers, {PEERS_TITLE}", ["backend", "policy"], [*columns, "runs"])
    for point in found["generations"]:
        table.add_row(
            point["backend"],
            point["policy"],
            {None: "-", True: "yes", False: "no"}[point.get("captured")],
            str(point["batch_size"]),
            f"{point['tokens_per_s']:.1f}",
            "-".join(f"{rate:.1f}" for rate in point["tokens_per_s_range"]),
            f"{point['unique_experts']:.1f}" if "unique_experts" in point else "-",
            *(_times(point, other) for other in ("transformers-grouped-mm", "vanilla")),
            percent(point["same_as_vanilla"]),
            percent(min(point["same_as_peer"].values(), default=None)),
            "equal" if point["equal_across_repeats"] else "DIFFER",
        )
    return [table]


def _times(point: Mapping[str, Any], other: str) -> str:
    factor = point["faster_than"].get(other)
    return "-" if factor is None else f"{factor:.2f}"


def _between(pair: Sequence[float]) -> str:
    return f"{pair[0]:.2f}-{pair[1]:.2f}"


def _table(title: str, words: Sequence[str], numbers: Sequence[str], *more: str) -> Table:
    """Without lines between columns: there are many of them."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for column in words:
        table.add_column(column, overflow="fold", min_width=WORD_WIDTH.get(column))
    for column in numbers:
        table.add_column(column, justify="right")
    for column in more:
        table.add_column(column)
    return table
