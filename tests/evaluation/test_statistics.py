"""Intervals against formulas written out here, and the two means of retained accuracy."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertshare.evaluation.statistics import paired_difference, proportion, retained

Z = 1.959963984540054  # normal quantile of 0.975


@given(st.lists(st.booleans(), min_size=1, max_size=300))
def test_wilson_interval_is_the_closed_formula(outcomes: list[bool]) -> None:
    n, p = len(outcomes), sum(outcomes) / len(outcomes)
    centre = (p + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
    share = proportion(outcomes)
    assert share.value == p
    assert share.low == pytest.approx(centre - half, abs=1e-9)
    assert share.high == pytest.approx(centre + half, abs=1e-9)


def test_paired_difference_by_hand() -> None:
    # 100 items: 6 won, 2 lost. Smoothed cells 6.5 and 2.5 of 102.
    mine = [True] * 6 + [False] * 2 + [True] * 92
    theirs = [False] * 6 + [True] * 2 + [True] * 92
    found = paired_difference(mine, theirs)
    error = math.sqrt(9.0 - 16.0 / 102) / 102
    assert (found.gained, found.lost, found.value) == (6, 2, 0.04)
    assert found.low == pytest.approx(4 / 102 - Z * error)
    assert found.high == pytest.approx(4 / 102 + Z * error)
    tail = sum(math.comb(8, k) for k in (0, 1, 2)) / 2**8
    assert found.p_value == pytest.approx(2 * tail)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_paired_difference_changes_sign_when_swapped(pairs: list[tuple[bool, bool]]) -> None:
    mine, theirs = [m for m, _ in pairs], [t for _, t in pairs]
    there, back = paired_difference(mine, theirs), paired_difference(theirs, mine)
    assert there.value == pytest.approx(-back.value)
    assert there.low == pytest.approx(-back.high)
    assert there.p_value == pytest.approx(back.p_value)
    assert -1.0 <= there.low <= there.value <= there.high <= 1.0


def test_equal_outcomes_differ_by_nothing() -> None:
    found = paired_difference([True, False], [True, False])
    assert (found.value, found.p_value) == (0.0, 1.0)


def test_capped_mean_does_not_let_a_gain_hide_a_loss() -> None:
    base = {"code": proportion([True, True, False, False]), "maths": proportion([True] * 4)}
    mine = {"code": proportion([True] * 3 + [False]), "maths": proportion([True, True, False, False])}
    found = retained(mine, base)
    assert found.by_task == {"code": 1.5, "maths": 0.5}
    assert found.mean == pytest.approx(1.0)
    assert found.capped_mean == pytest.approx(0.75)


def test_a_task_at_which_vanilla_fails_has_no_ratio() -> None:
    nothing, all_right = proportion([False, False]), proportion([True, True])
    assert retained({"a": all_right, "b": all_right}, {"a": nothing, "b": all_right}).by_task == {"b": 1.0}
    assert retained({"a": all_right}, {"a": nothing}).mean is None
