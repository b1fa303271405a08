"""`expertshare bench` as people and scripts call it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from expertshare.cli import main
from expertshare.errors import InputError
from expertshare.lab.bench.machine import Machine
from expertshare.lab.plots.bench import _looks, plot_bench
from expertshare.lab.plots.style import COLOURS


@pytest.fixture(autouse=True)
def _quick_machine(monkeypatch: pytest.MonkeyPatch, machine: Machine) -> None:
    monkeypatch.setattr("expertshare.cli.bench.measure_machine", lambda: machine)


def _run(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as left:
        main(["bench", *map(str, arguments)])
    captured = capsys.readouterr()
    return int(left.value.code or 0), captured.out, captured.err


def test_experts_end_with_one_json_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    report, plot = tmp_path / "r.json", tmp_path / "p.svg"
    arguments = ("--unique", "5,9,14", "--repeats", 1, "--memory", 0.1, "--json", "--report", report, "--plot", plot)
    code, out, err = _run(capsys, "experts", "--case", "tiny", *arguments)
    assert code == 0
    results = json.loads(out)
    assert {"machine", "bandwidth_gb_per_s", "peak_gmac_per_s", "cases", "fits", "left_out"} == results.keys()
    assert results["machine"]["bandwidth_gb_per_s"] == 2.0
    assert results["bandwidth_gb_per_s"] > 0
    assert results["peak_gmac_per_s"] > 0
    wanted = {"case", "unique", "backend", "ms", "gb_per_s", "gmac_per_s", "share_of_bound"}
    assert all(wanted <= point.keys() for point in results["cases"])
    names = {"torch", "torch-loop", "torch-grouped-mm", "transformers-eager", "transformers-grouped-mm"}
    optional = {"cpu", "cpu-int8", "cpu-int4", "zentorch"}
    assert names <= {point["backend"] for point in results["cases"]} <= names | optional
    assert "tiny: one layer's experts, 8 tokens" in err
    assert "R^2" in err
    saved = json.loads(report.read_text())
    assert saved["command"] == "bench experts"
    assert saved["results"] == results
    assert saved["environment"].keys() >= {"cpu", "commit", "threads", "versions"}
    assert plot.read_text().startswith("<?xml")


def test_experts_of_several_numbers_of_experts(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--experts", "16,64", "--unique", "6", "--backends", "torch", "--repeats", 1, "--json")
    code, out, _ = _run(capsys, "experts", "--case", "tiny", *arguments)
    assert code == 0
    points = json.loads(out)["cases"]
    assert [(p["case"], p["num_experts"]) for p in points] == [("tiny/16-experts", 16), ("tiny/64-experts", 64)]


def test_forward_and_its_picture(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    plot = tmp_path / "p.png"
    arguments = ("--policies", "vanilla,des-vote:budget=8", "--repeats", 1, "--context", 8, "--layers", 3)
    code, out, err = _run(capsys, "forward", "--case", "tiny", *arguments, "--unique", 12, "--json", "--plot", plot)
    assert code == 0, err
    results = json.loads(out)
    assert {p["policy"] for p in results["forwards"]} == {"vanilla", "des-vote:budget=8"}
    assert results["scene"]["unique_requested"] == 12
    assert "router % of experts" in err
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_generate_from_a_case(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    plot = tmp_path / "p.png"
    arguments = ("--layers", 3, "--limit", 2, "--gen-length", 8, "--batch-sizes", "1,2", "--repeats", 1)
    names = ("--backends", "torch,transformers-grouped-mm", "--policies", "vanilla")
    code, out, err = _run(capsys, "generate", "--case", "tiny", *arguments, *names, "--json", "--plot", plot)
    assert code == 0, err
    results = json.loads(out)
    assert len(results["generations"]) == 3
    assert "Whole answers" in err
    assert plot.exists()


def test_list_shows_every_case(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (("--list",), ("experts", "--list")):
        code, out, _ = _run(capsys, *arguments)
        assert code == 0
        assert all(name in out for name in ("llada2.0-mini", "llada-moe", "sdar-30b-a3b", "diffusiongemma"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("experts", "--case", "tyny"), "Did you mean 'tiny'"),
        (("experts", "--case", "tiny", "--unique", "0"), "--unique takes whole numbers"),
        (("experts", "--case", "tiny", "--unique", "3,x"), "--unique takes whole numbers"),
        (("experts", "--case", "tiny", "--unique", "33"), "must be at most 32"),
        (("experts", "--case", "tiny", "--backends", "gpu"), "unknown contender 'gpu'"),
        (("experts", "--case", "tiny", "--dtype", "float16"), "unknown dtype"),
        (("experts", "--case", "tiny", "--repeats", "0"), "repeats must be at least 1"),
        (("experts", "--case", "tiny", "--threads", "0"), "threads must be at least 1"),
        (("experts", "--case", "tiny", "--plot", "x.txt"), "picture name"),
        (("forward", "--case", "diffusiongemma"), "only its expert layer"),
        (("forward", "--case", "tiny", "--policies", "des-vot"), "Did you mean 'des-vote'"),
        (("generate", "no/such/model", "--prompts", "no/such.jsonl"), "no/such"),
        (("generate", "--case", "tiny", "--limit", "0"), "limit must be at least 1"),
        (("generate", "--layers", "3", "--memory", "2"), "--layers, --memory belong to a random model"),
        (("generate", "models/reference", "--case", "tiny"), "leave out MODEL and --prompts"),
        (("generate", "--case", "tiny", "--prompts", "some.jsonl"), "leave out MODEL and --prompts"),
    ],
)
def test_wrong_input_is_named(capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], words: str) -> None:
    code, _, err = _run(capsys, *arguments)
    assert code == 2
    assert words in err


def test_nothing_to_draw_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="left out"):
        plot_bench({"cases": []}, tmp_path / "p.png")


def test_contenders_look_different_beyond_the_number_of_colours() -> None:
    names = [f"c{index}" for index in range(len(COLOURS) + 3)]
    assert len(set(_looks(names).values())) == len(names)
