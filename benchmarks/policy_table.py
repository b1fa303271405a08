"""Print what `compare --json` wrote as the Markdown table of docs/quality.md.

Example: python benchmarks/policy_table.py benchmarks/results/policies.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def percent(share: float) -> str:
    """A share as per cent with one digit."""
    return f"{100 * share:.1f}"


def with_interval(value: float, interval: list[float]) -> str:
    """Per cent with its 95 % interval."""
    return f"{percent(value)} <sub>{100 * interval[0]:.0f}-{100 * interval[1]:.0f}</sub>"


def row(run: dict[str, Any], tasks: list[str]) -> str:
    """One policy."""
    cells = [
        f"`{run['label']}`",
        f"{run['unique_experts']['denoise']:.1f}",
        percent(run["unique_experts_reduction"]),
        *(with_interval(run["tasks"][task]["accuracy"], run["tasks"][task]["interval"]) for task in tasks),
        percent(run["retained"]),
        percent(run["retained_capped"]),
    ]
    return f"| {' | '.join(cells)} |"


def table(comparison: dict[str, Any]) -> str:
    """The whole table, in the order of the runs."""
    runs = comparison["runs"]
    tasks = list(runs[0]["tasks"])
    head = ["policy", "unique experts", "fewer, %", *tasks, "retained, %", "capped, %"]
    lines = [f"| {' | '.join(head)} |", "|---|" + "--:|" * (len(head) - 1)]
    return "\n".join(lines + [row(run, tasks) for run in runs])


def main() -> None:
    """Read the file named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparison", type=Path)
    print(table(json.loads(parser.parse_args().comparison.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
