"""Where a model routes: every router, the block that calls it, its experts, and the stack of layers around them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from expertshare.errors import ConfigError
from expertshare.integrations.transformers.routers import SUPPORTED, RouterRule, rule_of

ROUTER_NAMES = ("gate", "router")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RouterSite:
    """One MoE layer of a model.

    name: of the router, as in named_modules. block: calls router and experts. stack: the module that owns the list of
    layers; its calls say how tokens lie in sequences. layer: 0-based among the `num_layers` MoE layers of its stack.
    """

    name: str
    router: nn.Module
    block: nn.Module
    experts: nn.Module
    stack: nn.Module
    layer: int
    num_layers: int
    rule: RouterRule

    @property
    def separate_experts(self) -> bool:
        """Experts are modules of their own (remote code), instead of fused tensors."""
        return isinstance(self.experts, nn.ModuleList)

    @property
    def bytes_per_expert(self) -> int:
        """Weights of one expert."""
        if isinstance(self.experts, nn.ModuleList):
            return sum(p.numel() * p.element_size() for p in self.experts[0].parameters())
        fused = [p for p in self.experts.parameters() if len(p) == self.rule.spec.num_experts]
        return sum(p[0].numel() * p.element_size() for p in fused)


def find_sites(model: nn.Module) -> tuple[RouterSite, ...]:
    """Every router of the model, in order; ConfigError names what was found where that cannot be served."""
    found = list(_candidates(model))
    unknown = sorted({type(router).__name__ for _, _, router, rule in found if rule is None})
    if not found or unknown:
        routers = f"routers of class {', '.join(unknown)}" if unknown else "no router beside an `experts` module"
        raise ConfigError(f"expected one of: {SUPPORTED}; got {type(model).__name__} with {routers}.")
    stacks = [_stack(model, name) for name, *_ in found]
    seen: dict[int, int] = {}
    sites = []
    for (name, block, router, rule), stack in zip(found, stacks, strict=True):
        layer = seen[id(stack)] = seen.get(id(stack), -1) + 1
        assert rule is not None
        experts: Any = block.experts
        sites.append(
            RouterSite(
                name=name,
                router=router,
                block=block,
                experts=experts,
                stack=stack,
                layer=layer,
                num_layers=sum(other is stack for other in stacks),
                rule=rule,
            )
        )
    return tuple(sites)


def _candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Module, RouterRule | None]]:
    for name, block in model.named_modules():
        children = dict(block.named_children())
        routers = [child for child in ROUTER_NAMES if child in children]
        if "experts" in children and routers:
            router = children[routers[0]]
            yield f"{name}.{routers[0]}".lstrip("."), block, router, rule_of(router, block)


def _stack(model: nn.Module, name: str) -> nn.Module:
    """The owner of the innermost list of layers on the way to the router called `name`."""
    parts = name.split(".")
    for end in range(len(parts) - 1, 0, -1):
        if isinstance(model.get_submodule(".".join(parts[:end])), nn.ModuleList):
            return model.get_submodule(".".join(parts[: end - 1]))
    raise ConfigError(
        f"expected a model with a list of layers, whose call says how tokens lie in sequences; got the router "
        f"{name!r} of {type(model).__name__} outside any list. Pass the whole model."
    )
