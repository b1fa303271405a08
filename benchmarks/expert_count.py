"""More experts at equal active compute: models of 16 to 128 experts, 8 per token, trained equally on code.

    python benchmarks/expert_count.py build/expert-count --experts 16,32,64,128 --steps 600 --json out.json

Everything but the number of experts is the same: samples, masks, steps, learning rates. Then each model answers unseen
prompts of `code` and `code_pro` (self-invoking) under vanilla and under policies. By task: pass@1 with its interval,
unique experts of denoising forwards, tokens per second; of both together: steps. Models that are trained already are
used as they are. Close everything else first, for the tokens per second.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from unseen_prompts import unseen_prompts

from expertshare.decoding import DecodingOptions
from expertshare.evaluation.runner import Setup, answer_prompts, encode_prompts
from expertshare.evaluation.scoring import judge
from expertshare.evaluation.statistics import proportion
from expertshare.lab.tasks.tokenizer import TaskProblems
from expertshare.measure.report import capture_environment
from expertshare.models import load_model
from expertshare.routing import parse_policies, policy_label
from expertshare.training.config import TrainingConfig
from expertshare.training.scratch import prepare, run, run_folder

TASKS = ("code", "code_pro")


def trained(folder: Path, experts: int, config: TrainingConfig) -> Path:
    """The model's directory, trained if it is not there."""
    paths = run_folder(folder / f"experts-{experts}")
    model = paths.folder / "model"
    if not (model / "model.safetensors").exists():
        resume, problems = paths.settings.exists(), TaskProblems(config.seed)
        trainer = prepare(
            paths,
            config,
            problems,
            num_experts=experts,
            hidden=128,
            layers=4,
            expert_hidden=32,
            resume=resume,
        )
        run(trainer, paths, problems, resume=resume)
    return model


def measured(model: Path, experts: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per policy."""
    loaded, setup = load_model(model), Setup(batch_size=options.batch_size)
    records = {task: unseen_prompts(options.count, options.seed, (task,)) for task in TASKS}
    rows = []
    for policy in parse_policies([options.policies]):
        row: dict[str, Any] = {"experts": experts, "policy": policy_label(policy), "steps": 0}
        row |= {"pass_at_1": {}, "unique_experts": {}, "tokens_per_s": {}}
        for task, mine in records.items():
            prompts = encode_prompts(loaded, [record.prompt for record in mine], setup.chat)
            with torch.no_grad():
                answered = answer_prompts(loaded, prompts, policy, DecodingOptions(gen_length=128), setup=setup)
            found = proportion([bool(verdict) for verdict in judge(mine, [answer.text for answer in answered.answers])])
            row["pass_at_1"][task] = [found.value, found.low, found.high]
            row["steps"] += answered.steps
            row["unique_experts"][task] = answered.cost.unique_experts["denoise"]
            tokens = sum(len(answer.token_ids) for answer in answered.answers)
            row["tokens_per_s"][task] = tokens / answered.elapsed_s
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--experts", default="16,32,64,128")
    parser.add_argument("--steps", default=600, type=int)
    parser.add_argument("--samples-per-step", default=48, type=int)
    parser.add_argument("--policies", default="vanilla,des-seq:experts_per_vote=2,des-vote:budget=14")
    parser.add_argument("--count", default=500, type=int, help="prompts of each task")
    parser.add_argument("--seed", default=2026, type=int)
    parser.add_argument("--batch-size", default=64, type=int)
    parser.add_argument("--train-only", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    config = TrainingConfig(
        steps=options.steps, samples_per_step=options.samples_per_step, mixture={"code": 1.0, "code_pro": 1.5}
    )
    rows: list[dict[str, Any]] = []
    for experts in map(int, options.experts.split(",")):
        model = trained(options.folder, experts, config)
        if not options.train_only:
            rows += measured(model, experts, options)
    if options.json and rows:
        settings = {key: str(value) for key, value in vars(options).items() if key not in ("folder", "json")}
        passed = [row["pass_at_1"]["code_pro"][0] for row in rows]
        summary = {"code_pro_least": min(passed), "code_pro_most": max(passed)}
        environment = capture_environment().to_json()
        report = {"settings": settings, "environment": environment, "summary": summary, "rows": rows}
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
