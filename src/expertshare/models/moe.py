"""The mixture-of-experts layer: router, routing, experts, shared expert.

Shapes: G sharing groups of L tokens, T = G * L tokens, D features, E experts, K experts per token, S slots of a store.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from expertshare.config import ModelConfig
from expertshare.errors import ConfigError
from expertshare.experts import ResidentExperts
from expertshare.kernels.weights import readable_in_bfloat16, side_by_side
from expertshare.models.layers import SwiGLU
from expertshare.models.runtime import Runtime
from expertshare.routing import policy_at
from expertshare.types import Coreset, ExpertBank, Loan, Routed, RoutingPlan


def in_slots(plan: RoutingPlan, loan: Loan) -> RoutingPlan:
    """The plan with rows of the lent bank in the place of expert ids."""
    if loan.slot_of_E is None:
        return plan
    ids_TK, slot_of_E = plan.expert_ids_TK, loan.slot_of_E
    slots_TK = torch.where(ids_TK < 0, ids_TK, slot_of_E[ids_TK.clamp(min=0)])
    num_slots = loan.bank.down_EDF.shape[0] if isinstance(loan.bank, ExpertBank) else loan.bank.down.codes_EPC.shape[0]
    # One more for inactive experts: a mask as an index would have the host ask a GPU how many there are.
    active_S = torch.zeros(num_slots + 1, dtype=torch.bool, device=ids_TK.device)
    active_S[torch.where(plan.active_E, slot_of_E, num_slots)] = True
    return RoutingPlan(slots_TK, plan.weights_TK, active_S[:num_slots])


class Router(nn.Module):
    """Weights of a router: linear scores of every expert, and a bias that is for selection only.

    weight: float32, or bfloat16 where `narrow` found that to lose nothing. bias: float32, or None.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        spec = config.router
        self.weight = nn.Parameter(torch.empty(spec.num_experts, config.hidden_size))
        self.bias: Tensor | None
        self.register_buffer("bias", torch.zeros(spec.num_experts) if spec.has_bias else None)

    def forward(self, x_GLD: Tensor) -> Tensor:
        """Logits, float32 [G, L, E], whatever the dtype of the model: for training; a backend computes its own."""
        with torch.autocast(x_GLD.device.type, enabled=False):
            return F.linear(x_GLD.float(), self.weight.float())


def lay_side_by_side(routers: Sequence[Router], dtype: torch.dtype = torch.float32) -> None:
    """Give routers new memory for their weights, uninitialised, where a backend reads them faster side by side."""
    weights = side_by_side([router.weight.detach() for router in routers], dtype)
    for router, weight_ED in zip(routers, weights, strict=True):
        router.weight = nn.Parameter(weight_ED, requires_grad=router.weight.requires_grad)


def narrow(routers: Sequence[Router]) -> None:
    """Keep weights in bfloat16 where all of them are bfloat16 numbers, as in most checkpoints: half as much to read.

    For inference: products and sums stay those of float32. Only where a backend takes them so.
    """
    weights = [router.weight.detach() for router in routers]
    if not readable_in_bfloat16(weights):
        return
    lay_side_by_side(routers, torch.bfloat16)
    with torch.no_grad():
        for router, weight in zip(routers, weights, strict=True):
            router.weight.copy_(weight)


class AbsentExperts(nn.Module):
    """In the place of experts that are in files of their own: the runtime must have a store."""

    def borrow(self, *_: object, **__: object) -> AbstractContextManager[Loan]:
        """Lends nothing: raises ConfigError that says how to open a store."""
        raise ConfigError(
            "expected a runtime with a store, because this model's experts are in files of their own, got none: open "
            "one with expertshare.experts.open_store and pass it as Runtime(store=...)"
        )


class MoE(nn.Module):
    """Routes each sharing group under the runtime's policy and runs the experts of its plan: those of the runtime's
    store, or the layer's own."""

    def __init__(self, config: ModelConfig, moe_layer: int) -> None:
        super().__init__()
        self.spec = config.router
        self.moe_layer, self.num_layers = moe_layer, config.num_moe_layers
        self.router = Router(config)
        self.experts: ResidentExperts | AbsentExperts = ResidentExperts(
            config.router.num_experts, config.hidden_size, config.expert_hidden
        )
        self.shared = SwiGLU(config.hidden_size, config.shared_hidden) if config.shared_hidden else None

    def forward(
        self,
        x_GLD: Tensor,
        live_GL: Tensor,
        runtime: Runtime,
        masked_GL: Tensor | None = None,
        previous: Coreset | None = None,
    ) -> tuple[Tensor, Routed]:
        """Returns the layer's output (same shape and dtype as the input) and what it asked of the experts.

        masked_GL, previous: as in ForwardInput, of this layer's groups.
        """
        backend, router = runtime.backend, self.router
        with runtime.timed("router"):
            policy = policy_at(runtime.policy, self.moe_layer, self.num_layers)
            routed = backend.route(
                x_GLD, router.weight, router.bias, policy, self.spec, live_GL, masked_GL=masked_GL, previous=previous
            )
        plan = routed.plan
        if runtime.on_plan is not None:
            runtime.on_plan(self.moe_layer, plan)
        x_TD = x_GLD.flatten(0, 1)
        with runtime.timed("experts"):
            store = runtime.store or self.experts
            with store.borrow(self.moe_layer, plan.active_E, early=backend.takes_arrivals) as loan:
                y_TD = backend.moe_ffn(x_TD, in_slots(plan, loan), loan.bank, loan.arrivals)
            if self.shared is not None:
                y_TD = y_TD + self.shared(x_TD, backend)
        return y_TD.view(x_GLD.shape), routed
