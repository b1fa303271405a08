"""How far a policy's denoising decisions are from vanilla's, on vanilla's own trajectories: no generation needed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor

from expertshare.evaluation.runner import ProgressListener, own_policy
from expertshare.models import LoadedModel, Runtime
from expertshare.models.transformer import MoETransformer
from expertshare.routing import Layerwise, RoutingPolicy
from expertshare.tuning.trajectories import Pack, Trajectory, pack

# Tokens that are told apart in a divergence: vanilla's likeliest ones; all others count as one.
_TOP_TOKENS = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """A policy and what it does on the recorded steps.

    unique_experts: per block and layer, mean over steps; by_layer: the same. divergence: KL(vanilla || policy) in nats,
    mean over the decisions that vanilla took, over vanilla's 32 likeliest tokens and the rest as one (never more than
    the full divergence). flips: share of those decisions where the policy's most probable token is another one.
    """

    policy: RoutingPolicy
    unique_experts: float
    divergence: float
    flips: float
    by_layer: tuple[float, ...]


@dataclass(slots=True)
class Replay:
    """Vanilla's steps, ready to be run under any policy. Policies that were run are remembered."""

    loaded: LoadedModel
    runtime: Runtime
    packs: Sequence[Pack]
    _reference: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    _known: dict[RoutingPolicy, Point] = field(default_factory=dict)

    @classmethod
    def of(cls, loaded: LoadedModel, trajectories: Sequence[Trajectory], *, runtime: Runtime) -> Replay:
        """Pack the steps and run vanilla on them."""
        replay = cls(loaded, runtime, pack(trajectories, loaded.config))
        for item in replay.packs:
            log_share_CV, _ = replay._run(item, own_policy(loaded))
            top = log_share_CV.topk(min(_TOP_TOKENS, log_share_CV.shape[1]), dim=1)
            replay._reference.append((top.indices, top.values))
        return replay

    def measure(self, policy: RoutingPolicy) -> Point:
        """Run `policy`; PolicyError if the model cannot work with it."""
        bound = policy.bind(self.loaded.config.router)
        if bound not in self._known:
            self._known[bound] = self._measure(bound)
        return replace(self._known[bound], policy=policy)

    def _measure(self, policy: RoutingPolicy) -> Point:
        divergence, flips, decisions = 0.0, 0, 0
        unique_N = torch.zeros(self.loaded.config.num_moe_layers, dtype=torch.float64)
        groups = 0
        for item, (ids_CM, log_share_CM) in zip(self.packs, self._reference, strict=True):
            log_share_CV, experts_NG = self._run(item, policy)
            divergence += float(coarse_divergence(log_share_CM, log_share_CV.gather(1, ids_CM)).sum())
            flips += int((log_share_CV.argmax(dim=1) != ids_CM[:, 0]).sum())
            decisions += len(ids_CM)
            unique_N += experts_NG.sum(dim=1).double().cpu()
            groups += experts_NG.shape[1]
        by_layer = tuple((unique_N / groups).tolist())
        return Point(
            policy=policy,
            divergence=divergence / decisions,
            flips=flips / decisions,
            unique_experts=sum(by_layer) / len(by_layer),
            by_layer=by_layer,
        )

    @torch.no_grad()
    def _run(self, item: Pack, policy: RoutingPolicy) -> tuple[Tensor, Tensor]:
        """Log probabilities at scored positions [C, V], without the mask token; unique experts of counted groups."""
        model: MoETransformer = self.loaded.model
        output = model(item.inputs, replace(self.runtime, policy=policy))
        logits_CV = model.logits(output.hidden_BSD[item.scored_BS]).float()
        logits_CV[:, self.loaded.config.mask_id] = float("-inf")  # never proposed in decoding either
        return logits_CV.log_softmax(dim=1), output.routing.group_experts_NG[:, item.groups_G]


def coarse_divergence(reference_CM: Tensor, other_CM: Tensor) -> Tensor:
    """KL divergence [C] of two distributions known on M tokens (log probabilities), the others taken as one token."""
    least = torch.finfo(torch.float32).tiny
    p_CM, q_CM = reference_CM.exp(), other_CM.exp()
    rest_p, rest_q = ((1.0 - x.sum(dim=1)).clamp_min(least) for x in (p_CM, q_CM))
    known_C = torch.where(p_CM > 0, p_CM * (reference_CM - other_CM), 0.0).sum(dim=1)
    return (known_C + rest_p * (rest_p.log() - rest_q.log())).clamp_min(0.0)


Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerOption:
    """One setting in one layer, all other layers vanilla: the experts that the layer then uses per block, and the
    divergence of the model's decisions from vanilla's."""

    policy: RoutingPolicy
    unique_experts: float
    divergence: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Sensitivity:
    """options[n]: what was measured for MoE layer n; vanilla is among them."""

    options: tuple[tuple[LayerOption, ...], ...]

    def allocate(self, prices: Sequence[float]) -> RoutingPolicy:
        """In every layer the setting with the least divergence + price * experts; prices: one for each layer.

        At one price for all layers, and as far as divergences add up over layers, this is the best allocation of its
        total cost (Everett 1963): as the price rises, layers move down their lower convex hulls, the smallest loss per
        expert first. Prices that differ make up for divergences that do not add up.
        """
        chosen = [
            min(options, key=lambda option, price=price: option.divergence + price * option.unique_experts)  # type: ignore[misc]
            for options, price in zip(self.options, prices, strict=True)
        ]
        return Layerwise(layers=tuple(option.policy for option in chosen))

    @property
    def price_range(self) -> tuple[float, float]:
        """Prices between which allocations differ: from the flattest to the steepest step of any layer's hull."""
        steps = [step for layer in self.options for step in _hull_steps(layer) if step > 0]
        return (min(steps) / 2, max(steps) * 2) if steps else (1e-6, 1.0)


def measure_sensitivity(
    replay: Replay, settings: Sequence[RoutingPolicy], on_progress: ProgressListener | None = None
) -> Sensitivity:
    """Restrict one layer at a time, to each of `settings`."""
    num_layers = replay.loaded.config.num_moe_layers
    vanilla = own_policy(replay.loaded)
    base = replay.measure(vanilla)
    layers = [
        [LayerOption(policy=vanilla, unique_experts=base.by_layer[layer], divergence=0.0)]
        for layer in range(num_layers)
    ]
    tried = [(layer, setting) for layer in range(num_layers) for setting in settings]
    for layer, setting in counted(tried, "layers", on_progress):
        mixed = tuple(setting if n == layer else vanilla for n in range(num_layers))
        seen = replay.measure(Layerwise(layers=mixed))
        layers[layer].append(
            LayerOption(policy=setting, unique_experts=seen.by_layer[layer], divergence=seen.divergence)
        )
    return Sensitivity(options=tuple(tuple(options) for options in layers))


def counted(items: Sequence[Item], stage: str, on_progress: ProgressListener | None) -> Iterator[Item]:
    """The items, each of which on_progress(stage, done, total) hears of once it is dealt with."""
    for done, item in enumerate(items, 1):
        yield item
        if on_progress is not None:
            on_progress(stage, done, len(items))


def _hull_steps(options: Sequence[LayerOption]) -> list[float]:
    """Divergence per expert saved, from each corner of the lower convex hull to the next."""
    hull: list[tuple[float, float]] = []
    for point in sorted({(o.unique_experts, o.divergence) for o in options}):
        while len(hull) >= 2 and _slope(hull[-2], hull[-1]) >= _slope(hull[-2], point):
            hull.pop()
        if not hull or (point[0] > hull[-1][0] and point[1] < hull[-1][1]):
            hull.append(point)
    return [-_slope(a, b) for a, b in pairwise(hull)]


def _slope(a: tuple[float, float], b: tuple[float, float]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])
