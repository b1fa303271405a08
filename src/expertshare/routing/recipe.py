"""A policy in a few numbers: what the native library needs to know to route a layer in one call.

A recipe adds nothing to a policy: `select` and `keep` define it, and a recipe says the same again in terms that the
library has (csrc/routing_step.h). One without a recipe is routed by its `select` and `keep`, in more calls.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal, Protocol, cast

from expertshare.config import RouterSpec
from expertshare.routing.ballots import Ballots
from expertshare.types import RoutingPolicy

Ranking = Literal["all", "votes", "highest"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """How a coreset is made, and what a token keeps of its K experts inside it.

    ranking: of the experts of a group, by the ballots' `tally` ("votes") or by `highest`; "all" shares no coreset. The
    coreset is the `size` best, those in front before all others: the `num_firsts` best of every token (with "votes"),
    or the shortest prefix of the ranking that passes `prefix_share`. front_is_whole: a front larger than `size` is not
    cut. slots: a token keeps so many of its experts, None for all; of these it drops the lightest, up to `drop_share`.
    """

    ranking: Ranking = "all"
    ballots: Ballots = "ungrouped"
    size: int = 0
    num_firsts: int = 0
    prefix_share: float | None = None
    front_is_whole: bool = False
    slots: int | None = None
    drop_share: float | None = None


class HasRecipe(Protocol):
    """A policy that can be said in a few numbers."""

    def recipe(self, spec: RouterSpec) -> Recipe | None:
        """Those that give the same as `select` and `keep`, to the last bit; None with knobs that have no such numbers.

        The library sees scores and live tokens only: a coreset of the step before, or anything else, is not in it.
        """
        ...


def recipe_of(policy: RoutingPolicy, spec: RouterSpec) -> Recipe | None:
    """The policy's recipe; None where it has none, or only one of a class whose `select` or `keep` it replaced."""
    return cast(HasRecipe, policy).recipe(spec) if _is_own(type(policy)) else None


@cache
def _is_own(kind: type) -> bool:
    """Whether the recipe was written with or after what it describes."""

    def definer(name: str) -> int:
        return next((place for place, base in enumerate(kind.__mro__) if name in vars(base)), len(kind.__mro__))

    return definer("recipe") < len(kind.__mro__) and definer("recipe") <= min(definer("select"), definer("keep"))
