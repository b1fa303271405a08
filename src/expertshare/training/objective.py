"""What a run trains for: the samples of every step, and how their tokens are routed.

Elastic training: every sharing group draws how many experts it may use, and which, so that one training serves every
policy and every budget, and no expert is emptied. A token then routes inside its group's set by the rule of inference.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import ClassVar

import torch
from torch import Tensor

from expertshare.config import ModelConfig, RouterSpec
from expertshare.errors import PolicyError
from expertshare.routing import Layerwise, RoutingPolicy
from expertshare.routing.policy import CoresetPolicy
from expertshare.routing.ranking import top_k_ids
from expertshare.routing.rule import SharingRule
from expertshare.routing.select import ballots, tally
from expertshare.training.batches import Sample, TrainingBatch, geometry, make_batch, noise_seed
from expertshare.training.config import ElasticSets, RunConfig
from expertshare.training.processes import Processes
from expertshare.types import Coreset, RouterScores


@dataclass(frozen=True, kw_only=True, slots=True)
class Objective:
    """draw: the samples of a 0-based step; policy: how tokens are routed in it, bound to the model's router.

    Both are functions of the step alone, the same in every process, so that a resumed run sees what it would have seen.
    """

    draw: Callable[[int], Sequence[Sample]]
    policy: Callable[[int], RoutingPolicy]
    model: ModelConfig
    config: RunConfig
    processes: Processes

    def batches(self, step: int) -> list[TrainingBatch]:
        """This process's share of a step, in forwards of similar lengths; their number is the same in every process."""
        seed, length, size = self.config.seed, self.model.block_length, self.config.micro_batch
        drawn = [(sample, noise_seed(seed, step, place)) for place, sample in enumerate(self.draw(step))]

        def blocks(pair: tuple[Sample, int]) -> tuple[int, int]:
            """Noisy blocks and all blocks: samples that are alike in both pad each other the least."""
            total, first = geometry(pair[0], length)
            return total - first, total

        mine = sorted(drawn, key=blocks)[self.processes.rank :: self.processes.count]
        parts = [mine[start : start + size] for start in range(0, len(mine), size)]
        return [make_batch([s for s, _ in part], [n for _, n in part], self.model, self.config) for part in parts]

    def routing(self, step: int, batch: TrainingBatch) -> RoutingPolicy:
        """The policy of one forward: the step's, or under elastic training sets that are drawn for its groups."""
        return self.policy(step) if self.config.elastic is None else draw_coresets(batch, self.model, self.config)


def check_elastic(config: RunConfig, spec: RouterSpec) -> None:
    """Raise PolicyError where the smallest set of elastic training could leave a token without its K experts."""
    least, most = spec.min_coreset_size("inside"), spec.num_experts
    if config.elastic is not None and not least <= config.elastic <= most:
        raise PolicyError(f"elastic must lie in {least}..{most} experts for this model, got {config.elastic}")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class DrawnCoresets(CoresetPolicy):
    """Each group uses so many experts (size_G, int64), the first by noise_GE (uniform in [0, 1), float32), alone or as
    Gumbel noise on the votes of the group's tokens: then a set of size n is drawn without replacement, an expert's
    chance being its share of the votes."""

    name: ClassVar[str] = "elastic"
    size_G: Tensor
    noise_GE: Tensor
    sets: ElasticSets

    def rule(self, spec: RouterSpec) -> SharingRule:
        """What `assign` does inside the coreset."""
        return self.sharing()

    def select(self, scores: RouterScores, spec: RouterSpec, previous: Coreset | None = None) -> Coreset:
        """The sets that were drawn."""
        key_GE = self.noise_GE
        if self.sets == "votes":
            votes_GE = tally(scores, ballots(scores, spec, spec.top_k, "ungrouped"))
            smallest = torch.finfo(torch.float32).tiny
            gumbel_GE = -(-key_GE.clamp_min(smallest).log()).clamp_min(smallest).log()
            key_GE = votes_GE.clamp_min(smallest).log() + gumbel_GE
        order_GE = top_k_ids(key_GE, spec.num_experts)
        taken_GE = torch.arange(spec.num_experts, device=key_GE.device) < self.size_G.unsqueeze(1)
        return Coreset(torch.empty_like(taken_GE).scatter_(1, order_GE, taken_GE))


def draw_coresets(batch: TrainingBatch, model: ModelConfig, config: RunConfig) -> Layerwise:
    """Sets for every group and MoE layer of a batch: `elastic_free` of them hold all experts, the others a number
    between `elastic` and all whose logarithm is uniform. They depend on the sample's seed and on nothing else."""
    assert config.elastic is not None
    experts, rows = model.router.num_experts, len(batch.seeds)
    parts = [batch.num_noisy, batch.inputs.live_BS.shape[1] // batch.inputs.block_length - batch.num_noisy]
    toss = torch.empty(model.num_moe_layers, rows, sum(parts), 2 + experts)
    for row, seed in enumerate(batch.seeds):
        for layer in range(model.num_moe_layers):
            # Noisy and clean blocks apart, one after the other: padding, which stands behind each part, shifts nothing.
            for part, blocks in enumerate(torch.split(toss[layer, row], parts)):
                generator = torch.Generator().manual_seed(Random(f"{seed}:{layer}:{part}").getrandbits(63))
                torch.rand(blocks.shape, generator=generator, out=blocks)
    least, most = math.log(config.elastic), math.log(experts)
    size = (least + (most - least) * toss[..., 0]).exp().round().long()
    toss, size = toss.to(batch.targets_BS.device), size.to(batch.targets_BS.device)
    size = torch.where(toss[..., 1] < config.elastic_free, experts, size).flatten(1)
    noise = toss[..., 2:].flatten(1, 2)
    drawn = zip(size, noise, strict=True)
    return Layerwise(layers=tuple(DrawnCoresets(size_G=s, noise_GE=n, sets=config.elastic_sets) for s, n in drawn))
