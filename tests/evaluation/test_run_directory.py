"""A run directory: lines come back, a cut one is dropped, another evaluation is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from expertshare.errors import EvaluationError, InputError
from expertshare.evaluation.run_directory import ITEMS, RUN, check_known, open_run

RUN_JSON = {"identity": {"model_sha256": "a", "policies": ["vanilla"]}}
LINE = {"task": "t", "id": "0", "policy": "vanilla", "answer": "ü"}


def test_lines_come_back_and_a_cut_one_is_dropped(tmp_path: Path) -> None:
    with open_run(tmp_path / "new" / "run", RUN_JSON) as opened:
        assert opened.lines == ()
        opened.append(LINE)
        opened.append({**LINE, "id": "1"})
    path = tmp_path / "new" / "run" / ITEMS
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    with open_run(tmp_path / "new" / "run", RUN_JSON) as opened:
        assert opened.lines == (LINE,)
        assert opened.dropped_bytes == len(whole) - 5 - (whole.index(b"\n") + 1)
        opened.append({**LINE, "id": "1"})
    assert path.read_bytes() == whole


def test_another_evaluation_is_refused_by_name_of_what_differs(tmp_path: Path) -> None:
    with open_run(tmp_path, RUN_JSON):
        pass
    other = {"identity": {**RUN_JSON["identity"], "model_sha256": "b"}}
    with pytest.raises(EvaluationError, match="differs in model_sha256"), open_run(tmp_path, other):
        pass


def test_a_directory_in_use_is_refused(tmp_path: Path) -> None:
    with open_run(tmp_path, RUN_JSON):  # noqa: SIM117
        with pytest.raises(EvaluationError, match="in use"), open_run(tmp_path, RUN_JSON):
            pass
    with open_run(tmp_path, RUN_JSON):
        pass  # free again


def test_what_is_no_run_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(EvaluationError, match=r"thesis\.tex"), open_run(tmp_path, RUN_JSON):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(InputError, match="choose another"), open_run(tmp_path / "thesis.tex", RUN_JSON):
        pass


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
    with pytest.raises(EvaluationError, match=message), open_run(tmp_path, RUN_JSON):
        pass


def test_answers_to_other_questions_are_an_error(tmp_path: Path) -> None:
    assert check_known([LINE], [("t", "0", "vanilla")], tmp_path) == {("t", "0", "vanilla")}
    with pytest.raises(EvaluationError, match="does not ask"):
        check_known([LINE], [("t", "1", "vanilla")], tmp_path)
