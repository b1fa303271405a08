"""Benchmark results as tables for people."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from rich.table import Table

from expertshare.cli.console import VERDICTS, figure, percent, table
from expertshare.lab.bench.cases import Case
from expertshare.lab.bench.machine import Machine

Point = Mapping[str, Any]
Columns = dict[str, Callable[[Point], str]]
PEERS_TITLE = "x: times as fast as torch's loop, transformers' eager and grouped_mm, vanilla"


def case_table(cases: Mapping[str, Case]) -> Table:
    """The cases that `bench` knows, with their sizes."""
    columns: dict[str, Callable[[tuple[str, Case]], str]] = {
        "case": lambda row: row[0],
        "hidden": lambda row: str(row[1].config.hidden_size),
        "expert": lambda row: str(row[1].config.expert_hidden),
        "experts": lambda row: str(row[1].config.router.num_experts),
        "K": lambda row: str(row[1].config.router.top_k),
        "MB/expert": lambda row: f"{row[1].config.num_expert_parameters * 2 / 1e6:.2f}",
        "tokens": lambda row: str(row[1].tokens),
        "unique": lambda row: ",".join(map(str, row[1].unique)),
        "note": lambda row: row[1].note,
    }
    made = table("Cases", columns, cases.items(), compact=True)
    made.columns[-1].justify = "left"
    return made


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


def experts_tables(found: Point) -> list[Table]:
    """A table for each case and number of tokens, then the lines through the points."""
    columns: Columns = {
        "backend": lambda point: point["backend"],
        "unique": lambda point: str(point["unique"]),
        "ms": lambda point: figure(point["ms"], 2),
        "quartiles": lambda point: _between(point["ms_quartiles"]),
        "GB/s": lambda point: figure(point["gb_per_s"]),
        "GMAC/s": lambda point: figure(point["gmac_per_s"]),
        "bound": lambda point: figure(point["bound_ms"], 2),
        "% of it": lambda point: percent(point["share_of_bound"]),
        "x loop": _times("torch-loop"),
        "x eager": _times("transformers-eager"),
        "x grouped": _times("transformers-grouped-mm"),
    }
    tables = []
    for case, tokens in dict.fromkeys((point["case"], point["tokens"]) for point in found["cases"]):
        points = [point for point in found["cases"] if (point["case"], point["tokens"]) == (case, tokens)]
        tables.append(
            table(f"{case}: one layer's experts, {tokens} tokens, {PEERS_TITLE}", columns, points, compact=True)
        )
    fits: Columns = {
        "case": lambda fit: fit["case"],
        "backend": lambda fit: fit["backend"],
        "us/expert": lambda fit: figure(fit["us_per_expert"]),
        "as GB/s": lambda fit: figure(fit["gb_per_s"]),
        "us/pair": lambda fit: figure(fit["us_per_pair"], 2),
        "R^2": lambda fit: figure(fit["r_squared"], 4),
        "largest residual ms": lambda fit: figure(max(map(abs, fit["residuals_ms"])), 3),
    }
    if found["fits"]:
        tables.append(table("latency = b * unique + a * pairs", fits, found["fits"], words=2, compact=True))
    return tables


def forward_tables(found: Point) -> list[Table]:
    """Every contender, then where our time goes."""
    who: Columns = {"backend": lambda point: point["backend"], "policy": lambda point: point["policy"]}
    columns: Columns = {
        **who,
        "unique": lambda point: figure(point.get("unique_experts")),
        "ms": lambda point: figure(point["ms"], 2),
        "quartiles": lambda point: _between(point["ms_quartiles"]),
        "bound": lambda point: figure(point.get("bound_ms"), 2),
        "% of bound": lambda point: percent(point.get("share_of_bound")),
        "x eager": _times("transformers-eager"),
        "x grouped": _times("transformers-grouped-mm"),
        "x vanilla": _times("vanilla"),
        "argmax %": lambda point: percent(point["same_argmax"]),
    }
    parts: Columns = who | {part: partial(_part, part) for part in ("router", "experts", "attention", "head", "other")}
    parts["router % of experts"] = lambda point: percent(point["router_over_experts"])
    points = found["forwards"]
    ours = [point for point in points if "ms_by_part" in point]
    return [
        table(f"One denoising forward, {PEERS_TITLE}", columns, points, words=2, compact=True),
        table("ms by part (medians)", parts, ours, words=2, compact=True),
    ]


def generate_tables(found: Point) -> list[Table]:
    """A table of whole answers for every contender."""
    columns: Columns = {
        "backend": lambda point: point["backend"],
        "policy": lambda point: point["policy"],
        "graph": lambda point: VERDICTS[point.get("captured")],
        "batch": lambda point: str(point["batch_size"]),
        "tokens/s": lambda point: figure(point["tokens_per_s"]),
        "range": lambda point: "-".join(f"{rate:.1f}" for rate in point["tokens_per_s_range"]),
        "unique": lambda point: figure(point.get("unique_experts")),
        "x grouped": _times("transformers-grouped-mm"),
        "x vanilla": _times("vanilla"),
        "same %": lambda point: percent(point["same_as_vanilla"]),
        "peer %": lambda point: percent(min(point["same_as_peer"].values(), default=None)),
        "runs": lambda point: "equal" if point["equal_across_repeats"] else "DIFFER",
    }
    return [table(f"Whole answers, {PEERS_TITLE}", columns, found["generations"], words=2, compact=True)]


def _part(name: str, point: Point) -> str:
    return figure(point["ms_by_part"][name], 2)


def _times(other: str) -> Callable[[Point], str]:
    return lambda point: figure(point["faster_than"].get(other), 2)


def _between(pair: Sequence[float]) -> str:
    return f"{pair[0]:.2f}-{pair[1]:.2f}"
