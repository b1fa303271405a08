"""From an easy setting of a policy to the one that is wanted."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from expertshare.config import RouterSpec
from expertshare.errors import PolicyError
from expertshare.routing import parse_policy
from expertshare.training.config import DistillConfig
from expertshare.types import RoutingPolicy


@dataclass(frozen=True, kw_only=True, slots=True)
class Curriculum:
    """The policy of every step: the numbers of `start` go evenly to those of `target` in `steps` steps.

    Both are bound to the model's router, so that all numbers are concrete.
    """

    start: RoutingPolicy
    target: RoutingPolicy
    steps: int
    spec: RouterSpec

    def policy(self, step: int) -> RoutingPolicy:
        """The bound policy of 0-based `step`; from `steps` on, the target itself."""
        if step >= self.steps:
            return self.target
        share = step / self.steps
        between = {name: type(low)(round(low + share * (high - low), 9)) for name, (low, high) in _moving(self).items()}
        return replace(self.target, **between).bind(self.spec)  # type: ignore[type-var]


def _moving(curriculum: Curriculum) -> dict[str, tuple[float, float]]:
    pairs = {
        knob.name: (getattr(curriculum.start, knob.name), getattr(curriculum.target, knob.name))
        for knob in fields(curriculum.target)  # type: ignore[arg-type]
    }
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def make_curriculum(config: DistillConfig, spec: RouterSpec) -> Curriculum:
    """The curriculum that a configuration asks for; without a start policy, the target at every step.

    Raises PolicyError for a policy that the router cannot work with, or a start that is another policy or differs in
    more than numbers.
    """
    target = parse_policy(config.policy).bind(spec)
    if config.start_policy is None:
        return Curriculum(start=target, target=target, steps=0, spec=spec)
    start = parse_policy(config.start_policy).bind(spec)
    if start.name != target.name:
        raise PolicyError(
            f"the start policy must be {target.name} with other numbers, got {start.name}: only knobs can move"
        )
    steps = round(config.curriculum_share * config.steps)
    curriculum = Curriculum(start=start, target=target, steps=steps, spec=spec)
    for name, pair in _moving(curriculum).items():
        if not all(isinstance(value, int | float) for value in pair):
            raise PolicyError(f"{name} must be the same word in both policies, got {pair[0]!r} and {pair[1]!r}")
        if type(pair[0]) is not type(pair[1]):
            raise PolicyError(f"{name} must be a count or a fraction in both policies, got {pair[0]} and {pair[1]}")
    return curriculum
