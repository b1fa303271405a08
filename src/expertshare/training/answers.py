"""The model's own answers, which it is trained to give again: one JSON line each, written as they are made."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from expertshare.decoding import BlockDecoder, DecodingOptions, FinishReason
from expertshare.decoding.row import check_prompts
from expertshare.errors import InputError, TrainingError
from expertshare.kernels import AUTO, choose_backend
from expertshare.models import LoadedModel, Runtime, decode_answer, encode_prompt
from expertshare.routing import native_policy
from expertshare.training.batches import Sample

AnswerListener = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredAnswer:
    """One line of the file. answer_ids: what the model wrote, up to and without the end-of-text token."""

    prompt: str
    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason | None

    @property
    def finished(self) -> bool:
        """Whether the model ended its answer itself; one cut off by the length would teach not to end."""
        return self.finish_reason == "eos"

    def sample(self, eos_id: int) -> Sample:
        """What is trained on: the prompt, and the answer with its end."""
        return Sample(self.prompt_ids, (*self.answer_ids, eos_id))


def read_answers(path: Path, prompts: Sequence[str]) -> list[StoredAnswer]:
    """The answers stored so far, which must be to the first of `prompts`; a line that was cut short is removed.

    Raises TrainingError where the file holds something else.
    """
    if not path.exists():
        return []
    text = path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    if len(whole) < len(text):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    answers = [_parse(line, f"{path}, line {number}") for number, line in enumerate(whole.splitlines(), 1)]
    advice = "give the prompts that this run was started with, or another folder"
    for number, (answer, prompt) in enumerate(zip(answers, prompts, strict=False), 1):
        if answer.prompt != prompt:
            raise TrainingError(
                f"{path}, line {number}: expected the answer to {prompt[:60]!r}, got one to "
                f"{answer.prompt[:60]!r}: {advice}"
            )
    if len(answers) > len(prompts):
        raise TrainingError(
            f"{path} holds {len(answers)} answers, expected at most {len(prompts)}, one for each prompt: {advice}"
        )
    return answers


def _parse(line: bytes, source: str) -> StoredAnswer:
    try:
        values: dict[str, Any] = json.loads(line)
        return StoredAnswer(**{**values, **{name: tuple(values[name]) for name in ("prompt_ids", "answer_ids")}})
    except (ValueError, KeyError, TypeError) as error:
        raise TrainingError(f"{source}: expected a stored answer, got {line[:60]!r}: use another folder") from error


def check_answerable(
    loaded: LoadedModel, prompts: Sequence[str], options: DecodingOptions, *, batch_size: int
) -> list[list[int]]:
    """Token ids of all `prompts`; InputError unless the model can be asked them. options: resolved for the model."""
    if loaded.tokenizer is None:
        raise InputError(f"{loaded.path} has no tokenizer: put the model's tokenizer.json there")
    if batch_size < 1:
        raise InputError(f"the batch size of generation must be at least 1, got {batch_size}")
    ids = [encode_prompt(loaded.tokenizer, text) for text in prompts]
    check_prompts(ids, options, loaded.config)
    return ids


@torch.no_grad()
def generate_answers(
    loaded: LoadedModel,
    prompts: Sequence[str],
    options: DecodingOptions,
    path: Path,
    *,
    batch_size: int,
    on_progress: AnswerListener | None = None,
) -> list[StoredAnswer]:
    """Answer `prompts` under the model's own routing, a batch at a time, each appended to `path` as it is done.

    Answers that `path` holds already are kept. Prompt number i is sampled with the options' seed + i, so neither
    batches nor interruptions change an answer. on_progress(done, total) hears of every batch. Raises InputError,
    TrainingError or NumericsError.
    """
    prompt_ids = check_answerable(loaded, prompts, options.resolve(loaded.config), batch_size=batch_size)
    assert loaded.tokenizer is not None  # the check refused a model without one
    answers = read_answers(path, prompts)
    runtime = Runtime(policy=native_policy(loaded.config), backend=choose_backend(AUTO, loaded.model.device))
    decoder = BlockDecoder(loaded.model, runtime, options)
    path.parent.mkdir(parents=True, exist_ok=True)
    while len(answers) < len(prompts):
        numbers = range(len(prompts))[len(answers) : len(answers) + batch_size]
        seeds = [options.seed + number for number in numbers]
        stream = decoder.blocks([prompt_ids[number] for number in numbers], seeds=seeds)
        for _ in stream:
            pass
        made = [
            StoredAnswer(
                prompt=prompts[number],
                prompt_ids=tuple(prompt_ids[number]),
                answer_ids=row.token_ids,
                text=decode_answer(loaded.tokenizer, row.token_ids),
                finish_reason=row.finish_reason,
            )
            for number, row in zip(numbers, stream.generation().rows, strict=True)
        ]
        with path.open("a", encoding="utf-8", newline="\n") as file:
            file.writelines(json.dumps(asdict(answer), ensure_ascii=False) + "\n" for answer in made)
            file.flush()
            os.fsync(file.fileno())
        answers += made
        if on_progress is not None:
            on_progress(len(answers), len(prompts))
    return answers
