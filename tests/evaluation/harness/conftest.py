"""A folder of benchmark files, two made-up records each, in the layout of docs/evaluation.md."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from expertshare.evaluation.harness.benchmarks import MATHS_SUBJECTS

HUMANEVAL = [
    {
        "task_id": f"HumanEval/{number}",
        "prompt": f'def add{number}(x):\n    """Add {number} to x."""\n',
        "entry_point": f"add{number}",
        "canonical_solution": f"    return x + {number}\n",
        "test": f"def check(candidate):\n    assert candidate(1) == {1 + number}\n",
    }
    for number in (1, 2)
]
MBPP = [
    {
        "text": f"Write a function that adds {number}.",
        "code": f"def add(x):\r\n  return x + {number}",
        "task_id": number,
        "test_setup_code": "",
        "test_list": [f"assert add({x}) == {x + number}" for x in range(3)],
        "challenge_test_list": [],
    }
    for number in (1, 2, 3, 11, 12, 600)
]
PRO = [
    {
        "id": number,
        "raw_problem": "# Double x.\ndef double(x):\n",
        "raw_solution": "    return 2 * x\n",
        "new_problem": "# Double every item.\ndef double_all(items):\n",
        "new_solution": "    return [double(item) for item in items]\n",
        "test_code": "assert double_all([1, 2]) == [2, 4]",
    }
    for number in (0, 1)
]
GSM8K = [{"question": f"What is {n} plus 1?", "answer": f"It is {n + 1}.\n#### {n + 1}"} for n in range(6)]
MATH = [
    {"problem": f"What is ${n}+1$?", "solution": f"It is $\\boxed{{{n + 1}}}$.", "answer": f"{n + 1}"} for n in (1, 2)
]
MMLU = 'question,choice0,choice1,choice2,choice3,answer\n"One, two?",a,b,c,d,2\nThree?,a,b,c,d,0\n'
ARC = [{"question": "Which is red?", "choices": ["sky", "blood", "grass", "coal"], "answer": 1, "subject": "s"}] * 2


def write_lines(path: Path, records: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    for split in ("train", "test"):
        write_lines(folder / "gsm8k" / f"{split}.jsonl", GSM8K)
        write_lines(folder / "arc_challenge" / f"{split}.jsonl", ARC)
    write_lines(folder / "math500" / "test.jsonl", MATH)
    write_lines(folder / "humaneval" / "HumanEval.jsonl", HUMANEVAL)
    write_lines(folder / "mbpp" / "mbpp.jsonl", MBPP)
    for name in ("humaneval_pro", "mbpp_pro"):
        path = folder / "codeeval_pro" / f"{name}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(PRO))
    for split in ("dev", "test"):
        for subject in MATHS_SUBJECTS:
            path = folder / "mmlu" / split / f"{subject}_{split}.csv"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(MMLU)
    return folder
