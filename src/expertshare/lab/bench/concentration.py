"""Random routers that agree on as many experts per block as a trained model's do.

Tokens of a random model route as if independent and touch far more experts than those of a trained one. What trained
routers have in common over a block is imitated by one direction: every router's weights are mixed with an outer
product of random expert preferences and the mean hidden state of the block, W' = cos(t) W + sin(t) v u^T, scaled so
that shared and own logits have the same spread. t is found by bisection, layer by layer, on the block that is then
measured: at t = 0 routing is untouched, towards t = pi/2 all tokens want the same experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from expertshare.config import RouterSpec
from expertshare.kernels import Past
from expertshare.models import ForwardInput, MoETransformer, Runtime
from expertshare.models.moe import MoE
from expertshare.routing import make_policy, route, router_scores

BISECTIONS = 20


def concentrate(
    model: MoETransformer,
    inputs: ForwardInput,
    past: Sequence[Past] | None,
    *,
    unique: int,
    seed: int,
) -> None:
    """Change the routers' weights until vanilla routing of this block uses about `unique` experts in every layer.

    One forward: each router is tuned on its own input just before it runs, so deeper layers see tuned ones before
    them. What more than the untouched router's number is asked for cannot be reached, and is not.
    """
    spec = model.config.router
    generator = torch.Generator().manual_seed(seed)

    def tune(moe: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        assert isinstance(moe, MoE)
        router, x_GLD = moe.router, arguments[0].float()
        preference_E = torch.randn(spec.num_experts, generator=generator).to(x_GLD.device)
        router.weight.copy_(concentrated(router.weight.float(), preference_E, x_GLD, router.bias, spec, unique))

    layers = [module for module in model.modules() if isinstance(module, MoE)]
    hooks = [layer.register_forward_pre_hook(tune) for layer in layers]
    try:
        with torch.no_grad():
            model(inputs, Runtime(policy=make_policy("vanilla").bind(spec)), past)
    finally:
        for hook in hooks:
            hook.remove()


def concentrated(
    weight_ED: Tensor, preference_E: Tensor, x_GLD: Tensor, bias_E: Tensor | None, spec: RouterSpec, unique: int
) -> Tensor:
    """Router weights [E, D]: the mixture under which a block uses nearest to `unique` experts, as a mean over blocks.

    preference_E: what all tokens have in common. x_GLD: float32, the router's input for G blocks.
    """
    mean_D = x_GLD.flatten(0, 1).mean(dim=0)
    own_GLE = x_GLD @ weight_ED.T
    reach_GL = x_GLD @ mean_D
    shared_ED = torch.outer(preference_E, mean_D) * (own_GLE.std() / reach_GL.square().mean().sqrt().clamp_min(1e-12))
    live_GL = torch.ones(x_GLD.shape[:2], dtype=torch.bool, device=x_GLD.device)

    def mixture(angle: float) -> Tensor:
        return math.cos(angle) * weight_ED + math.sin(angle) * shared_ED

    def count(angle: float) -> float:
        scores = router_scores(x_GLD @ mixture(angle).T, live_GL, spec, bias_E)
        _, plan = route(scores, make_policy("vanilla"), spec)
        return mean_unique(plan.expert_ids_TK, len(x_GLD), spec)

    return mixture(_bisect(count, unique))


def mean_unique(expert_ids_TK: Tensor, num_groups: int, spec: RouterSpec) -> float:
    """Unique experts of a block, mean over blocks. expert_ids_TK: none of them unused."""
    used_GE = torch.zeros(num_groups, spec.num_experts, dtype=torch.bool, device=expert_ids_TK.device)
    used_GE.scatter_(1, expert_ids_TK.view(num_groups, -1), True)
    return float(used_GE.sum()) / num_groups


def _bisect(count: Callable[[float], float], wanted: int) -> float:
    """The angle, of those tried, at which `count` (falling, in steps) comes nearest to `wanted`."""
    low, high = 0.0, math.pi / 2
    tried = {low: count(low), high: count(high)}
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        tried[middle] = count(middle)
        low, high = (middle, high) if tried[middle] > wanted else (low, middle)
    return min(tried, key=lambda angle: abs(tried[angle] - wanted))
