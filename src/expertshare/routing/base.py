"""What all policies have in common, and how budgets are read."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, Self, get_args

import torch
from torch import Tensor

from expertshare.config import GroupLimit, RouterSpec
from expertshare.errors import PolicyError
from expertshare.routing.assign import everything
from expertshare.routing.ballots import Ballots
from expertshare.types import Coreset, RouterScores

Budget = int | float
Voters = Literal["all", "masked"]
_WORDS = {"group_limit": get_args(GroupLimit), "voters": get_args(Voters), "ballots": get_args(Ballots)}


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenPolicy:
    """A policy without a coreset: every expert stays available, a token may run fewer of them."""

    name: ClassVar[str]

    @property
    def reuse(self) -> None:
        """There is no coreset to keep."""

    @property
    def needs_steps(self) -> bool:
        """A token decides by itself."""
        return False

    @property
    def group_limit(self) -> GroupLimit:
        """The model's own rule."""
        return "inside"

    def bind(self, spec: RouterSpec) -> Self:
        """Nothing to derive."""
        return self

    def select(self, scores: RouterScores, spec: RouterSpec, previous: Coreset | None = None) -> Coreset:
        """All experts."""
        return everything(scores)

    def keep(self, affinity_TK: Tensor) -> Tensor | None:
        """All K of them."""
        return None


@dataclass(frozen=True, kw_only=True, slots=True)
class CoresetPolicy:
    """A policy with a coreset: a token still runs K experts, all of them inside what its block agreed on.

    group_limit: "inside" applies the model's group-limited routing within the coreset (dMoE), "ignore" drops it there
    (LLaDA2.2). Without expert groups both are the same. voters: whose scores choose the coreset. reuse: in how
    many steps of a block decoding uses a coreset before it selects another; None is 1.
    """

    name: ClassVar[str]
    group_limit: GroupLimit = field(default="inside", metadata={"help": "group rule in the coreset: inside, ignore"})
    voters: Voters = field(default="all", metadata={"help": "tokens that vote: all, masked"})
    reuse: int | None = field(default=None, metadata={"help": "steps of a block that a coreset serves (default: 1)"})

    def __post_init__(self) -> None:
        for knob, words in _WORDS.items():
            value = getattr(self, knob, words[0])  # not every policy has ballots
            if value not in words:
                raise PolicyError(f"{self.name}: {knob} must be one of {', '.join(words)}, got {value!r}")
        if self.reuse is not None and self.reuse < 1:
            raise PolicyError(f"{self.name}: reuse must be a number of steps, at least 1, got {self.reuse}")

    @property
    def needs_steps(self) -> bool:
        """For `voters` or `reuse`."""
        return self.voters == "masked" or (self.reuse or 1) > 1

    def voting(self, scores: RouterScores) -> RouterScores:
        """The scores with every token that does not vote taken for padding.

        voters "masked": those still to be decided; a group without one (prefill, commit) lets all its tokens vote.
        """
        if self.voters == "all" or scores.masked_GL is None:
            return scores
        masked_GL = scores.live_GL & scores.masked_GL
        return replace(scores, live_GL=torch.where(masked_GL.any(dim=1, keepdim=True), masked_GL, scores.live_GL))

    def keep(self, affinity_TK: Tensor) -> Tensor | None:
        """All K of them."""
        return None


def default_budget(spec: RouterSpec, group_limit: GroupLimit) -> int:
    """K experts more than the smallest possible coreset: 20 for LLaDA2.0-mini, 16 for LLaDA-MoE and SDAR-MoE."""
    return min(spec.num_experts, spec.min_coreset_size(group_limit) + spec.top_k)


def resolve_budget(budget: Budget | None, spec: RouterSpec, group_limit: GroupLimit, policy: str) -> int:
    """Number of experts that `budget` stands for: a count, a fraction of all experts (rounded down), or the default.

    Raises PolicyError below the smallest workable coreset or above the number of experts.
    """
    if budget is None:
        return default_budget(spec, group_limit)
    least = spec.min_coreset_size(group_limit)
    if isinstance(budget, float):
        if not 0.0 < budget <= 1.0:
            raise PolicyError(
                f"{policy}: a budget is a count of experts (a whole number) or a fraction in (0, 1], got {budget}"
            )
        count = math.floor(budget * spec.num_experts + 1e-9)
    else:
        count = budget
    if not least <= count <= spec.num_experts:
        shown = f"{budget} ({count} experts)" if isinstance(budget, float) else f"{budget}"
        raise PolicyError(
            f"{policy}: the budget must lie in {least}..{spec.num_experts} experts for this model "
            f"({spec.top_k} experts per token, group limit {group_limit!r}), got {shown}"
        )
    return count


def check_count(value: int, *, least: int, most: int, knob: str, policy: str) -> None:
    """Raise PolicyError unless `value` lies in least..most."""
    if not least <= value <= most:
        raise PolicyError(f"{policy}: {knob} must lie in {least}..{most} for this model, got {value}")
