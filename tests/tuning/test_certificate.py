"""The certificate against exact formulas and simulations."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import beta, binom

from expertshare.evaluation.statistics import PairedCounts
from expertshare.tuning.certificate import least_solved, lower_bound, needed_prompts, p_value

ERROR = 0.05
FEW = st.integers(0, 40)


def counts(kept: int, lost: int, gained: int, neither: int) -> PairedCounts:
    return PairedCounts(kept=kept, lost=lost, gained=gained, neither=neither)


def test_pairs_are_counted() -> None:
    right, vanilla = [True, False, True, False, True], [True, True, False, False, True]
    assert PairedCounts.of(right, vanilla) == counts(2, 1, 1, 1)
    assert PairedCounts.of(right, vanilla).retained == pytest.approx(3 / 3)


def test_where_vanilla_solves_all_it_is_the_binomial_test() -> None:
    assert p_value(counts(95, 5, 0, 0), 0.9, error=ERROR) == pytest.approx(float(binom.sf(94, 100, 0.9)))


def test_where_vanilla_solves_all_the_bound_is_that_of_clopper_and_pearson() -> None:
    assert lower_bound(counts(95, 5, 0, 0), confidence=0.95) == pytest.approx(beta.ppf(0.05, 95, 6), abs=2e-5)


def test_nothing_is_shown_where_vanilla_solves_nothing() -> None:
    assert p_value(counts(0, 0, 5, 5), 0.5, error=ERROR) == 1.0


@settings(deadline=None, max_examples=25)
@given(kept=st.integers(20, 80), lost=FEW, gained=FEW, neither=FEW)
def test_a_better_result_has_no_larger_p_value(kept: int, lost: int, gained: int, neither: int) -> None:
    worse = p_value(counts(kept, lost + 1, gained, neither), 0.9, error=ERROR)
    better = p_value(counts(kept + 1, lost, gained, neither), 0.9, error=ERROR)
    assert better <= worse + 1e-9


def test_the_bound_is_where_the_test_turns() -> None:
    seen = counts(700, 8, 10, 182)
    bound = lower_bound(seen, confidence=0.95)
    assert p_value(seen, bound - 1e-3, error=ERROR) <= ERROR < p_value(seen, bound + 1e-3, error=ERROR)
    assert bound < seen.retained


def test_the_bound_is_capped_at_one() -> None:
    assert lower_bound(counts(500, 0, 200, 100), confidence=0.95) == 1.0


@pytest.mark.parametrize(
    ("prompts", "accuracy", "gain_rate", "retain"),
    [(400, 0.8, 0.0, 0.99), (1500, 0.8, 0.05, 0.99), (300, 0.6, 0.05, 0.95), (200, 0.9, 0.2, 0.9)],
)
def test_a_policy_on_the_edge_is_certified_no_more_often_than_promised(
    prompts: int, accuracy: float, gain_rate: float, retain: float
) -> None:
    """True retained share exactly `retain`. 300 repetitions; the limit is the 99.9 % quantile of Bin(300, 0.05)."""
    keep_rate = retain - gain_rate * (1 - accuracy) / accuracy
    chances = [
        accuracy * keep_rate,
        accuracy * (1 - keep_rate),
        (1 - accuracy) * gain_rate,
        (1 - accuracy) * (1 - gain_rate),
    ]
    draws = np.random.default_rng(5).multinomial(prompts, chances, size=300)
    known: dict[tuple[int, ...], bool] = {}
    for draw in {tuple(map(int, draw)) for draw in draws}:
        known[draw] = p_value(counts(*draw), retain, error=ERROR) <= ERROR
    certified = sum(known[tuple(map(int, draw))] for draw in draws)
    assert certified <= binom.ppf(0.999, 300, ERROR)


def test_a_lossless_policy_needs_the_well_known_number() -> None:
    """log 0.05 / log 0.99 = 298.07: the "rule of three"."""
    assert least_solved(0.99, 0.95) == math.ceil(math.log(0.05) / math.log(0.99)) == 299
    assert p_value(counts(299, 0, 0, 0), 0.99, error=ERROR) <= ERROR < p_value(counts(298, 0, 0, 0), 0.99, error=ERROR)


def test_sample_size_is_the_textbook_formula() -> None:
    """n = ((z sd under the hypothesis + z sd) / mean)^2 for the gap of one prompt, written out by outcome: kept 1 - r,
    lost -r, gained 1, neither 0; half a prompt more lost and gained."""
    r, total = 0.97, 1001.0
    shares = {1 - r: 800 / total, -r: 4.5 / total, 1.0: 6.5 / total}
    mean = sum(value * share for value, share in shares.items())
    variance = sum(value**2 * share for value, share in shares.items()) - mean**2
    edge = r * ((1 - r) * 804.5 / total + 2 * 6.5 / total)
    z = NormalDist().inv_cdf
    expected = ((z(0.95) * math.sqrt(edge) + z(0.8) * math.sqrt(variance)) / mean) ** 2
    assert needed_prompts(counts(800, 4, 6, 190), r, confidence=0.95) == math.ceil(expected)


def test_sample_size_is_never_below_the_lossless_one() -> None:
    assert needed_prompts(counts(10_000, 0, 0, 10_000), 0.99, confidence=0.95, power=0.5) == 2 * 299


def test_with_the_advised_number_four_in_five_are_certified() -> None:
    """Simulated; 80 % power within what 200 repetitions and the normal formula allow."""
    seen, retain = counts(7800, 60, 60, 2080), 0.98
    needed = needed_prompts(seen, retain, confidence=0.95)
    assert needed is not None
    rates = np.array([7800, 60, 60, 2080]) / 10_000
    draws = np.random.default_rng(3).multinomial(needed, rates, size=200)
    certified = sum(p_value(counts(*map(int, draw)), retain, error=ERROR) <= ERROR for draw in draws)
    assert 0.68 <= certified / 200 <= 0.92


def test_no_number_of_prompts_certifies_what_is_not_so() -> None:
    assert needed_prompts(counts(700, 100, 10, 190), 0.99, confidence=0.95) is None
