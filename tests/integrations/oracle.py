"""Routing inside given coresets by the models' own formulas, written out token by token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def scores(name: str, router: Any, logits_E: Tensor) -> tuple[Tensor, Tensor]:
    """Affinity and choice of one token. DiffusionGemma's router returns probabilities."""
    if name in ("glm4_moe", "llada2"):
        affinity = 1 / (1 + (-logits_E.double()).exp())
        bias = router.e_score_correction_bias if name == "glm4_moe" else router.expert_bias
        return affinity, affinity + bias.double()
    affinity = logits_E.double() if name == "diffusion_gemma" else logits_E.double().softmax(-1)
    return affinity, affinity


def best(values: Tensor, count: int) -> list[int]:
    """Indices of the largest, ties to the lower one."""
    return sorted(range(len(values)), key=lambda i: (-float(values[i]), i))[:count]


def vote(choice_LE: Sequence[Tensor], top_k: int, budget: int) -> set[int]:
    """DES-Vote: sum each token's top-k scores over the block, take the `budget` highest, ties to the lower id."""
    votes: dict[int, float] = {}
    for choice in choice_LE:
        for expert in choice.topk(top_k).indices.tolist():
            votes[expert] = votes.get(expert, 0.0) + float(choice[expert])
    every = range(len(choice_LE[0]))
    return set(sorted(every, key=lambda e: (-votes.get(e, float("-inf")), e))[:budget])


def assign(name: str, router: Any, logits_E: Tensor, coreset: set[int], top_k: int) -> dict[int, float]:
    """Expert -> weight of one token inside the coreset."""
    affinity, choice = scores(name, router, logits_E)
    choice = choice.clone()
    choice[[e for e in range(len(choice)) if e not in coreset]] = float("-inf")
    if name in ("glm4_moe", "llada2"):  # 4 groups, 2 of which are kept, by the sum of their best two
        groups = choice.view(4, -1)
        for group in set(range(4)) - set(best(groups.topk(2, dim=-1).values.sum(-1), 2)):
            groups[group] = float("-inf")
    ids = [e for e in best(choice, top_k) if choice[e] > float("-inf")]
    weights = torch.stack([affinity[e] for e in ids])
    if name not in ("olmoe", "llada_moe"):
        weights = weights / weights.sum()
    if name in ("glm4_moe", "llada2"):
        weights = weights * 2.5
    if name == "diffusion_gemma":
        weights = weights * router.per_expert_scale[ids].double()
    return dict(zip(ids, weights.tolist(), strict=True))
