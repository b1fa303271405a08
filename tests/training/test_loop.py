"""The loop: it learns, it resumes to the same weights, it balances; Muon against torch's own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from expertshare.errors import ConfigError, TrainingError
from expertshare.lab.tasks.tokenizer import TaskProblems
from expertshare.models import load_model
from expertshare.training.config import TrainingConfig, reference_architecture
from expertshare.training.optimisers import Muon, orthogonalise
from expertshare.training.scratch import prepare, run, run_folder
from expertshare.training.trainer import Trainer, train


def _config(**changes: object) -> TrainingConfig:
    settings: dict[str, object] = {"steps": 4, "samples_per_step": 6, "dtype": "float32", "checkpoint_every": 2}
    return TrainingConfig(**(settings | changes))  # type: ignore[arg-type]


def _trainer(folder: Path, config: TrainingConfig, *, resume: bool = False) -> Trainer:
    return prepare(
        run_folder(folder), config, TaskProblems(config.seed), hidden=64, layers=2, expert_hidden=8, resume=resume
    )


def test_the_number_of_experts_is_a_choice_that_the_router_checks(tmp_path: Path) -> None:
    paths, sizes = run_folder(tmp_path), {"hidden": 64, "layers": 2, "expert_hidden": 8}
    router = prepare(paths, _config(), TaskProblems(0), **sizes, num_experts=16, resume=False).model.config.router
    assert (router.num_experts, router.top_k) == (16, 8)
    for number in (8, 20):
        with pytest.raises(ConfigError):
            reference_architecture(vocab_size=64, mask_id=0, eos_id=1, pad_id=2, num_experts=number)


def test_muon_equals_torch_on_a_matrix_and_treats_a_stack_matrix_by_matrix() -> None:
    torch.manual_seed(0)
    start, gradients = torch.randn(12, 20), [torch.randn(12, 20) for _ in range(3)]
    theirs, ours = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    stack = torch.nn.Parameter(torch.stack((start, start.flip(0))))
    reference = torch.optim.Muon([theirs], lr=0.1, momentum=0.95, weight_decay=0.01)
    for gradient in gradients:
        theirs.grad = gradient.clone()
        reference.step()
    optimiser = Muon([ours, stack], lr=0.1, momentum=0.95, weight_decay=0.01)
    for gradient in gradients:
        ours.grad, stack.grad = gradient.clone(), torch.stack((gradient, gradient.flip(0)))
        optimiser.step()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0.03)  # torch iterates in bfloat16
    torch.testing.assert_close(stack[0], ours, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(stack[1], ours.flip(0), rtol=1e-4, atol=1e-5)


def test_orthogonalise_brings_singular_values_near_one() -> None:
    torch.manual_seed(1)
    values = torch.linalg.svdvals(orthogonalise(torch.randn(3, 16, 48)))
    assert values.min() > 0.6
    assert values.max() < 1.3


def test_a_resumed_run_ends_with_the_same_weights(tmp_path: Path) -> None:
    whole = _trainer(tmp_path / "whole", _config())
    train(whole, run_folder(tmp_path / "whole"), resume=False, log_every=1)

    class Interrupt(Exception):
        pass

    def stop(result: object) -> None:
        if getattr(result, "step", 0) == 2:
            raise Interrupt

    broken = _trainer(tmp_path / "broken", _config())
    with pytest.raises(Interrupt):
        train(broken, run_folder(tmp_path / "broken"), resume=False, log_every=1, on_step=stop)
    resumed = _trainer(tmp_path / "broken", _config(), resume=True)
    train(resumed, run_folder(tmp_path / "broken"), resume=True, log_every=1)
    for (name, a), b in zip(whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_loss_falls_and_the_bias_moves_towards_an_even_load(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path / "run", _config(steps=30, samples_per_step=16, warmup_steps=5, balance_rate=0.01))
    losses = [trainer.step().loss for _ in range(30)]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    bias = trainer.model.layers[1].moe.router.bias
    assert bias.abs().max() > 0.01


def test_a_step_whose_masks_hit_nothing_changes_nothing(tmp_path: Path) -> None:
    """With full attention, where masks are drawn for one block of the answer and may all miss it."""
    config = _config(samples_per_step=1, mask_ratio=(1e-9, 1e-9), full_mask_share=0.0, balance_loss=0.0)
    shape = {"family": "llada_moe", "hidden": 64, "layers": 2, "expert_hidden": 8}
    trainer = prepare(run_folder(tmp_path / "run"), config, TaskProblems(0), **shape, resume=False)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    assert trainer.step().loss == 0.0
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(before[name], tensor), name


@pytest.mark.parametrize("keep", [0, 1000])
def test_a_damaged_checkpoint_is_named(tmp_path: Path, keep: int) -> None:
    folder = tmp_path / "run"
    train(_trainer(folder, _config(steps=2)), run_folder(folder), resume=False, log_every=1)
    damaged = folder / "checkpoint.pt"
    damaged.write_bytes(damaged.read_bytes()[:keep])
    with pytest.raises(TrainingError, match=r"checkpoint\.pt"):
        train(_trainer(folder, _config(steps=2), resume=True), run_folder(folder), resume=True, log_every=1)


def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    trainer = _trainer(folder, _config(steps=2))
    torch.save({"weights": torch.zeros(2)}, folder / "checkpoint.pt")
    with pytest.raises(TrainingError, match=r"checkpoint\.pt"):
        train(trainer, run_folder(folder), resume=True, log_every=1)


def test_a_checkpoint_that_an_older_version_laid_out_is_refused_with_what_to_do(tmp_path: Path) -> None:
    folder, config = tmp_path / "run", _config(steps=2)
    trainer = _trainer(folder, config)
    optimisers = [optimiser.state_dict() for optimiser in trainer.optimisers]
    older = {"step": 1, "model": trainer.model.state_dict(), "optimisers": optimisers}  # named as the model's own
    torch.save(older, folder / "checkpoint.pt")
    with pytest.raises(TrainingError, match=r"checkpoint\.pt: expected .*model\..*, got .* or remove the file"):
        train(trainer, run_folder(folder), resume=True, log_every=1)
    (folder / "checkpoint.pt").unlink()
    train(trainer, run_folder(folder), resume=True, log_every=1)
    assert trainer.step_index == 2


def test_a_damaged_record_of_the_run_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    _trainer(folder, _config())
    (folder / "run.json").write_text("{")
    with pytest.raises(TrainingError, match=r"run\.json"):
        _trainer(folder, _config(), resume=True)


def test_a_gradient_that_is_not_finite_reaches_no_weight(tmp_path: Path) -> None:
    """The loss shows it a step later: behind the checkpoint, or, after the last step, never."""
    trainer = _trainer(tmp_path / "run", _config())
    trainer.model.norm.weight.register_hook(lambda gradient: gradient * float("inf"))
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    with pytest.raises(TrainingError, match="gradient is not finite at step 0"):
        trainer.step()
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(before[name], tensor), name


def test_balancing_raises_the_idle_and_lowers_the_busy(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path / "run", _config(balance_rate=0.5, warmup_steps=1, decay_share=1e-9))
    load = torch.ones(1, 64)
    load[0, 3], load[0, 5] = 10.0, 0.0
    assert trainer.balance is not None
    trainer.balance.update(load, trainer.config.learning_rate_factor(0))
    bias = trainer.model.layers[1].moe.router.bias
    assert bias[3] == -0.5
    assert bias[5] == 0.5


def test_a_run_exports_a_model_that_loads_and_its_log(tmp_path: Path) -> None:
    paths = run_folder(tmp_path / "run")
    trainer = _trainer(paths.folder, _config(steps=2))
    model = run(trainer, paths, TaskProblems(0), resume=False, log_every=1)
    loaded = load_model(model)
    assert loaded.config.router.min_coreset_size("inside") == 12
    assert loaded.model.dtype == torch.bfloat16
    lines = [json.loads(line) for line in paths.log.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert json.loads(paths.settings.read_text())["training"]["seed"] == 0


def test_a_resumed_run_logs_every_step_once(tmp_path: Path) -> None:
    paths = run_folder(tmp_path / "run")

    class Interrupt(Exception):
        pass

    def stop(result: object) -> None:
        if getattr(result, "step", 0) == 2:
            raise Interrupt

    with pytest.raises(Interrupt):
        run(_trainer(paths.folder, _config()), paths, TaskProblems(0), resume=False, log_every=1, on_step=stop)
    run(_trainer(paths.folder, _config(), resume=True), paths, TaskProblems(0), resume=True, log_every=1)
    assert [json.loads(line)["step"] for line in paths.log.read_text().splitlines()] == [1, 2, 3, 4]


def test_other_settings_or_a_finished_folder_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    _trainer(folder, _config())
    with pytest.raises(TrainingError, match=r"--resume"):
        _trainer(folder, _config())
    with pytest.raises(TrainingError, match=r"training\.seed"):
        _trainer(folder, _config(seed=5), resume=True)
    with pytest.raises(TrainingError, match=r"nothing to resume"):
        _trainer(tmp_path / "other", _config(), resume=True)


UNUSABLE: tuple[dict[str, object], ...] = (
    {"steps": 0},
    {"mask_ratio": (0.0, 0.5)},
    {"dtype": "float16"},
    {"matrix_lr": float("nan")},
    {"scalar_lr": float("inf")},
    {"weight_decay": -1.0},
    {"balance_rate": float("nan")},
    {"fill_weight": 2.0},
    {"mixture": {"arith": 0.0}},
    {"mixture": {"arith": float("nan")}},
)


@pytest.mark.parametrize("change", UNUSABLE)
def test_unusable_settings_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        _config(**change)
