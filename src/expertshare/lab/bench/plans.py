"""Routing plans with exactly as many unique experts as asked for."""

from __future__ import annotations

import heapq

import torch
from torch import Tensor

from expertshare.errors import InputError
from expertshare.types import RoutingPlan

SKEW = 0.5
"""Exponent of the Zipf-like load: the r-th busiest expert serves in proportion to 1 / r ** SKEW tokens."""


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
