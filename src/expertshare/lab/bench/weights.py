"""Random weights of full-size shapes, filled in place: no second copy, no float32 detour. And random routers that agree
on as many experts per block as a trained model's do.

Tokens of a random model route as if independent and touch far more experts than those of a trained one. What trained
routers have in common over a block is imitated by one direction: every router's weights are mixed with an outer
product of random expert preferences and the mean hidden state of the block, W' = cos(t) W + sin(t) v u^T, scaled so
that shared and own logits have the same spread. t is found by bisection, layer by layer, on the block that is then
measured: at t = 0 routing is untouched, towards t = pi/2 all tokens want the same experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from expertshare.config import ModelConfig, RouterSpec
from expertshare.experts.slab import SlabFormat, allocate_slabs
from expertshare.kernels import Past
from expertshare.kernels.quantise import quantise_bank, scheme_named
from expertshare.models import ForwardInput, MoETransformer, Runtime
from expertshare.models.moe import MoE, Router, lay_side_by_side
from expertshare.native import ask_for_huge_pages
from expertshare.routing import make_policy, route, router_scores
from expertshare.types import ExpertBank, QuantisedBank

CHUNK = 2**20
BISECTIONS = 20


def random_banks(
    *, count: int, num_experts: int, hidden: int, inner: int, dtype: torch.dtype, seed: int
) -> list[ExpertBank]:
    """`count` layers of experts whose outputs have about the size of their inputs."""
    generator = np.random.Generator(np.random.SFC64(seed))
    return [
        ExpertBank(
            fill(torch.empty(num_experts, 2 * inner, hidden, dtype=dtype), hidden**-0.5, generator),
            fill(torch.empty(num_experts, hidden, inner, dtype=dtype), inner**-0.5, generator),
        )
        for _ in range(count)
    ]


def quantised(bank: ExpertBank, quantisation: str) -> QuantisedBank:
    """The bank in codes; on a CPU copied to where stores have it: slab after slab, in huge pages."""
    made = quantise_bank(bank, scheme_named(quantisation))
    down = made.down
    if down.codes_EPC.device.type != "cpu":
        return made
    group = 0 if down.bits == 8 else down.group_size
    form = SlabFormat(scheme=quantisation, hidden=down.rows, inner=down.depth, group_size=group)
    lent = form.bank(allocate_slabs(len(down.codes_EPC), form.slab_bytes))
    assert isinstance(lent, QuantisedBank)
    for to, of in ((lent.gate_up, made.gate_up), (lent.down, down)):
        to.codes_EPC.copy_(of.codes_EPC)
        to.scales_EPG.copy_(of.scales_EPG)
    return lent


def fill(tensor: Tensor, std: float, generator: np.random.Generator) -> Tensor:
    """Uniform values of mean 0 and standard deviation `std`, in place; by numpy, which is much faster at it here."""
    ask_for_huge_pages(tensor)
    edge, flat = std * math.sqrt(3.0), tensor.view(-1)
    chunk = np.empty(min(CHUNK, flat.numel()), dtype=np.float32)
    for start in range(0, flat.numel(), CHUNK):
        part = flat[start : start + CHUNK]
        values = chunk[: part.numel()]
        generator.random(dtype=np.float32, out=values)
        part.copy_(torch.from_numpy(values).mul_(2.0 * edge).sub_(edge))
    return tensor


def random_model(config: ModelConfig, dtype: torch.dtype, seed: int, std: float = 0.02) -> MoETransformer:
    """A model in evaluation mode: norms one, selection biases zero, all else random. Routers compute in float32."""
    with torch.device("meta"):
        model = MoETransformer(config).to(dtype)
    for module in model.modules():
        if isinstance(module, Router):
            module.float()
    model = model.to_empty(device="cpu")
    lay_side_by_side([module for module in model.modules() if isinstance(module, Router)], dtype)
    if config.tie_embeddings and isinstance(model.embed, nn.Embedding) and isinstance(model.head, nn.Linear):
        model.head.weight = model.embed.weight
    generator = np.random.Generator(np.random.SFC64(seed))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
            else:
                fill(parameter, std, generator)
        for buffer in model.buffers():
            buffer.zero_()
    return model.requires_grad_(False).eval()


def model_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes of the weights that `random_model` makes."""
    with torch.device("meta"):
        model = MoETransformer(config)
    return sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize


def expert_bytes(config: ModelConfig, quantisation: str | None, dtype: torch.dtype) -> int:
    """Of one expert: its floats, or its codes and scales. Raises ConfigError where the widths do not divide into the
    scheme's groups."""
    if quantisation is None:
        return config.num_expert_parameters * dtype.itemsize
    scheme, hidden, inner = scheme_named(quantisation), config.hidden_size, config.expert_hidden
    return scheme.num_bytes(2 * inner, hidden) + scheme.num_bytes(hidden, inner)


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
