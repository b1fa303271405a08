"""`distill`: a model learns to give its own answers under an expert-sharing policy (arXiv 2605.30876), or with any
number of experts (elastic training).

One folder holds it all: the finished model, a model card and `distillation.json` at the top, and below `distillation/`
the answers, the settings and the checkpoint of the run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from hashlib import sha256
from pathlib import Path
from random import Random
from typing import Any

import torch

from expertshare.config import ModelConfig
from expertshare.decoding import DecodingOptions
from expertshare.errors import TrainingError
from expertshare.measure.report import capture_environment
from expertshare.models import LoadedModel, MoETransformer, load_model, save_model
from expertshare.routing import knobs
from expertshare.training.answers import AnswerListener, StoredAnswer, check_answerable, generate_answers, read_answers
from expertshare.training.batches import Sample
from expertshare.training.config import Curriculum, DistillConfig, make_curriculum
from expertshare.training.objective import check_elastic
from expertshare.training.optimisers import adamw, choose_trained, muon_and_adamw
from expertshare.training.processes import Processes
from expertshare.training.run_folder import RunFolder, write_whole
from expertshare.training.trainer import StepResult, Trainer, train


@dataclass(frozen=True, kw_only=True, slots=True)
class Distillation:
    """What came of a run. model: folder of the distilled model. unfinished: answers that were left out."""

    model: Path
    steps: int
    answers: int
    unfinished: int


@dataclass(frozen=True, kw_only=True, slots=True)
class AnswerSettings:
    """How the model answers its prompts. batch_size: prompts decoded together, which does not change an answer."""

    options: DecodingOptions
    batch_size: int = 32
    on_progress: AnswerListener | None = None


def distill(
    base: LoadedModel,
    prompts: Sequence[str],
    config: DistillConfig,
    out: Path,
    *,
    answering: AnswerSettings,
    processes: Processes | None = None,
    resume: bool = False,
    on_step: Callable[[StepResult], None] | None = None,
) -> Distillation:
    """Distil `base` into `out` for the policy of `config`. Everything that can be refused is refused first.

    With several processes all of them call this; the first one answers the prompts and writes the files. Raises a
    subclass of ExpertShareError.
    """
    processes, folder = processes or Processes(), distill_folder(out)
    if base.layout is not None:
        raise TrainingError(
            f"distillation needs a model that holds its experts, but those of {base.path} are in files of their own: "
            "give the checkpoint that it was converted from, and convert what comes of it"
        )
    curriculum = check_trainable(base.config, config, processes)
    if processes.rank == 0:
        folder.check(resume=resume)
        if not resume and (out / "config.json").exists():
            raise TrainingError(f"{out} holds a model already, which would be overwritten: choose another folder")
    options = answering.options.resolve(base.config)
    check_answerable(base, prompts, options, batch_size=answering.batch_size)
    path = folder.work / "answers.jsonl"
    if processes.rank == 0:
        folder.record(_settings(base, prompts, config, options), resume=resume)
        generate_answers(
            base, prompts, options, path, batch_size=answering.batch_size, on_progress=answering.on_progress
        )
    processes.wait()
    answers = read_answers(path, prompts)
    samples = [answer.sample(base.config.eos_ids[0]) for answer in answers if answer.finished]
    if not samples:
        raise TrainingError(
            f"the model finished none of its {len(answers)} answers within {options.gen_length} tokens: raise the "
            "generation length, or give prompts that it can answer"
        )
    model = load_model(base.path, dtype=torch.float32, device=base.model.device).model
    trainer = make_trainer(model, samples, config, processes)
    train(trainer, folder, resume=resume, log_every=10, on_step=on_step)
    _export(trainer, base, _record(trainer, config, curriculum, base, answers), out)
    return Distillation(
        model=out, steps=trainer.step_index, answers=len(answers), unfinished=len(answers) - len(samples)
    )


def distill_folder(out: Path) -> RunFolder:
    """The files of a run whose finished model goes to `out`."""
    return RunFolder(folder=out, work=out / "distillation", kind="distillation")


def check_trainable(model: ModelConfig, config: DistillConfig, processes: Processes) -> Curriculum:
    """The policies of the run. Raises TrainingError or PolicyError for what cannot be trained."""
    check_elastic(config, model.router)
    processes.check(config)
    return make_curriculum(config, model.router)


def make_trainer(
    model: MoETransformer, samples: Sequence[Sample], config: DistillConfig, processes: Processes | None = None
) -> Trainer:
    """Trains `model` in place. Raises as `check_trainable`, and TrainingError without samples."""
    if not samples:
        raise TrainingError("expected at least one finished answer to train on, got none")
    processes = processes or Processes()
    curriculum = check_trainable(model.config, config, processes)
    choose_trained(model, router_only=config.router_only)
    decay = config.weight_decay
    return Trainer(
        model,
        config,
        partial(adamw, lr=config.peak_lr, weight_decay=decay)
        if config.optimiser == "adamw"
        else partial(
            muon_and_adamw, lr=config.peak_lr, scalar_lr=config.peak_scalar_lr, weight_decay=decay, scalar_decay=decay
        ),
        draw=lambda step: [samples[index] for index in draw_indices(len(samples), config, step)],
        policy=curriculum.policy,
        processes=processes,
    )


def draw_indices(count: int, config: DistillConfig, step: int) -> list[int]:
    """Which of `count` answers a step sees: epoch after epoch, each in its own order; a function of the step alone."""
    start = step * config.samples_per_step
    places = range(start, start + config.samples_per_step)
    return [_epoch(count, config.seed, place // count)[place % count] for place in places]


@lru_cache(maxsize=2)
def _epoch(count: int, seed: int, epoch: int) -> list[int]:
    order = list(range(count))
    Random(f"{seed}:epoch:{epoch}").shuffle(order)
    return order


def _settings(
    base: LoadedModel, prompts: Sequence[str], config: DistillConfig, options: DecodingOptions
) -> dict[str, Any]:
    """What a resumed run must repeat: one entry for each flag, and the prompts by their digest."""
    return {
        **{f"training.{name}": value for name, value in asdict(config).items()},
        **{f"decoding.{name}": value for name, value in asdict(options).items()},
        "model": base.path.name,
        "prompts": sha256("\0".join(prompts).encode()).hexdigest(),
    }


def _record(
    trainer: Trainer, config: DistillConfig, curriculum: Curriculum, base: LoadedModel, answers: Sequence[StoredAnswer]
) -> dict[str, Any]:
    """The content of distillation.json; `expertshare info` shows its policy."""
    environment = capture_environment(trainer.model.device)
    return {
        "policy": config.policy if config.elastic is None else None,
        "knobs": {"name": curriculum.target.name, **knobs(curriculum.target)},
        "base_model": base.path.name,
        "training": asdict(config),
        "peak_lr": config.peak_lr,
        "answers": len(answers),
        "unfinished": sum(not answer.finished for answer in answers),
        "processes": trainer.processes.count,
        "commit": environment.commit,
        "versions": environment.versions,
    }


def _export(trainer: Trainer, base: LoadedModel, record: Mapping[str, Any], out: Path) -> None:
    """Write the trained model in the dtype of `base`, with its tokenizer, record and card. All processes must call."""
    state = trainer.state()["model"]
    if trainer.processes.rank == 0:
        model = MoETransformer(base.config)
        model.load_state_dict({name.removeprefix("model."): tensor for name, tensor in state.items()})
        write_whole(out / "distillation.json", json.dumps(record, indent=2, ensure_ascii=False) + "\n")
        write_whole(out / "README.md", _model_card(record))
        save_model(model, out, dtype=base.model.dtype, tokenizer_dir=base.path)
    trainer.processes.wait()


_CARD = """---
library_name: expertshare
tags: [diffusion language model, mixture of experts, self-distillation]
---

# {base_model}, {purpose}

Trained to give its own answers while the tokens of a block share experts. {advice}

```sh
expertshare generate . --policy '{policy}' --prompt '...'
```

| | |
|---|---|
{rows}
"""
_FOR_A_POLICY = "Run it under the policy it was trained for:\nnothing chooses that policy by itself."
_ELASTIC = "Each group of tokens drew its number of experts, so it\nserves any policy with at least that many."


def _model_card(record: Mapping[str, Any]) -> str:
    """Markdown from the content of distillation.json."""
    training = record["training"]
    elastic = training["elastic"]
    facts = {
        "policy": f"`{record['policy']}`" if elastic is None else f"any, with {elastic} experts or more",
        "knobs": ", ".join(f"{name}={value}" for name, value in record["knobs"].items()),
        "started from": record["base_model"],
        "start policy": training["start_policy"] or "the same",
        "trained weights": "routers only" if training["router_only"] else "all",
        "answers": f"{record['answers']} of its own, of which {record['unfinished']} were unfinished and left out",
        "steps": f"{training['steps']} of {training['samples_per_step']} answers",
        "optimiser": f"{training['optimiser']}, peak learning rate {record['peak_lr']:g}",
        "seed": training["seed"],
        "commit": record["commit"] or "not from a checkout",
        "versions": ", ".join(f"{name} {version}" for name, version in record["versions"].items()),
    }
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    return _CARD.format(
        base_model=record["base_model"],
        purpose=f"distilled for `{record['policy']}`" if elastic is None else "for any number of experts",
        advice=_FOR_A_POLICY if elastic is None else _ELASTIC,
        policy=record["policy"] or f"des-vote:budget={elastic}",
        rows=rows,
    )
