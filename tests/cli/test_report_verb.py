"""`expertshare report`, from what the other verbs have just written."""

from __future__ import annotations

import json
from pathlib import Path

from cli.conftest import Run

POLICIES = "vanilla,des-vote,block-top-p:top_p_experts=0.5,block-top-p:top_p_experts=0.7,block-top-p:top_p_experts=0.9"


def test_a_page_from_compare_and_eval(checkpoint: Path, run: Run, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    assert run("tasks", prompts, "--task", "arith", "--count", "2").code == 0
    files = [tmp_path / f"{length}.json" for length in (4, 8)]
    for file in files:
        compared = ("compare", checkpoint, "--prompts", prompts, "--policies", POLICIES, "--gen-length", "8")
        assert run(*compared, "--block-length", file.stem, "--report", file).code == 0
    evaluated = ("eval", checkpoint, "--tasks", "arith", "--policies", "des-seq", "--limit", "2", "--gen-length", "8")
    assert run(*evaluated, "--out", tmp_path / "run").code == 0
    done = run("report", tmp_path / "run", *files, "--out", tmp_path / "page", "--json")
    assert done.code == 0, done.err
    value = json.loads(done.out)
    names = {Path(image).name for image in value["images"]}
    numbered = {f"{slug}-{number}.png" for slug in ("quality", "parts") for number in (1, 2)}
    assert names == {"p-sweep-1.png", "block-lengths-1.png", *numbered}
    assert all(Path(image).is_file() for image in value["images"])
    assert "Tuning" in value["missing"]
    page = Path(value["page"]).read_text(encoding="utf-8")
    assert str(checkpoint) in page
    assert "--block-length 4" in page


def test_an_unknown_file_is_refused_by_name(run: Run, tmp_path: Path) -> None:
    strange = tmp_path / "strange.json"
    strange.write_text('{"points": []}')
    done = run("report", strange, "--out", tmp_path / "page.html")
    assert (done.code, done.out) == (2, "")
    assert f"got {strange}, which is an object with points. Known: eval (expertshare eval" in done.err
    assert not (tmp_path / "page.html").exists()


def test_a_place_that_cannot_be_written(run: Run, tmp_path: Path) -> None:
    source = Path(__file__).parent.parent.parent / "benchmarks" / "results" / "expert-growth.json"
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "missing" / "page.html", tmp_path / "file" / "folder"):
        done = run("report", source, "--out", out)
        assert (done.code, done.out) == (2, "")
        assert str(out) in done.err
