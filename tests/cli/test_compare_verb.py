"""`expertshare compare`, `info` and `tasks`, in this process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cli.conftest import Run
from expertshare import api
from expertshare.evaluation.prompts import read_prompts
from expertshare.routing import POLICIES

POLICY_LIST = "vanilla,des-vote:budget=8,group_limit=ignore,des-vote:budget=0.5,block-top-p:top_p_experts=0.6"


@pytest.fixture
def prompts(tmp_path: Path, run: Run) -> Path:
    path = tmp_path / "prompts.jsonl"
    assert run("tasks", path, "--task", "arith", "--task", "code", "--count", "2", "--seed", "1").code == 0
    return path


def test_compare_ends_with_one_json_line(checkpoint: Path, prompts: Path, run: Run, tmp_path: Path) -> None:
    plot, report = tmp_path / "quality.png", tmp_path / "report.json"
    done = run(
        *("compare", checkpoint, "--prompts", prompts, "--policies", POLICY_LIST, "--policy", "skip:skip_share=0.3"),
        *("--gen-length", "16", "--batch-size", "3", "--plot", plot, "--report", report, "--json"),
    )
    assert done.code == 0, done.err
    (line,) = done.out.splitlines()
    value = json.loads(line)
    assert [run["policy"] for run in value["runs"]] == ["vanilla", "des-vote", "des-vote", "block-top-p", "skip"]
    assert [run["knobs"].get("budget") for run in value["runs"]] == [None, 8, 8, None, None]
    needed = {"policy", "knobs", "unique_experts", "expert_bytes", "tokens_per_s", "agreement", "accuracy"}
    assert all(run.keys() >= needed for run in value["runs"])
    assert value["runs"][0]["agreement"] == 1.0
    assert all(run["tasks"].keys() == {"arith", "code"} for run in value["runs"])
    assert value["config"]["batch_size"] == 3
    assert value["environment"]["versions"].keys() >= {"python", "torch", "expertshare", "transformers"}
    assert plot.read_bytes().startswith(b"\x89PNG")
    saved = json.loads(report.read_text())
    assert saved["command"] == "compare"
    assert len(saved["results"]["runs"][1]["answers"]) == 4


def test_tables_name_every_policy_and_task(checkpoint: Path, prompts: Path, run: Run) -> None:
    done = run("compare", checkpoint, "--prompts", prompts, "--policies", "vanilla,des-seq", "--gen-length", "8")
    for word in ("vanilla", "des-seq", "saved %", "agreement %", "arith (2)", "code (2)", "capped"):
        assert word in done.out
    assert done.err == ""


def test_all_policies_by_default_and_a_limit(checkpoint: Path, prompts: Path, run: Run) -> None:
    arguments = ("--gen-length", "8", "--limit", "1", "--json")
    value = json.loads(run("compare", checkpoint, "--prompts", prompts, *arguments).out)
    assert [run["policy"] for run in value["runs"]] == list(POLICIES)
    assert value["num_prompts"] == 1


def test_plain_prompts_have_agreement_but_no_accuracy(checkpoint: Path, run: Run, tmp_path: Path) -> None:
    file, plot = tmp_path / "plain.jsonl", tmp_path / "quality.svg"
    file.write_text('{"prompt": "hello"}\n')
    arguments = ("--policies", "des-vote", "--gen-length", "8", "--plot", plot, "--json")
    (row,) = json.loads(run("compare", checkpoint, "--prompts", file, *arguments).out)["runs"]
    assert row["accuracy"] is None
    assert 0.0 <= row["agreement"] <= 1.0
    assert plot.read_text().startswith("<?xml")


def test_compare_from_python(checkpoint: Path) -> None:
    comparison = api.compare(checkpoint, ["hello", "bye"], ["vanilla,skip", "des-seq"], gen_length=8)
    assert [run.label for run in comparison.runs] == ["vanilla", "skip:skip_share=0.4", "des-seq:experts_per_vote=1"]


def test_info(checkpoint: Path, run: Run) -> None:
    value = json.loads(run("info", checkpoint, "--json").out)
    assert value["family"] == "llada2_moe"
    assert value["min_coreset_inside"] == 6  # 4 experts per token + 2 dropped groups
    assert value["bytes_per_expert"] == 3 * 32 * 16 * 4
    shown = run("info", checkpoint).out
    assert "minimum coreset" in shown
    assert "sigmoid" in shown


def test_tasks_writes_prompts_that_can_be_read(prompts: Path) -> None:
    assert [record.task for record in read_prompts(prompts)] == ["arith", "arith", "code", "code"]


@pytest.mark.parametrize("verb", ["generate", "compare", "eval", "info", "tasks", "train"])
def test_every_verb_has_help_with_an_example(verb: str, run: Run) -> None:
    done = run(verb, "--help")
    assert done.code == 0
    assert f"Example: expertshare {verb}" in " ".join(done.out.split())


def test_every_knob_is_a_flag(run: Run) -> None:
    shown = run("generate", "--help").out
    for flag in ("budget", "top-p-experts", "guard", "experts-per-vote", "experts-per-token", "skip-share", "ballots"):
        assert f"--{flag}" in shown


def test_version(run: Run) -> None:
    assert run("--version").out.startswith("expertshare ")
