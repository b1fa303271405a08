"""convert, make-checkpoint and plan from the command line: what they print, and errors without tracebacks."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from expertshare.cli import main
from expertshare.convert import sizes
from expertshare.lab.random_checkpoint.characters import tokenizer_files

from .models import LLADA2, directory_bytes, read_all, same_bits, save_random

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as left:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return int(left.value.code or 0), captured.out, captured.err

    return call


@pytest.fixture
def tiny_case(monkeypatch: pytest.MonkeyPatch) -> None:
    """`--like llada2.0-mini` of a size that a test can write."""
    monkeypatch.setitem(sizes.SHAPES, "llada2.0-mini", replace(sizes.SHAPES["tiny"], vocab_size=400))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    directory = save_random(LLADA2, tmp_path / "source")
    for name, content in tokenizer_files(LLADA2).items():
        (directory / name).write_bytes(content)
    return directory


def test_convert_verify_generate_and_back(source: Path, tmp_path: Path, run: Run) -> None:
    code, out, err = run("convert", source, tmp_path / "experts", "--verify", "--json")
    assert code == 0, err
    told = json.loads(out)
    assert told["fresh"] is True
    assert 0 < told["verified_bytes"] < told["bytes"]
    code, out, _ = run("convert", source, tmp_path / "experts")
    assert (code, "was there already" in out) == (0, True)
    answers = []
    for model, memory in ((source, ()), (tmp_path / "experts", ("--expert-memory", "1MiB"))):
        code, out, err = run("generate", model, "--prompt", "7 + 8 =", "--gen-length", 16, "--json", *memory)
        assert code == 0, err
        answers.append(json.loads(out)["token_ids"])
    assert answers[0] == answers[1]
    back = ("--to", "huggingface", "--shard-size", "100KB")
    assert run("convert", tmp_path / "experts", tmp_path / "back", *back)[0] == 0
    assert same_bits(read_all(source), read_all(tmp_path / "back"))


def test_make_checkpoint_and_generate(tiny_case: None, tmp_path: Path, run: Run) -> None:
    arguments = ("--like", "llada2.0-mini", "--layers", 2, "--experts", 16, "--quantise", "int4", "--unique", 10)
    code, out, err = run("make-checkpoint", *arguments, "--out", tmp_path / "made", "--json")
    assert code == 0, err
    told = json.loads(out)
    assert told["unique_requested"] == 10
    assert abs(told["unique_experts"] / 10 - 1) < 0.15
    assert "asked for 10" in err
    code, out, err = run(
        *("generate", tmp_path / "made", "--prompt", "Hello", "--gen-length", 16, "--expert-memory", "1MiB"),
        *("--record-routing", tmp_path / "routing.jsonl", "--json"),
    )
    assert code == 0, err
    answer = json.loads(out)
    assert len(answer["token_ids"]) == 16
    assert answer["text"].isprintable()
    code, out, err = run("plan", tmp_path / "made", "--memory", "8GiB", "--trace", tmp_path / "routing.jsonl", "--json")
    assert code == 0, err
    planned = json.loads(out)
    assert planned["store"] == "all"
    assert {figure["origin"] for figure in planned["figures"].values()} == {"given", "measured", "derived"}


def test_plan_of_shapes_alone_and_of_what_does_not_fit(run: Run) -> None:
    code, out, _ = run("plan", "--like", "llada2.0-flash", "--memory", "8GiB", "--policy", "des-vote:budget=16")
    assert code == 0
    assert "experts in int4" in out
    code, out, _ = run("plan", "--like", "llada2.0-flash", "--memory", "1GiB", "--json")
    assert code == 0
    assert json.loads(out)["store"] == "none"


def test_without_memory_generate_says_what_to_do(
    source: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("expertshare.measure.memory.usable_memory_bytes", lambda: 100_000)
    code, _, err = run("generate", source, "--prompt", "Hello")
    assert code == 2
    assert "expertshare convert" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("convert", "SOURCE", "OUT", "--quantise", "int3"), "Did you mean 'int"),
        (("convert", "SOURCE", "OUT", "--to", "gguf"), "Known: experts, huggingface"),
        (("convert", "SOURCE", "OUT", "--to", "huggingface", "--quantise", "int4"), "leave out --quantise"),
        (("convert", "SOURCE", "OUT", "--to", "huggingface"), "has no expert_layout.json"),
        (("convert", "SOURCE", "OUT", "--to", "huggingface", "--shard-size", "lots"), "a size such as 3GiB"),
        (("convert", "SOURCE", "SOURCE"), "not made by this command"),
        (("convert", "nowhere", "OUT"), "there is no directory 'nowhere'"),
        (("make-checkpoint", "--like", "llada3", "--out", "OUT"), "Did you mean 'llada"),
        (("make-checkpoint", "--like", "llada2.0-mini", "--layers", "99", "--out", "OUT"), "--layers must lie in"),
        (("make-checkpoint", "--like", "llada2.0-mini", "--unique", "1", "--out", "OUT"), "--unique must lie in"),
        (("make-checkpoint", "--like", "llada2.0-mini", "--experts", "9", "--out", "OUT"), "must divide 9"),
        (("plan",), "expected either a model or --like"),
        (("plan", "SOURCE", "--memory", "8 potatoes"), "a size such as 3GiB"),
        (("plan", "SOURCE", "--layers", "3"), "--layers belongs to --like"),
        (("plan", "SOURCE", "--trace", "nowhere.jsonl"), "cannot be read"),
        (("plan", "SOURCE", "--policy", "dez-vote"), "Did you mean 'des-vote'"),
        (("plan", "SOURCE", "--batch-size", "0"), "batch size must be at least 1"),
    ],
)
def test_what_is_wrong_is_one_message(
    arguments: tuple[str, ...], message: str, source: Path, tmp_path: Path, run: Run
) -> None:
    before = directory_bytes(source)
    places = {"SOURCE": str(source), "OUT": str(tmp_path / "out")}
    code, _, err = run(*(places.get(argument, argument) for argument in arguments))
    assert code == 2
    assert message in err
    assert "Traceback" not in err
    assert directory_bytes(source) == before
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("verb", ["convert", "make-checkpoint", "plan"])
def test_help_has_an_example(verb: str, run: Run) -> None:
    code, out, _ = run(verb, "--help")
    assert code == 0
    assert f"Example: expertshare {verb}" in " ".join(out.split())
