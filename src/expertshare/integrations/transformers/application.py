"""`apply`: a policy on a loaded model of transformers, and the handle that takes it off again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import Any, Self
from weakref import WeakSet

from torch import nn

from expertshare.errors import ConfigError, PolicyError
from expertshare.integrations.transformers.calls import Call, block_length_of
from expertshare.integrations.transformers.experts import OBSERVERS
from expertshare.integrations.transformers.metrics import RoutingMetrics
from expertshare.integrations.transformers.sharing import RouterHook, SharedChoice, StackWatch
from expertshare.integrations.transformers.sites import RouterSite, find_sites
from expertshare.integrations.transformers.verification import verify
from expertshare.routing import RoutingPolicy, parse_policy, policy_at

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
    for site in _one_of_each_kind(sites):
        verify(site)
    previous_experts = _set_experts(model, sites, experts_implementation)
    return Handle(model, sites, policies, length, previous_experts)


def _one_of_each_kind(sites: Sequence[RouterSite]) -> list[RouterSite]:
    kinds = {(type(site.router), type(site.block), site.rule): site for site in reversed(sites)}
    return list(kinds.values())


class Handle:
    """A policy on a model. policies: bound, one for each MoE layer; block_length: None for whole sequences."""

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[RouterSite],
        policies: Sequence[RoutingPolicy],
        block_length: int | None,
        previous_experts: dict[str, str | None] | None,
    ) -> None:
        self.policies = tuple(policies)
        self.block_length = block_length
        self._model: Any = model
        self._sites = tuple(sites)
        self._listeners: list[RoutingMetrics] = []
        self._previous_experts = previous_experts
        stacks = {id(site.stack): site.stack for site in sites}
        watches = {key: StackWatch(stack, block_length) for key, stack in stacks.items()}
        self._removals: list[Any] = [watch.removal for watch in watches.values()]
        for index, (site, bound) in enumerate(zip(sites, policies, strict=True)):
            hook = RouterHook(index, site, bound, watches[id(site.stack)], self._record)
            self._removals += hook.removals
            _SHARED.add(site.router)

    def remove(self) -> None:
        """Give the model back as it was; again does no harm."""
        if not self._removals:
            return
        for removal in self._removals:
            removal.remove()
        self._removals.clear()
        for site in self._sites:
            _SHARED.discard(site.router)
        if self._previous_experts is not None:
            self._model.set_experts_implementation(self._previous_experts)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    @contextmanager
    def metrics(self) -> Iterator[RoutingMetrics]:
        """Count what the model asks of its experts inside the context."""
        metrics = RoutingMetrics(self._sites)
        observers = [partial(metrics.record_multiplied, index) for index in range(len(self._sites))]
        self._listeners.append(metrics)
        for site, observer in zip(self._sites, observers, strict=True):
            OBSERVERS.setdefault(site.experts, []).append(observer)
        try:
            yield metrics
        finally:
            self._listeners.remove(metrics)
            for site, observer in zip(self._sites, observers, strict=True):
                OBSERVERS[site.experts].remove(observer)

    def _record(self, index: int, call: Call, choice: SharedChoice) -> None:
        for metrics in self._listeners:
            metrics.record(index, call, choice)


def _set_experts(model: Any, sites: Sequence[RouterSite], implementation: str | None) -> dict[str, str | None] | None:
    """Returns what was set before, None where nothing is to be set."""
    if implementation is None:
        return None
    if not hasattr(model, "set_experts_implementation") or any(site.separate_experts for site in sites):
        raise ConfigError(
            f"expected a model with fused experts, whose implementation can be chosen, got {type(model).__name__}: "
            "leave experts_implementation out."
        )
    previous: dict[str, str | None] = model.get_experts_implementation()
    try:
        model.set_experts_implementation(implementation)
    except ValueError as error:
        raise ConfigError(f"experts_implementation: {error}") from error
    return previous
