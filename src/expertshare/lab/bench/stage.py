"""What all contenders of `bench experts` share: layers of weights, tokens and plans, on the device that is measured."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from expertshare.convert.rates import CACHE_FACTOR
from expertshare.kernels.quantise import quantise_bank, scheme_named
from expertshare.lab.bench.cases import Case
from expertshare.lab.bench.contenders import CPU, Contender, Run
from expertshare.lab.bench.machine import Machine
from expertshare.lab.bench.plans import SKEW, rotation
from expertshare.lab.bench.weights import check_memory, in_slabs, quantised_expert_bytes, random_banks
from expertshare.types import Bank, ExpertBank, RoutingPlan

MAX_BANKS = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertsSettings:
    """How each point is measured. tokens, unique: None takes the case's own. memory_bytes: weights may use at most."""

    tokens: tuple[int, ...] | None = None
    unique: tuple[int, ...] | None = None
    dtype: torch.dtype = torch.bfloat16
    repeats: int = 15
    warmup: int = 2
    seed: int = 0
    skew: float = SKEW
    memory_bytes: int = 4 * 10**9
    device: torch.device = CPU


@dataclass(frozen=True, slots=True)
class Stage:
    """What all contenders of one point share: layers of weights (by quantisation, None: floats), tokens, and the plans
    that are walked through."""

    banks: Mapping[str | None, Sequence[Bank]]
    x_TD: Tensor
    plans: Sequence[RoutingPlan]

    @property
    def num_calls(self) -> int:
        """Different calls: every layer under every plan."""
        return len(self.banks[None]) * len(self.plans)

    def call(self, run: Run, turn: int) -> Tensor:
        """The `turn`-th call: layers first, then plans."""
        layers = len(self.banks[None])
        return run(turn % layers, self.x_TD, self.plans[turn // layers % len(self.plans)])


def stage_of(
    case: Case, banks: Mapping[str | None, Sequence[Bank]], settings: ExpertsSettings, tokens: int, unique: int
) -> Stage:
    """Random tokens and the plans that walk through all experts, `unique` at a time."""
    router, generator = case.config.router, torch.Generator().manual_seed(settings.seed)
    x_TD = torch.randn(tokens, case.config.hidden_size, generator=generator).to(settings.device, settings.dtype)
    plans = rotation(
        router.num_experts,
        tokens,
        router.top_k,
        unique,
        count=max(2, -(-router.num_experts // unique)),
        seed=settings.seed,
        skew=settings.skew,
    )
    return Stage(banks, x_TD, [_moved(plan, settings.device) for plan in plans])


def _moved(plan: RoutingPlan, device: torch.device) -> RoutingPlan:
    return RoutingPlan(*(part.to(device) for part in (plan.expert_ids_TK, plan.weights_TK, plan.active_E)))


def banks_of(
    case: Case, machine: Machine, settings: ExpertsSettings, entrants: Collection[Contender]
) -> dict[str | None, Sequence[Bank]]:
    """Enough layers to exceed the cache CACHE_FACTOR times, as far as memory and MAX_BANKS allow: floats under None,
    and the same quantised for whoever takes part with codes. All forms together stay within the limit."""
    config = case.config
    floats = config.router.num_experts * config.num_expert_parameters * settings.dtype.itemsize
    forms = sorted({e.quantisation for e in entrants if e.quantisation is not None})
    codes = sum(config.router.num_experts * quantised_expert_bytes(config, form) for form in forms)
    one = (2 if any(e.copies_weights for e in entrants) else 1) * floats + codes
    check_memory(one, settings.memory_bytes, "one layer of this case", "measure a smaller --experts")
    wanted = -(-CACHE_FACTOR * machine.cache_bytes // floats)
    made = random_banks(
        count=max(1, min(wanted, MAX_BANKS, settings.memory_bytes // one)),
        num_experts=config.router.num_experts,
        hidden=config.hidden_size,
        inner=config.expert_hidden,
        dtype=settings.dtype,
        seed=settings.seed,
    )
    banks = [ExpertBank(*(t.to(settings.device) for t in (bank.gate_up_EHD, bank.down_EDF))) for bank in made]
    return {None: banks, **{form: [_quantised(bank, form) for bank in banks] for form in forms}}


def _quantised(bank: ExpertBank, form: str) -> Bank:
    made = quantise_bank(bank, scheme_named(form))
    return in_slabs(made, form) if bank.down_EDF.device.type == "cpu" else made


def expert_bytes(case: Case, entrant: Contender, dtype: torch.dtype) -> int:
    """Of one expert, as this contender holds it."""
    if entrant.quantisation is None:
        return case.config.num_expert_parameters * dtype.itemsize
    return quantised_expert_bytes(case.config, entrant.quantisation)
