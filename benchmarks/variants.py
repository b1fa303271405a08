"""Variants of policies against their plain form on the same prompts, at equal unique experts.

    python benchmarks/variants.py models/reference --count 200 --seed 2026 --out benchmarks/results/variants.json

Every run is kept in the file with the outcome of each prompt, so that a broken-off measurement goes on where it was,
and any two runs can be compared afterwards. So are comparisons that the table no longer asks for, because what they
measured has left the product: "commit" in their runs says which code had it. A difference is variant minus plain form,
paired by prompt, with its 95 % interval.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from unseen_prompts import unseen_prompts

from expertshare.decoding import BlockDecoder, DecodingOptions
from expertshare.decoding.forwards import Forwards
from expertshare.decoding.row import Row, Window
from expertshare.evaluation.prompts import PromptRecord
from expertshare.evaluation.runner import PolicyRun, Setup, answer_prompts, encode_prompts
from expertshare.evaluation.scoring import judge
from expertshare.evaluation.statistics import paired_difference, retained, task_accuracy
from expertshare.experts import ResidentExperts
from expertshare.measure.report import capture_environment
from expertshare.models import LoadedModel, load_model
from expertshare.routing import Layerwise, RoutingPolicy, parse_policies
from expertshare.types import Loan

VANILLA = "vanilla"
DECODINGS = {
    "confidence": DecodingOptions(gen_length=64),
    "8 steps": DecodingOptions(gen_length=64, threshold=None, steps_per_block=8),
}


def read_policy(text: str) -> RoutingPolicy:
    """One policy, or one for each MoE layer, parted by " | "."""
    layers = parse_policies(text.split(" | "))
    return layers[0] if len(layers) == 1 else Layerwise(layers=tuple(layers))


class _Steps:
    """A store and forwards at once: notes which experts each denoising step of a single row borrows."""

    resident = False  # it hears of no step that is replayed

    def __init__(self, layers: Sequence[ResidentExperts]) -> None:
        self._layers, self.forwards = layers, cast(Forwards, None)
        self._step: tuple[int, int] | None = None
        self.used: dict[tuple[int, int, int], Tensor] = {}

    def borrow(self, layer: int, active_E: Tensor, *, early: bool = False) -> AbstractContextManager[Loan]:
        if self._step is not None:
            self.used[(layer, *self._step)] = active_E
        return self._layers[layer].borrow(layer, active_E, early=early)

    def prefill(self, rows: Sequence[Row]) -> None:
        self.forwards.prefill(rows)

    def denoise(self, rows: Sequence[Row], window: Window) -> Tensor:
        self._step = (rows[0].block, rows[0].steps)
        hidden_RLD = self.forwards.denoise(rows, window)
        self._step = None
        return hidden_RLD

    def commit(self, rows: Sequence[Row]) -> None:
        self.forwards.commit(rows)


def fetched(model: LoadedModel, prompts: Sequence[Sequence[int]], policy: str, options: DecodingOptions) -> float:
    """Experts of a step and layer that the block's step before did not use; all of them in its first step."""
    own = [module for module in model.model.modules() if isinstance(module, ResidentExperts)]
    fresh: list[int] = []
    for prompt in prompts:
        steps = _Steps(own)
        runtime = replace(Setup().runtime(model, read_policy(policy)), store=steps)
        stream = BlockDecoder(model.model, runtime, options).blocks([prompt])
        steps.forwards, stream.forwards = stream.forwards, steps
        for _ in stream:
            pass
        for (layer, block, step), active_E in steps.used.items():
            before_E = steps.used.get((layer, block, step - 1), torch.zeros_like(active_E))
            fresh.append(int((active_E & ~before_E).sum()))
    return sum(fresh) / len(fresh)


def measure(
    model: LoadedModel, records: Sequence[PromptRecord], policy: str, setup: Setup, options: DecodingOptions
) -> dict[str, Any]:
    """Answer all prompts under one policy; outcomes as a string of 0 and 1, in the order of the prompts."""
    prompts = encode_prompts(model, [record.prompt for record in records], setup.chat)
    with torch.no_grad():
        run = answer_prompts(model, prompts, read_policy(policy), options, setup=setup)
    outcomes = judge(records, [answer.text for answer in run.answers])
    assert None not in outcomes  # every generated task can be judged
    return {
        "unique_experts": {**run.cost.unique_experts, "all": _over_all_forwards(run)},
        "unique_by_layer": list(run.cost.unique_experts_by_layer["denoise"]),
        "fetched": fetched(model, prompts[:: max(1, len(prompts) // 50)], policy, options),
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


def _read_table(path: Path) -> list[list[str]]:
    """Rows of question, decoding, variant and plain form, parted by two blanks or more."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    return [[part.strip() for part in line.split("  ") if part.strip()] for line in lines]


def _row_of(comparison: dict[str, Any]) -> list[str]:
    return [comparison[part] for part in ("question", "decoding", "variant", "plain")]


def _line(run: dict[str, Any], key: str) -> str:
    unique = run["unique_experts"]
    return (
        f"{unique['denoise']:6.2f} {unique['all']:6.2f} {run['fetched']:6.2f} {run['steps']:5.2f} "
        f"{100 * run['accuracy'][0]:5.1f}  {key}"
    )


def _measure_all(report: dict[str, Any], table: Sequence[Sequence[str]], given: argparse.Namespace) -> None:
    """Every run of the table that the report does not hold; the file is written after each."""
    records, setup = unseen_prompts(given.count, given.seed), Setup(batch_size=given.batch_size)
    model, runs = load_model(given.model), report["runs"]
    wanted = [(decoding, policy) for _, decoding, *pair in table for policy in (VANILLA, *reversed(pair))]
    for decoding, policy in dict.fromkeys(wanted):
        key = f"{decoding}: {policy}"
        if key not in runs:
            run = measure(model, records, policy, setup, DECODINGS[decoding])
            runs[key] = {"commit": report["environment"]["commit"], **run}
        base = runs[f"{decoding}: {VANILLA}"]["outcomes"]
        runs[key] |= summary(runs[key], records, base)
        given.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        print(_line(runs[key], key), flush=True)


def main() -> None:
    """Measure what is not in the file yet, then compare; a line per comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--table", type=Path, default=Path(__file__).with_suffix(".txt"))
    parser.add_argument("--count", type=int, default=200, help="items of each task, test split")
    parser.add_argument("--seed", type=int, default=2026)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    table = _read_table(given.table)
    config = {"model": given.model, "count": given.count, "seed": given.seed, "batch_size": given.batch_size}
    report: dict[str, Any] = {"config": config, "environment": capture_environment().to_json(), "runs": {}}
    before = json.loads(given.out.read_text(encoding="utf-8")) if given.out.exists() else {}
    report["runs"] = before.get("runs", {})
    report["comparisons"] = [row for row in before.get("comparisons", []) if _row_of(row) not in table]
    _measure_all(report, table, given)
    for question, decoding, variant, plain in table:
        found = compared(*(report["runs"][f"{decoding}: {policy}"] for policy in (variant, plain)))
        row = {"question": question, "decoding": decoding, "variant": variant, "plain": plain, **found}
        report["comparisons"].append(row)
        value, low, high = (100 * part for part in found["difference"])
        sizes = found["unique_experts_ratio"]
        print(
            f"{value:+5.1f} [{low:+5.1f}, {high:+5.1f}] x{sizes['denoise']:.3f} x{sizes['all']:.3f} "
            f"{question}, {decoding}: {variant} - {plain}"
        )
    given.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
