"""Accuracy of a model on unseen items of every task and level, under its native policy: one JSON object, one table.

Example: python benchmarks/accuracy_by_level.py models/reference --count 500 --out benchmarks/results/levels.json
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any

from expertshare.api import generate, load
from expertshare.evaluation.scoring import score_many
from expertshare.evaluation.statistics import proportion
from expertshare.lab.tasks.generation import TASKS, generate_items
from expertshare.measure.report import capture_environment


def measure(model: str, count: int, seed: int) -> dict[str, Any]:
    """Answers `count` test items per task; accuracy with its 95 % Wilson interval per task and level."""
    loaded = load(model)
    accuracy: dict[str, dict[str, Any]] = {}
    for task in TASKS:
        items = generate_items(task, split="test", count=count, seed=seed)
        answers = generate(loaded, [item.prompt for item in items], gen_length=64, batch_size=64).answers
        outcomes = defaultdict(list)
        for item, right in zip(items, score_many(items, [answer.text for answer in answers]), strict=True):
            outcomes[f"level {item.level}"].append(right)
            outcomes["all"].append(right)
        accuracy[task] = {name: asdict(proportion(rights)) for name, rights in sorted(outcomes.items())}
    return {"model": model, "count": count, "seed": seed, "accuracy": accuracy}


def table(result: dict[str, Any]) -> str:
    """Markdown: a row per task, a column per level."""
    columns = ["level 1", "level 2", "level 3", "level 4", "all"]
    lines = [f"| task | {' | '.join(columns)} |", "|---|" + "--:|" * len(columns)]
    for task, shares in result["accuracy"].items():
        cells = [f"{100 * shares[c]['successes'] / shares[c]['count']:.1f} ({shares[c]['count']})" for c in columns]
        lines.append(f"| `{task}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=2026)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    result = measure(arguments.model, arguments.count, arguments.seed)
    result["environment"] = capture_environment().to_json()
    arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(table(result))


if __name__ == "__main__":
    main()
