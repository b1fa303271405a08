"""`expertshare distill` as a user meets it: a model that generates, its record, resuming, clear errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from .conftest import Run

POLICY = "block-top-p:top_p_experts=0.5"
COMMON = ("--tasks", "arith,code", "--count", "2", "--gen-length", "8", "--temperature", "1", "--seed", "3")
TRAINING = ("--policy", POLICY, "--steps", "2", "--batch-size", "2", "--dtype", "float32", "--lr", "0.001")


@pytest.fixture(scope="module")
def ending(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint with an end-of-text token that is likely enough for short answers."""
    folder = tmp_path_factory.mktemp("ending")
    for file in checkpoint.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"][1] *= 6.0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_distilled_model_generates_and_says_what_it_was_trained_for(run: Run, ending: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run("distill", ending, *COMMON, *TRAINING, "--out", out, "--json")
    assert done.code == 0, done.err
    told: dict[str, Any] = json.loads(done.out.splitlines()[-1])
    assert (told["steps"], told["answers"], told["policy"], told["seed"]) == (2, 4, POLICY, 3)
    assert f"{told['unfinished']} of 4 answers were unfinished" in done.err
    before, after = load_file(ending / "model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        if name.endswith("expert_bias"):
            assert torch.equal(tensor, after[name]), name
    assert not torch.equal(before["lm_head.weight"], after["lm_head.weight"])
    record = json.loads((out / "distillation.json").read_text())
    assert record["knobs"] == {
        "name": "block-top-p",
        "top_p_experts": 0.5,
        "guard": 6,
        "group_limit": "inside",
        "voters": "all",
        "reuse": None,
        "ballots": "ungrouped",
    }
    card = (out / "README.md").read_text()
    assert POLICY in card
    assert "| seed | 3 |" in card
    generated = run("generate", out, "--prompt", "Solve x + 5 = 12.", "--policy", POLICY, "--gen-length", "8", "--json")
    assert json.loads(generated.out)["policy"] == "block-top-p"
    assert json.loads(run("info", out, "--json").out)["distilled_policy"] == POLICY
    assert POLICY in run("info", out).out
    assert json.loads(run("info", ending, "--json").out)["distilled_policy"] is None


def test_a_finished_run_is_not_run_twice_and_resumes_to_the_same_files(run: Run, ending: Path, tmp_path: Path) -> None:
    arguments = ("distill", ending, *COMMON, *TRAINING, "--out", tmp_path / "out")
    assert run(*arguments).code == 0
    weights = (tmp_path / "out" / "model.safetensors").read_bytes()
    again = run(*arguments)
    assert again.code == 2
    assert "--resume" in again.err
    assert run(*arguments, "--resume").code == 0
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == weights
    other = run(*arguments, "--resume", "--lr", "0.1")
    assert other.code == 2
    assert "training.lr" in other.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--policy", POLICY), "either --prompts FILE or --tasks NAMES, got neither"),
        (("--policy", POLICY, "--tasks", "arith,maths"), "Did you mean 'math'"),
        (("--policy", POLICY, "--tasks", "arith", "--count", "0"), "count must be at least 1"),
        (("--policy", "block-top", "--tasks", "arith"), "Did you mean 'block-top-p'"),
        (("--policy", "des-vote:budget=2", "--tasks", "arith"), "budget must lie in"),
        (("--policy", POLICY, "--tasks", "arith", "--steps", "0"), "steps must be at least 1"),
        (("--policy", POLICY, "--tasks", "arith", "--optimiser", "sgd"), "adamw or muon"),
        (("--policy", POLICY, "--tasks", "arith", "--start-policy", "des-seq"), "must be block-top-p"),
        (("--policy", POLICY, "--tasks", "arith", "--resume"), "nothing to resume"),
        (("--policy", POLICY, "--tasks", "arith", "--device", "tpu"), "cpu or cuda"),
        (("--policy", POLICY, "--prompts", "nowhere.jsonl"), "readable prompt file"),
    ],
)
def test_errors_are_one_clear_message(
    run: Run, checkpoint: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    outcome = run("distill", checkpoint, "--out", tmp_path / "out", *arguments)
    assert outcome.code == 2
    assert message in outcome.err
    assert "Traceback" not in outcome.err
    assert not (tmp_path / "out").exists()


def test_a_model_is_never_overwritten(run: Run, checkpoint: Path) -> None:
    outcome = run("distill", checkpoint, "--out", checkpoint, "--policy", POLICY, "--tasks", "arith", "--count", "1")
    assert outcome.code == 2
    assert "holds a model already" in outcome.err
