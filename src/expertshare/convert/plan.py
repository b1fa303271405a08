"""`expertshare plan`: what fits, where experts should be kept and how fast that may be, before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from expertshare.config import ModelConfig, RouterSpec
from expertshare.convert.rates import Rates
from expertshare.convert.sizes import ModelSizes, cache_bytes
from expertshare.errors import InputError
from expertshare.experts.recording import RoutingRecord
from expertshare.experts.slab import format_size
from expertshare.experts.slots import Bools, simulate
from expertshare.experts.store import StoreStatistics
from expertshare.measure.memory import anonymous_bytes
from expertshare.routing import Layerwise, RoutingPolicy, runs_on_torch

Origin = Literal["given", "measured", "derived"]
StoreKind = Literal["all", "budget", "none"]
HEADROOM = 0.05
LOGIT_COPIES = 3
"""float32 copies of a block's logits that choosing tokens makes, beside those of the model."""


@dataclass(frozen=True, slots=True)
class Figure:
    """One number. unit: bytes, experts, share, bytes/s, MAC/s, s or tokens/s; how: where it comes from, in words."""

    value: float
    unit: str
    how: str
    origin: Origin = "derived"


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """What is to be generated. tokens_per_step: committed by a denoising step, at least 1; more where a trained model
    is confident."""

    prompt_length: int = 256
    gen_length: int = 256
    batch_size: int = 1
    tokens_per_step: float = 1.0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not value >= 1:  # nor is nan
                raise InputError(f"{name.replace('_', ' ')} must be at least 1, got {value}")

    @property
    def positions(self) -> int:
        """Of one sequence, when all of it is generated."""
        return self.prompt_length + self.gen_length


@dataclass(frozen=True, slots=True)
class Plan:
    """store: "all" experts in memory, a "budget", or "none" where nothing fits; scheme: how they are stored then;
    expert_memory: what to give to `generate --expert-memory`. advice: what to do, in sentences. figures: by name."""

    store: StoreKind
    scheme: str
    expert_memory: str | None
    advice: tuple[str, ...]
    figures: Mapping[str, Figure]

    def to_json(self) -> dict[str, Any]:
        """Plain values by the names of the fields."""
        return {**asdict(self), "advice": list(self.advice)}


def make_plan(
    sizes: ModelSizes,
    memory_bytes: int,
    policy: RoutingPolicy,
    rates: Rates,
    *,
    workload: Workload | None = None,
    record: RoutingRecord | None = None,
    process_bytes: int | None = None,
) -> Plan:
    """What `memory_bytes` is enough for. policy: bound to the model's router. record: of a generation under it.

    process_bytes: memory of interpreter and libraries, by default this process's own. Raises InputError for a record
    of another model.
    """
    workload = workload or Workload()
    config, spec = sizes.config, sizes.config.router
    if record is not None and (record.num_layers, record.num_experts) != (config.num_moe_layers, spec.num_experts):
        raise InputError(
            f"the routing record has {record.num_layers} layers of {record.num_experts} experts, expected "
            f"{config.num_moe_layers} of {spec.num_experts}: record this model"
        )
    used_by_process = anonymous_bytes() if process_bytes is None else process_bytes
    beside_experts = {
        "headroom": Figure(HEADROOM * memory_bytes, "bytes", f"{HEADROOM:.0%} of it, for activations"),
        "process": Figure(
            used_by_process or 0, "bytes", "interpreter and libraries, without pages of files", "measured"
        ),
        **_model_memory(sizes, workload),
    }
    base = int(sum(figure.value for figure in beside_experts.values()))
    left = memory_bytes - base
    figures = {"memory": Figure(memory_bytes, "bytes", "--memory, or what is free", "given"), **beside_experts}
    for scheme, slab in sizes.slabs.items():
        figures[f"expert ({scheme})"] = Figure(slab, "bytes", "weights of one expert, padded to pages")
        figures[f"all experts ({scheme})"] = Figure(slab * sizes.num_experts, "bytes", f"{sizes.num_experts} of them")
    scheme = _scheme(sizes, left)
    slab, whole = sizes.slabs[scheme], sizes.slabs[scheme] * sizes.num_experts
    per_block = experts_per_block(policy, spec, config.block_length)
    at_once = {
        "vanilla": _at_once(config, spec.top_k * config.block_length, workload),
        "policy": _at_once(config, per_block, workload),
    }
    if record is not None:
        how = "most that a layer of a forward in the record used"
        at_once["record"] = Figure(most_at_once(record), "experts", how, "measured")
    figures |= {f"experts at once ({name})": figure for name, figure in at_once.items()}
    for name, figure in at_once.items():
        smallest = Figure(figure.value * slab, "bytes", f"those experts in {scheme}", figure.origin)
        figures[f"smallest budget ({name})"] = smallest
    needed = int(at_once["policy" if record is None else "record"].value)
    store: StoreKind = "all" if left >= whole else "budget" if left >= needed * slab else "none"
    slots = sizes.num_experts if store == "all" else max(0, left) // slab
    figures["room for experts"] = Figure(max(0, left), "bytes", "memory less all the above but experts")
    if store != "none":
        used = _experts_used(config, per_block, workload, record)
        figures["experts per layer and forward"] = used
        hit_rates, how = _hit_rates(store, record, slots)
        if "" in hit_rates:
            figures["hit rate"] = Figure(hit_rates[""], "share", how)
        figures |= _speed(_step(sizes, workload, used.value, slab), config, rates, workload, hit_rates)
    return Plan(
        store=store,
        scheme=scheme,
        expert_memory={"all": "all", "budget": str(slots * slab), "none": None}[store],
        advice=_advice(sizes, store, scheme, slots * slab, base + needed * slab),
        figures=figures,
    )


def _model_memory(sizes: ModelSizes, workload: Workload) -> dict[str, Figure]:
    """What a model needs beside its experts."""
    config, rows = sizes.config, workload.batch_size * sizes.config.block_length
    cache = cache_bytes(sizes, positions=workload.positions, batch_size=workload.batch_size)
    sequences = f"{workload.batch_size} x {workload.positions} positions, {config.num_layers} layers"
    logits = rows * config.vocab_size * (sizes.float_bytes + 4 * LOGIT_COPIES)
    copies = f"{rows} rows of {config.vocab_size}, and {LOGIT_COPIES} copies in float32"
    return {
        "dense weights": Figure(sizes.dense_bytes, "bytes", "everything but routed experts, as loaded"),
        "key-value cache": Figure(cache, "bytes", sequences),
        "logits": Figure(logits, "bytes", copies),
    }


def _scheme(sizes: ModelSizes, left: int) -> str:
    """As stored; where that is open, the first in which all experts fit, else the smallest."""
    if sizes.stored is not None:
        return sizes.stored
    fitting = (name for name, slab in sizes.slabs.items() if slab * sizes.num_experts <= left)
    return next(fitting, min(sizes.slabs, key=lambda name: sizes.slabs[name]))


def experts_per_block(policy: RoutingPolicy, spec: RouterSpec, block_length: int) -> int:
    """Most experts that one block can use in a layer under a bound policy, as far as its rule says: those that its
    tokens can choose, inside the coreset."""
    if isinstance(policy, Layerwise):
        return max(experts_per_block(layer, spec, block_length) for layer in policy.layers)
    chosen = spec.top_k * block_length
    if not runs_on_torch(policy):  # else no rule expresses it
        rule = policy.rule(spec)
        coreset = chosen if rule.ranking == "all" or rule.prefix_share is not None else rule.size
        if rule.keep_protected:
            coreset = max(coreset, rule.protected * block_length)
        chosen = min(coreset, (rule.experts_per_token or spec.top_k) * block_length)
    return min(spec.num_experts, chosen)


def _at_once(config: ModelConfig, per_block: int, workload: Workload) -> Figure:
    """Most experts that one forward can ask of a layer: every block of it brings others."""
    num_experts = config.router.num_experts
    per_block = min(per_block, num_experts)
    if config.attention == "full":
        blocks = math.ceil(workload.positions / config.block_length)
    else:
        blocks = max(1, workload.prompt_length // config.block_length)
    blocks *= workload.batch_size
    how = f"{blocks} blocks in the largest forward, at most {per_block} experts each, of {num_experts}"
    return Figure(min(num_experts, blocks * per_block), "experts", how)


def _experts_used(config: ModelConfig, per_block: int, workload: Workload, record: RoutingRecord | None) -> Figure:
    """Of a layer by a decoding step."""
    if record is not None:
        return Figure(mean_at_once(record), "experts", "mean of the record", "measured")
    spec, tokens = config.router, config.block_length * workload.batch_size
    if per_block >= min(spec.num_experts, spec.top_k * config.block_length):
        expected = spec.num_experts * (1.0 - (1.0 - spec.top_k / spec.num_experts) ** tokens)
        return Figure(expected, "experts", "tokens that choose independently; trained models use fewer")
    most = min(spec.num_experts, per_block * workload.batch_size)
    return Figure(most, "experts", "full coresets, without overlap between sequences")


def _hit_rates(store: StoreKind, record: RoutingRecord | None, slots: int) -> tuple[dict[str, float], str]:
    """The hit rate under an empty label, and how it is known; where it is not, the range that it lies in."""
    if store == "all":
        return {"": 1.0}, "all experts are in memory"
    if record is None:
        return {" (no hits)": 0.0, " (all hits)": 1.0}, "nothing on record"
    how = f"the record replayed on {slots} slots, empty at first, nothing read ahead"
    return {"": replay(record, slots).total.hit_rate or 0.0}, how


def _speed(
    step: Step, config: ModelConfig, rates: Rates, workload: Workload, hit_rates: Mapping[str, float]
) -> dict[str, Figure]:
    """Rates of the machine, and seconds and tokens per second at each hit rate, by the label that it has."""
    found = {
        "memory bandwidth": Figure(rates.memory_bytes_per_s, "bytes/s", "best pass over a large buffer", "measured"),
        "arithmetic": Figure(rates.macs_per_s, "MAC/s", "bfloat16 product of large matrices", "measured"),
    }
    if rates.storage_bytes_per_s is not None:
        how = "direct reads" if rates.storage_direct else "reads that the page cache may have served"
        found["storage"] = Figure(rates.storage_bytes_per_s, "bytes/s", f"{how} of this checkpoint's file", "measured")
    for label, hit_rate in hit_rates.items():
        seconds = seconds_per_forward(step, rates, hit_rate=hit_rate)
        if seconds is not None:
            speed = tokens_per_s(seconds, config, batch_size=workload.batch_size, per_step=workload.tokens_per_step)
            found[f"forward{label}"] = Figure(seconds, "s", "the formula of docs/memory.md")
            how = f"decoding, {workload.tokens_per_step:g} tokens a step"
            found[f"tokens per second{label}"] = Figure(speed, "tokens/s", how)
    return found


def _advice(sizes: ModelSizes, store: StoreKind, scheme: str, budget: int, least: int) -> tuple[str, ...]:
    if store == "none":
        return (
            f"It does not fit. The least that works is {format_size(least)} in all, with experts in {scheme}.",
            "Give a policy a smaller coreset, decode shorter prompts or fewer together, or use a smaller model.",
        )
    sentences = []
    if sizes.path is None:
        sentences.append(f"Nothing is on disk: store experts in {scheme}.")
    elif sizes.stored is None and (store == "budget" or scheme != "none"):
        sentences.append(f"Convert it first: expertshare convert {sizes.path} OUT --quantise {scheme}")
    if store == "all":
        return (*sentences, "All experts fit into memory.")
    share = budget / (sizes.slabs[scheme] * sizes.num_experts)
    return (*sentences, f"Give experts --expert-memory {budget} (bytes), {100 * share:.0f} % of all of them.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One forward. dense_bytes and dense_parameters: without the input embedding. experts: used, of all layers.
    pair_parameters: of the experts that one position runs, over all layers. positions: computed, of all sequences."""

    dense_bytes: int
    dense_parameters: int
    experts: float
    slab_bytes: int
    pair_parameters: int
    positions: int


def _step(sizes: ModelSizes, workload: Workload, used: float, slab: int) -> Step:
    config = sizes.config
    return Step(
        dense_bytes=sizes.dense_bytes - sizes.embedding_bytes,
        dense_parameters=sizes.dense_parameters,
        experts=used * config.num_moe_layers,
        slab_bytes=slab,
        pair_parameters=config.num_moe_layers * config.router.top_k * config.num_expert_parameters,
        positions=workload.batch_size * (workload.positions if config.attention == "full" else config.block_length),
    )


def seconds_per_forward(step: Step, rates: Rates, *, hit_rate: float) -> float | None:
    """The larger of reading all weights from memory and computing, and then the reads of what was not there.

    None where experts have to be read and nobody knows how fast.
    """
    reading = (step.dense_bytes + step.experts * step.slab_bytes) / rates.memory_bytes_per_s
    computing = step.positions * (step.dense_parameters + step.pair_parameters) / rates.macs_per_s
    missing = step.experts * (1.0 - hit_rate) * step.slab_bytes
    if missing == 0:
        return max(reading, computing)
    if rates.storage_bytes_per_s is None:
        return None
    return max(reading, computing) + missing / rates.storage_bytes_per_s


def tokens_per_s(seconds: float, config: ModelConfig, *, batch_size: int, per_step: float) -> float:
    """Of decoding: a block takes block_length / per_step denoising forwards and, with a cache, one to commit."""
    steps = config.block_length / per_step
    forwards = steps if config.attention == "full" else steps + 1
    return batch_size * config.block_length / (forwards * seconds)


def replay(record: RoutingRecord, num_slots: int) -> StoreStatistics:
    """What serving the record's requests from `num_slots` slots, empty at the start, would count: with the store's own
    eviction, without reading ahead.

    What is read ahead turns part of the misses into shorter waits, so a real store does not do worse. Raises
    ExpertMemoryError where a layer's experts exceed the slots.
    """
    layers = simulate(
        _visits(record), num_slots=num_slots, num_layers=record.num_layers, num_experts=record.num_experts
    )
    return StoreStatistics(kind="budget", slots=num_slots, slot_bytes=0, layers=tuple(layers))


def _visits(record: RoutingRecord) -> Iterator[tuple[int, Bools]]:
    """Layers with their active experts, in the order in which they ran."""
    for layers in record.forwards:
        for layer, ids in enumerate(layers):
            member_E = np.zeros(record.num_experts, dtype=np.bool_)
            member_E[list(ids)] = True
            yield layer, member_E


def most_at_once(record: RoutingRecord) -> int:
    """Most experts that any layer of any forward used."""
    return max(len(ids) for layers in record.forwards for ids in layers)


def mean_at_once(record: RoutingRecord) -> float:
    """Experts of a layer, mean over layers and forwards."""
    counts = [len(ids) for layers in record.forwards for ids in layers]
    return sum(counts) / len(counts)
