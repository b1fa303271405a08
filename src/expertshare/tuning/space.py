"""What may be tried: the range of every knob that sets how much a policy shares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import Field, dataclass, fields
from typing import Any

import numpy as np

from expertshare.config import GroupLimit, RouterSpec
from expertshare.errors import PolicyError, nearest
from expertshare.routing import POLICIES, make_policy
from expertshare.types import RoutingPolicy


@dataclass(frozen=True, slots=True)
class KnobRange:
    """From where a policy shares most (low) to where it hardly shares (high)."""

    low: float
    high: float
    whole: bool


def range_of(knob: Field[Any], spec: RouterSpec, group_limit: GroupLimit) -> KnobRange | None:
    """What the knob's declaration says may be tried; None where it is not for tuning."""
    tuned = knob.metadata.get("tuned", False)
    if not tuned:
        return None
    low, high = knob.metadata["limits"](spec, group_limit) if tuned is True else tuned
    return KnobRange(low, high, whole=tuned is True)


@dataclass(frozen=True, kw_only=True, slots=True)
class Dial:
    """One policy and the knob that sets how much it shares."""

    policy: str
    knob: str
    range: KnobRange

    def at(self, value: float) -> RoutingPolicy:
        """The policy with its knob at `value`."""
        return make_policy(self.policy, {self.knob: round(value) if self.range.whole else round(value, 3)})

    def settings(self, count: int) -> list[float]:
        """`count` values at most, from low to high; counts at equal ratios, shares at equal distances."""
        space = np.geomspace if self.range.whole else np.linspace
        values = [float(value) for value in space(self.range.low, self.range.high, count)]
        return sorted({float(round(value)) if self.range.whole else round(value, 3) for value in values})


def dials(names: Sequence[str] | None, spec: RouterSpec) -> list[Dial]:
    """One for each named policy (None: all that have a knob to turn).

    Raises PolicyError for an unknown name, or one without such a knob.
    """
    found: list[Dial] = []
    for name in POLICIES if names is None else dict.fromkeys(names):
        if name not in POLICIES:
            raise PolicyError(f"unknown policy {name!r}. {nearest(name, POLICIES)}")
        limit = make_policy(name).group_limit
        ranges = {f.name: reach for f in fields(POLICIES[name]) if (reach := range_of(f, spec, limit))}
        for knob, reach in list(ranges.items())[:1]:
            found.append(Dial(policy=name, knob=knob, range=reach))
        if not ranges and names is not None:
            known = dict.fromkeys(f.name for p in POLICIES.values() for f in fields(p) if f.metadata.get("tuned"))
            raise PolicyError(
                f"expected policies with one of the knobs {', '.join(known)}, got {name!r}: there is nothing to tune"
            )
    if not found:
        raise PolicyError(f"expected at least one policy to tune, got none. {nearest('', POLICIES)}")
    return found
