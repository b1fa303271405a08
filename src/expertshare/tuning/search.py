"""The search: policies, knobs and per-layer budgets, judged on recorded steps."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import Field, dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from expertshare.config import RouterSpec
from expertshare.errors import InputError, PolicyError, nearest
from expertshare.evaluation.runner import ProgressListener
from expertshare.routing import POLICIES, Layerwise, RoutingPolicy, make_policy
from expertshare.tuning.replay import Point, Replay, Sensitivity, counted, measure_sensitivity

if TYPE_CHECKING:
    import optuna

SETTINGS_PER_DIAL = 8
# Settings whose divergence is within this factor of the front's at their cost are tried in single layers.
_NEAR_THE_FRONT = 1.3
_LAYERWISE = "layerwise"


@dataclass(frozen=True, kw_only=True, slots=True)
class Dial:
    """One policy and the knob that sets how much it shares: most at `low`, hardly at `high`. whole: a count."""

    policy: str
    knob: str
    low: float
    high: float
    whole: bool

    def at(self, value: float) -> RoutingPolicy:
        """The policy with its knob at `value`."""
        return make_policy(self.policy, {self.knob: round(value) if self.whole else round(value, 3)})

    def settings(self, count: int) -> list[float]:
        """`count` values at most, from low to high; counts at equal ratios, shares at equal distances."""
        space = np.geomspace if self.whole else np.linspace
        values = [float(value) for value in space(self.low, self.high, count)]
        return sorted({float(round(value)) if self.whole else round(value, 3) for value in values})


def dials(names: Sequence[str] | None, spec: RouterSpec) -> list[Dial]:
    """One for each named policy (None: all that have a knob to turn): its first knob that is declared as tuned.

    Raises PolicyError for an unknown name, or one without such a knob.
    """
    found: list[Dial] = []
    for name in POLICIES if names is None else dict.fromkeys(names):
        if name not in POLICIES:
            raise PolicyError(f"unknown policy {name!r}. {nearest(name, POLICIES)}")
        knob = next(iter(_tuned_knobs(POLICIES[name])), None)
        if knob is not None:
            tuned = knob.metadata["tuned"]  # True: within the knob's own limits, else the lowest and highest value
            low, high = knob.metadata["limits"](spec, make_policy(name).group_limit) if tuned is True else tuned
            found.append(Dial(policy=name, knob=knob.name, low=low, high=high, whole=tuned is True))
        elif names is not None:
            known = dict.fromkeys(knob.name for policy in POLICIES.values() for knob in _tuned_knobs(policy))
            raise PolicyError(
                f"expected policies with one of the knobs {', '.join(known)}, got {name!r}: there is nothing to tune"
            )
    if not found:
        raise PolicyError(f"expected at least one policy to tune, got none. {nearest('', POLICIES)}")
    return found


def _tuned_knobs(policy: type[RoutingPolicy]) -> list[Field[Any]]:
    return [knob for knob in fields(policy) if knob.metadata.get("tuned")]


def check_optuna() -> None:
    """Raise InputError where optuna is not installed."""
    if importlib.util.find_spec("optuna") is None:
        raise InputError("expected optuna for tuning, got none: install expertshare[tune]")


def search(
    replay: Replay, dials: Sequence[Dial], *, trials: int, seed: int, on_progress: ProgressListener | None = None
) -> list[Point]:
    """All policies that were tried: every dial at a few settings, then `trials` more that optuna's multi-objective
    TPE proposes (few experts, little divergence), per-layer allocations among them."""
    policies = [dial.at(value) for dial in dials for value in dial.settings(SETTINGS_PER_DIAL)]
    uniform = [replay.measure(policy) for policy in counted(policies, "policies", on_progress)]
    near = [point.policy for point in _near_front(uniform)]
    sensitivity = measure_sensitivity(replay, near, on_progress)
    return uniform + _propose(replay, dials, sensitivity, trials=trials, seed=seed, on_progress=on_progress)


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """Points that no other beats in both experts and divergence, from many experts to few."""
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p.unique_experts, p.divergence)):
        if not front or point.divergence < front[-1].divergence:
            front.append(point)
    return front[::-1]


def fronts_by_policy(points: Sequence[Point], front: Sequence[Point]) -> list[list[Point]]:
    """The own front of each policy that takes part in `front`, alone or in a layer.

    Divergence compares settings of one policy better than different policies: those that share by a budget lose more
    accuracy than DES-Seq does at the same divergence (docs/tuning.md).
    """
    names = dict.fromkeys(name for point in front for name in _names(point.policy))
    of_policy = [[p for p in points if p.policy.name == name] for name in names if name != "vanilla"]
    return [pareto_front(own) for own in of_policy if own]


def _names(policy: RoutingPolicy) -> list[str]:
    return [layer.name for layer in policy.layers] if isinstance(policy, Layerwise) else [policy.name]


def _near_front(points: Sequence[Point]) -> list[Point]:
    front = pareto_front(points)

    def is_near(point: Point) -> bool:
        rivals = [p for p in front if p.unique_experts <= point.unique_experts]
        return point.divergence <= _NEAR_THE_FRONT * min(p.divergence for p in rivals)

    return [point for point in points if is_near(point)]


def _propose(
    replay: Replay,
    dials: Sequence[Dial],
    sensitivity: Sensitivity,
    *,
    trials: int,
    seed: int,
    on_progress: ProgressListener | None,
) -> list[Point]:
    import optuna  # an optional dependency: check_optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    points: list[Point] = []

    def objective(trial: optuna.Trial) -> tuple[float, float]:
        point = replay.measure(_suggest(trial, dials, sensitivity))
        points.append(point)
        if on_progress is not None:
            on_progress("search", len(points), trials)
        return point.unique_experts, point.divergence

    study = optuna.create_study(
        directions=["minimize", "minimize"], sampler=optuna.samplers.TPESampler(seed=seed, n_startup_trials=8)
    )
    low, high = sensitivity.price_range
    for place in range(min(trials, 8)):  # allocations over the whole range of prices come first
        price = low * (high / low) ** (place / 7)
        study.enqueue_trial({"policy": _LAYERWISE, "price": price, **dict.fromkeys(_factors(sensitivity), 1.0)})
    study.optimize(objective, n_trials=trials)
    return points


def _suggest(trial: optuna.Trial, dials: Sequence[Dial], sensitivity: Sensitivity) -> RoutingPolicy:
    name = trial.suggest_categorical("policy", [_LAYERWISE, *(dial.policy for dial in dials)])
    if name == _LAYERWISE:
        low, high = sensitivity.price_range
        price = trial.suggest_float("price", low, high, log=True)
        factors = [trial.suggest_float(name, 0.25, 4.0, log=True) for name in _factors(sensitivity)]
        return sensitivity.allocate([price * factor for factor in factors])
    dial = next(dial for dial in dials if dial.policy == name)
    label = f"{dial.policy}.{dial.knob}"
    if dial.whole:
        return dial.at(trial.suggest_int(label, int(dial.low), int(dial.high)))
    return dial.at(trial.suggest_float(label, dial.low, dial.high))


def _factors(sensitivity: Sensitivity) -> list[str]:
    return [f"layer_{n}.price" for n in range(len(sensitivity.options))]


# Predicted chance of a certificate with which a point is taken for safe, and from which it is worth a test.
_SAFE, _WORTH_A_TEST = 0.5, 0.25
# Points tested on either side of the edge.
_DEARER, _CHEAPER = 2, 4
# Neighbours on the front differ by this share of the experts at least.
_LEAST_SAVING = 0.02


def thin_front(front: Sequence[Point]) -> list[Point]:
    """Points that save something worth a test of its own, from many experts to few."""
    kept: list[Point] = []
    for point in front:
        if not kept or point.unique_experts <= (1.0 - _LEAST_SAVING) * kept[-1].unique_experts:
            kept.append(point)
    return kept


def find_edge(front: Sequence[Point], chance: Callable[[Point], float]) -> int:
    """Place on the front (many experts first) of the cheapest point that is likely to pass; 0 where none is.

    Bisection, as quality is taken to fall along the front. chance: predicted from generation on prompts of the search.
    """
    low, high = 0, len(front) - 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if chance(front[middle]) >= _SAFE else (low, middle - 1)
    return low


def around(front: Sequence[Point], edge: int) -> list[Point]:
    """The points on both sides of the edge."""
    return list(front[max(0, edge - _DEARER) : edge + _CHEAPER + 1])


def best_chain(points: Sequence[Point], chance: Callable[[Point], float]) -> list[Point]:
    """Points that stand a chance, and a better one than every cheaper point, the dearest first; where none stands
    one, the likeliest alone."""
    chain: list[Point] = []
    for point in sorted(points, key=lambda p: (p.unique_experts, -chance(p))):
        if chance(point) >= _WORTH_A_TEST and (not chain or chance(point) > chance(chain[-1])):
            chain.append(point)
    return chain[::-1] or [max(points, key=chance)]
