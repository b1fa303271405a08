"""Which figures results give, one kind at a time, and how evaluations and sweeps are put together."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import binomtest

from expertshare.lab.report.comparisons import block_length_sweeps, comparison_of, p_sweep_of
from expertshare.lab.report.page import draw_all, sections
from expertshare.lab.report.sources import read_source, read_sources
from lab.report.conftest import content, stored

ALONE = [
    ("policies", {"main-1", "quality-1", "parts-1"}),
    ("p-sweep", {"main-1", "p-sweep-1", "parts-1"}),
    ("steps-distribution", {"steps-1"}),
    ("weight-against-loss", {"weights-1"}),
    ("expert-growth", {"growth-1"}),
    ("forward-mini", {"parts-1"}),
    ("generate-mini-float32", {"answers-1"}),
    ("tuning", {"tuning-1"}),
]


@pytest.mark.parametrize(("name", "slugs"), ALONE)
def test_a_result_alone_gives_its_figures(name: str, slugs: set[str], tmp_path: Path) -> None:
    parts = sections([read_source(stored(name))])
    figures = {figure.slug: figure for part in parts for figure in part.figures}
    assert figures.keys() == slugs
    drawn = draw_all(parts, tmp_path)
    assert drawn.keys() == {slug for slug in slugs if not slug.startswith("main")}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn.values())
    for figure in figures.values():
        assert figure.table is None or {len(row) for row in figure.table.rows} == {len(figure.table.head)}


def test_comparisons_that_differ_in_the_block_length_are_a_sweep(changed: Callable[..., Path]) -> None:
    def fewer(value: dict[str, Any]) -> None:
        value["num_prompts"] = 10

    sources = read_sources([*(stored(f"block-length-{n}") for n in (32, 8, 16)), changed("block-length-24", fewer)])
    (sweep,) = block_length_sweeps(sources)
    assert list(sweep) == [8, 16, 32]
    mains = next(part for part in sections(sources) if part.slug == "main").figures
    names = {Path(figure.sources[0].name).stem for figure in mains}
    assert names == {"block-length-32", "block-length-24"}  # the model's own length, and what is in no sweep


def test_runs_that_differ_in_more_than_p_are_no_sweep() -> None:
    comparison = content("p-sweep")
    assert [run["knobs"]["top_p_experts"] for run in p_sweep_of(comparison)][:2] == [0.4, 0.5]
    for number, run in enumerate(comparison["runs"][4:]):
        run["knobs"]["guard"] = number
    assert [run["knobs"]["top_p_experts"] for run in p_sweep_of(comparison)] == [0.4, 0.5, 0.6]
    assert p_sweep_of(content("policies")) == []  # two settings are no sweep


def test_an_evaluation_takes_the_form_of_a_comparison(tmp_path: Path) -> None:
    def row(task: str, policy: str, judged: int, correct: int) -> dict[str, Any]:
        accuracy = correct / judged if judged else None
        interval = [0.0, 1.0] if judged else None
        shared = {"task": task, "policy": policy, "count": 8, "judged": judged, "correct": correct}
        return {**shared, "accuracy": accuracy, "interval": interval, "retained": None}

    def summary(policy: str) -> dict[str, Any]:
        kept = {"retained": 0.5, "retained_capped": 0.5, "retained_capped_interval": [0.4, 0.6]}
        return {"policy": policy, **kept, "unique_experts": {"denoise": 4.0}, "unique_experts_reduction": 0.25}

    policies = [{"label": name, "policy": name.partition(":")[0], "knobs": {}} for name in ("vanilla", "skip:s=1")]
    report = {
        "schema_version": 1,
        "command": "eval",
        "environment": content("policies")["environment"],
        "seeds": {"decoding": 3},
        "config": {
            "model": "m",
            "policies": policies,
            "identity": {"items": {"a": 8, "b": 8}, "allow_code": True},
            "config": {"limit": 8, "decoding": {"gen_length": 64, "block_length": 32}},
        },
        "results": {
            "tasks": ["a", "b"],
            "policies": ["vanilla", "skip:s=1"],
            "num_answers": 32,
            "rows": [row(t, p, j, c) for p in ("vanilla", "skip:s=1") for t, j, c in (("a", 8, 6), ("b", 0, 0))],
            "summary": [summary("vanilla"), summary("skip:s=1")],
        },
    }
    for name in ("run.json", "report.json"):
        (tmp_path / name).write_text(json.dumps(report if name == "report.json" else {}))
    source = read_source(tmp_path)
    assert source.command == (
        "expertshare eval m --tasks a,b --policies vanilla,skip:s=1 --limit 8 --allow-code --seed 3 --out RUN_DIR"
    )
    comparison = comparison_of(source)
    run = comparison["runs"][1]
    wilson = binomtest(6, 8).proportion_ci(method="wilson")
    assert (comparison["num_prompts"], run["policy"], run["accuracy"]) == (16, "skip", 0.75)
    assert run["accuracy_interval"] == [wilson.low, wilson.high]
    assert run["tasks"].keys() == {"a"}
    assert {figure.slug for part in sections([source]) for figure in part.figures} == {"main-1", "quality-1"}
