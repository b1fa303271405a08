"""What may be tried: the range of every knob that sets how much a policy shares."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields

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


_RANGES: Mapping[str, Callable[[RouterSpec, GroupLimit], KnobRange]] = {
    "budget": lambda spec, limit: KnobRange(spec.min_coreset_size(limit), spec.num_experts, whole=True),
    "experts_per_vote": lambda spec, _: KnobRange(1, spec.top_k, whole=True),
    "experts_per_token": lambda spec, _: KnobRange(1, spec.top_k, whole=True),
    "top_p_experts": lambda *_: KnobRange(0.3, 1.0, whole=False),
    "skip_share": lambda *_: KnobRange(0.0, 0.6, whole=False),
}


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
        knob = next((f.name for f in fields(POLICIES[name]) if f.name in _RANGES), None)
        if knob is not None:
            reach = _RANGES[knob](spec, make_policy(name).group_limit)
            found.append(Dial(policy=name, knob=knob, range=reach))
        elif names is not None:
            raise PolicyError(
                f"expected policies with one of the knobs {', '.join(_RANGES)}, got {name!r}: there is nothing to tune"
            )
    if not found:
        raise PolicyError(f"expected at least one policy to tune, got none. {nearest('', POLICIES)}")
    return found
