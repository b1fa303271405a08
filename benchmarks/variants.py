"""Variants of policies against their plain form on the same prompts, at equal unique experts.

    python benchmarks/variants.py models/reference --count 200 --seed 2026 --out benchmarks/results/variants.json

Every run is kept in the file with the outcome of each prompt, so that a broken-off measurement goes on where it was, and
any two runs can be compared afterwards. A difference is variant minus plain form, paired by prompt, 95 % interval.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from expertshare.decoding import DecodingOptions
from expertshare.evaluation import (
    PolicyRun,
    Setup,
    answer_prompts,
    encode_prompts,
    judge,
    paired_difference,
    parse_policies,
    retained,
    task_accuracy,
)
from expertshare.measure.environment import capture_environment
from expertshare.models import LoadedModel, load_model
from expertshare.routing import Layerwise
from expertshare.tasks import TASKS, PromptRecord, generate_items
from expertshare.types import RoutingPolicy

VANILLA = "vanilla"


def _records(count: int, seed: int) -> list[PromptRecord]:
    items = [item for task in TASKS for item in generate_items(task, split="test", count=count, seed=seed)]
    return [PromptRecord(prompt=i.prompt, reference=i.reference, task=i.task, tests=i.tests) for i in items]


def read_policy(text: str) -> RoutingPolicy:
    """One policy, or one for each MoE layer, parted by " | "."""
    layers = parse_policies(text.split(" | "))
    return layers[0] if len(layers) == 1 else Layerwise(layers=tuple(layers))


def measure(model: LoadedModel, records: Sequence[PromptRecord], policy: str, setup: Setup) -> dict[str, Any]:
    """Answer all prompts under one policy; outcomes as a string of 0 and 1, in the order of the prompts."""
    prompts = encode_prompts(model, [record.prompt for record in records], setup.chat)
    with torch.no_grad():
        run = answer_prompts(model, prompts, read_policy(policy), DecodingOptions(gen_length=64), setup=setup)
    outcomes = judge(records, [answer.text for answer in run.answers])
    assert None not in outcomes  # every generated task can be judged
    return {
        "unique_experts": {**run.cost.unique_experts, "all": _over_all_forwards(run)},
        "unique_by_layer": list(run.cost.unique_experts_by_layer["denoise"]),
        "steps": sum(answer.steps for answer in run.answers) / len(run.answers),
        "outcomes": "".join(str(int(bool(outcome))) for outcome in outcomes),
    }


def _over_all_forwards(run: PolicyRun) -> float:
    """Unique experts of a block and layer, mean over prefill, denoising and commit forwards."""
    groups = sum(step.groups for step in run.cost.steps)
    total = sum(step.groups * sum(step.unique_experts) / len(step.unique_experts) for step in run.cost.steps)
    return total / groups


def summary(run: dict[str, Any], records: Sequence[PromptRecord], base: str) -> dict[str, Any]:
    """Accuracy by task, and what is kept of vanilla's, whose outcomes are `base`."""
    mine, theirs = ([bit == "1" for bit in text] for text in (run["outcomes"], base))
    accuracy, reference = task_accuracy(records, mine), task_accuracy(records, theirs)
    kept = retained(accuracy.by_task, reference.by_task)
    assert accuracy.overall is not None
    return {
        "accuracy": [accuracy.overall.value, accuracy.overall.low, accuracy.overall.high],
        "accuracy_by_task": {task: share.value for task, share in accuracy.by_task.items()},
        "retained": kept.mean,
        "retained_capped": kept.capped_mean,
    }


def compared(variant: dict[str, Any], plain: dict[str, Any]) -> dict[str, Any]:
    """Variant minus plain form, paired by prompt."""
    mine, theirs = ([bit == "1" for bit in run["outcomes"]] for run in (variant, plain))
    difference = paired_difference(mine, theirs)
    ratio = {kind: variant["unique_experts"][kind] / plain["unique_experts"][kind] for kind in ("denoise", "all")}
    return {
        "difference": [difference.value, difference.low, difference.high],
        "p_value": difference.p_value,
        "gained": difference.gained,
        "lost": difference.lost,
        "unique_experts_ratio": ratio,
    }


def _save(out: Path, report: dict[str, Any]) -> None:
    out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Measure what is not in the file yet, then compare; a line per comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--table", type=Path, default=Path(__file__).with_name("variants.txt"))
    parser.add_argument("--count", type=int, default=200, help="items of each task, test split")
    parser.add_argument("--seed", type=int, default=2026)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    lines = [line.split("  ") for line in given.table.read_text(encoding="utf-8").splitlines() if line[:1].strip("#")]
    pairs = [[part.strip() for part in line if part.strip()] for line in lines]
    config = {"model": given.model, "count": given.count, "seed": given.seed, "batch_size": given.batch_size}
    report = {"config": config | {"gen_length": 64}, "environment": capture_environment().to_json(), "runs": {}}
    if given.out.exists():
        report["runs"] = json.loads(given.out.read_text(encoding="utf-8"))["runs"]
    records, setup = _records(given.count, given.seed), Setup(batch_size=given.batch_size)
    model = load_model(given.model)
    for policy in dict.fromkeys([VANILLA, *(text for pair in pairs for text in reversed(pair[1:]))]):
        if policy not in report["runs"]:
            report["runs"][policy] = measure(model, records, policy, setup)
            _save(given.out, report)
        run = report["runs"][policy]
        run |= summary(run, records, report["runs"][VANILLA]["outcomes"])
        print(
            f"{run['unique_experts']['denoise']:6.2f} {run['unique_experts']['all']:6.2f} {run['steps']:5.2f} "
            f"{100 * run['accuracy'][0]:5.1f}  {policy}", flush=True
        )
    report["comparisons"] = []
    for question, variant, plain in pairs:
        found = compared(report["runs"][variant], report["runs"][plain])
        report["comparisons"].append({"question": question, "variant": variant, "plain": plain, **found})
        value, low, high = (100 * part for part in found["difference"])
        sizes = found["unique_experts_ratio"]
        print(f"{value:+5.1f} [{low:+5.1f}, {high:+5.1f}] x{sizes['denoise']:.3f} {question}: {variant} - {plain}")
    _save(given.out, report)


if __name__ == "__main__":
    main()
