"""Ballots: what each token of a block contributes to the choice of its coreset."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from expertshare.config import RouterSpec
from expertshare.routing.assign import token_choice
from expertshare.routing.ranking import top_k_mask
from expertshare.types import Coreset, RouterScores

Ballots = Literal["ungrouped", "grouped"]


def ballots(scores: RouterScores, spec: RouterSpec, k: int, kind: Ballots) -> Tensor:
    """Which experts each live token votes for, its `k` best: bool [G, L, E]. Padding votes for none.

    "ungrouped" ranks all experts, as the papers' code does; "grouped" ranks those that the token could really be
    routed to under the model's group limit.
    """
    reach = token_choice(scores, spec, None, "inside" if kind == "grouped" else "ignore")
    cast = top_k_mask(reach, k) & (reach > float("-inf"))
    return cast & scores.live_GL.unsqueeze(-1)


def tally(scores: RouterScores, cast_GLE: Tensor) -> Tensor:
    """Sum of the choice scores of the ballots cast: float32 [G, E], -inf where nobody voted.

    The sum may be negative where the balancing bias is; an expert with a vote still ranks before one without. It is
    taken in float64, where adding up float32 scores rounds nothing, so that the order of the tokens does not matter.
    """
    votes = scores.choice_GLE.detach().masked_fill(~cast_GLE, 0.0).sum(dim=1, dtype=torch.float64).float()
    return votes.masked_fill(~cast_GLE.any(dim=1), float("-inf"))


def grow(member_GE: Tensor, votes_GE: Tensor, size: int) -> Coreset:
    """Enlarge each coreset to at least `size` experts, in order of votes, ties to the lower id."""
    wanted = votes_GE.masked_fill(member_GE, torch.inf)
    return Coreset(member_GE | top_k_mask(wanted, size))
