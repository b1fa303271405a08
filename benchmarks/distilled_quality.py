"""Accuracy of a distilled model under its policy, against the model it came from under vanilla routing.

    python benchmarks/distilled_quality.py BASE DISTILLED --policies 'block-top-p:top_p_experts=0.5' --count 100 \
        --seed 7 --json out.json

Rows: BASE under vanilla, which all others are compared with item by item; BASE and DISTILLED under every policy;
DISTILLED under vanilla. Unique experts are those of denoising forwards, per block and layer.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from unseen_prompts import unseen_prompts

from expertshare.decoding import DecodingOptions
from expertshare.evaluation.prompts import PromptRecord
from expertshare.evaluation.runner import PolicyRun, Setup, answer_prompts, encode_prompts
from expertshare.evaluation.scoring import judge
from expertshare.evaluation.statistics import paired_difference, retained, task_accuracy
from expertshare.measure.report import capture_environment
from expertshare.models import LoadedModel, load_model
from expertshare.routing import RoutingPolicy, make_policy, parse_policies, policy_label


def _answer(
    model: LoadedModel, records: Sequence[PromptRecord], policy: RoutingPolicy, setup: Setup
) -> tuple[PolicyRun, list[bool | None]]:
    prompts = encode_prompts(model, [record.prompt for record in records], setup.chat)
    with torch.no_grad():
        run = answer_prompts(model, prompts, policy, DecodingOptions(gen_length=128), setup=setup)
    return run, list(judge(records, [answer.text for answer in run.answers]))


def _row(
    name: str, records: Sequence[PromptRecord], mine: tuple[PolicyRun, list[Any]], base: tuple[PolicyRun, list[Any]]
) -> dict[str, Any]:
    accuracy, reference = task_accuracy(records, mine[1]), task_accuracy(records, base[1])
    kept, difference = retained(accuracy.by_task, reference.by_task), paired_difference(mine[1], base[1])
    experts, all_experts = mine[0].cost.unique_experts["denoise"], base[0].cost.unique_experts["denoise"]
    return {
        "model": name,
        "policy": policy_label(mine[0].policy),
        "unique_experts": experts,
        "unique_experts_reduction": 1 - experts / all_experts,
        "accuracy": {task: [p.value, p.low, p.high] for task, p in accuracy.by_task.items()},
        "retained": dict(kept.by_task),
        "retained_mean": kept.mean,
        "retained_capped_mean": kept.capped_mean,
        "difference": [difference.value, difference.low, difference.high],
        "steps": mine[0].steps,
    }


def _print(row: dict[str, Any]) -> None:
    tasks = " ".join(f"{task} {100 * value[0]:.1f}" for task, value in row["accuracy"].items())
    kept = 100 * (row["retained_capped_mean"] or 0.0)
    value, low, high = (100 * v for v in row["difference"])
    print(
        f"{row['model']:>10} {row['policy']}: {row['unique_experts']:.2f} experts "
        f"({100 * row['unique_experts_reduction']:.1f} % fewer), capped mean {kept:.1f} %, difference {value:+.1f} "
        f"[{low:+.1f}, {high:+.1f}]; {tasks}",
        flush=True,
    )


def main() -> None:
    """Read the command line, answer, print a line per row, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("distilled")
    parser.add_argument("--policies", required=True)
    parser.add_argument("--count", type=int, default=100, help="items of each task, test split")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--skip-base", action="store_true", help="leave out BASE under the policies")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    records, setup = unseen_prompts(given.count, given.seed), Setup(batch_size=given.batch_size)
    models = {"base": load_model(given.base), "distilled": load_model(given.distilled)}
    vanilla, policies = make_policy("vanilla"), parse_policies([given.policies])
    reference = _answer(models["base"], records, vanilla, setup)
    wanted = [("base", vanilla), *(("base", policy) for policy in policies if not given.skip_base)]
    wanted += [*(("distilled", policy) for policy in policies), ("distilled", vanilla)]
    rows = []
    for name, policy in wanted:
        first = name == "base" and policy == vanilla
        rows.append(
            _row(name, records, reference if first else _answer(models[name], records, policy, setup), reference)
        )
        _print(rows[-1])
    if given.json is not None:
        config = {key: str(value) for key, value in vars(given).items() if key != "json"}
        report = {"config": config, "environment": capture_environment().to_json(), "rows": rows}
        given.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
