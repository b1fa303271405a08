"""One replica under a recorded routing: time of a step, traffic, balance, memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from expertshare.convert.rates import Rates
from expertshare.convert.sizes import ModelSizes, cache_bytes
from expertshare.errors import ConfigError, InputError, nearest
from expertshare.lab.simulate.deployment import Cluster, Demand
from expertshare.lab.simulate.placement import BlockTrace, Ints, LayerSteps, Placement, draw_blocks, place, run_layer

Floats = NDArray[np.float64]
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
    load_NE = trace.load_NE()
    placed = [place(cluster.placement, load_E, num_gpus, cluster.copies) for load_E in load_NE]
    tokens = num_gpus * blocks * trace.experts_NXLK.shape[2]
    layers = [
        _layer(sizes, run_layer(experts, placement, draws), cluster)
        for experts, placement in zip(trace.experts_NXLK, placed, strict=True)
    ]
    times_N = [len(range(n, sizes.config.num_moe_layers, len(layers))) for n in range(len(layers))]
    kept = [(layer, times) for layer, times in zip(layers, times_N, strict=True) if times]

    def total(name: str) -> float:
        return sum(layer[name] * times for (layer, _, _), times in kept)

    experts_s = total("experts_s")
    memory = _memory(sizes, placed, cluster, demand)
    return Replica(
        num_gpus=num_gpus,
        dense_s=_dense_seconds(sizes, cluster, demand),
        experts_s=experts_s,
        exchange_s=total("exchange_s"),
        bandwidth_share=total("bandwidth_s") / experts_s if experts_s else 0.0,
        experts_per_gpu=total("experts") / sizes.config.num_moe_layers,
        pairs=_spread([pairs_P for (_, pairs_P, _), _ in kept]),
        unique=_spread([unique_P for (_, _, unique_P), _ in kept]),
        exchange_bytes=total("exchange_bytes"),
        network_bytes=total("network_bytes"),
        ranks_per_token=total("visits") / (tokens * sizes.config.num_moe_layers),
        memory=memory,
        fits=memory.total <= cluster.card.memory_bytes,
    )


def _layer(sizes: ModelSizes, ran: LayerSteps, cluster: Cluster) -> tuple[dict[str, float], Floats, Floats]:
    """Seconds, bytes and counts of one recorded layer, means over steps; [P] how uneven pairs and experts are."""
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
    means = {name: float(values_P.mean()) for name, values_P in means_of.items()}
    return means, _imbalance(ran.pairs_PR), _imbalance(ran.unique_PR)


def _dense_seconds(sizes: ModelSizes, cluster: Cluster, demand: Demand) -> float:
    """Everything but routed experts, on the sequences of one GPU."""
    config, rates = sizes.config, cluster.card.rates(cluster.efficiency)
    tokens = cluster.sequences * demand.blocks_at_work(sizes) * config.block_length
    context = demand.prompt_length + demand.gen_length
    if config.attention != "full":
        context = demand.prompt_length + demand.gen_length // 2 + config.block_length
    scores = 2 * context * config.num_heads * config.head_dim * config.num_layers
    cached = cache_bytes(sizes, positions=max(0, context - config.block_length), batch_size=cluster.sequences)
    return part_seconds(
        sizes.dense_bytes - sizes.embedding_bytes + cached,
        tokens * (sizes.dense_parameters + scores),
        rates,
        cluster.overlap,
    )


def _memory(sizes: ModelSizes, placed: Sequence[Placement], cluster: Cluster, demand: Demand) -> Memory:
    config, layers = sizes.config, sizes.config.num_moe_layers
    slots = sum(placed[n % len(placed)].most_slots() for n in range(layers))
    rows = cluster.sequences * config.block_length
    positions = demand.prompt_length + demand.gen_length
    return Memory(
        dense=sizes.dense_bytes,
        experts=slots * sizes.slabs[cluster.scheme],
        cache=cache_bytes(sizes, positions=positions, batch_size=cluster.sequences),
        logits=rows * config.vocab_size * LOGIT_BYTES,
    )


def _busiest_port(tokens_PRR: Ints) -> Ints:
    """Most tokens that one GPU sends, or receives, in each step."""
    sent_P, received_P = tokens_PRR.sum(axis=2).max(axis=1), tokens_PRR.sum(axis=1).max(axis=1)
    return np.asarray(np.maximum(sent_P, received_P), dtype=np.int64)


def _imbalance(counts_PR: Ints) -> Floats:
    return np.asarray(counts_PR.max(axis=1) / np.maximum(counts_PR.mean(axis=1), 1e-12), dtype=np.float64)


def _spread(each: Sequence[Floats]) -> Spread:
    every = np.concatenate(each)
    return Spread(mean=float(every.mean()), p95=float(np.quantile(every, 0.95)))
