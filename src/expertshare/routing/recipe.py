"""Policies as numbers, for kernels that run a whole selection at once and cannot call `select` or `keep`."""

from __future__ import annotations

from expertshare.config import RouterSpec
from expertshare.routing.assign import reach_limit
from expertshare.routing.ballots import Ballots
from expertshare.routing.base import Budget, CoresetPolicy, resolve_budget
from expertshare.routing.block_max import BlockMax
from expertshare.routing.block_top_p import BlockTopP
from expertshare.routing.des_seq import DesSeq
from expertshare.routing.des_vote import DesVote
from expertshare.routing.protected_vote import ProtectedVote
from expertshare.routing.skip import Skip
from expertshare.routing.top_k_cap import TopKCap
from expertshare.routing.vanilla import Vanilla
from expertshare.types import Recipe, RoutingPolicy

_OURS = (Vanilla, TopKCap, Skip, BlockMax, DesVote, ProtectedVote, DesSeq, BlockTopP)


def recipe_of(policy: RoutingPolicy, spec: RouterSpec) -> Recipe | None:
    """What `policy` does under this router, as numbers; None for a policy that has none.

    The policy's own `select` and `keep` stay the definition: tests/kernels/triton holds every recipe to them.
    """
    if type(policy) not in _OURS:  # a class derived from one of ours may select something else
        return None
    match policy:
        case Vanilla():
            return Recipe()
        case TopKCap():
            return Recipe(slots=policy.experts_per_token)
        case Skip():
            return Recipe(drop_share=policy.skip_share)
        case BlockMax():
            return Recipe(ranking="highest", size=_size(policy, policy.budget, spec))
        case DesVote():
            return Recipe(ranking="votes", reach=_reach(spec, policy.ballots), size=_size(policy, policy.budget, spec))
        case ProtectedVote():
            size = _size(policy, policy.budget, spec)
            return Recipe(ranking="votes", reach=_reach(spec, policy.ballots), size=size, front=1)
        case DesSeq():
            return Recipe(
                ranking="votes",
                reach=_reach(spec, policy.ballots),
                size=spec.min_coreset_size(policy.group_limit),
                front=policy.experts_per_vote,
                whole_front=True,
            )
        case BlockTopP():
            least = spec.min_coreset_size(policy.group_limit)
            return Recipe(
                ranking="votes",
                reach=_reach(spec, policy.ballots),
                size=least if policy.guard is None else policy.guard,
                share=policy.top_p_experts,
            )
        case _:
            return None


def _reach(spec: RouterSpec, ballots: Ballots) -> tuple[int, int]:
    """Of votes."""
    return reach_limit(spec, "inside" if ballots == "grouped" else "ignore")


def _size(policy: CoresetPolicy, budget: Budget | None, spec: RouterSpec) -> int:
    return resolve_budget(budget, spec, policy.group_limit, policy.name)
