"""The mixture-of-experts layer: router, routing, experts, shared expert."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from expertshare.config import ModelConfig
from expertshare.experts import ResidentExperts
from expertshare.kernels import moe_ffn
from expertshare.models.layers import SwiGLU
from expertshare.models.runtime import Runtime
from expertshare.routing import route, router_scores
from expertshare.types import ExpertBank, Loan, RoutingPlan


@dataclass(frozen=True, slots=True)
class LayerRouting:
    """One layer's share of a RoutingTrace: load_E int64, group_experts_G int64."""

    load_E: Tensor
    group_experts_G: Tensor


def in_slots(plan: RoutingPlan, loan: Loan) -> RoutingPlan:
    """The plan with rows of the lent bank in the place of expert ids."""
    if loan.slot_of_E is None:
        return plan
    ids_TK, slot_of_E = plan.expert_ids_TK, loan.slot_of_E
    slots_TK = torch.where(ids_TK < 0, ids_TK, slot_of_E[ids_TK.clamp(min=0)])
    num_slots = loan.bank.down_EDF.shape[0] if isinstance(loan.bank, ExpertBank) else loan.bank.down.codes_ERC.shape[0]
    active_S = torch.zeros(num_slots, dtype=torch.bool, device=ids_TK.device)
    active_S[slot_of_E[plan.active_E]] = True
    return RoutingPlan(slots_TK, plan.weights_TK, active_S)


class Router(nn.Module):
    """Linear scores for every expert, in float32 whatever the dtype of the model; the bias is for selection only."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        spec = config.router
        self.weight = nn.Parameter(torch.empty(spec.num_experts, config.hidden_size))
        self.bias: Tensor | None
        self.register_buffer("bias", torch.zeros(spec.num_experts) if spec.has_bias else None)

    def forward(self, x_GLD: Tensor) -> Tensor:
        """Logits, float32 [G, L, E]."""
        with torch.autocast(x_GLD.device.type, enabled=False):
            return F.linear(x_GLD.float(), self.weight.float())


class MoE(nn.Module):
    """Routes each sharing group under the runtime's policy and runs the experts of its plan."""

    def __init__(self, config: ModelConfig, moe_layer: int) -> None:
        super().__init__()
        self.spec = config.router
        self.moe_layer, self.num_layers = moe_layer, config.num_moe_layers
        self.router = Router(config)
        self.experts = ResidentExperts(config.router.num_experts, config.hidden_size, config.expert_hidden)
        self.shared = SwiGLU(config.hidden_size, config.shared_hidden) if config.shared_hidden else None

    def forward(self, x_GLD: Tensor, live_GL: Tensor, runtime: Runtime) -> tuple[Tensor, LayerRouting]:
        """Returns the layer's output (same shape and dtype as the input) and what it asked of the experts."""
        with runtime.timed("router"):
            scores = router_scores(self.router(x_GLD), live_GL, self.spec, self.router.bias)
            _, plan = route(scores, runtime.policy_for(self.moe_layer, self.num_layers), self.spec)
            routing = self._account(plan, live_GL)
        x_TD = x_GLD.flatten(0, 1)
        with runtime.timed("experts"):
            with self._borrow(plan, runtime) as loan:
                y_TD = moe_ffn(x_TD, in_slots(plan, loan), loan.bank, backend=runtime.backend)
            if self.shared is not None:
                y_TD = y_TD + self.shared(x_TD)
        return y_TD.view(x_GLD.shape), routing

    def _borrow(self, plan: RoutingPlan, runtime: Runtime) -> AbstractContextManager[Loan]:
        if runtime.store is None:
            return nullcontext(Loan(self.experts.bank()))
        return runtime.store.borrow(self.moe_layer, plan.active_E)

    def _account(self, plan: RoutingPlan, live_GL: Tensor) -> LayerRouting:
        slots = plan.expert_ids_TK + 1  # 0 collects the unused ones
        load = torch.zeros(self.spec.num_experts + 1, dtype=torch.int64, device=slots.device)
        load = load.scatter_add_(0, slots.flatten(), torch.ones_like(slots).flatten())[1:]
        groups = live_GL.shape[0]
        used = torch.zeros(groups, self.spec.num_experts + 1, dtype=torch.bool, device=slots.device)
        used = used.scatter_(1, slots.view(groups, -1), True)[:, 1:]
        return LayerRouting(load, used.sum(dim=1))
