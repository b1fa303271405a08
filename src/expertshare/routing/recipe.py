"""A policy in a few numbers: what the native library needs to know to route a layer in one call, and Triton in two.

A recipe adds nothing to a policy: `select` and `keep` define it, and a recipe says the same again in terms that the
library has (csrc/routing_step.h). One without a recipe is routed by its `select` and `keep`, in more calls.
"""

from __future__ import annotations

from functools import cache
from typing import Protocol, cast

from expertshare.config import RouterSpec
from expertshare.types import Recipe, RoutingPolicy

__all__ = ["HasRecipe", "Recipe", "recipe_of"]


class HasRecipe(Protocol):
    """A policy that can be said in a few numbers."""

    def recipe(self, spec: RouterSpec) -> Recipe | None:
        """Those that give the same as `select` and `keep`, to the last bit; None with knobs that have no such numbers.

        The library sees scores and live tokens only: a coreset of the step before, or anything else, is not in it.
        """
        ...


def recipe_of(policy: RoutingPolicy, spec: RouterSpec) -> Recipe | None:
    """The policy's recipe; None where it has none, or only one of a class whose `select` or `keep` it replaced.

    None as well for a policy that needs to know of steps: the library is not told of them.
    """
    if policy.needs_steps or not _is_own(type(policy)):
        return None
    return cast(HasRecipe, policy).recipe(spec)


@cache
def _is_own(kind: type) -> bool:
    """Whether the recipe was written with or after what it describes."""

    def definer(name: str) -> int:
        return next((place for place, base in enumerate(kind.__mro__) if name in vars(base)), len(kind.__mro__))

    return definer("recipe") < len(kind.__mro__) and definer("recipe") <= min(definer("select"), definer("keep"))
