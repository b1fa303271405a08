"""The capacity model of `expertshare simulate` against what was measured on one machine: tables for docs/scaling.md.

    python benchmarks/capacity_check.py

Reads benchmarks/results/experts-mini-2.json, forward-mini.json and memory-mini-*.json. One "GPU" stands for the
machine, with the bandwidth and peak of the report (memory-mini has none of its own: those of experts-mini-2).
Predictions come twice: reading hidden behind computing or the reverse (--overlap 1, the roofline), and one after the
other (--overlap 0).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from expertshare.convert.sizes import likeness, sizes_like
from expertshare.experts import parse_size
from expertshare.lab.simulate.capacity import Replica, simulate_replica
from expertshare.lab.simulate.deployment import Card, Cluster, Demand, find_card
from expertshare.lab.simulate.placement import BlockTrace

RESULTS = Path(__file__).parent / "results"
MODEL = "llada2.0-mini"
CONTEXT = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One measured figure and its predictions, in one unit. low: with overlap 1; high: with overlap 0."""

    what: str
    unique: float
    measured: float
    low: float
    high: float

    @property
    def error_low(self) -> float:
        """Of the roofline, as a share of what was measured; negative where it promises too much."""
        return self.low / self.measured - 1.0

    @property
    def error_high(self) -> float:
        """Of the sum."""
        return self.high / self.measured - 1.0


def expert_layer() -> list[Check]:
    """Our kernel, one layer of 32 tokens, milliseconds."""
    results = _results("experts-mini-2.json")
    card = _machine(results)
    cases = [case for case in results["cases"] if case["backend"] == "cpu"]
    return [_check(f"{c['unique']} experts", c["unique"], c["ms"], card, layers=2, part="experts_s") for c in cases]


def forwards() -> list[Check]:
    """Whole forwards of four layers and the head, milliseconds."""
    results = _results("forward-mini.json")
    card, found = _machine(results), []
    for each in results["forwards"]:
        if each["backend"] != "cpu":
            continue
        policy, unique = each["policy"], each["unique_experts"]
        found.append(_check(f"forward, {policy}", unique, each["ms"], card, layers=4, part="step_s"))
    return found


def decoding(name: str, scheme: str) -> list[Check]:
    """Forwards of the whole model behind a store with a budget, without the time that it waited, milliseconds."""
    card = _machine(_results("experts-mini-2.json"))
    found = []
    for point in _points(name):
        seconds = (sum(point["seconds_by_part"].values()) - point["stall_s"]) / point["forwards"]
        label = f"{point['budget']}, {point['policy']}"
        found.append(
            _check(label, point["unique_experts"], 1e3 * seconds, card, layers=20, part="step_s", scheme=scheme)
        )
    return found


def memory() -> list[Check]:
    """Anonymous memory of those processes without the budget for experts, GB; nothing is predicted for the process."""
    found = []
    for point in _points("memory-mini-bf16.json"):
        measured = point["peak_anonymous_bytes"] - parse_size(point["budget"])
        parts = _replica(point["unique_experts"], _machine(_results("experts-mini-2.json")), layers=20).memory
        predicted = (parts.dense + parts.cache + parts.logits) / 1e9
        found.append(
            Check(
                what=f"{point['budget']}, {point['policy']}",
                unique=point["unique_experts"],
                measured=measured / 1e9,
                low=predicted,
                high=predicted,
            )
        )
    return found


def table(title: str, checks: list[Check], unit: str) -> str:
    """As Markdown."""
    lines = [
        f"| {title} | experts | measured, {unit} | roofline | error, % | sum | error, % |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for check in checks:
        lines.append(
            f"| {check.what} | {check.unique:.4g} | {check.measured:.2f} | {check.low:.2f} | "
            f"{100 * check.error_low:+.0f} | {check.high:.2f} | {100 * check.error_high:+.0f} |"
        )
    return "\n".join(lines)


def _check(
    what: str, unique: float, measured: float, card: Card, *, layers: int, part: str, scheme: str = "none"
) -> Check:
    low, high = (
        1e3 * getattr(_replica(unique, card, layers=layers, overlap=overlap, scheme=scheme), part)
        for overlap in (1.0, 0.0)
    )
    return Check(what=what, unique=unique, measured=measured, low=low, high=high)


def _replica(unique: float, card: Card, *, layers: int, overlap: float = 1.0, scheme: str = "none") -> Replica:
    """One device, one sequence, every block with as many experts as were measured (rounded)."""
    config = likeness(MODEL, layers=layers)
    count, per_token = round(unique), config.router.top_k
    ids = np.arange(config.block_length * per_token).reshape(1, 1, config.block_length, per_token) % count
    trace = BlockTrace("measured", config.router.num_experts, ids)
    cluster = Cluster(card=card, sequences=1, overlap=overlap, scheme=scheme)
    demand = Demand(prompt_length=CONTEXT, gen_length=1)
    return simulate_replica(sizes_like(config), trace, cluster, demand, num_gpus=1, steps=1)


def _machine(results: dict[str, Any]) -> Card:
    macs = results["peak_gmac_per_s"]
    return replace(
        find_card("h100"),
        name="this machine",
        bytes_per_s=1e9 * results["bandwidth_gb_per_s"],
        flops_per_s=2e9 * (macs["bfloat16"] if isinstance(macs, dict) else macs),
    )


def _results(name: str) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((RESULTS / name).read_text(encoding="utf-8"))["results"]
    return values


def _points(name: str) -> list[dict[str, Any]]:
    points: list[dict[str, Any]] = json.loads((RESULTS / name).read_text(encoding="utf-8"))["points"]
    return points


def main() -> None:
    """Print every table."""
    print(table("expert layer", expert_layer(), "ms"), end="\n\n")
    print(table("four layers and the head", forwards(), "ms"), end="\n\n")
    print(table("20 layers, bfloat16", decoding("memory-mini-bf16.json", "none"), "ms"), end="\n\n")
    print(table("20 layers, 4 bit", decoding("memory-mini-int4.json", "int4"), "ms"), end="\n\n")
    print(table("memory beside experts", memory(), "GB"))


if __name__ == "__main__":
    main()
