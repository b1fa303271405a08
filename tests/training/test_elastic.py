"""Elastic training: the sets that groups draw, and that tokens route inside them by the rule of inference."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from expertshare.config import ModelConfig
from expertshare.errors import ConfigError, PolicyError, TrainingError
from expertshare.lab.tasks.tokenizer import TaskProblems
from expertshare.models import MoETransformer, Runtime, initialise, load_model
from expertshare.routing import make_policy, route, router_scores
from expertshare.routing.select import ballots, tally
from expertshare.training.batches import Sample, make_batch
from expertshare.training.config import DistillConfig, TrainingConfig, reference_architecture
from expertshare.training.objective import DrawnCoresets, Objective, draw_coresets
from expertshare.training.processes import Processes
from expertshare.training.scratch import prepare, run, run_folder
from expertshare.training.trainer import BatchLoss
from expertshare.types import RoutingPlan

ELASTIC = TrainingConfig(elastic=16, elastic_free=0.25, dtype="float32")
LEAST = 16


def architecture(family: str = "llada2_moe") -> ModelConfig:
    return reference_architecture(
        family=family, vocab_size=64, mask_id=0, eos_id=1, pad_id=2, hidden=64, layers=3, expert_hidden=8
    )


def drawn_samples(count: int) -> list[Sample]:
    generator = torch.Generator().manual_seed(5)
    sizes = torch.randint(1, 90, (count, 2), generator=generator).tolist()
    return [
        Sample(tuple(torch.randint(3, 64, (a,), generator=generator).tolist()), (*[7] * (b - 1), 1)) for a, b in sizes
    ]


def random_model(config: ModelConfig) -> MoETransformer:
    model = MoETransformer(config)
    initialise(model, seed=3, std=0.2)
    return model.eval()


def plans_of(model: MoETransformer, samples: list[Sample], seeds: list[int]) -> tuple[Any, list[RoutingPlan]]:
    batch = make_batch(samples, seeds, model.config, ELASTIC)
    plans: list[RoutingPlan] = []
    policy = draw_coresets(batch, model.config, ELASTIC)
    with torch.no_grad():
        BatchLoss(model)(batch, Runtime(policy=policy, on_plan=lambda _, plan: plans.append(plan)))
    return batch, plans


def test_numbers_are_log_uniform_and_a_quarter_of_the_groups_is_free() -> None:
    config = architecture()
    batch = make_batch(drawn_samples(300), range(300), config, ELASTIC)
    for layer in draw_coresets(batch, config, ELASTIC).layers:
        assert isinstance(layer, DrawnCoresets)
        free = layer.size_G == config.router.num_experts
        assert float(free.float().mean()) == pytest.approx(0.25 + 0.75 * 0.0057, abs=0.02)
        drawn = layer.size_G[~free].float()
        assert drawn.min() == LEAST
        share = (drawn.log() - torch.tensor(16.0).log()) / torch.tensor(4.0).log()
        for quarter in (0.25, 0.5, 0.75):
            assert float((share < quarter).float().mean()) == pytest.approx(quarter, abs=0.04)


@pytest.mark.parametrize("family", ["llada2_moe", "llada_moe"])
def test_a_group_keeps_to_its_set_and_its_tokens_have_all_their_experts(family: str) -> None:
    config = architecture(family)
    model = random_model(config)
    batch, plans = plans_of(model, drawn_samples(12), list(range(12)))
    policy = draw_coresets(batch, config, ELASTIC)
    live_T = batch.inputs.live_BS.flatten()
    assert len(plans) == config.num_moe_layers
    for plan, layer in zip(plans, policy.layers, strict=True):
        assert isinstance(layer, DrawnCoresets)
        by_group = plan.expert_ids_TK.view(len(layer.size_G), -1)
        used = torch.tensor([len(set(ids.tolist()) - {-1}) for ids in by_group])
        assert (used <= layer.size_G).all()
        assert len(set(layer.size_G.tolist())) > 10
        assert (plan.expert_ids_TK[live_T] >= 0).all()
        order = layer.noise_GE.argsort(dim=1, descending=True)
        for ids, size, first in zip(by_group, layer.size_G, order, strict=True):
            assert set(ids.tolist()) - {-1} <= set(first[:size].tolist())


def test_inside_a_set_tokens_route_by_the_rule_of_inference() -> None:
    """A drawn set, against every expert outside it given a choice score of minus infinity, by the plain router."""
    spec = replace(architecture().router, num_groups=1, kept_groups=1)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 32, spec.num_experts, generator=generator)
    scores = router_scores(
        logits, torch.ones(5, 32, dtype=torch.bool), spec, None if not spec.has_bias else torch.zeros(64)
    )
    noise, size = torch.rand(5, 64, generator=generator), torch.tensor([64, 16, 20, 33, 8])
    coreset, plan = route(scores, DrawnCoresets(size_G=size, noise_GE=noise, sets="random"), spec)
    assert torch.equal(coreset.member_GE.sum(dim=1), size)
    outside = ~coreset.member_GE.unsqueeze(1)
    closed = replace(scores, choice_GLE=scores.choice_GLE.masked_fill(outside, float("-inf")))
    _, expected = route(closed, make_policy("vanilla").bind(spec), spec)
    assert torch.equal(plan.expert_ids_TK, expected.expert_ids_TK)
    assert torch.equal(plan.weights_TK, expected.weights_TK)


def test_sets_by_votes_are_drawn_by_the_share_of_the_votes() -> None:
    spec = architecture().router
    logits = torch.randn(1, 32, spec.num_experts, generator=torch.Generator().manual_seed(1))
    scores = router_scores(logits, torch.ones(1, 32, dtype=torch.bool), spec, torch.zeros(spec.num_experts))
    votes_E = tally(scores, ballots(scores, spec, spec.top_k, "ungrouped"))[0].clamp_min(0.0)
    counts = torch.zeros(spec.num_experts)
    generator, draws = torch.Generator().manual_seed(2), 4000
    for _ in range(draws):
        noise = torch.rand(1, spec.num_experts, generator=generator)
        policy = DrawnCoresets(size_G=torch.tensor([1]), noise_GE=noise, sets="votes")
        counts += policy.select(scores, spec).member_GE[0]
    torch.testing.assert_close(counts / draws, votes_E / votes_E.sum(), rtol=0, atol=0.015)


def test_what_a_sample_draws_depends_on_its_seed_alone() -> None:
    config, samples = architecture(), drawn_samples(6)
    model = random_model(config)
    together, plans = plans_of(model, samples, list(range(6)))
    length = config.block_length
    for row, sample in enumerate(samples):
        alone, own = plans_of(model, [sample], [row])
        for mine, theirs in zip(own, plans, strict=True):
            ids, others = (p.expert_ids_TK.view(len(b.seeds), -1, 8) for p, b in ((mine, alone), (theirs, together)))
            noisy = alone.num_noisy * length
            assert torch.equal(ids[0, :noisy], others[row, :noisy])
            clean = ids.shape[1] - noisy
            start = together.num_noisy * length
            assert torch.equal(ids[0, noisy:], others[row, start : start + clean])


def test_processes_share_a_step_without_changing_it() -> None:
    config, samples = architecture(), drawn_samples(8)
    settings = replace(ELASTIC, samples_per_step=8, micro_batch=2)

    def sizes(count: int) -> list[tuple[int, ...]]:
        found = []
        for rank in range(count):
            objective = Objective(
                draw=lambda _: samples,
                policy=lambda _: make_policy("vanilla").bind(config.router),
                model=config,
                config=settings,
                processes=Processes(rank=rank, count=count),
            )
            for batch in objective.batches(3):
                policy = objective.routing(3, batch)
                blocks = len(policy.layers[0].size_G) // len(batch.seeds)  # type: ignore[attr-defined]
                for row, seed in enumerate(batch.seeds):
                    own = policy.layers[0].size_G[row * blocks]  # type: ignore[attr-defined]
                    found.append((seed, int(own)))
        return sorted(found)

    assert sizes(1) == sizes(2) == sizes(4)
    assert len({size for _, size in sizes(1)}) > 2


def test_a_run_repeats_and_resumes_and_goes_on_from_a_model(tmp_path: Path) -> None:
    settings = TrainingConfig(
        steps=4, samples_per_step=6, dtype="float32", checkpoint_every=2, elastic=16, warmup_steps=2
    )
    shape = {"hidden": 64, "layers": 2, "expert_hidden": 8}
    problems = TaskProblems(0)

    def trained(name: str, **changes: Any) -> Any:
        resume = changes.pop("resume", False)
        folder = run_folder(tmp_path / name)
        trainer = prepare(folder, replace(settings, **changes), problems, **shape, resume=resume)
        losses: list[float] = []
        model = run(trainer, folder, problems, resume=resume, on_step=lambda step: losses.append(step.loss))
        return model, losses

    model, losses = trained("whole")
    assert trained("again")[1] == losses
    assert trained("free", elastic=None)[1] != losses
    folder, continued = run_folder(tmp_path / "from"), []
    start = load_model(model)
    trainer = prepare(folder, settings, problems, start=start, resume=False)
    run(trainer, folder, problems, resume=False, on_step=lambda step: continued.append(step.loss))
    assert sum(continued) < 0.95 * sum(losses)
    problems.vocabulary = {**problems.vocabulary, "<other>": 999}
    with pytest.raises(TrainingError, match="expected a model with the vocabulary of these problems"):
        prepare(run_folder(tmp_path / "other"), settings, problems, start=start, resume=False)


def test_wrong_settings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match=r"12\.\.64 experts"):
        prepare(run_folder(tmp_path), replace(ELASTIC, elastic=9), TaskProblems(0), hidden=64, layers=2, resume=False)
    with pytest.raises(ConfigError, match="elastic_free must lie"):
        replace(ELASTIC, elastic_free=1.5)
    with pytest.raises(ConfigError, match="random or votes"):
        replace(ELASTIC, elastic_sets="best")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="to mean anything"):
        replace(ELASTIC, elastic=None, elastic_free=0.5)
    with pytest.raises(ConfigError, match="left out of elastic training"):
        DistillConfig(policy="des-vote", elastic=16)
