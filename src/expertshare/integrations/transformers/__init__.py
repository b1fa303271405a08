"""Expert sharing in models of transformers: `apply` puts a policy on a loaded model, and its handle takes it off again.

Importing this registers the experts implementation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from expertshare.errors import ConfigError, PolicyError
from expertshare.integrations.transformers.calls import Call, block_length_of
from expertshare.integrations.transformers.experts import NAME, OBSERVERS, register_experts
from expertshare.integrations.transformers.sharing import Recorder, RouterHook, SharedChoice, StackWatch, verify
from expertshare.integrations.transformers.sites import RouterSite, find_sites
from expertshare.routing import RoutingPolicy, count_load, parse_policy, policy_at
from expertshare.types import RoutingPlan

__all__ = ["NAME", "Handle", "LayerUse", "RoutingMetrics", "apply", "register_experts"]

register_experts()

_SHARED: WeakSet[nn.Module] = WeakSet()
"""Routers that a policy is on: a second one would choose inside the first one's choice."""


def apply(
    model: nn.Module,
    policy: RoutingPolicy | str,
    *,
    block_length: int | None = None,
    experts_implementation: str | None = None,
) -> Handle:
    """Let every MoE layer of `model` route under `policy`, until the handle is removed (it is a context manager, too).

    policy: an object, or words such as "des-vote:budget=16". block_length: positions that share a coreset, counted from
    the first position of a call; without it what the config says (canvas_length, block_length, block_size), the
    default of the LLaDA2, LLaDA-MoE and SDAR families, else all positions of a sequence in a call (autoregressive
    models). experts_implementation: set while the policy is on, for example "expertshare", our CPU kernel.
    Raises ConfigError for a model that is not supported or has a policy already, PolicyError for a policy that does not
    fit the model.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"expected a loaded model of transformers, got {type(model).__name__}.")
    sites = find_sites(model)
    if any(site.router in _SHARED for site in sites):
        raise ConfigError(
            f"expected {type(model).__name__} without a policy, got one that has a policy already: call remove() on "
            "the handle of the first apply()."
        )
    length = block_length_of(model, block_length)
    chosen = parse_policy(policy) if isinstance(policy, str) else policy
    if chosen.needs_steps:
        raise PolicyError(
            "expected a policy without voters=masked and reuse, because a model of transformers does not say which "
            f"tokens are masked nor which step of a block it is in, got {chosen!r}: leave these knobs out."
        )
    policies = [policy_at(chosen, site.layer, site.num_layers).bind(site.rule.spec) for site in sites]
    one_of_each_kind = {(type(site.router), type(site.block), site.rule): site for site in reversed(sites)}
    for site in one_of_each_kind.values():
        verify(site)
    with ExitStack() as undo:
        _set_experts(model, sites, experts_implementation, undo)
        return Handle(sites, policies, length, undo.pop_all())


class Handle(AbstractContextManager["Handle"]):
    """A policy on a model. policies: bound, one for each MoE layer; block_length: None for whole sequences."""

    def __init__(
        self, sites: Sequence[RouterSite], policies: Sequence[RoutingPolicy], block_length: int | None, undo: ExitStack
    ) -> None:
        """undo: what `remove` does beside taking the policy off."""
        self.policies, self.block_length = tuple(policies), block_length
        self._sites, self._undo = tuple(sites), undo
        self._recorders: list[Recorder] = []
        stacks = {id(site.stack): site.stack for site in sites}
        watches = {key: StackWatch(stack, block_length) for key, stack in stacks.items()}
        removals = [watch.removal for watch in watches.values()]
        for index, (site, bound) in enumerate(zip(sites, policies, strict=True)):
            removals += RouterHook(index, site, bound, watches[id(site.stack)], self._recorders).removals
            _SHARED.add(site.router)
            undo.callback(_SHARED.discard, site.router)
        for removal in removals:
            undo.callback(removal.remove)

    def remove(self) -> None:
        """Give the model back as it was; again does no harm."""
        self._undo.close()

    def __exit__(self, *_: object) -> None:
        self.remove()

    @contextmanager
    def metrics(self) -> Iterator[RoutingMetrics]:
        """Count what the model asks of its experts inside the context."""
        metrics = RoutingMetrics(self._sites)
        observers = [partial(metrics.record_multiplied, index) for index in range(len(self._sites))]
        self._recorders.append(metrics.record)
        for site, observer in zip(self._sites, observers, strict=True):
            OBSERVERS.setdefault(site.experts, []).append(observer)
        try:
            yield metrics
        finally:
            self._recorders.remove(metrics.record)
            for site, observer in zip(self._sites, observers, strict=True):
                OBSERVERS[site.experts].remove(observer)


def _set_experts(model: Any, sites: Sequence[RouterSite], implementation: str | None, undo: ExitStack) -> None:
    """undo: is told how to set back what was there before."""
    if implementation is None:
        return
    if not hasattr(model, "set_experts_implementation") or any(site.separate_experts for site in sites):
        raise ConfigError(
            f"expected a model with fused experts, whose implementation can be chosen, got {type(model).__name__}: "
            "leave experts_implementation out."
        )
    previous = model.get_experts_implementation()
    try:
        model.set_experts_implementation(implementation)
    except ValueError as error:
        raise ConfigError(f"experts_implementation: {error}") from error
    undo.callback(model.set_experts_implementation, previous)


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerUse:
    """One MoE layer's share.

    name: of its router. forwards: calls. unique_experts: of one block, mean over forwards and blocks with a live token.
    union_experts: of the whole batch, mean over forwards. pairs: (token, expert) pairs. expert_bytes: of the union's
    weights, summed over forwards. multiplied: experts that the implementation "expertshare" multiplied, summed over
    forwards; None where another one computed.
    """

    name: str
    forwards: int
    unique_experts: float
    union_experts: float
    pairs: int
    expert_bytes: int
    multiplied: int | None


class RoutingMetrics:
    """Counts between entering and leaving `Handle.metrics()`; can be read inside it, too."""

    def __init__(self, sites: Sequence[RouterSite]) -> None:
        self._sites = tuple(sites)
        self._counts: list[list[Tensor]] = [[] for _ in sites]
        self._multiplied: list[list[Tensor]] = [[] for _ in sites]

    def record(self, index: int, call: Call, choice: SharedChoice) -> None:
        """One forward of the layer at `index`."""
        grouped_PK = call.grouped(choice.run_TK + 1, fill=0).flatten(0, 1) - 1
        live_G = call.live_groups().any(dim=-1)
        load_E, unique_G = count_load(RoutingPlan(grouped_PK, grouped_PK, choice.active_E), len(live_G))
        counts = ((unique_G * live_G).sum(), live_G.sum(), (load_E > 0).sum(), load_E.sum())
        self._counts[index].append(torch.stack(counts))

    def record_multiplied(self, index: int, active_E: Tensor) -> None:
        """What the experts implementation really ran in one forward of the layer at `index`."""
        self._multiplied[index].append(active_E.sum())

    @property
    def by_layer(self) -> tuple[LayerUse, ...]:
        """In the order of the model's modules."""
        return tuple(self._layer(index) for index in range(len(self._sites)))

    @property
    def forwards(self) -> int:
        """Calls of a stack of layers: most often one per forward of the model (two in DiffusionGemma's)."""
        return sum(len(self._counts[i]) for i, site in enumerate(self._sites) if site.layer == 0)

    @property
    def unique_experts(self) -> float:
        """Experts that one block uses in one MoE layer: mean over forwards, layers and blocks."""
        return self._mean(lambda use: use.unique_experts)

    @property
    def union_experts(self) -> float:
        """Experts that the whole batch uses in one MoE layer: mean over forwards and layers."""
        return self._mean(lambda use: use.union_experts)

    @property
    def pairs(self) -> int:
        """(token, expert) pairs, summed over forwards and layers."""
        return sum(use.pairs for use in self.by_layer)

    @property
    def expert_bytes(self) -> int:
        """Bytes of the experts of the union, summed over forwards and layers."""
        return sum(use.expert_bytes for use in self.by_layer)

    @property
    def multiplied(self) -> int | None:
        """Experts that the implementation "expertshare" multiplied, summed likewise; None where another computed."""
        layers = [use.multiplied for use in self.by_layer if use.multiplied is not None]
        return sum(layers) if layers else None

    def _mean(self, of: Callable[[LayerUse], float]) -> float:
        layers = self.by_layer
        return sum(of(use) * use.forwards for use in layers) / max(1, sum(use.forwards for use in layers))

    def _layer(self, index: int) -> LayerUse:
        site, rows = self._sites[index], self._counts[index]
        unique, groups, union, pairs = torch.stack(rows).sum(dim=0).tolist() if rows else (0, 0, 0, 0)
        multiplied = self._multiplied[index]
        return LayerUse(
            name=site.name,
            forwards=len(rows),
            unique_experts=unique / max(1, groups),
            union_experts=union / max(1, len(rows)),
            pairs=pairs,
            expert_bytes=union * site.bytes_per_expert,
            multiplied=int(torch.stack(multiplied).sum()) if multiplied else None,
        )
