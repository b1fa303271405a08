"""Training: what moves and what does not, resuming, the schedule of policies and of the learning rate."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from expertshare.config import ModelConfig
from expertshare.errors import ConfigError, PolicyError, TrainingError
from expertshare.models.transformer import MoETransformer, initialise
from expertshare.routing import parse_policy
from expertshare.training.batches import Sample
from expertshare.training.config import DistillConfig, make_curriculum, reference_architecture
from expertshare.training.distill import distill_folder, draw_indices, make_trainer
from expertshare.training.run_folder import RunFolder
from expertshare.training.trainer import Trainer, train

POLICY = "block-top-p:top_p_experts=0.5"


def _architecture() -> ModelConfig:
    made = reference_architecture(vocab_size=64, mask_id=0, eos_id=1, pad_id=2, hidden=64, layers=2, expert_hidden=8)
    return replace(made, block_length=8)


def _settings(**changes: object) -> DistillConfig:
    values: dict[str, object] = {
        "policy": POLICY,
        "steps": 4,
        "samples_per_step": 6,
        "micro_batch": 4,
        "dtype": "float32",
        "checkpoint_every": 2,
        "warmup_steps": 1,
    }
    return DistillConfig(**(values | changes))  # type: ignore[arg-type]


def _samples(count: int = 10) -> list[Sample]:
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randint(3, 64, (6 + n % 7,), generator=generator).tolist() for n in range(count)]
    return [Sample(tuple(ids[:4]), (*ids[4:], 1)) for ids in drawn]


def _trainer(config: DistillConfig) -> Trainer:
    model = MoETransformer(_architecture())
    initialise(model, seed=3, std=0.1)
    for layer in model.layers[1:]:
        layer.moe.router.bias.copy_(torch.linspace(-0.2, 0.2, 64))
    return make_trainer(model, _samples(), config)


@pytest.mark.parametrize("optimiser", ["adamw", "muon"])
def test_full_training_moves_every_weight_and_no_bias(optimiser: str) -> None:
    trainer = _trainer(_settings(optimiser=optimiser))
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    for _ in range(3):
        trainer.step()
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(before[name], tensor) == name.endswith("router.bias"), name


def test_router_only_training_leaves_everything_else_bit_equal() -> None:
    trainer = _trainer(_settings(router_only=True))
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    for _ in range(3):
        trainer.step()
    moved = {name for name, tensor in trainer.model.state_dict().items() if not torch.equal(before[name], tensor)}
    assert moved == {"layers.1.moe.router.weight"}


def test_loss_falls() -> None:
    trainer = _trainer(_settings(steps=40, lr=3e-3))
    losses = [trainer.step().loss for _ in range(40)]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


@pytest.mark.parametrize("changes", [{}, {"optimiser": "muon"}, {"router_only": True}])
def test_a_resumed_run_ends_with_the_same_weights(tmp_path: Path, changes: dict[str, object]) -> None:
    config = _settings(start_policy="block-top-p:top_p_experts=0.9", **changes)
    whole = _trainer(config)
    train(whole, _paths(tmp_path / "whole"), resume=False, log_every=1)

    class Interrupt(Exception):
        pass

    def stop(result: object) -> None:
        if getattr(result, "step", 0) == 2:
            raise Interrupt

    paths = _paths(tmp_path / "broken")
    with pytest.raises(Interrupt):
        train(_trainer(config), paths, resume=False, log_every=1, on_step=stop)
    resumed = _trainer(config)
    train(resumed, paths, resume=True, log_every=1)
    for (name, a), b in zip(whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    logged = [_without_speed(p.read_text()) for p in (paths.log, _paths(tmp_path / "whole").log)]
    assert logged[0] == logged[1]


@pytest.mark.parametrize("keep", [0, 1000])
def test_a_damaged_checkpoint_is_named(tmp_path: Path, keep: int) -> None:
    paths = _paths(tmp_path)
    train(_trainer(_settings(steps=1)), paths, resume=False, log_every=10)
    paths.checkpoint.write_bytes(paths.checkpoint.read_bytes()[:keep])
    with pytest.raises(TrainingError, match=r"checkpoint\.pt"):
        train(_trainer(_settings(steps=1)), paths, resume=True, log_every=10)


def test_a_damaged_record_of_the_run_is_named(tmp_path: Path) -> None:
    paths = _paths(tmp_path)
    paths.record({"seed": 0}, resume=False)
    paths.settings.write_text("[]")
    with pytest.raises(TrainingError, match=r"run\.json"):
        paths.record({"seed": 0}, resume=True)


def test_a_step_always_has_a_token_to_learn() -> None:
    """Also where end-of-text tokens weigh nothing and they alone would be masked."""
    trainer = _trainer(_settings(samples_per_step=1, fill_weight=0.0, mask_ratio=(1e-9, 1e-9)))
    for step in range(20):
        assert all(float(batch.weights_BS.sum()) > 0 for batch in trainer.objective.batches(step)), step


@pytest.mark.parametrize("optimiser", ["adamw", "muon"])
def test_a_gradient_that_is_not_finite_reaches_no_weight(optimiser: str) -> None:
    """The loss shows it a step later: behind the checkpoint, or, after the last step, never."""
    trainer = _trainer(_settings(optimiser=optimiser))
    trainer.model.norm.weight.register_hook(lambda gradient: gradient * float("inf"))
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    with pytest.raises(TrainingError, match="gradient is not finite at step 0"):
        trainer.step()
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(before[name], tensor), name


def _paths(folder: Path) -> RunFolder:
    paths = distill_folder(folder)
    paths.work.mkdir(parents=True, exist_ok=True)
    return paths


def _without_speed(log: str) -> list[str]:
    return [line.split('"positions_per_s"')[0] for line in log.splitlines()]


def test_every_answer_is_seen_once_in_each_epoch_in_another_order() -> None:
    config = _settings(samples_per_step=6)
    seen = [index for step in range(10) for index in draw_indices(20, config, step)]
    epochs = [seen[start : start + 20] for start in (0, 20, 40)]
    assert all(Counter(epoch) == Counter(range(20)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_a_curriculum_goes_evenly_to_its_target_and_stays_there() -> None:
    spec = _architecture().router
    config = _settings(steps=10, start_policy="block-top-p:top_p_experts=0.9", curriculum_share=0.4)
    steps = [make_curriculum(config, spec).policy(step) for step in range(6)]
    assert [policy.top_p_experts for policy in steps] == pytest.approx([0.9, 0.8, 0.7, 0.6, 0.5, 0.5])  # type: ignore[attr-defined]
    assert steps[-1] == parse_policy(POLICY).bind(spec)
    counts = _settings(policy="des-vote:budget=12", start_policy="des-vote:budget=32", steps=4, curriculum_share=1.0)
    budgets = [make_curriculum(counts, spec).policy(step).budget for step in range(5)]  # type: ignore[attr-defined]
    assert budgets == [32, 27, 22, 17, 12]


@pytest.mark.parametrize(
    ("start", "message"),
    [
        ("des-vote:budget=30", "must be block-top-p"),
        ("block-top-p:top_p_experts=0.9,group_limit=ignore", "the same word"),
        ("block-top-p:top_p_experts=1.9", "top_p_experts must lie"),
    ],
)
def test_a_start_policy_may_differ_in_numbers_only(start: str, message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        make_curriculum(_settings(start_policy=start), _architecture().router)


def test_the_learning_rate_warms_up_and_falls_along_a_half_cosine() -> None:
    config = _settings(steps=100, warmup_steps=10)
    factors = [config.learning_rate_factor(step) for step in (0, 9, 50, 99)]
    assert factors == pytest.approx(
        [0.1, (1 + math.cos(0.09 * math.pi)) / 2, 0.5, (1 + math.cos(0.99 * math.pi)) / 2], abs=1e-6
    )


def test_a_model_with_full_attention_learns_its_answers_too() -> None:
    model = MoETransformer(replace(_architecture(), attention="full"))
    initialise(model, seed=3, std=0.1)
    trainer = make_trainer(model, _samples(), _settings(steps=20, mask_ratio=(0.5, 0.5)))
    losses = [trainer.step().loss for _ in range(20)]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


def test_no_answers_are_refused() -> None:
    with pytest.raises(TrainingError, match="finished answer"):
        make_trainer(MoETransformer(_architecture()), [], _settings())


UNUSABLE: tuple[dict[str, object], ...] = (
    {"steps": 0},
    {"micro_batch": 0},
    {"mask_ratio": (0.0, 0.5)},
    {"full_mask_share": 1.5},
    {"dtype": "float16"},
    {"optimiser": "sgd"},
    {"lr": -1.0},
    {"weight_decay": float("nan")},
)


@pytest.mark.parametrize("change", UNUSABLE)
def test_unusable_settings_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        _settings(**change)
