"""The model's own answers: stored one by one, the same whatever interrupts them, unfinished ones left out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from expertshare.convert import convert
from expertshare.decoding import DecodingOptions, generate
from expertshare.errors import InputError, TrainingError
from expertshare.lab.tasks.tokenizer import save_tokenizer
from expertshare.models import LoadedModel, MoETransformer, Runtime, encode_prompt, initialise, load_model, save_model
from expertshare.routing import make_policy
from expertshare.training.answers import generate_answers, read_answers
from expertshare.training.config import DistillConfig, reference_architecture
from expertshare.training.distill import AnswerSettings, distill

PROMPTS = [f"Solve x + {n} = 12." for n in range(7)]
OPTIONS = DecodingOptions(gen_length=24, temperature=0.7, seed=11)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = tmp_path_factory.mktemp("base")
    save_tokenizer(folder)
    entries = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()
    config = reference_architecture(
        vocab_size=entries, mask_id=0, eos_id=1, pad_id=2, hidden=64, layers=2, expert_hidden=8
    )
    model = MoETransformer(config)
    initialise(model, seed=0, std=0.1)
    with torch.no_grad():
        model.head.weight[1] *= 4.0  # so that some answers end, and some do not
    save_model(model, folder, dtype=torch.float32)
    return load_model(folder)


@torch.no_grad()
def test_answers_are_those_of_plain_decoding_and_survive_a_torn_file(base: LoadedModel, tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    whole = generate_answers(base, PROMPTS, OPTIONS, path, batch_size=3)
    runtime = Runtime(policy=make_policy("vanilla"))
    for number, (prompt, answer) in enumerate(zip(PROMPTS, whole, strict=True)):
        assert base.tokenizer is not None
        ids = encode_prompt(base.tokenizer, prompt)
        (row,) = generate(base.model, runtime, OPTIONS, [ids], seeds=[11 + number]).rows
        assert (answer.prompt, answer.prompt_ids) == (prompt, tuple(ids))
        assert (answer.answer_ids, answer.finish_reason) == (row.token_ids, row.finish_reason)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3])
    heard: list[tuple[int, int]] = []
    again = generate_answers(
        base, PROMPTS, OPTIONS, path, batch_size=2, on_progress=lambda *counts: heard.append(counts)
    )
    assert again == whole
    assert path.read_bytes() == content
    assert heard[0][0] > 2
    assert heard[-1] == (7, 7)


def test_answers_to_other_prompts_are_refused(base: LoadedModel, tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    line = {"prompt": "Who?", "prompt_ids": [5], "answer_ids": [6], "text": "x", "finish_reason": "eos"}
    path.write_text(json.dumps(line) + "\n")
    with pytest.raises(TrainingError, match=r"line 1.*'Who\?'"):
        read_answers(path, PROMPTS)
    assert read_answers(path, ["Who?"])[0].sample(1).answer == (6, 1)
    path.write_text("[]\n")
    with pytest.raises(TrainingError, match="expected a stored answer"):
        read_answers(path, PROMPTS)
    with pytest.raises(InputError, match="batch size"):
        generate_answers(base, PROMPTS, OPTIONS, tmp_path / "other", batch_size=0)


def test_unfinished_answers_are_stored_but_not_trained_on(base: LoadedModel, tmp_path: Path) -> None:
    config = DistillConfig(policy="des-vote:budget=16", steps=1, samples_per_step=2, dtype="float32")
    result = distill(base, PROMPTS, config, tmp_path, answering=AnswerSettings(options=OPTIONS))
    stored = [json.loads(line) for line in (tmp_path / "distillation" / "answers.jsonl").read_text().splitlines()]
    ended = [answer for answer in stored if answer["finish_reason"] == "eos"]
    assert len(stored) == result.answers == 7
    assert 0 < len(ended) < 7
    assert result.unfinished == 7 - len(ended)


def test_a_model_that_never_ends_is_told_so(base: LoadedModel, tmp_path: Path) -> None:
    config = DistillConfig(policy="des-vote:budget=16", steps=1)
    short = AnswerSettings(options=DecodingOptions(gen_length=1, temperature=0.0))
    with pytest.raises(TrainingError, match="none of its 1 answers within 1 tokens"):
        distill(base, PROMPTS[:1], config, tmp_path, answering=short)


@pytest.mark.parametrize(
    ("prompts", "batch_size", "message"),
    [
        ([], 2, "at least one prompt"),
        (["Solve x + 1 = 2.", "  "], 2, "prompt must hold some text"),
        (["Solve x + 1 = 2.", "1 " * 2000], 2, "prompt 2 has"),
        (["Solve x + 1 = 2."], 0, "batch size"),
    ],
    ids=["none", "blank", "too long", "batch"],
)
def test_a_run_that_cannot_answer_is_refused_before_it_leaves_anything(
    base: LoadedModel, tmp_path: Path, prompts: list[str], batch_size: int, message: str
) -> None:
    """Else the same call, put right, would be told that the folder holds another run."""
    answering = AnswerSettings(options=OPTIONS, batch_size=batch_size)
    with pytest.raises(InputError, match=message):
        distill(base, prompts, DistillConfig(policy="des-vote", steps=1), tmp_path / "out", answering=answering)
    assert not (tmp_path / "out").exists()


def test_a_model_without_a_tokenizer_is_refused_before_it_leaves_anything(base: LoadedModel, tmp_path: Path) -> None:
    config, answering = DistillConfig(policy="des-vote", steps=1), AnswerSettings(options=OPTIONS)
    with pytest.raises(InputError, match=r"tokenizer\.json"):
        distill(replace(base, tokenizer=None), PROMPTS, config, tmp_path / "out", answering=answering)
    assert not (tmp_path / "out").exists()


def test_a_converted_model_is_refused_with_what_to_take_instead(base: LoadedModel, tmp_path: Path) -> None:
    converted = load_model(convert(base.path, tmp_path / "experts").path)
    config, answering = DistillConfig(policy="des-vote", steps=1), AnswerSettings(options=OPTIONS)
    with pytest.raises(TrainingError, match="checkpoint that it was converted from"):
        distill(converted, PROMPTS, config, tmp_path / "out", answering=answering)
    assert not (tmp_path / "out").exists()
