"""What takes part in `bench experts`: ours, and what people would use instead, all on the very same weights."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from expertshare import native
from expertshare.errors import ConfigError, nearest
from expertshare.kernels import choose_backend
from expertshare.kernels.triton import unavailable_reason as no_triton
from expertshare.lab.bench.cases import Case
from expertshare.lab.bench.machine import CPU
from expertshare.lab.bench.peer_models import peer_config
from expertshare.types import Bank, ExpertBank, RoutingPlan

Run = Callable[[int, Tensor, RoutingPlan], Tensor]
"""run(layer, x_TD, plan) -> y_TD."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Contender:
    """build: makes a Run over layers of weights without copying them. missing: why it cannot take part here, or None.
    copies_weights: it keeps a copy of its own, which counts as memory. quantisation: a name of QUANTISATIONS; its
    layers are then QuantisedBanks, which count as memory too. only_on: a kind of device, None: any. host_bound: it
    waits for the GPU between its kernels, so that no graph can hold it.
    """

    build: Callable[[Sequence[Any], Case], Run]
    missing: Callable[[], str | None] = lambda: None
    copies_weights: bool = False
    quantisation: str | None = None
    only_on: str | None = None
    host_bound: bool = False

    def absent(self, device: torch.device) -> str | None:
        """Why it cannot take part on this device, or None."""
        if self.only_on not in (None, device.type):
            return f"runs on {self.only_on} only"
        return self.missing()


def contenders(names: Sequence[str] | None, device: torch.device = CPU) -> dict[str, Contender]:
    """Those called `names`, in that order, or all that are made for the device. ConfigError for an unknown name."""
    for name in names or ():
        if name not in CONTENDERS:
            raise ConfigError(f"unknown contender {name!r}. {nearest(name, CONTENDERS)}")
    made_for_it = [name for name, entrant in CONTENDERS.items() if entrant.only_on in (None, device.type)]
    return {name: CONTENDERS[name] for name in (names or made_for_it)}


def _ours(backend: str) -> Callable[[Sequence[Bank], Case], Run]:
    def build(banks: Sequence[Bank], _case: Case) -> Run:
        first = banks[0]
        weights = first.down_EDF if isinstance(first, ExpertBank) else first.down.codes_EPC
        moe_ffn = choose_backend(backend, weights.device).moe_ffn
        return lambda layer, x_TD, plan: moe_ffn(x_TD, plan, banks[layer])

    return build


def _torch_loop(banks: Sequence[ExpertBank], _case: Case) -> Run:
    """What one writes first in plain torch: for every expert in use, two matrix products over its tokens."""

    def run(layer: int, x_TD: Tensor, plan: RoutingPlan) -> Tensor:
        bank, y_TD = banks[layer], torch.zeros_like(x_TD, dtype=torch.float32)
        for expert in plan.active_E.nonzero().flatten().tolist():
            token_R, slot_R = torch.where(plan.expert_ids_TK == expert)
            gate_RF, up_RF = F.linear(x_TD[token_R], bank.gate_up_EHD[expert]).chunk(2, dim=-1)
            out_RD = F.linear(F.silu(gate_RF) * up_RF, bank.down_EDF[expert])
            y_TD.index_add_(0, token_R, out_RD.float() * plan.weights_TK[token_R, slot_R].unsqueeze(-1))
        return y_TD.to(x_TD.dtype)

    return run


def _torch_grouped_mm(banks: Sequence[ExpertBank], _case: Case) -> Run:
    """torch's grouped matrix product with the least around it: one sort, one gather, one weighted sum."""

    def run(layer: int, x_TD: Tensor, plan: RoutingPlan) -> Tensor:
        bank, num_experts = banks[layer], len(plan.active_E)
        expert_P, order_P = plan.expert_ids_TK.flatten().sort()
        experts_E = torch.arange(num_experts, device=expert_P.device)
        ends_E = torch.searchsorted(expert_P, experts_E, right=True, out_int32=True)  # bincount waits for a GPU
        token_P = order_P // plan.expert_ids_TK.shape[1]
        hidden = F.grouped_mm(x_TD[token_P], bank.gate_up_EHD.transpose(1, 2), offs=ends_E)
        gate_PF, up_PF = hidden.chunk(2, dim=-1)
        out_PD = F.grouped_mm(F.silu(gate_PF) * up_PF, bank.down_EDF.transpose(1, 2), offs=ends_E)
        weighted_PD = out_PD.float() * plan.weights_TK.flatten()[order_P].unsqueeze(-1)
        return torch.zeros_like(x_TD, dtype=torch.float32).index_add_(0, token_P, weighted_PD).to(x_TD.dtype)

    return run


def _transformers(implementation: str) -> Callable[[Sequence[ExpertBank], Case], Run]:
    """transformers' own experts module. It gets its weights in the tokens' dtype, as its own router gives them."""

    def build(banks: Sequence[ExpertBank], case: Case) -> Run:
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

        config = peer_config(case.config, "qwen3_moe", implementation)
        modules: list[nn.Module] = []
        for bank in banks:
            with torch.device("meta"):
                module = Qwen3MoeExperts(config)  # type: ignore[no-untyped-call]
            module.gate_up_proj = nn.Parameter(bank.gate_up_EHD, requires_grad=False)
            module.down_proj = nn.Parameter(bank.down_EDF, requires_grad=False)
            modules.append(module)

        def run(layer: int, x_TD: Tensor, plan: RoutingPlan) -> Tensor:
            y_TD: Tensor = modules[layer](x_TD, plan.expert_ids_TK, plan.weights_TK.to(x_TD.dtype))
            return y_TD

        return run

    return build


def _zentorch(banks: Sequence[ExpertBank], _case: Case) -> Run:
    """AMD's fused layer. Some of its versions are wrong when routing changes between calls; hence the checks."""
    importlib.import_module("zentorch")
    fused = torch.ops.zentorch.zentorch_fused_moe

    def run(layer: int, x_TD: Tensor, plan: RoutingPlan) -> Tensor:
        bank, y_TD = banks[layer], torch.empty_like(x_TD)
        ids_TK = plan.expert_ids_TK.to(torch.int32)
        fused(y_TD, x_TD, bank.gate_up_EHD, bank.down_EDF, None, None, plan.weights_TK, ids_TK, False, "silu")
        return y_TD

    return run


def _zentorch_missing() -> str | None:
    if importlib.util.find_spec("zentorch") is None:
        return "not installed: pip install zentorch, for processors that it supports"
    return None


def _our_kernels(backend: str, device: str, missing: Callable[[], str | None]) -> dict[str, Contender]:
    """One backend with floats and with each form of codes."""
    return {
        backend if form is None else f"{backend}-{form}": Contender(
            build=_ours(backend), missing=missing, quantisation=form, only_on=device
        )
        for form in (None, "int8", "int4")
    }


CONTENDERS: dict[str, Contender] = {
    **_our_kernels("cpu", "cpu", native.unavailable_reason),
    **_our_kernels("triton", "cuda", no_triton),
    "torch": Contender(build=_ours("torch")),
    "torch-loop": Contender(build=_torch_loop, host_bound=True),
    "torch-grouped-mm": Contender(build=_torch_grouped_mm),
    "transformers-eager": Contender(build=_transformers("eager"), host_bound=True),
    "transformers-grouped-mm": Contender(build=_transformers("grouped_mm")),  # its default
    "zentorch": Contender(build=_zentorch, missing=_zentorch_missing, copies_weights=True, only_on="cpu"),
}
