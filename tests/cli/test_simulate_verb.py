"""`expertshare simulate` on the recorded examples, and what it says to wrong input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from expertshare.cli import main

ROOT = Path(__file__).parents[2]
ROUTING = ROOT / "examples" / "routing"
REFERENCE = [f"--trace={ROUTING}/reference-vanilla.jsonl", f"--trace={ROUTING}/reference-des-vote.jsonl"]
MINI = [f"--trace={ROUTING}/mini-3-layers-vanilla.jsonl", f"--trace={ROUTING}/mini-3-layers-des-vote.jsonl"]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, object]:
    with pytest.raises(SystemExit) as left:
        main(["simulate", *arguments, "--steps", "2", "--json"])
    assert left.value.code == 0
    (line,) = capsys.readouterr().out.strip().splitlines()
    values: dict[str, object] = json.loads(line)
    return values


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as left:
        main(["simulate", *arguments])
    assert left.value.code == 2
    return capsys.readouterr().err


def test_the_examples_are_small_and_of_the_reference_model(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert sum(path.stat().st_size for path in ROUTING.iterdir()) <= 200_000
    found = run(capsys, str(ROOT / "models" / "reference"), *REFERENCE, "--gpus", "1,8", "--plot", f"{tmp_path}/a.png")
    assert (tmp_path / "a.png").stat().st_size > 10_000
    vanilla, shared = found["traces"]  # type: ignore[misc]
    assert [vanilla["label"], shared["label"]] == ["reference-vanilla", "reference-des-vote"]
    assert shared["unique_experts"] < 28 < vanilla["unique_experts"]
    for trace in (vanilla, shared):
        assert trace["recorded_layers"] == 3
        assert [point["gpus"] for point in trace["sweep"]] == [1, 8]
        assert trace["sweep"][1]["tokens_per_s"] >= 7.9 * trace["sweep"][0]["tokens_per_s"]


def test_a_larger_model_of_as_many_experts_takes_the_recorded_layers_by_turns(
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ["--card", "h200", "--quantise", "int8", "--gpus", "1,4,10000", "--max-expert-parallel", "8"]
    found = run(capsys, "--like", "llada2.0-flash", *options, "--rate", "100", "--steps-per-block", "8", *MINI)
    assert len(found["assumptions"]) >= 6  # type: ignore[arg-type]
    vanilla, shared = found["traces"]  # type: ignore[misc]
    assert vanilla["recorded_layers"] == 2
    assert [each["replica"]["num_gpus"] for each in vanilla["degrees"]] == [1, 2, 4, 8]
    for before, after in zip(vanilla["degrees"], shared["degrees"], strict=True):
        assert after["replica"]["experts_per_gpu"] < before["replica"]["experts_per_gpu"]
        assert after["replica"]["memory"] == before["replica"]["memory"]
        assert after["gpus"] % after["replica"]["num_gpus"] == 0
    assert shared["sweep"][0]["tokens_per_s"] > 2 * vanilla["sweep"][0]["tokens_per_s"]


def test_flags_take_the_place_of_the_cards_figures_and_of_the_steps(capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--like", "llada2.0-mini", *MINI, "--gpus", "1", "--steps-per-block", "8", "--steps-per-block", "12"]
    found = run(capsys, *common, "--memory", "200GB", "--bandwidth", "1000", "--tflops", "500", "--link", "100")
    card = found["cluster"]["card"]  # type: ignore[index]
    assert (card["memory_bytes"], card["bytes_per_s"], card["flops_per_s"]) == (200e9, 1e12, 5e14)
    assert card["name"] == "h100, changed"
    vanilla, shared = found["traces"]  # type: ignore[misc]
    assert (vanilla["demand"]["steps_per_block"], shared["demand"]["steps_per_block"]) == (8, 12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--like", "llada2.0-mini"], "--trace"),
        (MINI, "--like NAME"),
        (["--like", "llada2.0-mini", *REFERENCE], "expected 256"),
        (["--like", "llada2.0-mini", *MINI, "--card", "h1000"], "Did you mean"),
        (["--like", "llada2.0-mini", *MINI, "--gpus", "0"], "--gpus"),
        (["--like", "llada2.0-mini", *MINI, "--expert-parallel", "512"], r"1..256"),
        (["--like", "llada2.0-mini", *MINI, *("--steps-per-block", "1") * 3], "2 times"),
        (["--like", "llada2.0-mini", *MINI, "--quantise", "int3"], "int3"),
        (["--like", "llada2.0-mini", *MINI, "--block-length", "7"], "block length 7"),
        (["--like", "llada2.0-mini", *MINI, "--block-length", "0"], "at least 1"),
        (["--like", "llada2.0-mini", *MINI, "--max-expert-parallel", "0"], "--max-expert-parallel"),
        (["--like", "llada2.0-mini", *MINI, "--bandwidth", "0"], "above 0"),
        (["--like", "llada2.0-mini", *MINI, "--steps", "0"], "at least 1"),
    ],
)
def test_wrong_input_is_told(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert message in refused(capsys, *arguments)


def test_the_figures_of_the_page_come_again(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    stored = json.loads((ROOT / "benchmarks" / "results" / "scaling-flash.json").read_text(encoding="utf-8"))
    options = ["--quantise", "int8", "--card", "h200", "--max-expert-parallel", "16", "--steps-per-block", "8"]
    with pytest.raises(SystemExit):
        main(["simulate", "--like", "llada2.0-flash", *options, "--rate", "1000", *MINI, "--json"])
    found = json.loads(capsys.readouterr().out)
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    for before, now in zip(stored["traces"], found["traces"], strict=True):
        for one, other in zip(before["sweep"], now["sweep"], strict=True):
            assert other == pytest.approx(one)
        for point in now["sweep"]:
            if point["gpus"] in (1, 2, 4, 8, 64, 1_000, 10_000):
                assert f"| {point['tokens_per_s']:,.0f} ({point['expert_parallel']}) |" in page
