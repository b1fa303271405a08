"""What a policy means, as data: every implementation of routing interprets the same fields."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from expertshare.config import GroupLimit, RouterSpec
from expertshare.errors import PolicyError

Ballots = Literal["ungrouped", "grouped"]
Voters = Literal["all", "masked"]
Ranking = Literal["all", "votes", "highest", "coverage"]
RANKINGS: tuple[Ranking, ...] = get_args(Ranking)
"""In the order by which kernels number them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SharingRule:
    """The one statement of a policy: how a sharing group agrees on its coreset, and what a token runs inside it.

    routing/select.py and routing/assign.py interpret it in torch and define what it means; the native library
    (csrc/routing_step.h) and the Triton kernels (kernels/triton/device) interpret the same fields to the same bits.

    Who votes. voters: "all" live tokens, or the "masked" ones, which are still to be decided; a group without a masked
    token (prefill, commit) lets all vote. ballots: the K experts that a token votes for are its best of all
    ("ungrouped", as the papers' code does) or of those that the model's group limit lets it reach ("grouped").

    The coreset. ranking: experts are ranked by the sum of the choice scores of the ballots for them ("votes"), by the
    highest choice score of a voter ("highest"), or taken one by one by what they add to the voters' covered affinity
    ("coverage", of each voter up to the share `saturation` of its K best); "all" shares nothing. The coreset is the
    `size` best. With votes it can be more: protected: each voter's so many best experts come before all others, and
    keep_protected: they all stay, even if they are more than `size`; prefix_share: the shortest prefix of the ranking
    whose share of the votes passes this one stays too.

    Inside it. group_limit: whether the model's group limit applies there ("inside") or not ("ignore").
    experts_per_token: a token keeps so many of its K experts, None for all; drop_share: of these it drops the lightest
    while their share of its weight stays under this one.

    reuse: denoising steps of a block that a coreset serves. Raises PolicyError for numbers that no router can use.
    """

    ranking: Ranking = "all"
    ballots: Ballots = "ungrouped"
    size: int = 0
    protected: int = 0
    prefix_share: float | None = None
    keep_protected: bool = False
    saturation: float | None = None
    experts_per_token: int | None = None
    drop_share: float | None = None
    voters: Voters = "all"
    reuse: int = 1
    group_limit: GroupLimit = "inside"

    def __post_init__(self) -> None:
        counts = {
            "size": (self.size, 0 if self.ranking == "all" else 1),
            "protected": (self.protected, 0),
            "experts_per_token": (1 if self.experts_per_token is None else self.experts_per_token, 1),
            "reuse": (self.reuse, 1),
        }
        for field, (count, least) in counts.items():
            if count < least:
                raise PolicyError(f"a sharing rule needs {field} of at least {least}, got {count}")
        for field in ("prefix_share", "saturation", "drop_share"):
            share = getattr(self, field)
            if share is not None and not 0.0 <= share <= 1.0:
                raise PolicyError(f"a sharing rule needs {field} in [0, 1], got {share}")
        if (self.ranking == "coverage") != (self.saturation is not None):
            raise PolicyError(f"a saturation belongs to the ranking 'coverage' alone, got {self.ranking!r}")
        if self.ranking != "votes" and (self.protected or self.prefix_share is not None):
            raise PolicyError(f"protected experts and a prefix need the ranking 'votes', got {self.ranking!r}")


def expert_groups(spec: RouterSpec, limited: bool) -> tuple[int, int]:
    """Groups of experts, and how many of them a token may reach: one of one where there is no limit."""
    return (spec.num_groups, spec.kept_groups) if limited and spec.kept_groups < spec.num_groups else (1, 1)
