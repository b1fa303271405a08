"""Two checkouts side by side in one run: how fast is the newer one beside the older, and the older beside itself?

    git worktree add ../before COMMIT && (cd ../before && python setup.py -q build_ext --inplace)
    python benchmarks/before_after.py ../before . --rounds 5 --json benchmarks/results/before-after.json

Every round runs each command in three processes, one after the other: before, after, before again. A ratio is after /
before of the same round, so that a machine whose memory changes speed between rounds does not decide it; "itself" is
before again / before, the spread that no change explains. Times and rates are put so that more than 1 is slower.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from expertshare.measure.report import Report, capture_environment

Timings = Iterator[tuple[str, float]]
BENCH = ["--backends", "cpu", "--json"]


def _experts(result: dict[str, Any]) -> Timings:
    for case in result["cases"]:
        yield f"expert layer, {case['unique']} experts", case["ms"]


def _forward(result: dict[str, Any]) -> Timings:
    for forward in result["forwards"]:
        yield f"forward, {forward['policy']}", forward["ms"]
        yield f"routing in it, {forward['policy']}", forward["ms_by_part"]["router"]


def _answers(name: str) -> Callable[[dict[str, Any]], Timings]:
    def timings(result: dict[str, Any]) -> Timings:
        for generation in result["generations"]:
            yield f"{name}, {generation['policy']}", 1.0 / generation["tokens_per_s"]

    return timings


def _compare(result: dict[str, Any]) -> Timings:
    for row in result["runs"]:
        yield f"compare, {row['label']}", 1.0 / row["tokens_per_s"]


def _commands(root: Path) -> dict[str, tuple[list[str], Callable[[dict[str, Any]], Timings]]]:
    reference, prompts = str(root / "models/reference"), str(root / "examples/prompts.jsonl")
    sharing = ["--policies", "vanilla,des-vote:budget=16"]
    return {
        "bench experts": (["bench", "experts", "--unique", "16,32,70", *BENCH], _experts),
        "bench forward": (["bench", "forward", "--layers", "4", *sharing, *BENCH], _forward),
        "bench generate --case": (
            ["bench", "generate", "--case", "llada2.0-mini", "--layers", "4", "--limit", "2", *sharing, *BENCH],
            _answers("answers at full width"),
        ),
        "bench generate": (
            ["bench", "generate", reference, "--limit", "8", "--repeats", "5", *sharing, *BENCH],
            _answers("answers of the reference model"),
        ),
        "compare": (
            [
                "compare",
                reference,
                "--prompts",
                prompts,
                "--policies",
                "vanilla,des-seq,des-vote,block-top-p",
                "--json",
            ],
            _compare,
        ),
    }


def _run(tree: Path, words: list[str]) -> dict[str, Any]:
    environment = {**os.environ, "PYTHONPATH": str(tree / "src"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "expertshare", *words], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise SystemExit(f"{tree}: {' '.join(words)} ended with status {done.returncode}:\n{done.stderr}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def _summary(ratios: list[float]) -> dict[str, float]:
    return {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}


def main() -> None:
    """Run, print a table, write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="a built checkout of the older commit")
    parser.add_argument("after", type=Path, help="a built checkout of the newer commit")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", help="commands, parted by commas: bench experts, bench forward, ...")
    parser.add_argument("--json", type=Path, help="report to write")
    arguments = parser.parse_args()
    before, after = arguments.before.resolve(), arguments.after.resolve()
    chosen = arguments.only.split(",") if arguments.only else None
    rows: list[dict[str, Any]] = []
    for name, (words, timings) in _commands(after).items():
        if chosen is not None and name not in chosen:
            continue
        changed: dict[str, list[float]] = {}
        itself: dict[str, list[float]] = {}
        for _ in range(arguments.rounds):
            old, new, again = (dict(timings(_run(tree, words))) for tree in (before, after, before))
            for what, seconds in old.items():
                changed.setdefault(what, []).append(new[what] / seconds)
                itself.setdefault(what, []).append(again[what] / seconds)
        for what, ratios in changed.items():
            rows.append({"what": what, "after": _summary(ratios), "itself": _summary(itself[what])})
            shown = "  ".join(
                f"{rows[-1][key]['median']:.3f} [{rows[-1][key]['least']:.3f}, {rows[-1][key]['most']:.3f}]"
                for key in ("after", "itself")
            )
            print(f"{what:48} after/before {shown}", flush=True)
    if arguments.json:
        commits = [
            subprocess.run(["git", "-C", str(tree), "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
            for tree in (before, after)
        ]
        config = {"rounds": arguments.rounds, "before": commits[0], "after": commits[1]}
        Report(
            command="before_after", environment=capture_environment(), seeds={}, config=config, results={"rows": rows}
        ).write(arguments.json)


if __name__ == "__main__":
    main()
