"""A full-size model under an expert budget: memory, bytes read and speed, with and without sharing, in one run.

    expertshare make-checkpoint --like llada2.0-mini --quantise int4 --out checkpoints/mini-int4
    python benchmarks/full_size_memory.py checkpoints/mini-int4 --budgets 640MiB --policies vanilla,des-vote:budget=16

Every setting is a process of its own, `expertshare generate --expert-memory`, so that peak memory is its own; settings
take turns, `--rounds` times. Experts are read past the page cache (--direct-io) unless --buffered. Close everything else.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

from expertshare.measure.environment import capture_environment
from expertshare.measure.report import write_json

PROMPT = "Tom has 12 apples. He finds 7 more. How many apples does Tom have now?"


def generate(model: Path, policy: str, budget: str, options: argparse.Namespace) -> dict[str, Any]:
    """The JSON line of one generation."""
    command = [sys.executable, "-m", "expertshare", "generate", str(model), "--prompt", PROMPT, "--json"]
    command += ["--policy", policy, "--expert-memory", budget, "--gen-length", str(options.gen_length)]
    if not options.buffered:
        command.append("--direct-io")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{policy} at {budget}: {done.stderr.strip().splitlines()[-1]}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def settings(options: argparse.Namespace) -> Iterator[tuple[Path, str, str]]:
    """Models, budgets and policies, each with each."""
    return product(options.models, options.budgets.split(","), options.policies.split(","))


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over rounds; counts are the same in every round."""
    first, speeds = runs[0], [run["tokens_per_s"] for run in runs]
    store = first["expert_store"]
    return {
        "tokens_per_s": statistics.median(speeds),
        "tokens_per_s_range": [min(speeds), max(speeds)],
        "peak_anonymous_bytes": max(run["peak_anonymous_bytes"] for run in runs),
        "peak_memory_bytes": max(run["peak_memory_bytes"] for run in runs),
        "unique_experts": first["unique_experts"]["denoise"],
        "hit_rate": store["hit_rate"],
        "expert_bytes_read": store["bytes_read"],
        "stall_s": statistics.median(run["expert_store"]["stall_s"] for run in runs),
        "seconds_by_part": first["seconds_by_part"],
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


def main() -> None:
    options = parse()
    runs: dict[tuple[Path, str, str], list[dict[str, Any]]] = {}
    for _ in range(options.rounds):
        for setting in settings(options):
            runs.setdefault(setting, []).append(generate(*_reordered(setting), options))
    points = []
    print("model            budget   policy               tok/s  x vanilla  anon GiB  unique   hit %  read GB  stall s")
    for (model, budget, policy), results in runs.items():
        point = {"model": model.name, "budget": budget, "policy": policy, **summary(results)}
        vanilla = next((p for p in points if (p["model"], p["budget"], p["policy"]) == (model.name, budget, "vanilla")), point)
        point["faster_than_vanilla"] = point["tokens_per_s"] / vanilla["tokens_per_s"]
        points.append(point)
        print(
            f"{model.name:16} {budget:8} {policy:20} {point['tokens_per_s']:5.2f} {point['faster_than_vanilla']:9.2f}x "
            f"{point['peak_anonymous_bytes'] / 2**30:9.2f} {point['unique_experts']:7.1f} {100 * point['hit_rate']:7.1f} "
            f"{point['expert_bytes_read'] / 1e9:8.1f} {point['stall_s']:8.1f}"
        )
    if options.json:
        settings_told = {key: value for key, value in vars(options).items() if key not in ("models", "json")}
        environment = capture_environment().to_json()
        write_json({"settings": settings_told, "environment": environment, "points": points}, options.json)


def _reordered(setting: tuple[Path, str, str]) -> tuple[Path, str, str]:
    model, budget, policy = setting
    return model, policy, budget


if __name__ == "__main__":
    main()
