"""The mixture-of-experts layer: router, routing, experts, shared expert."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from expertshare.config import ModelConfig, RouterSpec
from expertshare.errors import ConfigError
from expertshare.experts import ResidentExperts
from expertshare.kernels import moe_ffn, select_and_assign
from expertshare.models.layers import SwiGLU
from expertshare.models.runtime import Runtime
from expertshare.routing import (
    count_load,
    gate_scores,
    gate_takes,
    reach_limit,
    recipe_of,
    route,
    router_scores,
)
from expertshare.types import ExpertBank, Loan, RouterScores, RoutingPlan


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

    def scores(self, x_GLD: Tensor, live_GL: Tensor, spec: RouterSpec, *, compiled: bool) -> RouterScores:
        """Scores of every expert; compiled: by the native library where it takes these tensors."""
        if compiled and gate_takes(x_GLD, self.weight, self.bias):
            return gate_scores(x_GLD, self.weight, self.bias, live_GL, spec)
        return router_scores(self(x_GLD), live_GL, spec, self.bias)


class MoE(nn.Module):
    """Routes each sharing group under the runtime's policy and runs the experts of its plan.

    experts: None where they are not the model's own; the runtime must then have a store.
    """

    def __init__(self, config: ModelConfig, moe_layer: int) -> None:
        super().__init__()
        self.spec = config.router
        self.moe_layer, self.num_layers = moe_layer, config.num_moe_layers
        self.router = Router(config)
        self.experts: ResidentExperts | None = ResidentExperts(
            config.router.num_experts, config.hidden_size, config.expert_hidden
        )
        self.shared = SwiGLU(config.hidden_size, config.shared_hidden) if config.shared_hidden else None

    def forward(self, x_GLD: Tensor, live_GL: Tensor, runtime: Runtime) -> tuple[Tensor, LayerRouting]:
        """Returns the layer's output (same shape and dtype as the input) and what it asked of the experts."""
        with runtime.timed("router"):
            scores = self.router.scores(x_GLD, live_GL, self.spec, compiled=runtime.backend == "cpu")
            plan, routing = self._route(scores, runtime)
        x_TD = x_GLD.flatten(0, 1)
        with runtime.timed("experts"):
            with self._borrow(plan, runtime) as loan:
                y_TD = moe_ffn(x_TD, in_slots(plan, loan), loan.bank, backend=runtime.backend)
            if self.shared is not None:
                y_TD = y_TD + self.shared(x_TD, backend=runtime.backend)
        return y_TD.view(x_GLD.shape), routing

    def _route(self, scores: RouterScores, runtime: Runtime) -> tuple[RoutingPlan, LayerRouting]:
        """Under "triton" by kernels that need no word from the host, for every policy that can be written down."""
        policy = runtime.policy_for(self.moe_layer, self.num_layers)
        recipe = recipe_of(policy, self.spec) if runtime.backend == "triton" else None
        if recipe is None:
            _, plan = route(scores, policy, self.spec)
            return plan, LayerRouting(*count_load(plan, len(scores.live_GL)))
        found = select_and_assign(
            scores, self.spec, recipe, plan_reach=reach_limit(self.spec, policy.group_limit)
        )
        return found.plan, LayerRouting(found.load_E, found.group_experts_G)

    def _borrow(self, plan: RoutingPlan, runtime: Runtime) -> AbstractContextManager[Loan]:
        if runtime.store is not None:
            return runtime.store.borrow(self.moe_layer, plan.active_E)
        if self.experts is None:
            raise ConfigError(
                "expected a runtime with a store, because this model's experts are in files of their own, got none: "
                "open one with expertshare.experts.open_store and pass it as Runtime(store=...)"
            )
        return nullcontext(Loan(self.experts.bank()))
