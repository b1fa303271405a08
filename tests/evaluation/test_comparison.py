"""Comparisons with a tiny random model: vanilla as the reference, everything by the same prompts."""

from __future__ import annotations

import json

import pytest

from expertshare.decoding import DecodingOptions
from expertshare.errors import PolicyError
from expertshare.evaluation.comparison import Comparison, compare_policies
from expertshare.evaluation.prompts import PromptRecord
from expertshare.evaluation.runner import Setup
from expertshare.lab.tasks.generation import generate_items
from expertshare.models import LoadedModel
from expertshare.routing import parse_policies

ITEMS = [item for task in ("arith", "choice") for item in generate_items(task, split="test", count=2, seed=3)]
RECORDS = [PromptRecord(prompt=i.prompt, reference=i.reference, task=i.task, tests=i.tests) for i in ITEMS]


def compared(loaded: LoadedModel, policies: str, records: list[PromptRecord] = RECORDS) -> Comparison:
    options = DecodingOptions(gen_length=16)
    return compare_policies(loaded, records, parse_policies([policies]), options, setup=Setup(batch_size=3))


def test_vanilla_agrees_with_itself_and_is_run_once(loaded: LoadedModel) -> None:
    comparison = compared(loaded, "des-seq,vanilla")
    vanilla = comparison.runs[1]
    assert vanilla is comparison.reference
    assert (vanilla.agreement.tokens, vanilla.agreement.exact, vanilla.reduction) == (1.0, 1.0, 0.0)
    assert vanilla.difference is None


def test_vanilla_is_not_listed_unless_asked_for(loaded: LoadedModel) -> None:
    comparison = compared(loaded, "des-vote:budget=6")
    assert [run.run.policy.name for run in comparison.runs] == ["des-vote"]
    assert comparison.reference.run.policy.name == "vanilla"


def test_every_expert_in_the_coreset_is_vanilla(loaded: LoadedModel) -> None:
    run = compared(loaded, "des-vote:budget=16").runs[0]
    assert run.agreement.exact == 1.0
    assert run.reduction == pytest.approx(0.0)


def test_figures_follow_from_the_runs(loaded: LoadedModel) -> None:
    comparison = compared(loaded, "des-vote:budget=6")
    run, base = comparison.runs[0], comparison.reference
    mine, theirs = run.run.cost.unique_experts["denoise"], base.run.cost.unique_experts["denoise"]
    assert mine <= 6.0 < theirs
    assert run.reduction == pytest.approx((theirs - mine) / theirs)
    shares = [
        sum(x == y for x, y in zip(a.token_ids, b.token_ids, strict=False)) / max(len(a.token_ids), len(b.token_ids))
        for a, b in zip(run.run.answers, base.run.answers, strict=True)
    ]
    assert run.agreement.tokens == pytest.approx(sum(shares) / 4)
    assert {task: share.count for task, share in run.accuracy.by_task.items()} == {"arith": 2, "choice": 2}


def test_without_references_there_is_no_accuracy(loaded: LoadedModel) -> None:
    value = compared(loaded, "skip", [PromptRecord(prompt="hello")]).to_json()
    (run,) = value["runs"]
    absent = ("accuracy", "accuracy_interval", "retained", "retained_capped", "difference")
    assert {key: run[key] for key in absent} == dict.fromkeys(absent)
    json.dumps(value, allow_nan=False)


def test_the_same_comparison_twice_gives_the_same_figures(loaded: LoadedModel) -> None:
    timed = ("tokens_per_s", "elapsed_s", "seconds_by_part")
    first, second = (compared(loaded, "block-top-p").to_json()["runs"][0] for _ in range(2))
    assert {k: v for k, v in first.items() if k not in timed} == {k: v for k, v in second.items() if k not in timed}


@pytest.mark.parametrize(("policies", "message"), [("vanilla,vanilla", "got vanilla again"), (",", "got none")])
def test_unusable_lists_of_policies(loaded: LoadedModel, policies: str, message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        compared(loaded, policies)
