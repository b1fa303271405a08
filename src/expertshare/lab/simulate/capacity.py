"""One replica under a recorded routing: time of a step, traffic, balance, memory. And from one replica to many: tokens
and requests per second, and GPUs for a request rate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from expertshare.convert.plan import tokens_per_s
from expertshare.convert.rates import Rates
from expertshare.convert.sizes import ModelSizes, cache_bytes
from expertshare.errors import ConfigError, InputError, nearest
from expertshare.lab.simulate.deployment import Cluster, Demand
from expertshare.lab.simulate.placement import BlockTrace, Ints, LayerSteps, Placement, draw_blocks, place, run_layer

GPU_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1_000, 2_000, 5_000, 10_000)
ACTIVATION_BYTES = 2
"""Of one feature that is sent or multiplied: bfloat16."""
LOGIT_BYTES = 6
"""Of one logit: bfloat16, and a float32 copy to choose tokens with."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """Bytes of the GPU that needs most. cache: keys and values of all its sequences at full length."""

    dense: int
    experts: int
    cache: int
    logits: int

    @property
    def total(self) -> int:
        """Bytes of all parts together."""
        return self.dense + self.experts + self.cache + self.logits


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """How uneven GPUs are: the most over the mean of a layer's GPUs; mean and 95th percentile over layers and steps."""

    mean: float
    p95: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Replica:
    """Means over simulated steps, for all layers together unless it says otherwise.

    dense_s, experts_s, exchange_s: parts of step_s. bandwidth_share: of experts_s, what layers spent at the limit of
    memory rather than of arithmetic. experts_per_gpu: that the busiest GPU reads in a layer. pairs, unique: how they
    spread over GPUs. exchange_bytes: over links and network, both ways, all GPUs; network_bytes: of them between nodes.
    ranks_per_token: GPUs, its own included, that compute for a token in a layer.
    """

    num_gpus: int
    dense_s: float
    experts_s: float
    exchange_s: float
    bandwidth_share: float
    experts_per_gpu: float
    pairs: Spread
    unique: Spread
    exchange_bytes: float
    network_bytes: float
    ranks_per_token: float
    memory: Memory
    fits: bool

    @property
    def step_s(self) -> float:
        """Of one forward of all sequences."""
        return self.dense_s + self.experts_s + self.exchange_s

    def to_json(self) -> dict[str, Any]:
        """Plain values, and the totals."""
        values = asdict(self)
        return {**values, "step_s": self.step_s, "memory": {**values["memory"], "total": self.memory.total}}


def part_seconds(num_bytes: float, num_macs: float, rates: Rates, overlap: float) -> float:
    """Time of something that reads and multiplies: the longer of both, and what of the other is not hidden."""
    reading, computing = num_bytes / rates.memory_bytes_per_s, num_macs / rates.macs_per_s
    return max(reading, computing) + (1.0 - overlap) * min(reading, computing)


def simulate_replica(
    sizes: ModelSizes,
    trace: BlockTrace,
    cluster: Cluster,
    demand: Demand,
    *,
    num_gpus: int,
    steps: int = 16,
    seed: int = 0,
) -> Replica:
    """`num_gpus` GPUs that hold the model once. Raises InputError for a record of another number of experts or a scheme
    that the model's widths do not allow."""
    spec = sizes.config.router
    if trace.num_experts != spec.num_experts:
        raise InputError(
            f"the routing record {trace.label} is of {trace.num_experts} experts, expected {spec.num_experts}: record "
            "this model, or one with as many experts"
        )
    if cluster.scheme not in sizes.slabs:
        raise ConfigError(f"unknown storage of experts {cluster.scheme!r}. {nearest(cluster.scheme, sizes.slabs)}")
    blocks = cluster.sequences * demand.blocks_at_work(sizes)
    draws = draw_blocks(trace.experts_NXLK.shape[1], num_ranks=num_gpus, per_rank=blocks, steps=steps, seed=seed)
    placed = [place(cluster.placement, load_E, num_gpus, cluster.copies) for load_E in trace.load_NE()]
    tokens = num_gpus * blocks * trace.experts_NXLK.shape[2]
    recorded = list(zip(trace.experts_NXLK, placed, strict=True))[: sizes.config.num_moe_layers]
    ran_N = [run_layer(experts, placement, draws) for experts, placement in recorded]
    means_N = [_layer(sizes, ran, cluster) for ran in ran_N]
    times_N = [len(range(n, sizes.config.num_moe_layers, len(placed))) for n in range(len(ran_N))]

    def total(name: str) -> float:
        return sum(means[name] * times for means, times in zip(means_N, times_N, strict=True))

    experts_s = total("experts_s")
    memory = _memory(sizes, placed, cluster, demand)
    return Replica(
        num_gpus=num_gpus,
        dense_s=_dense_seconds(sizes, cluster, demand),
        experts_s=experts_s,
        exchange_s=total("exchange_s"),
        bandwidth_share=total("bandwidth_s") / experts_s if experts_s else 0.0,
        experts_per_gpu=total("experts") / sizes.config.num_moe_layers,
        pairs=_spread([ran.pairs_PR for ran in ran_N]),
        unique=_spread([ran.unique_PR for ran in ran_N]),
        exchange_bytes=total("exchange_bytes"),
        network_bytes=total("network_bytes"),
        ranks_per_token=total("visits") / (tokens * sizes.config.num_moe_layers),
        memory=memory,
        fits=memory.total <= cluster.card.memory_bytes,
    )


def _layer(sizes: ModelSizes, ran: LayerSteps, cluster: Cluster) -> dict[str, float]:
    """Seconds, bytes and counts of one recorded layer, means over steps."""
    config, rates = sizes.config, cluster.card.rates(cluster.efficiency)
    width = config.hidden_size * ACTIVATION_BYTES
    arrived_PR = ran.tokens_PRR.sum(axis=1)
    bytes_PR = ran.unique_PR * sizes.slabs[cluster.scheme] + 2 * width * arrived_PR
    macs_PR = ran.pairs_PR * config.num_expert_parameters
    reading_PR, computing_PR = bytes_PR / rates.memory_bytes_per_s, macs_PR / rates.macs_per_s
    longer_PR = np.maximum(reading_PR, computing_PR)
    seconds_PR = longer_PR + (1.0 - cluster.overlap) * np.minimum(reading_PR, computing_PR)
    slowest_P = seconds_PR.argmax(axis=1)
    steps = np.arange(len(slowest_P))
    at_bandwidth_P = (reading_PR >= computing_PR)[steps, slowest_P]
    node_R = np.arange(ran.tokens_PRR.shape[1]) // cluster.card.gpus_per_node
    near_RR = np.equal.outer(node_R, node_R)
    far_PRR = ran.tokens_PRR * ~near_RR
    link_PRR = ran.tokens_PRR * (near_RR & ~np.eye(len(near_RR), dtype=np.bool_))
    exchange_P = np.maximum(
        _busiest_port(link_PRR) * width / cluster.card.link_bytes_per_s,
        _busiest_port(far_PRR) * width / cluster.card.network_bytes_per_s,
    )
    means_of = {
        "experts_s": seconds_PR.max(axis=1),
        "bandwidth_s": seconds_PR.max(axis=1) * at_bandwidth_P,
        "exchange_s": 2.0 * exchange_P,
        "exchange_bytes": 2.0 * width * (link_PRR + far_PRR).sum(axis=(1, 2)),
        "network_bytes": 2.0 * width * far_PRR.sum(axis=(1, 2)),
        "visits": ran.tokens_PRR.sum(axis=(1, 2)),
        "experts": ran.unique_PR.max(axis=1),
    }
    return {name: float(values_P.mean()) for name, values_P in means_of.items()}


def _dense_seconds(sizes: ModelSizes, cluster: Cluster, demand: Demand) -> float:
    """Everything but routed experts, on the sequences of one GPU."""
    config, rates = sizes.config, cluster.card.rates(cluster.efficiency)
    tokens = cluster.sequences * demand.blocks_at_work(sizes) * config.block_length
    context = demand.prompt_length + demand.gen_length
    if config.attention != "full":
        context = demand.prompt_length + demand.gen_length // 2 + config.block_length
    scores = 2 * context * config.num_heads * config.head_dim * config.num_layers
    cached = cache_bytes(sizes, positions=max(0, context - config.block_length), batch_size=cluster.sequences)
    num_bytes = sizes.dense_bytes - sizes.embedding_bytes + cached
    return part_seconds(num_bytes, tokens * (sizes.dense_parameters + scores), rates, cluster.overlap)


def _memory(sizes: ModelSizes, placed: Sequence[Placement], cluster: Cluster, demand: Demand) -> Memory:
    config, positions = sizes.config, demand.prompt_length + demand.gen_length
    slots = sum(placed[n % len(placed)].most_slots() for n in range(config.num_moe_layers))
    return Memory(
        dense=sizes.dense_bytes,
        experts=slots * sizes.slabs[cluster.scheme],
        cache=cache_bytes(sizes, positions=positions, batch_size=cluster.sequences),
        logits=cluster.sequences * config.block_length * config.vocab_size * LOGIT_BYTES,
    )


def _busiest_port(tokens_PRR: Ints) -> Ints:
    """Most tokens that one GPU sends, or receives, in each step."""
    sent_P, received_P = tokens_PRR.sum(axis=2).max(axis=1), tokens_PRR.sum(axis=1).max(axis=1)
    return np.asarray(np.maximum(sent_P, received_P), dtype=np.int64)


def _spread(counts_of_layers: Sequence[Ints]) -> Spread:
    """Counts [P, R] of every layer."""
    each = [counts_PR.max(axis=1) / np.maximum(counts_PR.mean(axis=1), 1e-12) for counts_PR in counts_of_layers]
    every = np.concatenate(each)
    return Spread(mean=float(every.mean()), p95=float(np.quantile(every, 0.95)))


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
        per_gpu = self.tokens_per_s / self.replica.num_gpus
        return {**asdict(self), "replica": self.replica.to_json(), "tokens_per_s_per_gpu": per_gpu}


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
        if expert_parallel in self._known:
            return self._known[expert_parallel]
        sizes, demand, config = self.sizes, self.demand, self.sizes.config
        replica = simulate_replica(
            sizes, self.trace, self.cluster, demand, num_gpus=expert_parallel, steps=self.steps, seed=self.seed
        )
        sequences = expert_parallel * self.cluster.sequences
        per_step = config.block_length / demand.steps_per_block
        requests = sequences / (demand.steps_per_request(sizes) * replica.step_s)
        wanted = demand.requests_per_s
        replicas = None if wanted is None else math.ceil(wanted / (requests * demand.load))
        found = Capacity(
            replica=replica,
            tokens_per_s=tokens_per_s(replica.step_s, config, batch_size=sequences, per_step=per_step),
            requests_per_s=requests,
            replicas=replicas,
            gpus=None if replicas is None else replicas * expert_parallel,
        )
        self._known[expert_parallel] = found
        return found

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
