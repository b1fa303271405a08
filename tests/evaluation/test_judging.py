"""What can be judged, and by which rule."""

from __future__ import annotations

import pytest

from expertshare.errors import InputError
from expertshare.evaluation.prompts import PromptRecord
from expertshare.evaluation.scoring import check_scorable, judge
from expertshare.evaluation.statistics import task_accuracy


def test_each_record_is_judged_by_its_own_rule() -> None:
    records = [
        PromptRecord(prompt="free text"),
        PromptRecord(prompt="capital?", reference="Paris"),
        PromptRecord(prompt="capital?", reference="Paris"),
        PromptRecord(prompt="7 + 8?", reference="so #### 15", task="arith"),
        PromptRecord(prompt="double", tests=("assert f(2) == 4",)),
        PromptRecord(prompt="double", tests=("assert f(2) == 4",)),
    ]
    code = "def f(x):\n    return 2 * x"
    answers = ["anything", " Paris\n", "Par is", "7 + 8 #### 15", code, "def f(x):\n    return x"]
    assert judge(records, answers) == [None, True, False, True, True, False]


def test_accuracy_is_pooled_and_by_task() -> None:
    records = [PromptRecord(prompt="p", task=task) for task in ("arith", "arith", "math", None, None)]
    found = task_accuracy(records, [True, False, True, None, False])
    assert found.overall is not None
    assert (found.overall.successes, found.overall.count) == (2, 4)
    assert {task: (s.successes, s.count) for task, s in found.by_task.items()} == {
        "arith": (1, 2),
        "math": (1, 1),
        "unnamed": (0, 1),
    }


def test_nothing_to_judge() -> None:
    found = task_accuracy([PromptRecord(prompt="p")], [None])
    assert found.overall is None
    assert found.by_task == {}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (PromptRecord(prompt="p", reference="1", task="arit"), r"prompt 2: .*'arit'.*Did you mean 'arith'"),
        (PromptRecord(prompt="p", reference="def f(): pass", task="code"), r'prompt 2: expected "tests"'),
    ],
)
def test_what_cannot_be_judged_is_refused_beforehand(record: PromptRecord, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_scorable([PromptRecord(prompt="fine"), record])
