"""Per-layer budgets: give every layer the setting that loses least for what it costs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

from expertshare.evaluation.runner import ProgressListener
from expertshare.routing import Layerwise, RoutingPolicy, make_policy
from expertshare.tuning.replay import Replay

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
    replay: Replay,
    settings: Sequence[RoutingPolicy],
    on_progress: ProgressListener | None = None,
) -> Sensitivity:
    """Restrict one layer at a time, to each of `settings`."""
    num_layers = replay.loaded.config.num_moe_layers
    vanilla = make_policy("vanilla")
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
