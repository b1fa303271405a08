"""A run directory: lines come back, a cut one is dropped, another evaluation is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from expertshare.errors import EvaluationError, InputError
from expertshare.evaluation.run_directory import ITEMS, RUN, RunDirectory, check_known

RUN_JSON = {"identity": {"model_sha256": "a", "policies": ["vanilla"]}}
LINE = {"task": "t", "id": "0", "policy": "vanilla", "answer": "ü"}


def test_lines_come_back_and_a_cut_one_is_dropped(tmp_path: Path) -> None:
    with RunDirectory(tmp_path / "new" / "run") as directory:
        assert directory.open(RUN_JSON).lines == ()
        directory.append(LINE)
        directory.append({**LINE, "id": "1"})
    path = tmp_path / "new" / "run" / ITEMS
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    with RunDirectory(tmp_path / "new" / "run") as directory:
        opened = directory.open(RUN_JSON)
        assert opened.lines == (LINE,)
        assert opened.dropped_bytes == len(whole) - 5 - (whole.index(b"\n") + 1)
        directory.append({**LINE, "id": "1"})
    assert path.read_bytes() == whole


def test_another_evaluation_is_refused_by_name_of_what_differs(tmp_path: Path) -> None:
    with RunDirectory(tmp_path) as directory:
        directory.open(RUN_JSON)
    other = {"identity": {**RUN_JSON["identity"], "model_sha256": "b"}}
    with RunDirectory(tmp_path) as directory, pytest.raises(EvaluationError, match="differs in model_sha256"):
        directory.open(other)


def test_a_directory_in_use_is_refused(tmp_path: Path) -> None:
    with RunDirectory(tmp_path) as first, RunDirectory(tmp_path) as second:
        first.open(RUN_JSON)
        with pytest.raises(EvaluationError, match="in use"):
            second.open(RUN_JSON)


def test_what_is_no_run_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with RunDirectory(tmp_path) as directory, pytest.raises(EvaluationError, match=r"thesis\.tex"):
        directory.open(RUN_JSON)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    with RunDirectory(tmp_path / "thesis.tex") as directory, pytest.raises(InputError, match="choose another"):
        directory.open(RUN_JSON)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no json\n", "line 1"),
        ("[1]\n", "line 1"),
        (json.dumps(LINE) + "\n" + json.dumps(LINE) + "\n", "line 2.*twice"),
    ],
)
def test_a_changed_file_is_an_error_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / RUN).write_text(json.dumps(RUN_JSON))
    (tmp_path / ITEMS).write_text(text)
    with RunDirectory(tmp_path) as directory, pytest.raises(EvaluationError, match=message):
        directory.open(RUN_JSON)


def test_answers_to_other_questions_are_an_error(tmp_path: Path) -> None:
    assert check_known([LINE], [("t", "0", "vanilla")], tmp_path) == {("t", "0", "vanilla")}
    with pytest.raises(EvaluationError, match="does not ask"):
        check_known([LINE], [("t", "1", "vanilla")], tmp_path)
