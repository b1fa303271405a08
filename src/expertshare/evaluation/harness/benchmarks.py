"""BENCHMARKS: which tasks of lm-evaluation-harness make up a benchmark, and which of their metrics is its accuracy."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from expertshare.errors import InputError

MATHS_SUBJECTS = (
    "abstract_algebra",
    "college_mathematics",
    "elementary_mathematics",
    "high_school_mathematics",
    "high_school_statistics",
)
# fmt: off
SUBJECTS = (
    "abstract_algebra", "anatomy", "astronomy", "business_ethics", "clinical_knowledge", "college_biology",
    "college_chemistry", "college_computer_science", "college_mathematics", "college_medicine", "college_physics",
    "computer_security", "conceptual_physics", "econometrics", "electrical_engineering", "elementary_mathematics",
    "formal_logic", "global_facts", "high_school_biology", "high_school_chemistry", "high_school_computer_science",
    "high_school_european_history", "high_school_geography", "high_school_government_and_politics",
    "high_school_macroeconomics", "high_school_mathematics", "high_school_microeconomics", "high_school_physics",
    "high_school_psychology", "high_school_statistics", "high_school_us_history", "high_school_world_history",
    "human_aging", "human_sexuality", "international_law", "jurisprudence", "logical_fallacies", "machine_learning",
    "management", "marketing", "medical_genetics", "miscellaneous", "moral_disputes", "moral_scenarios", "nutrition",
    "philosophy", "prehistory", "professional_accounting", "professional_law", "professional_medicine",
    "professional_psychology", "public_relations", "security_studies", "sociology", "us_foreign_policy", "virology",
    "world_religions",
)
# fmt: on


@dataclass(frozen=True, kw_only=True, slots=True)
class Benchmark:
    """parts: task of the harness by the name of the part ("" where there is one part only).

    metric: (filter, metric) of the harness that says whether an answer is right; None for code, which is judged by
    running it. folders: of the harness's tasks to search; none for task files of ours. data: what `local_data` reads.
    """

    name: str
    parts: Mapping[str, str]
    metric: tuple[str, str] | None
    folders: tuple[str, ...] = field(default=())
    data: str


def _of_subjects(name: str, subjects: tuple[str, ...]) -> Benchmark:
    return Benchmark(
        name=name,
        parts={subject: f"mmlu_{subject}_generative" for subject in subjects},
        metric=("get_response", "exact_match"),
        folders=("mmlu/generative",),
        data="mmlu",
    )


def _code(name: str) -> Benchmark:
    return Benchmark(name=name, parts={"": f"expertshare_{name}"}, metric=None, data=name)


BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark(
            name="gsm8k",
            parts={"": "gsm8k"},
            metric=("flexible-extract", "exact_match"),
            folders=("gsm8k",),
            data="gsm8k",
        ),
        Benchmark(
            name="math500",
            parts={"": "minerva_math500"},
            metric=("none", "math_verify"),
            folders=("minerva_math",),
            data="math500",
        ),
        Benchmark(
            name="arc_c",
            parts={"": "arc_challenge_chat"},
            metric=("remove_whitespace", "exact_match"),
            folders=("arc",),
            data="arc_c",
        ),
        _of_subjects("mmlu", SUBJECTS),
        _of_subjects("mmlu_math", MATHS_SUBJECTS),
        _of_subjects("mmlu_hs_math", ("high_school_mathematics",)),
        _code("humaneval"),
        _code("mbpp"),
        _code("humaneval_pro"),
        _code("mbpp_pro"),
    )
}


Record = dict[str, Any]
MBPP_PROMPTS, MBPP_TEST = range(1, 11), range(11, 511)
"""Task ids of the examples and of the test split (google-research's README of MBPP)."""


def splits(data: str, part: str, folder: Path) -> Mapping[str, list[Record]]:
    """Records by split. Raises InputError for a file that is missing or not what its name says."""
    return _READERS[data](folder, part)


def _gsm8k(folder: Path, _: str) -> dict[str, list[Record]]:
    return {split: _jsonl(folder / "gsm8k" / f"{split}.jsonl", "question", "answer") for split in ("train", "test")}


def _math500(folder: Path, _: str) -> dict[str, list[Record]]:
    return {"test": _jsonl(folder / "math500" / "test.jsonl", "problem", "solution", "answer")}


def _arc(folder: Path, _: str) -> dict[str, list[Record]]:
    read = {
        split: _jsonl(folder / "arc_challenge" / f"{split}.jsonl", "question", "choices", "answer")
        for split in ("train", "test")
    }
    found = {split: [_arc_record(record) for record in records] for split, records in read.items()}
    return {**found, "validation": found["train"]}  # the harness names one, and asks nothing of it


def _arc_record(record: Record) -> Record:
    texts = list(record["choices"])
    labels = list("ABCDE")[: len(texts)]
    choices = {"text": texts, "label": labels}
    return {"question": record["question"], "choices": choices, "answerKey": labels[record["answer"]]}


def _mmlu(folder: Path, subject: str) -> dict[str, list[Record]]:
    return {
        split: [
            {
                "question": row["question"],
                "choices": [row[f"choice{number}"] for number in range(4)],
                "answer": int(row["answer"]),
                "subject": subject,
            }
            for row in _csv(folder / "mmlu" / split / f"{subject}_{split}.csv")
        ]
        for split in ("dev", "test")
    }


def _humaneval(folder: Path, _: str) -> dict[str, list[Record]]:
    return {"test": _jsonl(folder / "humaneval" / "HumanEval.jsonl", "prompt", "entry_point", "test")}


def _mbpp(folder: Path, _: str) -> dict[str, list[Record]]:
    columns = ("text", "code", "task_id", "test_list", "test_setup_code")
    read = _jsonl(folder / "mbpp" / "mbpp.jsonl", *columns)
    records = [{name: record[name] for name in columns} for record in read]
    return {
        "prompt": [record for record in records if record["task_id"] in MBPP_PROMPTS],
        "test": [record for record in records if record["task_id"] in MBPP_TEST],
    }


def _pro(name: str) -> Callable[[Path, str], dict[str, list[Record]]]:
    def read(folder: Path, _: str) -> dict[str, list[Record]]:
        path = folder / "codeeval_pro" / f"{name}.json"
        value = _parse(_text(path), f"{path}")
        if not isinstance(value, list):
            raise InputError(f"expected a list of problems in {path}, got {type(value).__name__}")
        return {"train": _checked(value, path, "raw_problem", "new_problem", "test_code")}

    return read


_READERS: dict[str, Callable[[Path, str], dict[str, list[Record]]]] = {
    "gsm8k": _gsm8k,
    "math500": _math500,
    "arc_c": _arc,
    "mmlu": _mmlu,
    "humaneval": _humaneval,
    "mbpp": _mbpp,
    "humaneval_pro": _pro("humaneval_pro"),
    "mbpp_pro": _pro("mbpp_pro"),
}


def _jsonl(path: Path, *columns: str) -> list[Record]:
    lines = [line for line in _text(path).split("\n") if line.strip()]
    return _checked([_parse(line, f"{path}, line {n}") for n, line in enumerate(lines, 1)], path, *columns)


def _csv(path: Path) -> list[dict[str, str]]:
    rows = list(csv.DictReader(_text(path).splitlines(keepends=True)))
    return _checked(rows, path, "question", "choice0", "choice1", "choice2", "choice3", "answer")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise InputError(
            f"expected the benchmark file {path}, got: {reason}; docs/evaluation.md says which files --data holds"
        ) from error


def _parse(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{place}: expected JSON, got an error at column {error.colno}: {error.msg}") from error


def _checked(records: Iterable[Any], path: Path, *columns: str) -> list[Any]:
    found = list(records)
    for number, record in enumerate(found, 1):
        missing = [name for name in columns if not isinstance(record, dict) or record.get(name) is None]
        if missing:
            raise InputError(f"{path}, record {number}: expected {', '.join(columns)}, got none of {missing[0]!r}")
    if not found:
        raise InputError(f"expected records in {path}, got none")
    return found
