"""Where a model routes: every router and its rule, the block that calls it, its experts, the stack of layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from expertshare.config import RouterSpec
from expertshare.errors import ConfigError
from expertshare.routing import router_scores
from expertshare.types import RouterScores

Output = Literal["logits, weights, ids", "ids, weights, logits", "logits"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RouterRule:
    """How one router is read.

    output: what its forward returns; with "logits" it is a plain linear layer, and the block around it chooses.
    scores_are_probabilities: what stands in the place of logits went through the softmax already. bias, expert_scale:
    names of the tensors [E] that select (added to the affinity) and weigh (a factor on the final weight), if any.
    """

    spec: RouterSpec
    output: Output = "logits, weights, ids"
    scores_are_probabilities: bool = False
    bias: str | None = None
    expert_scale: str | None = None

    def scores(self, router: nn.Module, first_GLE: Tensor, live_GL: Tensor) -> RouterScores:
        """Scores from the router's logits (or probabilities), any float dtype, [G, L, E]."""
        if self.scores_are_probabilities:
            affinity = first_GLE.float()
            return RouterScores(affinity, affinity, live_GL)
        return router_scores(first_GLE, live_GL, self.spec, getattr(router, self.bias) if self.bias else None)

    def expert_scale_of(self, router: nn.Module) -> Tensor | None:
        """The learned factor of every expert, where the model has one."""
        return getattr(router, self.expert_scale) if self.expert_scale else None

    def ordered(self, three: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, weights and ids from what a router that chooses has returned, and the reverse."""
        first, weights, last = three
        return three if self.output == "logits, weights, ids" else (last, weights, first)


def _plain(num_experts: int, top_k: int, renormalise: object, output: Output = "logits, weights, ids") -> RouterRule:
    spec = RouterSpec(num_experts=num_experts, top_k=top_k, activation="softmax", renormalise=bool(renormalise))
    return RouterRule(spec=spec, output=output)


def _sigmoid(
    router: Any, *, renormalise: bool, groups: tuple[int | None, int | None], bias: str, output: Output
) -> RouterRule:
    """groups: all, and those that are kept; None or 0 for a router without groups. bias: name of its tensor, if any."""
    has_bias = getattr(router, bias, None) is not None
    spec = RouterSpec(
        num_experts=router.num_experts,
        top_k=router.top_k,
        activation="sigmoid",
        renormalise=renormalise,
        scaling=float(router.routed_scaling_factor),
        num_groups=groups[0] or 1,
        kept_groups=groups[1] or 1,
        has_bias=has_bias,
    )
    return RouterRule(spec=spec, output=output, bias=bias if has_bias else None)


def _softmax(router: Any, _block: Any) -> RouterRule:
    """OLMoE, Qwen3-MoE; Mixtral, which always renormalises and says nothing of it."""
    return _plain(router.num_experts, router.top_k, getattr(router, "norm_topk_prob", True))


def _glm4(router: Any, _block: Any) -> RouterRule:
    return _sigmoid(
        router,
        renormalise=bool(router.norm_topk_prob),
        groups=(router.num_group, router.topk_group),
        bias="e_score_correction_bias",
        output="logits, weights, ids",
    )


def _diffusion_gemma(router: Any, _block: Any) -> RouterRule:
    config = router.config
    spec = RouterSpec(
        num_experts=config.num_experts,
        top_k=config.top_k_experts,
        activation="softmax",
        renormalise=True,
        has_expert_scale=True,
    )
    return RouterRule(spec=spec, scores_are_probabilities=True, expert_scale="per_expert_scale")


def _llada2(router: Any, _block: Any) -> RouterRule:
    """LLaDA2's released gate, which renormalises whatever its config says, except with one expert per token."""
    groups = getattr(router, "n_group", None), getattr(router, "topk_group", None)
    order: Output = "ids, weights, logits"
    return _sigmoid(router, renormalise=router.top_k > 1, groups=groups, bias="expert_bias", output=order)


def _linear(router: Any, block: Any) -> RouterRule:
    """LLaDA-MoE and SDAR, as OLMoE and Qwen3-MoE were before transformers 5: the block applies the softmax."""
    return _plain(router.out_features, block.top_k, block.norm_topk_prob, "logits")


NATIVE: dict[str, Callable[[Any, Any], RouterRule]] = {
    "OlmoeTopKRouter": _softmax,
    "Qwen3MoeTopKRouter": _softmax,
    "MixtralTopKRouter": _softmax,
    "Glm4MoeTopkRouter": _glm4,
    "DiffusionGemmaTextRouter": _diffusion_gemma,
}
"""Router classes of transformers. Others may look alike and compute something else, so these go by their name."""

SUPPORTED = (
    "OLMoE, Qwen3-MoE, Mixtral, GLM-4-MoE and DiffusionGemma of transformers, and remote code with the interface of "
    "LLaDA2 (a gate with top_k, num_experts and routed_scaling_factor that returns ids, weights, logits), LLaDA-MoE or "
    "SDAR (a linear `gate` in a block with top_k and norm_topk_prob)"
)

_LLADA2_GATE = ("num_experts", "top_k", "routed_scaling_factor", "weight")


def rule_of(router: nn.Module, block: nn.Module) -> RouterRule | None:
    """The rule of a router inside its block, by the class or by the interface; None if it is not a known one."""
    for kind in type(router).__mro__:
        if kind.__name__ in NATIVE and kind.__module__.startswith("transformers."):
            return NATIVE[kind.__name__](router, block)
    if isinstance(router, nn.Linear):
        usable = router.bias is None and hasattr(block, "top_k") and hasattr(block, "norm_topk_prob")
        return _linear(router, block) if usable else None
    if type(router).__module__.startswith("transformers.models."):
        return None
    usable = all(hasattr(router, name) for name in _LLADA2_GATE) and isinstance(router.weight, torch.Tensor)
    return _llada2(router, block) if usable else None


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
    stack: nn.Module
    layer: int
    num_layers: int
    rule: RouterRule

    @property
    def experts(self) -> Any:
        """The module that the block gives its tokens to: fused tensors, or a list of modules (remote code)."""
        return self.block.experts

    @property
    def separate_experts(self) -> bool:
        """Experts are modules of their own (remote code), instead of fused tensors."""
        return isinstance(self.experts, nn.ModuleList)

    @property
    def bytes_per_expert(self) -> int:
        """Bytes of the weights of one expert."""
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
    sites = []
    for number, ((name, block, router, rule), stack) in enumerate(zip(found, stacks, strict=True)):
        assert rule is not None
        layer, depth = (sum(other is stack for other in some) for some in (stacks[:number], stacks))
        sites.append(
            RouterSite(name=name, router=router, block=block, stack=stack, layer=layer, num_layers=depth, rule=rule)
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
