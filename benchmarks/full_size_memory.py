"""A full-size model under an expert budget: memory, bytes read and speed, with and without sharing, in one run.

    expertshare make-checkpoint --like llada2.0-mini --quantise int4 --out checkpoints/mini-int4
    python benchmarks/full_size_memory.py checkpoints/mini-int4 --budgets 640MiB --policies vanilla,des-vote:budget=16

Every setting is a process of its own, `expertshare generate --expert-memory`, so that peak memory is its own; settings
take turns, `--rounds` times. Experts are read past the page cache (--direct-io) unless --buffered. Close everything
else first. tokens_per_s counts the tokens of the answer; the prompt ends inside a block, so more are decided: `steps`.
"""

from __future__ import annotations

import argparse
import statistics
from itertools import product
from pathlib import Path
from typing import Any

from own_process import generated

from expertshare.measure.report import capture_environment, write_json

HEADER = "model            budget   policy               tok/s  x vanilla  anon GiB  unique   hit %  read GB  stall s"
PROMPT = "Tom has 12 apples. He finds 7 more. How many apples does Tom have now?"


def generate(model: Path, policy: str, budget: str, options: argparse.Namespace) -> dict[str, Any]:
    """The JSON line of one generation."""
    flags = ["--gen-length", str(options.gen_length), *([] if options.buffered else ["--direct-io"])]
    return generated(model, PROMPT, policy, budget, flags)


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over rounds; counts are the same in every round."""
    first, speeds = runs[0], [run["tokens_per_s"] for run in runs]
    store, parts = first["expert_store"], first["seconds_by_part"]
    return {
        "tokens_per_s": statistics.median(speeds),
        "tokens_per_s_range": [min(speeds), max(speeds)],
        "peak_anonymous_bytes": max(run["peak_anonymous_bytes"] for run in runs),
        "peak_memory_bytes": max(run["peak_memory_bytes"] for run in runs),
        "unique_experts": first["unique_experts"]["denoise"],
        "hit_rate": store["hit_rate"],
        "expert_bytes_read": store["bytes_read"],
        "stall_s": statistics.median(run["expert_store"]["stall_s"] for run in runs),
        "seconds_by_part": {part: statistics.median(run["seconds_by_part"][part] for run in runs) for part in parts},
        "steps": first["steps"],
        "forwards": first["forwards"],
        "tokens": len(first["token_ids"]),
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path, help="directories in the expert layout")
    parser.add_argument("--budgets", default="1GiB", help="expert memories, parted by commas")
    parser.add_argument("--policies", default="vanilla,des-vote:budget=32,des-vote:budget=16")
    parser.add_argument("--gen-length", default=32, type=int)
    parser.add_argument("--rounds", default=1, type=int)
    parser.add_argument("--buffered", action="store_true", help="read experts through the page cache")
    parser.add_argument("--json", type=Path, help="write the results there")
    return parser.parse_args()


def table_row(point: dict[str, Any]) -> str:
    """A line under HEADER."""
    faster = point["faster_than_vanilla"]
    return (
        f"{point['model']:16} {point['budget']:8} {point['policy']:20} {point['tokens_per_s']:5.2f} "
        f"{'-' if faster is None else f'{faster:.2f}x':>10} {point['peak_anonymous_bytes'] / 2**30:9.2f} "
        f"{point['unique_experts']:7.1f} {100 * point['hit_rate']:7.1f} {point['expert_bytes_read'] / 1e9:8.1f} "
        f"{point['stall_s']:8.1f}"
    )


def main() -> None:
    options = parse()
    budgets, policies = options.budgets.split(","), options.policies.split(",")
    runs: dict[tuple[Path, str, str], list[dict[str, Any]]] = {}
    for _ in range(options.rounds):
        for model, budget, policy in product(options.models, budgets, policies):
            runs.setdefault((model, budget, policy), []).append(generate(model, policy, budget, options))
    points = [
        {"model": model.name, "budget": budget, "policy": policy, **summary(results)}
        for (model, budget, policy), results in runs.items()
    ]
    speed = {(p["model"], p["budget"]): p["tokens_per_s"] for p in points if p["policy"] == "vanilla"}
    print(HEADER)
    for point in points:
        vanilla = speed.get((point["model"], point["budget"]))
        point["faster_than_vanilla"] = point["tokens_per_s"] / vanilla if vanilla else None
        print(table_row(point))
    if options.json:
        told = {key: value for key, value in vars(options).items() if key not in ("models", "json")}
        write_json(options.json, {"settings": told, "environment": capture_environment().to_json(), "points": points})


if __name__ == "__main__":
    main()
