"""Ballots: what each token of a block contributes to the choice of its coreset."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from expertshare.config import GroupLimit, RouterSpec
from expertshare.routing import compiled
from expertshare.routing.assign import reach_limit, token_choice
from expertshare.routing.ranking import top_k_mask
from expertshare.types import Coreset, RouterScores

Ballots = Literal["ungrouped", "grouped"]


def ballots(scores: RouterScores, spec: RouterSpec, k: int, kind: Ballots) -> Tensor:
    """Which experts each live token votes for, its `k` best: bool [G, L, E]. Padding votes for none.

    "ungrouped" ranks all experts, as the papers' code does; "grouped" ranks those that the token could really be
    routed to under the model's group limit.
    """
    limit: GroupLimit = "inside" if kind == "grouped" else "ignore"
    library = compiled.library_for(scores.choice_GLE, masks=(scores.live_GL,))
    if library is not None:
        return compiled.cast(library, scores.choice_GLE, scores.live_GL, k, reach_limit(spec, limit))
    reach = token_choice(scores, spec, None, limit)
    cast = top_k_mask(reach, k) & (reach > float("-inf"))
    return cast & scores.live_GL.unsqueeze(-1)


def tally(scores: RouterScores, cast_GLE: Tensor) -> Tensor:
    """Sum of the choice scores of the ballots cast: float32 [G, E], -inf where nobody voted.

    The sum may be negative where the balancing bias is; an expert with a vote still ranks before one without. It is
    taken in float64, where adding up float32 scores rounds nothing, so that the order of the tokens does not matter.
    """
    library = compiled.library_for(scores.choice_GLE, masks=(cast_GLE,))
    if library is not None:
        return compiled.tally(library, scores.choice_GLE, cast_GLE)
    votes = scores.choice_GLE.detach().masked_fill(~cast_GLE, 0.0).sum(dim=1, dtype=torch.float64).float()
    return votes.masked_fill(~cast_GLE.any(dim=1), float("-inf"))


def election(scores: RouterScores, spec: RouterSpec, kind: Ballots, num_firsts: int = 1) -> tuple[Tensor, Tensor]:
    """The tally of every token's K best, and the experts that any token has among its `num_firsts` best (at most K).

    Returns votes float32 [G, E] as `tally` does, and bool [G, E].
    """
    limit: GroupLimit = "inside" if kind == "grouped" else "ignore"
    library = compiled.library_for(scores.choice_GLE, masks=(scores.live_GL,))
    if library is not None:
        reach = reach_limit(spec, limit)
        return compiled.votes(library, scores.choice_GLE, scores.live_GL, spec.top_k, reach, num_firsts)
    votes_GE = tally(scores, ballots(scores, spec, spec.top_k, kind))
    return votes_GE, ballots(scores, spec, num_firsts, kind).any(dim=1)


def highest(scores: RouterScores) -> Tensor:
    """The highest choice score that a live token of the group gives: float32 [G, E], -inf where none is live."""
    library = compiled.library_for(scores.choice_GLE, masks=(scores.live_GL,))
    if library is not None:
        return compiled.group_max(library, scores.choice_GLE, scores.live_GL)
    return scores.choice_GLE.detach().masked_fill(~scores.live_GL.unsqueeze(-1), float("-inf")).amax(dim=1)


def grow(member_GE: Tensor, votes_GE: Tensor, size: int) -> Coreset:
    """Enlarge each coreset to at least `size` experts, in order of votes, ties to the lower id."""
    return Coreset(member_GE | top_k_mask(votes_GE, size, member_GE))
