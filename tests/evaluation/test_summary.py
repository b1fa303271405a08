"""The report of an evaluation against closed formulas and scipy."""

from __future__ import annotations

from random import Random
from typing import Any

import numpy as np
import pytest
from scipy import stats

from expertshare.evaluation.statistics import PairedCounts, capped_mean_interval
from expertshare.evaluation.summary import summarise


def line(task: str, number: int, policy: str, correct: bool | None, **more: Any) -> dict[str, Any]:
    kinds = {"prefill": 0, "denoise": 2, "commit": 1}
    return {
        "task": task,
        "id": str(number),
        "policy": policy,
        "correct": correct,
        "reason": None if correct is not None else "not run",
        "tokens": 10,
        "steps": 2,
        "forwards": kinds,
        "blocks": kinds,
        "unique_experts": {"prefill": 0.0, "denoise": 40.0 if policy == "vanilla" else 10.0, "commit": 5.0},
        **more,
    }


def lines_of(outcomes: dict[str, dict[str, list[bool | None]]]) -> list[dict[str, Any]]:
    return [
        line(task, number, policy, correct)
        for task, by_policy in outcomes.items()
        for policy, of_policy in by_policy.items()
        for number, correct in enumerate(of_policy)
    ]


def row(results: dict[str, Any], task: str, policy: str) -> dict[str, Any]:
    [found] = [r for r in results["rows"] if (r["task"], r["policy"]) == (task, policy)]
    return dict(found)


def test_rows_against_closed_formulas() -> None:
    vanilla = [True] * 8 + [False] * 2
    mine = [True] * 5 + [False] * 4 + [True]
    results = summarise(
        lines_of({"t": {"vanilla": list(vanilla), "p": list(mine)}}), tasks=["t"], policies=["vanilla", "p"]
    )
    found = row(results, "t", "p")
    assert (found["correct"], found["count"], found["accuracy"]) == (6, 10, 0.6)
    z = stats.norm.ppf(0.975)
    centre, half = (6 + z**2 / 2) / (10 + z**2), z / (10 + z**2) * np.sqrt(6 * 4 / 10 + z**2 / 4)
    assert found["interval"] == pytest.approx([centre - half, centre + half])
    assert found["difference"]["value"] == pytest.approx(-0.2)
    assert (found["difference"]["gained"], found["difference"]["lost"]) == (1, 3)
    assert found["difference"]["p_value"] == pytest.approx(2 * stats.binom.cdf(1, 4, 0.5))
    assert found["retained"] == found["retained_capped"] == pytest.approx(6 / 8)
    assert found["unique_experts_reduction"] == pytest.approx(0.75)
    assert row(results, "t", "vanilla")["difference"] is None


def test_a_gain_is_capped_in_one_mean_and_not_in_the_other() -> None:
    outcomes: dict[str, dict[str, list[bool | None]]] = {
        "up": {"vanilla": [True, False], "p": [True, True]},
        "down": {"vanilla": [True, True], "p": [True, False]},
    }
    [_, summary] = summarise(lines_of(outcomes), tasks=["up", "down"], policies=["vanilla", "p"])["summary"]
    assert summary["retained"] == pytest.approx((2.0 + 0.5) / 2)
    assert summary["retained_capped"] == pytest.approx((1.0 + 0.5) / 2)


def test_unjudged_answers_and_tasks_without_a_ratio_are_left_out_and_named() -> None:
    outcomes: dict[str, dict[str, list[bool | None]]] = {
        "hard": {"vanilla": [False, False], "p": [True, False]},
        "code": {"vanilla": [None, None], "p": [None, None]},
    }
    results = summarise(lines_of(outcomes), tasks=["hard", "code"], policies=["vanilla", "p"])
    assert row(results, "hard", "p")["retained"] is None
    code = row(results, "code", "p")
    assert (code["accuracy"], code["judged"], code["unjudged_because"]) == (None, 0, ["not run"])
    assert results["summary"][1]["tasks_without_ratio"] == ["hard", "code"]
    assert results["summary"][1]["retained_capped_interval"] is None


def test_the_order_of_lines_does_not_matter() -> None:
    rng = Random(0)
    outcomes: dict[str, dict[str, list[bool | None]]] = {
        task: {policy: [rng.random() < 0.7 for _ in range(30)] for policy in ("vanilla", "p")} for task in "ab"
    }
    lines = lines_of(outcomes)
    first = summarise(lines, tasks=["a", "b"], policies=["vanilla", "p"])
    rng.shuffle(lines)
    assert summarise(lines, tasks=["a", "b"], policies=["vanilla", "p"]) == first


def test_unique_experts_are_weighted_by_blocks() -> None:
    two = [
        line("t", 0, "vanilla", True, blocks={"prefill": 0, "denoise": 1, "commit": 0}),
        line("t", 1, "vanilla", True, blocks={"prefill": 0, "denoise": 3, "commit": 0}),
    ]
    two[0]["unique_experts"] = {"prefill": 0.0, "denoise": 10.0, "commit": 0.0}
    two[1]["unique_experts"] = {"prefill": 0.0, "denoise": 20.0, "commit": 0.0}
    found = row(summarise(two, tasks=["t"], policies=["vanilla"]), "t", "vanilla")
    assert found["unique_experts"] == {"prefill": 0.0, "denoise": pytest.approx(17.5), "commit": 0.0}


def test_the_bootstrap_agrees_with_scipys() -> None:
    rng = np.random.default_rng(3)
    base = rng.random(200) < 0.8
    mine = np.where(rng.random(200) < 0.85, base, ~base)
    expected = stats.bootstrap(
        (mine, base),
        lambda m, b, axis: np.minimum(1.0, m.sum(axis=axis) / b.sum(axis=axis)),
        paired=True,
        vectorized=True,
        n_resamples=10_000,
        method="percentile",
        rng=np.random.default_rng(4),
    ).confidence_interval
    found = capped_mean_interval([PairedCounts.of(mine.tolist(), base.tolist())])
    assert found == pytest.approx((expected.low, expected.high), abs=0.01)


def test_equal_outcomes_have_no_spread() -> None:
    assert capped_mean_interval([PairedCounts(kept=5, gained=0, lost=0, neither=5)] * 2) == (1.0, 1.0)
