"""Does a policy keep a share of vanilla's accuracy? An exact test for paired outcomes, its bound, and its sample size.

Every prompt is answered by vanilla and by the policy. Write q for the chance that the policy solves a prompt which
vanilla solves, s for the chance that it solves one which vanilla does not, and w for vanilla's odds against a solution
(unsolved / solved prompts). The policy's accuracy is then q + s w of vanilla's. Given how many prompts vanilla solves,
`kept` and `gained` are independent binomial counts, so the chance of any result under "q + s w <= r" can be summed up
exactly; s, which that hypothesis leaves open, is taken at its worst within its own confidence interval (Suissa and
Shuster 1991; Berger and Boos 1994), and the number that vanilla solves is averaged over at vanilla's measured rate.
Results are ordered by a score statistic in the manner of Nam and Blackwelder (2002). Without prompts that vanilla fails
this is the exact binomial test, and so it is for agreement with vanilla, where vanilla's answer is the right one by
definition.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import betainc, gammaln, xlog1py, xlogy
from scipy.stats import beta, binom, norm

from expertshare.evaluation.statistics import PairedCounts

POWER = 0.8
# Error that is spent on bounding the open parameter, as a share of all of it (Berger and Boos).
_SPENT_ON_NUISANCE = 0.02
_FAR = 8.0  # standard deviations (and counts) beyond which a binomial is cut off
_GRID = 25
# Gauss-Hermite nodes and weights for an average over a normal variable.
_NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(5)
_WEIGHTS = _WEIGHTS / _WEIGHTS.sum()


def p_value(counts: PairedCounts, retain: float, *, error: float) -> float:
    """Largest chance of a result as good as `counts` for a policy that retains no more than `retain`.

    retain in (0, 1); error: the level that the p-value will be compared with, of which 2 % bound the open parameter.
    """
    if not counts.solved:
        return 1.0
    unsolved = counts.gained + counts.neither
    if not unsolved:
        return float(binom.sf(counts.kept - 1, counts.solved, retain))
    spent = error * _SPENT_ON_NUISANCE
    low, high = _clopper_pearson(counts.gained, unsolved, spent)
    high = min(high, retain * counts.solved / unsolved)  # beyond it q would be negative
    if low >= high:
        return min(1.0, _chance(counts, retain, high) + spent)
    worst = max(_chance(counts, retain, float(s)) for s in np.linspace(low, high, _GRID))
    return min(1.0, worst + spent)


def lower_bound(counts: PairedCounts, *, confidence: float) -> float:
    """One-sided bound on the retained share, capped at 1: every smaller share is refuted at this confidence."""
    error = 1.0 - confidence
    if p_value(counts, 1.0 - 1e-9, error=error) <= error:
        return 1.0
    low, high = 0.0, 1.0 - 1e-9
    while high - low > 1e-5:
        middle = (low + high) / 2
        low, high = (middle, high) if p_value(counts, middle, error=error) <= error else (low, middle)
    return low


@dataclass(frozen=True, kw_only=True, slots=True)
class Gap:
    """What a sample predicts for "policy right - retain * vanilla right" of one prompt: its mean, its standard
    deviation, and that on the edge of the hypothesis, by which the test scales it."""

    mean: float
    deviation: float
    edge_deviation: float

    @classmethod
    def of(cls, counts: PairedCounts, retain: float) -> Gap:
        """Half a prompt is added to lost, and to gained where there is one to gain, so that rates of zero do not
        promise certainty. At least one prompt that vanilla solves."""
        total = counts.total + 0.5 + 0.5 * bool(counts.neither)
        lost = (counts.lost + 0.5) / total
        gained = (counts.gained + 0.5 * bool(counts.neither)) / total
        kept = counts.kept / total
        mean = gained - retain * lost + (1.0 - retain) * kept
        square = gained + retain**2 * lost + (1.0 - retain) ** 2 * kept
        edge = retain * ((1.0 - retain) * (kept + lost) + 2.0 * gained)
        return cls(mean=mean, deviation=math.sqrt(max(square - mean**2, 0.0)), edge_deviation=math.sqrt(edge))


def needed_prompts(counts: PairedCounts, retain: float, *, confidence: float, power: float = POWER) -> int | None:
    """Prompts with which a policy of these rates would be certified with probability `power`; None: no number would do.

    n = ((z_confidence edge_deviation + z_power deviation) / mean)^2 (Gap), but never fewer than
    log(1 - confidence) / log(retain) prompts that vanilla solves, which certify even without a single loss.
    """
    if not counts.solved:
        return None
    gap = Gap.of(counts, retain)
    if gap.mean <= 0.0:
        return None
    width = float(norm.ppf(confidence)) * gap.edge_deviation + float(norm.ppf(power)) * gap.deviation
    least = least_solved(retain, confidence) * counts.total / counts.solved
    return math.ceil(max((width / gap.mean) ** 2, least))


def chance_to_pass(counts: PairedCounts, retain: float, *, confidence: float, prompts: int) -> float:
    """Predicted chance of a certificate from `prompts` fresh prompts for a policy that did `counts` on others."""
    if counts.solved / max(1, counts.total) * prompts < least_solved(retain, confidence):
        return 0.0
    gap = Gap.of(counts, retain)
    short = gap.mean * math.sqrt(prompts) - float(norm.ppf(confidence)) * gap.edge_deviation
    return float(norm.cdf(short / gap.deviation)) if gap.deviation else float(short >= 0.0)


def least_solved(retain: float, confidence: float) -> int:
    """Prompts solved by vanilla, all of them kept, that are needed to certify anything: retain^n <= 1 - confidence."""
    return math.ceil(math.log(1.0 - confidence) / math.log(retain) - 1e-9)


def _chance(counts: PairedCounts, retain: float, s: float) -> float:
    """Chance of a score at least that of `counts` where the policy retains `retain` and gains at the rate s."""
    total, solved = counts.total, counts.solved
    q = min(1.0, max(0.0, retain - s * (total - solved) / solved))
    observed = (counts.kept + counts.gained - retain * solved) / _spread(np.array([counts.gained]), solved, retain)[0]
    deviation = math.sqrt(solved * (total - solved) / total)
    chance = 0.0
    for node, weight in zip(_NODES, _WEIGHTS, strict=True):
        others = min(total, max(1, round(solved + node * deviation)))
        chance += weight * _chance_given(others, total - others, retain, q, s, observed)
    return chance


def _chance_given(solved: int, unsolved: int, retain: float, q: float, s: float, observed: float) -> float:
    """Chance of a score of at least `observed` among so many prompts that vanilla solves and does not."""
    centre, far = unsolved * s, _FAR * (1.0 + math.sqrt(unsolved * s * (1.0 - s)))
    gained = np.arange(max(0, math.floor(centre - far)), min(unsolved, math.ceil(centre + far)) + 1)
    least_kept = np.ceil(retain * solved - gained + observed * _spread(gained, solved, retain) - 1e-9)
    inside = np.clip(least_kept, 1, solved)
    tail = np.where(least_kept <= 0, 1.0, betainc(inside, solved - inside + 1, q)) * (least_kept <= solved)
    ways = gammaln(unsolved + 1) - gammaln(gained + 1) - gammaln(unsolved - gained + 1)
    return float(np.dot(np.exp(ways + xlogy(gained, s) + xlog1py(unsolved - gained, -s)), tail))


def _spread(gained: NDArray[np.int64], solved: int, retain: float) -> NDArray[np.float64]:
    """Standard deviation of the score on the edge of the hypothesis, where lost = (1 - retain) solved + gained."""
    return np.asarray(np.sqrt(retain * ((1.0 - retain) * solved + 2.0 * gained)))


def _clopper_pearson(successes: int, count: int, error: float) -> tuple[float, float]:
    low = float(beta.ppf(error / 2, successes, count - successes + 1)) if successes else 0.0
    high = float(beta.ppf(1 - error / 2, successes + 1, count - successes)) if successes < count else 1.0
    return low, high
