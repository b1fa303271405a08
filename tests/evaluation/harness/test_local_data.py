"""Benchmark files come out in the hub's columns; what is wrong with one is said with its place."""

from __future__ import annotations

from pathlib import Path

import pytest

from expertshare.errors import InputError
from expertshare.evaluation.harness.benchmarks import BENCHMARKS


def test_every_benchmark_can_be_read(data: Path) -> None:
    for benchmark in BENCHMARKS.values():
        if benchmark.name != "mmlu":
            for part in benchmark.parts:
                assert all(benchmark.read(data, part).values())


def test_columns_are_the_hubs(data: Path) -> None:
    arc = BENCHMARKS["arc_c"].read(data, "")["test"][0]
    assert arc["choices"] == {"text": ["sky", "blood", "grass", "coal"], "label": ["A", "B", "C", "D"]}
    assert arc["answerKey"] == "B"
    mmlu = BENCHMARKS["mmlu"].read(data, "college_mathematics")["test"][0]
    assert (mmlu["question"], mmlu["choices"], mmlu["answer"]) == ("One, two?", ["a", "b", "c", "d"], 2)


def test_mbpp_is_split_by_task_id(data: Path) -> None:
    found = BENCHMARKS["mbpp"].read(data, "")
    assert [record["task_id"] for record in found["prompt"]] == [1, 2, 3]
    assert [record["task_id"] for record in found["test"]] == [11, 12]


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("gsm8k/test.jsonl", None, "test.jsonl, got: No such file"),
        ("gsm8k/test.jsonl", "{", "line 1: expected JSON"),
        ("gsm8k/test.jsonl", '{"question": "q"}', "record 1: .* got none of 'answer'"),
        ("gsm8k/test.jsonl", "\n", "expected records"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(data: Path, file: str, text: str | None, message: str) -> None:
    if text is None:
        (data / file).unlink()
    else:
        (data / file).write_text(text)
    with pytest.raises(InputError, match=message):
        BENCHMARKS["gsm8k"].read(data, "")
