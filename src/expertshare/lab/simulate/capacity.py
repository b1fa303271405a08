"""From one replica to many: tokens and requests per second, and GPUs for a request rate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from expertshare.convert.plan import tokens_per_s
from expertshare.convert.sizes import ModelSizes
from expertshare.errors import InputError
from expertshare.lab.simulate.deployment import Cluster, Demand
from expertshare.lab.simulate.placement import BlockTrace
from expertshare.lab.simulate.replica import Replica, simulate_replica

GPU_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1_000, 2_000, 5_000, 10_000)


@dataclass(frozen=True, kw_only=True, slots=True)
class Capacity:
    """What one replica delivers, by itself. tokens_per_s: answers, while decoding. requests_per_s: with their prompts.
    replicas, gpus: for the demand's rate at its load; None without a rate."""

    replica: Replica
    tokens_per_s: float
    requests_per_s: float
    replicas: int | None
    gpus: int | None

    def to_json(self) -> dict[str, Any]:
        """Plain values, and tokens per second by GPU."""
        return {
            "replica": self.replica.to_json(),
            "tokens_per_s": self.tokens_per_s,
            "tokens_per_s_per_gpu": self.tokens_per_s / self.replica.num_gpus,
            "requests_per_s": self.requests_per_s,
            "replicas": self.replicas,
            "gpus": self.gpus,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepPoint:
    """The best that `gpus` GPUs can do: replicas of `expert_parallel` GPUs each; None and 0 where nothing fits."""

    gpus: int
    expert_parallel: int | None
    replicas: int
    tokens_per_s: float
    requests_per_s: float


@dataclass(frozen=True, slots=True)
class Simulation:
    """One model on one kind of cluster under one record. Degrees that were simulated are remembered."""

    sizes: ModelSizes
    trace: BlockTrace
    cluster: Cluster
    demand: Demand
    steps: int = 16
    seed: int = 0
    _known: dict[int, Capacity] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise InputError(f"steps to simulate must be at least 1, got {self.steps}")

    def capacity(self, expert_parallel: int) -> Capacity:
        """Of a replica of that many GPUs."""
        if expert_parallel not in self._known:
            self._known[expert_parallel] = self._simulate(expert_parallel)
        return self._known[expert_parallel]

    def degrees(self, most: int) -> list[int]:
        """Powers of two up to `most` GPUs and the experts of a layer."""
        limit = min(most, self.sizes.config.router.num_experts)
        return [2**power for power in range(limit.bit_length()) if 2**power <= limit]

    def best(self, gpus: int, degrees: Sequence[int] | None = None) -> SweepPoint:
        """What `gpus` GPUs deliver at the degree that fits and delivers most; GPUs that are left over are idle."""
        possible = [degree for degree in (self.degrees(gpus) if degrees is None else degrees) if degree <= gpus]
        fitting = [(gpus // degree, found) for degree in possible if (found := self.capacity(degree)).replica.fits]
        if not fitting:
            return SweepPoint(gpus=gpus, expert_parallel=None, replicas=0, tokens_per_s=0.0, requests_per_s=0.0)
        replicas, best = max(fitting, key=lambda each: each[0] * each[1].tokens_per_s)
        return SweepPoint(
            gpus=gpus,
            expert_parallel=best.replica.num_gpus,
            replicas=replicas,
            tokens_per_s=replicas * best.tokens_per_s,
            requests_per_s=replicas * best.requests_per_s,
        )

    def _simulate(self, degree: int) -> Capacity:
        sizes, demand, config = self.sizes, self.demand, self.sizes.config
        replica = simulate_replica(
            sizes, self.trace, self.cluster, demand, num_gpus=degree, steps=self.steps, seed=self.seed
        )
        sequences = degree * self.cluster.sequences
        per_step = config.block_length / demand.steps_per_block
        requests = sequences / (demand.steps_per_request(sizes) * replica.step_s)
        wanted = demand.requests_per_s
        replicas = None if wanted is None else math.ceil(wanted / (requests * demand.load))
        return Capacity(
            replica=replica,
            tokens_per_s=tokens_per_s(replica.step_s, config, batch_size=sequences, per_step=per_step),
            requests_per_s=requests,
            replicas=replicas,
            gpus=None if replicas is None else replicas * degree,
        )
