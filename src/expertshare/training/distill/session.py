"""A whole self-distillation: answers by the model itself, training on them, export. What the verb runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from expertshare.decoding import DecodingOptions
from expertshare.errors import TrainingError
from expertshare.models import LoadedModel, load_model
from expertshare.training.distill.answers import AnswerListener, check_answerable, generate_answers, read_answers
from expertshare.training.distill.config import DistillConfig
from expertshare.training.distill.processes import Processes
from expertshare.training.distill.run import DistillPaths, StepListener, check_folder, export, record_settings, train
from expertshare.training.distill.trainer import DistillTrainer, check_trainable


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
    on_step: StepListener | None = None,
) -> Distillation:
    """Distil `base` into `out` for the policy of `config`. Everything that can be refused is refused first.

    With several processes all of them call this; the first one answers the prompts and writes the files. Raises a
    subclass of ExpertShareError.
    """
    processes, paths = processes or Processes(), DistillPaths(folder=out)
    if base.layout is not None:
        raise TrainingError(
            f"distillation needs a model that holds its experts, but those of {base.path} are in files of their own: "
            "give the checkpoint that it was converted from, and convert what comes of it"
        )
    check_trainable(base.config, config, processes)
    if processes.rank == 0:
        check_folder(paths, resume=resume)
    options = answering.options.resolve(base.config)
    check_answerable(base, prompts, options, batch_size=answering.batch_size)
    if processes.rank == 0:
        record_settings(paths, _settings(base, prompts, config, options), resume=resume)
        with torch.no_grad():
            generate_answers(
                base,
                prompts,
                options,
                paths.answers,
                batch_size=answering.batch_size,
                on_progress=answering.on_progress,
            )
    processes.wait()
    answers = read_answers(paths.answers, prompts)
    samples = [answer.sample(base.config.eos_ids[0]) for answer in answers if answer.finished]
    if not samples:
        raise TrainingError(
            f"the model finished none of its {len(answers)} answers within {options.gen_length} tokens: raise the "
            "generation length, or give prompts that it can answer"
        )
    model = load_model(base.path, dtype=torch.float32, device=base.model.device).model
    trainer = DistillTrainer(model, samples, config, processes)
    train(trainer, paths, resume=resume, on_step=on_step)
    return Distillation(
        model=export(trainer, base, answers, paths),
        steps=trainer.step_index,
        answers=len(answers),
        unfinished=len(answers) - len(samples),
    )


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
