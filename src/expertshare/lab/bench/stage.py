"""What all contenders of `bench experts` share: layers of weights, tokens, plans with exactly as many unique experts as
asked for, and what is right for them."""

from __future__ import annotations

import heapq
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from expertshare.convert.rates import CACHE_FACTOR
from expertshare.errors import InputError
from expertshare.kernels.quantise import dequantise, experts_of
from expertshare.lab.bench.cases import Case
from expertshare.lab.bench.contenders import Contender, Run
from expertshare.lab.bench.machine import CPU, Machine, check_memory
from expertshare.lab.bench.weights import expert_bytes, quantised, random_banks
from expertshare.types import Bank, ExpertBank, RoutingPlan

MAX_BANKS = 8
SKEW = 0.5
"""Exponent of the Zipf-like load: the r-th busiest expert serves in proportion to 1 / r ** SKEW tokens."""
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
"""Largest relative error of a token's output. One wrong expert of eight is about ten times the bfloat16 one."""
QUANTISED_TOLERANCE = 5e-2
"""The same with quantised experts, against what their codes stand for: tokens and hidden features are 8 bits."""


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
    and the same quantised for contenders with codes. All forms together stay within the limit."""
    config = case.config
    floats = config.router.num_experts * expert_bytes(config, None, settings.dtype)
    forms = sorted({e.quantisation for e in entrants if e.quantisation is not None})
    codes = sum(config.router.num_experts * expert_bytes(config, form, settings.dtype) for form in forms)
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
    return {None: banks, **{form: [quantised(bank, form) for bank in banks] for form in forms}}


def loads(num_tokens: int, top_k: int, unique: int, skew: float = SKEW) -> list[int]:
    """Tokens of each of `unique` experts, busiest first: at least one, at most all, num_tokens * top_k together.

    Every pair beyond the first of each expert goes where the ratio of share to load is highest. Raises InputError for
    a number of experts that these pairs cannot cover, or cannot be spread over.
    """
    pairs = num_tokens * top_k
    if not top_k <= unique <= pairs:
        raise InputError(
            f"unique experts must lie in {top_k}..{pairs} for {num_tokens} tokens of {top_k} experts each, got {unique}"
        )
    shares = [1.0 / rank**skew for rank in range(1, unique + 1)]
    counts = [1] * unique
    queue = [(-share / 2, expert) for expert, share in enumerate(shares)]
    heapq.heapify(queue)
    for _ in range(pairs - unique):
        _, expert = heapq.heappop(queue)
        counts[expert] += 1
        if counts[expert] < num_tokens:
            heapq.heappush(queue, (-shares[expert] / (counts[expert] + 1), expert))
    return counts


def plan_over(
    experts_U: Tensor, num_experts: int, num_tokens: int, top_k: int, seed: int, skew: float = SKEW
) -> RoutingPlan:
    """A plan in which every expert of `experts_U` (int64, distinct) is used, K different ones by each token.

    The copies of an expert stand side by side in a list that is dealt out to the tokens in turn, so no token gets an
    expert twice. Weights are random and sum to 1 for each token.
    """
    generator = torch.Generator().manual_seed(seed)
    unique = len(experts_U)
    counts_U = torch.tensor(loads(num_tokens, top_k, unique, skew))
    place_U = torch.randperm(unique, generator=generator)
    dealt_P = experts_U[place_U].repeat_interleave(counts_U[place_U])
    ids_TK = dealt_P.view(top_k, num_tokens).T[torch.randperm(num_tokens, generator=generator)]
    ids_TK = torch.stack([row[torch.randperm(top_k, generator=generator)] for row in ids_TK])
    weights_TK = torch.rand(num_tokens, top_k, generator=generator) + 0.05
    weights_TK = weights_TK / weights_TK.sum(dim=1, keepdim=True)
    active_E = torch.zeros(num_experts, dtype=torch.bool).index_fill_(0, experts_U, True)
    return RoutingPlan(ids_TK.contiguous(), weights_TK, active_E)


def rotation(
    num_experts: int, num_tokens: int, top_k: int, unique: int, *, count: int, seed: int, skew: float = SKEW
) -> list[RoutingPlan]:
    """`count` plans that walk through a random order of all experts: neighbours share no expert if two sets fit.

    Calls that follow each other therefore find none of their weights in a cache. Raises InputError for more unique
    experts than there are.
    """
    if unique > num_experts:
        raise InputError(f"unique experts must be at most {num_experts}, the experts of this case, got {unique}")
    order_E = torch.randperm(num_experts, generator=torch.Generator().manual_seed(seed))
    steps = torch.arange(unique)
    chosen = (order_E[(start * unique + steps) % num_experts] for start in range(count))
    return [
        plan_over(experts_U, num_experts, num_tokens, top_k, seed + 1 + number, skew)
        for number, experts_U in enumerate(chosen)
    ]


def expected_output(x_TD: Tensor, plan: RoutingPlan, bank: Bank) -> Tensor:
    """The layer in float32 from the same (rounded or quantised) weights, an expert at a time: [T, D]."""
    y_TD = torch.zeros(x_TD.shape, dtype=torch.float32, device=x_TD.device)
    for expert in plan.active_E.nonzero().flatten().tolist():
        token_R, slot_R = (plan.expert_ids_TK == expert).nonzero(as_tuple=True)
        gate_up_HD, down_DF = _floats(bank, expert)
        gate_RF, up_RF = F.linear(x_TD[token_R].float(), gate_up_HD).chunk(2, dim=-1)
        out_RD = F.linear(F.silu(gate_RF) * up_RF, down_DF)
        y_TD.index_add_(0, token_R, out_RD * plan.weights_TK[token_R, slot_R].unsqueeze(-1))
    return y_TD


def _floats(bank: Bank, expert: int) -> tuple[Tensor, Tensor]:
    if isinstance(bank, ExpertBank):
        return bank.gate_up_EHD[expert].float(), bank.down_EDF[expert].float()
    gate_up, down = (dequantise(experts_of(weight, expert)) for weight in (bank.gate_up, bank.down))
    return gate_up, down


def relative_error(y_TD: Tensor, expected_TD: Tensor) -> float:
    """The worst token's error, as a share of that token's output; infinite for a wrong shape or values not finite."""
    if y_TD.shape != expected_TD.shape or not bool(y_TD.isfinite().all()):
        return math.inf
    difference_T = (y_TD.float() - expected_TD).norm(dim=-1)
    return float((difference_T / expected_TD.norm(dim=-1).clamp_min(1e-12)).max())
