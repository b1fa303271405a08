"""The tuner end to end on a tiny model and on the reference model, and the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from expertshare.api import generate, load, load_policy, tune
from expertshare.cli import main
from expertshare.evaluation.prompts import write_prompts
from expertshare.lab.plots.quality import plot_tuning
from expertshare.lab.tasks.generation import generate_items
from expertshare.models import LoadedModel
from expertshare.routing import policy_label
from expertshare.tuning.options import TuningOptions
from expertshare.tuning.results import Tuned

REFERENCE = Path(__file__).parent.parent.parent / "models" / "reference"
QUICK = TuningOptions(retain=0.5, confidence=0.9, trials=6, recorded_prompts=3, policies=("des-vote", "des-seq"))
WORDS = [f"Add {n} and {n + 3}." for n in range(24)]


@pytest.fixture(scope="module")
def unlabelled(loaded: LoadedModel) -> Tuned:
    return tune(loaded, WORDS, tuning=QUICK, gen_length=16)


def test_without_labels_it_keeps_agreement_and_says_so(unlabelled: Tuned) -> None:
    assert unlabelled.quality == "agreement"
    assert "agreement, not accuracy" in unlabelled.sentence()
    counts = unlabelled.chosen.counts
    assert (counts.gained, counts.neither, counts.total) == (0, 0, 18)


def test_it_is_repeatable(unlabelled: Tuned, loaded: LoadedModel) -> None:
    again = tune(loaded, WORDS, tuning=QUICK, gen_length=16)
    assert again.to_json() == unlabelled.to_json()


def test_what_is_certified_passed_the_test_and_saves(unlabelled: Tuned) -> None:
    told = unlabelled.to_json()
    for run in told["tested"]:
        assert run["passed"] == (run["p_value"] <= 0.1)
    assert told["certified"] == any(run["passed"] for run in told["tested"])
    assert [run["passed"] for run in told["tested"]] == sorted((r["passed"] for r in told["tested"]), reverse=True)


def test_the_policy_file_carries_the_evidence_and_generates(
    unlabelled: Tuned, loaded: LoadedModel, tmp_path: Path
) -> None:
    unlabelled.policy_file().write(tmp_path / "policy.json")
    found = load_policy(tmp_path / "policy.json")
    assert found.policy == unlabelled.policy
    assert {"environment", "config", "seeds", "prompts_sha256", "tested", "options"} <= set(found.evidence)
    run = generate(loaded, WORDS[0], policy=found, gen_length=16).run
    assert run.policy == unlabelled.policy.bind(loaded.config.router)


def test_too_few_prompts_are_said_to_be_too_few(loaded: LoadedModel) -> None:
    strict = TuningOptions(retain=0.99, trials=2, recorded_prompts=2, policies=("des-vote",))
    tuned = tune(loaded, WORDS, tuning=strict, gen_length=16)
    assert not tuned.certified
    assert tuned.sentence().startswith("not certified")
    assert tuned.needed_prompts is None or tuned.needed_prompts >= 299


@pytest.mark.parametrize("cost", ["bytes", "latency"])
def test_other_costs_are_measured(loaded: LoadedModel, cost: str, tmp_path: Path) -> None:
    options = TuningOptions(retain=0.5, confidence=0.9, trials=2, recorded_prompts=2, cost=cost)  # type: ignore[arg-type]
    tuned = tune(loaded, WORDS[:12], tuning=options, gen_length=8)
    assert all(run.cost(cost) > 0 for run in (tuned.vanilla, *tuned.tested))
    plot_tuning(tuned.to_json(), tmp_path / "plot.svg")
    assert (tmp_path / "plot.svg").stat().st_size > 0


def test_the_reference_model_is_tuned_for_accuracy() -> None:
    records = [item for task in ("arith", "choice") for item in generate_items(task, split="test", count=12, seed=5)]
    options = TuningOptions(retain=0.6, confidence=0.8, trials=4, recorded_prompts=3, policies=("des-seq",))
    tuned = tune(load(REFERENCE), records, tuning=options, gen_length=64)
    assert tuned.quality == "accuracy"
    assert set(tuned.vanilla.by_task) == {"arith", "choice"}
    assert tuned.vanilla.counts.retained == 1.0
    assert tuned.chosen.unique_experts < tuned.vanilla.unique_experts


def _run(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as left:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return int(left.value.code or 0), captured.out, captured.err


def test_the_command_writes_a_file_that_the_other_verbs_take(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts, policy, plot = tmp_path / "p.jsonl", tmp_path / "policy.json", tmp_path / "plot.png"
    write_prompts(prompts, generate_items("arith", split="test", count=8, seed=1))
    shared = ("--retain", "0.5", "--trials", "2", "--recorded-prompts", "2", "--gen-length", "8", "--seed", "3")
    asked = ("--quality", "agreement", "--task", "arith", "--policies", "des-vote", "--json", "--require-certified")
    code, out, _ = _run(
        capsys, "tune", checkpoint, "--prompts", prompts, *shared, *asked, "--out", policy, "--plot", plot
    )
    told = json.loads(out.splitlines()[-1])
    assert code == (0 if told["certified"] else 1)
    assert told["policy_file"] == json.loads(policy.read_text())
    assert told["policy_file"]["evidence"]["seeds"] == {"tuning": 3, "decoding": 3}
    assert plot.stat().st_size > 0
    use = ("--policy-file", policy, "--gen-length", "8", "--json")
    code, out, _ = _run(capsys, "generate", checkpoint, "--prompt", "Add 2 and 3.", *use)
    assert (code, json.loads(out)["label"]) == (0, told["chosen"]["label"])
    code, out, _ = _run(capsys, "compare", checkpoint, "--prompts", prompts, "--policies", "vanilla", *use)
    assert [run["label"] for run in json.loads(out)["runs"]] == ["vanilla", told["chosen"]["label"]]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (("--policy-file", "none.json", "--policy", "vanilla"), "expected --policy-file alone"),
        (("--policy-file", "none.json"), "readable policy file"),
    ],
)
def test_wrong_policy_files_are_refused(
    extra: tuple[str, ...], message: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = _run(capsys, "generate", checkpoint, "--prompt", "x", *extra)
    assert code == 2
    assert message in err


def test_a_task_that_is_not_there_is_refused(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_prompts(tmp_path / "p.jsonl", generate_items("arith", split="test", count=2, seed=1))
    code, _, err = _run(capsys, "tune", checkpoint, "--prompts", tmp_path / "p.jsonl", "--task", "math")
    assert code == 2
    assert "tasks in the file: arith" in err


def test_the_label_of_a_layerwise_choice_names_every_layer(unlabelled: Tuned) -> None:
    assert policy_label(unlabelled.policy) in unlabelled.sentence()
