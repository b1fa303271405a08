"""How the number of unique experts varies over denoising steps: histograms and coefficients of variation.

    python benchmarks/steps_distribution.py models/reference --count 200 --seed 2026 \
        --policies vanilla,block-top-p:top_p_experts=0.6 --json benchmarks/results/steps-distribution.json

Prompts are answered one at a time: every forward holds one block, and its number of unique experts is a whole one.
Coefficient of variation: standard deviation by the mean, of a layer's counts over steps (by layer, and of all layers
together), and of the mean over layers (one figure for each step).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from unseen_prompts import unseen_prompts

from expertshare.api import compare, load
from expertshare.evaluation.comparison import Outcome
from expertshare.measure.report import Report, capture_environment


def variation(values: np.ndarray) -> float:
    """Standard deviation by the mean."""
    return float(values.std() / values.mean())


def distribution(run: Outcome, num_experts: int) -> dict[str, Any]:
    """Of the denoising forwards of one policy; each holds one block."""
    forwards = [forward for forward in run.run.cost.steps if forward.kind == "denoise"]
    unique_SN = np.array([forward.unique_experts for forward in forwards])
    number_S = np.array([forward.turns[0].step for forward in forwards])
    counts_SN = unique_SN.round().astype(int)
    return {
        "label": run.label,
        "steps": len(forwards),
        "unique_experts": float(unique_SN.mean()),
        "accuracy": run.accuracy.overall.value if run.accuracy.overall else None,
        "cv": variation(unique_SN),
        "cv_by_layer": [variation(column) for column in unique_SN.T],
        "cv_of_step_means": variation(unique_SN.mean(axis=1)),
        "histogram_by_layer": [np.bincount(column, minlength=num_experts + 1).tolist() for column in counts_SN.T],
        "by_step": by_step(unique_SN.mean(axis=1), number_S),
    }


def by_step(mean_S: np.ndarray, number_S: np.ndarray) -> list[dict[str, Any]]:
    """Mean and deviation by the number of the step within its block, as far as 20 blocks get there."""
    found = []
    for number in range(int(number_S.max()) + 1):
        mine = mean_S[number_S == number]
        if len(mine) >= 20:
            found.append({"step": number, "blocks": len(mine), "mean": float(mine.mean()), "std": float(mine.std())})
    return found


def main() -> None:
    """Answer, count, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--policies", default="vanilla,block-top-p:top_p_experts=0.6")
    parser.add_argument("--count", type=int, default=200, help="prompts of each task, test split")
    parser.add_argument("--seed", type=int, default=2026)
    parser.add_argument("--json", type=Path, required=True)
    given = parser.parse_args()
    environment, loaded = capture_environment(), load(given.model)
    comparison = compare(loaded, unseen_prompts(given.count, given.seed), [given.policies], gen_length=64)
    num_experts = loaded.config.router.num_experts
    Report(
        command="steps-distribution",
        environment=environment,
        seeds={"prompts": given.seed, "decoding": comparison.config["decoding"]["seed"]},
        config={**comparison.config, "model": given.model, "count": given.count},
        results={"num_experts": num_experts, "runs": [distribution(run, num_experts) for run in comparison.runs]},
    ).write(given.json)
    for run in comparison.runs:
        found = distribution(run, num_experts)
        print(f"{run.label}: {found['steps']} steps, {found['unique_experts']:.2f} experts, CV {found['cv']:.3f}")


if __name__ == "__main__":
    main()
