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
from expertshare.measure.memory import anonymous_bytes
from expertshare.routing import RoutingPolicy, knobs

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
    origin: Origin
    how: str


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
        return {
            "store": self.store,
            "scheme": self.scheme,
            "expert_memory": self.expert_memory,
            "advice": list(self.advice),
            "figures": {name: asdict(figure) for name, figure in self.figures.items()},
        }


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
    figures: dict[str, Figure] = {"memory": Figure(memory_bytes, "bytes", "given", "--memory, or what is free")}
    figures["headroom"] = Figure(HEADROOM * memory_bytes, "bytes", "derived", f"{HEADROOM:.0%} of it, for activations")
    figures |= _base(sizes, workload, process_bytes)
    base = int(sum(figure.value for name, figure in figures.items() if name != "memory"))
    left = memory_bytes - base
    for scheme, slab in sizes.slabs.items():
        figures[f"expert ({scheme})"] = Figure(slab, "bytes", "derived", "weights of one expert, padded to pages")
        figures[f"all experts ({scheme})"] = Figure(
            slab * sizes.num_experts, "bytes", "derived", f"{sizes.num_experts} of them"
        )
    scheme = _scheme(sizes, left)
    slab, whole = sizes.slabs[scheme], sizes.slabs[scheme] * sizes.num_experts
    least = _least(config, policy, workload)
    figures["experts at once (vanilla)"] = _at_once(config, spec.top_k * config.block_length, workload)
    figures["experts at once (policy)"] = least
    if record is not None:
        figures["experts at once (record)"] = Figure(
            most_at_once(record), "experts", "measured", "most that a layer of a forward in the record used"
        )
    for name in ("vanilla", "policy", "record"):
        if (at_once := figures.get(f"experts at once ({name})")) is not None:
            figures[f"smallest budget ({name})"] = Figure(
                at_once.value * slab, "bytes", at_once.origin, f"those experts in {scheme}"
            )
    needed = int(least.value if record is None else figures["experts at once (record)"].value)
    store: StoreKind = "all" if left >= whole else "budget" if left >= needed * slab else "none"
    slots = sizes.num_experts if store == "all" else max(0, left) // slab
    figures["room for experts"] = Figure(max(0, left), "bytes", "derived", "memory less all the above but experts")
    if store != "none":
        figures |= _speed(sizes, policy, rates, workload, record, slab=slab, slots=slots, store=store)
    return Plan(
        store=store,
        scheme=scheme,
        expert_memory={"all": "all", "budget": str(slots * slab), "none": None}[store],
        advice=_advice(sizes, store, scheme, slots * slab, base + needed * slab),
        figures=figures,
    )


def _base(sizes: ModelSizes, workload: Workload, process_bytes: int | None) -> dict[str, Figure]:
    """What is needed beside experts."""
    config = sizes.config
    positions = workload.prompt_length + workload.gen_length
    rows = workload.batch_size * config.block_length
    process = anonymous_bytes() if process_bytes is None else process_bytes
    return {
        "process": Figure(process or 0, "bytes", "measured", "interpreter and libraries, without pages of files"),
        "dense weights": Figure(sizes.dense_bytes, "bytes", "derived", "everything but routed experts, as loaded"),
        "key-value cache": Figure(
            cache_bytes(sizes, positions=positions, batch_size=workload.batch_size),
            "bytes",
            "derived",
            f"{workload.batch_size} x {positions} positions, {config.num_layers} layers",
        ),
        "logits": Figure(
            rows * config.vocab_size * (sizes.float_bytes + 4 * LOGIT_COPIES),
            "bytes",
            "derived",
            f"{rows} rows of {config.vocab_size}, and {LOGIT_COPIES} copies in float32",
        ),
    }


def _scheme(sizes: ModelSizes, left: int) -> str:
    """As stored; where that is open, the first in which all experts fit, else the smallest."""
    if sizes.stored is not None:
        return sizes.stored
    fitting = (name for name, slab in sizes.slabs.items() if slab * sizes.num_experts <= left)
    return next(fitting, min(sizes.slabs, key=lambda name: sizes.slabs[name]))


def experts_per_block(policy: RoutingPolicy, spec: RouterSpec, block_length: int) -> int:
    """Most experts that one block can use under a bound policy: its coreset, or what its tokens can choose."""
    values = knobs(policy)
    budget, per_vote, per_token = (values.get(k) for k in ("budget", "experts_per_vote", "experts_per_token"))
    for each in (per_vote, per_token):
        if isinstance(each, int):
            return min(spec.num_experts, max(each * block_length, spec.top_k if each is per_vote else 1))
    most = int(budget) if isinstance(budget, int) else spec.top_k * block_length
    return min(spec.num_experts, most)


def _least(config: ModelConfig, policy: RoutingPolicy, workload: Workload) -> Figure:
    return _at_once(config, experts_per_block(policy, config.router, config.block_length), workload)


def _at_once(config: ModelConfig, per_block: int, workload: Workload) -> Figure:
    """Most experts that one forward can ask of a layer: every block of it brings others."""
    per_block = min(per_block, config.router.num_experts)
    prompt_blocks = workload.prompt_length // config.block_length
    if config.attention == "full":
        blocks = math.ceil((workload.prompt_length + workload.gen_length) / config.block_length)
    else:
        blocks = max(1, prompt_blocks)
    blocks *= workload.batch_size
    most = min(config.router.num_experts, blocks * per_block)
    how = f"{blocks} blocks in the largest forward, at most {per_block} experts each, of {config.router.num_experts}"
    return Figure(most, "experts", "derived", how)


def _speed(
    sizes: ModelSizes,
    policy: RoutingPolicy,
    rates: Rates,
    workload: Workload,
    record: RoutingRecord | None,
    *,
    slab: int,
    slots: int,
    store: StoreKind,
) -> dict[str, Figure]:
    """Hit rate and tokens per second, or their range where nothing is on record."""
    config = sizes.config
    used = _experts_used(config, policy, workload, record)
    found: dict[str, Figure] = {"experts per layer and forward": used}
    low, high, how = (1.0, 1.0, "all experts are in memory") if store == "all" else (0.0, 1.0, "nothing on record")
    if store == "budget" and record is not None:
        low = high = replay(record, slots).hit_rate
        how = f"the record replayed on {slots} slots, empty at first, nothing read ahead"
    if low == high:
        found["hit rate"] = Figure(low, "share", "derived", how)
    found["memory bandwidth"] = Figure(rates.memory_bytes_per_s, "bytes/s", "measured", "best pass over a large buffer")
    found["arithmetic"] = Figure(rates.macs_per_s, "MAC/s", "measured", "bfloat16 product of large matrices")
    if rates.storage_bytes_per_s is not None:
        how = "direct reads" if rates.storage_direct else "reads that the page cache may have served"
        found["storage"] = Figure(rates.storage_bytes_per_s, "bytes/s", "measured", f"{how} of this checkpoint's file")
    cases = {"": low} if low == high else {" (no hits)": low, " (all hits)": high}
    for label, rate in cases.items():
        seconds = seconds_per_forward(_step(sizes, workload, used.value, slab), rates, hit_rate=rate)
        if seconds is None:
            continue
        found[f"forward{label}"] = Figure(seconds, "s", "derived", "the formula of docs/memory.md")
        found[f"tokens per second{label}"] = Figure(
            tokens_per_s(seconds, config, batch_size=workload.batch_size, per_step=workload.tokens_per_step),
            "tokens/s",
            "derived",
            f"decoding, {workload.tokens_per_step:g} tokens a step",
        )
    return found


def _experts_used(
    config: ModelConfig, policy: RoutingPolicy, workload: Workload, record: RoutingRecord | None
) -> Figure:
    if record is not None:
        return Figure(mean_at_once(record), "experts", "measured", "mean of the record")
    spec = config.router
    each = experts_per_block(policy, spec, config.block_length)
    tokens = config.block_length * workload.batch_size
    if each >= min(spec.num_experts, spec.top_k * config.block_length):
        expected = spec.num_experts * (1.0 - (1.0 - spec.top_k / spec.num_experts) ** tokens)
        return Figure(expected, "experts", "derived", "tokens that choose independently; trained models use fewer")
    most = min(spec.num_experts, each * workload.batch_size)
    return Figure(most, "experts", "derived", "full coresets, without overlap between sequences")


def _step(sizes: ModelSizes, workload: Workload, used: float, slab: int) -> Step:
    config = sizes.config
    positions = config.block_length
    if config.attention == "full":
        positions = workload.prompt_length + workload.gen_length
    return Step(
        dense_bytes=sizes.dense_bytes - sizes.embedding_bytes,
        dense_parameters=sizes.dense_parameters,
        experts=used * config.num_moe_layers,
        slab_bytes=slab,
        pair_parameters=config.num_moe_layers * config.router.top_k * config.num_expert_parameters,
        positions=positions * workload.batch_size,
    )


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Replay:
    """hit_rate: share of requests that were in a slot already; by layer and of all. Slots are empty at the start."""

    hit_rate: float
    hit_rate_by_layer: tuple[float, ...]


def replay(record: RoutingRecord, num_slots: int) -> Replay:
    """Serve the record's requests from `num_slots` slots with the store's own eviction, without reading ahead.

    What is read ahead turns part of the misses into shorter waits, so a real store does not do worse. Raises
    ExpertMemoryError where a layer's experts exceed the slots.
    """
    layers = simulate(
        _visits(record), num_slots=num_slots, num_layers=record.num_layers, num_experts=record.num_experts
    )
    requests = sum(layer.requests for layer in layers)
    return Replay(
        hit_rate=sum(layer.hits or 0 for layer in layers) / max(1, requests),
        hit_rate_by_layer=tuple(layer.hit_rate or 0.0 for layer in layers),
    )


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
