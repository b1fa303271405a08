"""The page: it loads nothing, escapes everything, and holds every figure with words and numbers."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from expertshare.lab.report.page import WrittenReport, write_report
from lab.report.conftest import Elements, content, stored

SECTIONS = (
    *("main", "p-sweep", "block-lengths", "quality", "steps", "weights", "growth", "parts", "latency", "answers"),
    *("tuning", "claims", "sources"),
)


def test_every_section_is_there_and_linked(written: WrittenReport) -> None:
    page = Elements(written.page.read_text(encoding="utf-8"))
    ids = [attributes["id"] for _, attributes in page.found if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert set(SECTIONS) <= set(ids)
    assert [link["href"] for link in page.named("a")] == [f"#{name}" for name in SECTIONS]
    assert written.missing == ()


def test_it_loads_nothing(written: WrittenReport) -> None:
    text = written.page.read_text(encoding="utf-8")
    page = Elements(text)
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & {tag for tag, _ in page.found}
    assert not re.findall(r"https?:|url\(|@import|//[a-z]", re.sub(r"base64,[^\"]+", "", text))
    assert not [name for _, attributes in page.found for name in attributes if name.startswith("on")]
    assert all((image["src"] or "").startswith("data:image/png;base64,") for image in page.named("img"))
    (policy,) = [meta for meta in page.named("meta") if meta.get("http-equiv")]
    assert policy["content"] == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def test_pictures_are_the_files_beside_it_and_have_words(written: WrittenReport) -> None:
    page = Elements(written.page.read_text(encoding="utf-8"))
    images = page.named("img")
    assert len(images) == len(written.images) >= 11
    for image, path in zip(images, written.images, strict=True):
        data = path.read_bytes()
        assert data.startswith(b"\x89PNG")
        assert base64.b64decode((image["src"] or "").partition(",")[2]) == data
        assert len(image["alt"] or "") > 40


def test_captions_name_file_and_command(written: WrittenReport) -> None:
    text = "".join(Elements(written.page.read_text(encoding="utf-8")).text)
    for name in ("policies", "forward-mini", "weight-against-loss"):
        assert str(stored(name)) in text
    for command in (
        "expertshare bench forward --case llada2.0-mini --layers 4 --unique 70 --policies vanilla,des-vote:budget=16",
        "expertshare bench generate models/reference --limit 16 --batch-sizes 1,2,4,8,16 --policies vanilla,des-vote",
        "--batch-size 64 --gen-length 64 --block-length 8 --json",
        "python benchmarks/weight_against_loss.py models/reference --count 60 --blocks 200 --seed 2026 --json FILE",
    ):
        assert command in text


def test_the_main_table_holds_the_stored_numbers(written: WrittenReport) -> None:
    rows = re.findall(r"<tr>(.*?)</tr>", written.page.read_text(encoding="utf-8"))
    run = next(run for run in content("policies")["runs"] if run["label"] == "des-seq:experts_per_vote=2")
    row = next(row for row in rows if ">des-seq:experts_per_vote=2<" in row)
    cells = re.findall(r"<td>([^<]*)", row)
    shares = [run["tasks"][task]["accuracy"] for task in ("arith", "math", "code", "code_pro", "choice")]
    expected = [f"{100 * share:.1f}" for share in (*shares, run["retained"], run["retained_capped"])]
    assert cells[0] == f"{run['unique_experts']['denoise']:.1f}"
    assert cells[2:9] == expected


def test_the_same_results_give_the_same_bytes(tmp_path: Path) -> None:
    paths = [stored("steps-distribution"), stored("p-sweep")]
    pages = [write_report(paths, tmp_path / name).page.read_bytes() for name in ("a.html", "b.html")]
    assert pages[0] == pages[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.html", "b.html"]


def test_missing_sections_are_named_with_what_makes_them(tmp_path: Path) -> None:
    done = write_report([stored("tuning")], tmp_path / "page.html", claims=False)
    text = "".join(Elements(done.page.read_text(encoding="utf-8")).text)
    assert "Main table" in done.missing
    assert "Not in this report" in text
    assert "expertshare bench forward --report FILE" in text
    assert "What papers claim" not in text


def test_names_are_escaped(changed: Callable[..., Path], tmp_path: Path) -> None:
    evil = '"><script>alert(1)</script><img src=x onerror=alert(1)>'

    def spoil(value: dict[str, Any]) -> None:
        value["config"]["model"] = evil
        value["environment"]["cpu"] = evil
        for run in value["runs"]:
            run["label"] += evil
            run["tasks"] = {task + evil: found for task, found in run["tasks"].items()}

    done = write_report([changed("p-sweep", spoil)], tmp_path / "page.html", title=evil)
    page = Elements(done.page.read_text(encoding="utf-8"))
    assert page.named("script") == []
    assert {image["src"][:5] for image in page.named("img") if image["src"]} == {"data:"}
    assert not [name for _, attributes in page.found for name in attributes if name.startswith("on")]
    assert "".join(page.text).count(evil) > 20
