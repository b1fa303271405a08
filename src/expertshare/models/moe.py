"""The mixture-of-experts layer: router, routing, experts, shared expert."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from expertshare import native
from expertshare.config import ModelConfig, RouterSpec
from expertshare.errors import ConfigError
from expertshare.experts import ResidentExperts
from expertshare.kernels import moe_ffn, route_layer_cpu, route_layer_triton
from expertshare.models.layers import SwiGLU
from expertshare.models.runtime import Runtime
from expertshare.routing import route_layer
from expertshare.types import Bank, Coreset, ExpertBank, Loan, RoutingPlan, RoutingPolicy

_MOST_GROUPS = 1024
"""Of torch's grouped product on a GPU: fewer than these. A store's slots may be more."""


@dataclass(frozen=True, slots=True)
class LayerRouting:
    """One layer's share of a RoutingTrace: load_E int64, group_experts_G int64.

    coreset: None where the native library chose it, which is never under a policy that needs to know of steps.
    """

    load_E: Tensor
    group_experts_G: Tensor
    coreset: Coreset | None = None


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


def few_enough(plan: RoutingPlan, bank: Bank, backend: str, *, most: int = _MOST_GROUPS) -> tuple[RoutingPlan, Bank]:
    """For torch's grouped product on a GPU, which refuses a bank of `most` rows: a copy of the plan's experts, and the
    plan with their rows. Other plans and banks stay as they are."""
    if backend != "grouped" or not isinstance(bank, ExpertBank) or len(bank.down_EDF) < most or bank.down_EDF.is_cpu:
        return plan, bank
    return _of_active(plan, bank)


def _of_active(plan: RoutingPlan, bank: ExpertBank) -> tuple[RoutingPlan, ExpertBank]:
    ids_TK, active_E = plan.expert_ids_TK, plan.active_E
    rows_E = torch.where(active_E, active_E.cumsum(0) - 1, -1)
    experts_U = active_E.nonzero().flatten()
    rows_TK = torch.where(ids_TK < 0, ids_TK, rows_E[ids_TK.clamp(min=0)])
    chosen = ExpertBank(bank.gate_up_EHD[experts_U], bank.down_EDF[experts_U])
    return RoutingPlan(rows_TK, plan.weights_TK, torch.ones_like(experts_U, dtype=torch.bool)), chosen


class Router(nn.Module):
    """Linear scores of every expert, computed in float32 whatever the model's dtype; the bias is for selection only.

    weight: float32, or bfloat16 where `narrow` found that to lose nothing. bias: float32, or None.
    """

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

    def plan(
        self,
        x_GLD: Tensor,
        live_GL: Tensor,
        policy: RoutingPolicy,
        spec: RouterSpec,
        *,
        backend: str,
        masked_GL: Tensor | None = None,
        previous: Coreset | None = None,
    ) -> tuple[RoutingPlan, LayerRouting]:
        """Router scores, selection and assignment of a layer, and what they ask of the experts, by the backend.

        masked_GL, previous: for policies that need to know of steps, as in RouterScores and `route`.
        """
        route = {"cpu": route_layer_cpu, "triton": route_layer_triton}.get(backend, route_layer)
        found = route(x_GLD, self.weight, self.bias, policy, spec, live_GL, masked_GL=masked_GL, previous=previous)
        return found.plan, LayerRouting(found.load_E, found.group_experts_G, found.coreset)


def lay_side_by_side(routers: Sequence[Router], dtype: torch.dtype = torch.float32) -> None:
    """Give routers on the CPU one piece of memory for all their weights, uninitialised, in huge pages.

    A router alone is too small for these, and reading it, once a layer, would wait for an address every 4 KiB.
    """
    if not routers or not routers[0].weight.is_cpu:
        return
    weights_NED = torch.empty((len(routers), *routers[0].weight.shape), dtype=dtype)
    native.ask_for_huge_pages(weights_NED)
    for router, weight_ED in zip(routers, weights_NED, strict=True):
        router.weight = nn.Parameter(weight_ED, requires_grad=router.weight.requires_grad)


def narrow(routers: Sequence[Router]) -> None:
    """Keep weights in bfloat16 where all of them are bfloat16 numbers, as in most checkpoints: half as much to read.

    For inference: products and sums stay those of float32. Only on the CPU, where the native library takes them so.
    """
    weights = [router.weight.detach() for router in routers]
    if not native.available() or not all(weight.is_cpu and _is_bfloat16(weight) for weight in weights):
        return
    lay_side_by_side(routers, torch.bfloat16)
    with torch.no_grad():
        for router, weight in zip(routers, weights, strict=True):
            router.weight.copy_(weight)


def _is_bfloat16(weight: Tensor) -> bool:
    return torch.equal(weight.bfloat16().float(), weight)


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

    def forward(
        self,
        x_GLD: Tensor,
        live_GL: Tensor,
        runtime: Runtime,
        masked_GL: Tensor | None = None,
        previous: Coreset | None = None,
    ) -> tuple[Tensor, LayerRouting]:
        """Returns the layer's output (same shape and dtype as the input) and what it asked of the experts.

        masked_GL, previous: as in ForwardInput, of this layer's groups.
        """
        with runtime.timed("router"):
            policy, backend = runtime.policy_for(self.moe_layer, self.num_layers), runtime.backend
            plan, routing = self.router.plan(
                x_GLD, live_GL, policy, self.spec, backend=backend, masked_GL=masked_GL, previous=previous
            )
        if runtime.on_plan is not None:
            runtime.on_plan(self.moe_layer, plan)
        x_TD = x_GLD.flatten(0, 1)
        with runtime.timed("experts"):
            with self._borrow(plan, runtime) as loan:
                lent, bank = few_enough(in_slots(plan, loan), loan.bank, backend)
                y_TD = moe_ffn(x_TD, lent, bank, backend=backend, arrivals=loan.arrivals)
            if self.shared is not None:
                y_TD = y_TD + self.shared(x_TD, backend=runtime.backend)
        return y_TD.view(x_GLD.shape), routing

    def _borrow(self, plan: RoutingPlan, runtime: Runtime) -> AbstractContextManager[Loan]:
        if runtime.store is not None:
            return runtime.store.borrow(self.moe_layer, plan.active_E, early=runtime.backend == "cpu")
        if self.experts is None:
            raise ConfigError(
                "expected a runtime with a store, because this model's experts are in files of their own, got none: "
                "open one with expertshare.experts.open_store and pass it as Runtime(store=...)"
            )
        return nullcontext(Loan(self.experts.bank()))
