"""Cutting a ranking where a cumulative share is reached. Masses are float32, added up in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from expertshare.routing import compiled
from expertshare.routing.ranking import top_k_ids


def shortest_prefix(score_GE: Tensor, share: float) -> Tensor:
    """Members of each row's ranking until their cumulative share passes `share`, the first past it included.

    score_GE: float32, -inf for those that are never members. Scores below 0 have no mass; where no score is positive
    there is no share to cut at, and with a share of 1 there is nothing to cut: then all are members. Returns bool.
    """
    library = compiled.library_for(score_GE)
    if library is not None:
        return compiled.shortest_prefix(library, score_GE, share)
    order_GE = top_k_ids(score_GE, score_GE.shape[-1])
    sorted_GE = score_GE.gather(-1, order_GE)
    mass_GE = sorted_GE.clamp_min(0.0).double()
    upto_GE = mass_GE.cumsum(dim=-1)
    member_GE = sorted_GE > float("-inf")
    if share != 1.0:  # else all of them, whatever the rounding of the sum
        member_GE = member_GE & (upto_GE - mass_GE <= share * upto_GE[..., -1:])
    return torch.empty_like(member_GE).scatter_(-1, order_GE, member_GE)


def drop_lightest(weight_TK: Tensor, share: float) -> Tensor:
    """All but the lightest of each row, whose cumulative share of the row's sum stays under `share`: bool [T, K].

    The heaviest stays in any case. Of equals the one that ranks last goes first, so that ties stay with the lower id.
    """
    num_slots = weight_TK.shape[-1]
    library = compiled.library_for(weight_TK)
    if library is not None and num_slots <= compiled.MOST_SLOTS:
        return compiled.drop_lightest(library, weight_TK, share)
    mass_TK = weight_TK.double()
    shares_TK = mass_TK / mass_TK.sum(dim=-1, keepdim=True).clamp_min(1e-20)
    order_TK = num_slots - 1 - shares_TK.flip(-1).argsort(dim=-1, stable=True)
    kept_TK = shares_TK.gather(-1, order_TK).cumsum(dim=-1) >= share
    kept_TK[..., -1] = True
    return torch.empty_like(kept_TK).scatter_(-1, order_TK, kept_TK)
