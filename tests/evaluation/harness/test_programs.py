"""Answers to code benchmarks become programs: right ones pass their tests, in whatever form a model gives them."""

from __future__ import annotations

import pytest

from evaluation.harness.conftest import HUMANEVAL, MBPP, PRO
from expertshare.evaluation.harness import benchmarks
from expertshare.evaluation.harness.benchmarks import program, verdict

SOLUTION = HUMANEVAL[0]["canonical_solution"]
WHOLE = HUMANEVAL[0]["prompt"] + SOLUTION
BOTH = PRO[0]["raw_solution"] + "\n" + PRO[0]["new_problem"] + PRO[0]["new_solution"]


@pytest.mark.parametrize(
    "answer",
    [
        SOLUTION,
        SOLUTION + "```\nThis adds 1.",
        f"Here it is:\n```python\n{WHOLE}```\nDone.",
        f"```\n{WHOLE}",
        WHOLE,
        SOLUTION + "\n\nif __name__ == '__main__':\n    import sys, unittest\n    input()\n    unittest.main()\n",
        SOLUTION + "\n\nif __name__ == '__main__':\n    import sys\n    sys.exit(0)\n",
        f"Solution\n```python\n{WHOLE}```",
        f"'A'\n```python\nimport numpy as np\nimport asyncio\n{WHOLE}```",
    ],
    ids=[
        "continued",
        "continued, fence closed",
        "afresh in a fence",
        "fence left open",
        "afresh",
        "with a script's part",
        "with an exit",
        "under a heading",
        "with libraries",
    ],
)
def test_right_answers_pass(answer: str) -> None:
    assert verdict("humaneval", HUMANEVAL[0], answer).reason == ""


@pytest.mark.parametrize(
    ("benchmark", "record", "right", "wrong"),
    [
        ("humaneval", HUMANEVAL[0], SOLUTION, "    return x\n"),
        ("mbpp", MBPP[3], MBPP[3]["code"], "def add(x): return x"),
        ("mbpp", MBPP[3], f"{MBPP[3]['code']}\n```", ""),
        ("humaneval_pro", PRO[0], BOTH, PRO[0]["raw_solution"]),
        ("mbpp_pro", PRO[0], BOTH, "    return x\n" + PRO[0]["new_problem"] + PRO[0]["new_solution"]),
    ],
)
def test_right_and_wrong_are_told_apart(benchmark: str, record: dict[str, object], right: str, wrong: str) -> None:
    assert verdict(benchmark, record, right).passed
    assert not verdict(benchmark, record, wrong).passed


@pytest.mark.parametrize("answer", ["", "```", "\0", "(" * 5000, "\ud800", "if:\n", "while True: pass"])
def test_no_answer_breaks_anything(answer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmarks, "TIMEOUT_S", 0.5)
    assert isinstance(program("", answer), str)
    assert not verdict("mbpp", MBPP[3], answer).passed


@pytest.mark.parametrize("end", ["import sys\nsys.exit(0)", "import os\nos._exit(0)", "raise SystemExit"])
def test_leaving_early_is_no_pass(end: str) -> None:
    assert not verdict("mbpp", MBPP[3], f"def add(x): return x\n{end}").passed
    assert not verdict("humaneval", HUMANEVAL[0], f"    return x\n{end}").passed
